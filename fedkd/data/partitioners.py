"""The partitioners by name: parameters, how those of flwr-datasets are called, what replaces a failed one.

The library is imported when it is first needed: that takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedkd.data.shards import Shards
from fedkd.errors import ScenarioError
from fedkd.plugins import load_object

MANY = 10_000
"""With more clients than this, a partition that can be drawn without the library is: its loops over clients and
classes would take minutes."""


@dataclass(frozen=True)
class Task:
    """One partition to be made: the shuffled samples' labels and owners, and the parameters."""

    labels: np.ndarray  # int64 [N], classes that occur, numbered from 0 without gaps
    owners: np.ndarray | None
    clients: int
    alpha: Any  # a number, or a list as the partitioner wants it
    min_samples: int
    options: dict[str, Any] = field(default_factory=dict)


Draw = Callable[[Task, np.random.Generator], Shards]


@dataclass(frozen=True)
class Rule:
    """How one partitioner is called.

    Attributes
    ----------
    library : str
        Class in ``flwr_datasets.partitioner``; empty for one that is ours alone.
    summary : str
        One line for people.
    passes : tuple of str
        Arguments that come from elsewhere in the scenario.
    optional, required : tuple of str
        Parameters that a scenario may and must set in ``partition.options``.
    spare : Draw or None
        Draws a partition of the same kind where the library gives none, or has too many clients.
    """

    library: str
    summary: str
    passes: tuple[str, ...] = ("num_partitions",)
    optional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    spare: Draw | None = None

    @property
    def seeded(self) -> bool:
        """Whether another seed can give another result."""
        return "seed" in self.passes

    @property
    def skewed(self) -> bool:
        """Whether it has a concentration, ``partition.alpha``."""
        return "alpha" in self.passes

    @property
    def lucky(self) -> bool:
        """Whether chance decides how many samples a client has, so that another draw may do better."""
        return "min_partition_size" in self.passes

    @property
    def shared(self) -> bool:
        """Whether several clients may have a sample, so that there may be more clients than samples."""
        return not self.library

    @property
    def natural(self) -> bool:
        """Whether the data, not the scenario, say how many shards there are."""
        return "num_partitions" not in self.passes and "partition_sizes" not in (*self.passes, *self.required)


def _iid(task: Task, rng: np.random.Generator) -> Shards:
    """Cut the samples, which are shuffled, into equal parts."""
    return Shards(np.arange(len(task.labels)), np.cumsum(even_sizes(len(task.labels), task.clients)))


def _dirichlet(task: Task, rng: np.random.Generator) -> Shards:
    """Divide each class by its own Dirichlet proportions, any alpha > 0."""
    alpha = np.broadcast_to(np.asarray(task.alpha, dtype=float), task.clients)
    held = np.zeros(task.clients, dtype=np.int64)
    samples, owners = [], []
    for label in np.unique(task.labels):
        members = np.flatnonzero(task.labels == label)
        share = rng.dirichlet(alpha)
        if task.options.get("self_balancing"):  # who has more than the average gets no more
            share = np.where(held > len(task.labels) / task.clients, 0.0, share)
        if not (np.isfinite(share).all() and share.sum() > 0):  # underflow: the limit alpha -> 0 is one client
            share = (np.arange(task.clients) == rng.integers(task.clients)).astype(float)
        cuts = np.minimum((np.cumsum(share / share.sum()) * len(members)).astype(int), len(members))
        cuts[-1] = len(members)
        counts = np.diff(cuts, prepend=0)
        held += counts
        samples.append(members)
        owners.append(np.repeat(np.arange(task.clients), counts))
    return Shards.grouped(np.concatenate(samples), np.concatenate(owners), task.clients)


def _inner_dirichlet(task: Task, rng: np.random.Generator) -> Shards:
    """Fill clients of given sizes from their own class mixtures; where classes run out, from what is left."""
    sizes = np.asarray(task.options.get("partition_sizes") or even_sizes(len(task.labels), task.clients))
    classes = int(task.labels.max()) + 1
    alpha = np.broadcast_to(np.asarray(task.alpha, dtype=float), classes)
    pools = [rng.permutation(np.flatnonzero(task.labels == c)).tolist() for c in range(classes)]
    shards = [np.empty(0, dtype=np.int64)] * len(sizes)
    for client in rng.permutation(len(sizes)):
        share = rng.dirichlet(alpha)
        if not np.isfinite(share).all():
            share = np.eye(classes)[rng.integers(classes)]
        mine: list[int] = []
        while len(mine) < sizes[client]:
            left = np.array([len(pool) for pool in pools])
            chance = share * (left > 0)
            # Every class this client wants is used up: the rest comes from the others as they are left.
            chance = chance / chance.sum() if chance.sum() > 0 else left / left.sum()
            for c, count in enumerate(np.minimum(rng.multinomial(sizes[client] - len(mine), chance), left)):
                mine += [pools[c].pop() for _ in range(count)]
        shards[client] = np.array(mine, dtype=np.int64)
    return Shards.of(shards)


def _in_proportion(weigh: Callable[[np.ndarray], np.ndarray]) -> Draw:
    """Return a draw with sizes in proportion to a weight of the client's number (1..n); they may be 0."""

    def draw(task: Task, rng: np.random.Generator) -> Shards:
        weight = np.asarray(weigh(np.arange(1, task.clients + 1, dtype=float)), dtype=float)
        return _sized(weight, len(task.labels))

    return draw


def _by_function(task: Task, rng: np.random.Generator) -> Shards:
    weigh = _function(task.options["partition_id_to_size_fn"])
    return _sized(np.asarray(weigh(np.arange(1, task.clients + 1, dtype=float)), dtype=float), len(task.labels))


def _sized(weight: np.ndarray, samples: int) -> Shards:
    if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.sum() > 0):
        raise ValueError(f"sizes must be finite, not negative and not all 0; got {weight.tolist()[:5]}...")
    sizes = (weight / weight.sum() * samples).astype(int)
    sizes[-1] += samples - sizes.sum()  # what rounding left, to the last client as the library does
    return Shards(np.arange(samples), np.cumsum(sizes))


_LABEL = ("num_partitions", "partition_by", "seed")

RULES: dict[str, Rule] = {
    "iid": Rule("IidPartitioner", "equal random shares", spare=_iid),
    "dirichlet": Rule(
        "DirichletPartitioner",
        "each class divided by Dirichlet(alpha) proportions",
        ("num_partitions", "partition_by", "seed", "alpha", "min_partition_size"),
        ("alpha", "self_balancing"),
        spare=_dirichlet,
    ),
    "inner-dirichlet": Rule(
        "InnerDirichletPartitioner",
        "clients of given sizes, each with its own Dirichlet(alpha) class mixture",
        ("partition_sizes", "partition_by", "seed", "alpha"),
        ("alpha", "partition_sizes"),
        spare=_inner_dirichlet,
    ),
    "pathological": Rule(
        "PathologicalPartitioner",
        "a fixed number of classes per client",
        _LABEL,
        ("class_assignment_mode",),
        ("num_classes_per_partition",),
    ),
    "shard": Rule(
        "ShardPartitioner",
        "samples sorted by label, cut into shards that are dealt out",
        _LABEL,
        ("num_shards_per_partition", "shard_size", "keep_incomplete_shard"),
    ),
    "size": Rule("SizePartitioner", "given numbers of samples", (), (), ("partition_sizes",)),
    "linear": Rule("LinearPartitioner", "sizes grow with the client's number", spare=_in_proportion(lambda n: n)),
    "square": Rule("SquarePartitioner", "sizes grow with its square", spare=_in_proportion(np.square)),
    "exponential": Rule(
        "ExponentialPartitioner",
        "sizes grow with its exponential",
        # Divided by the largest: exp(n) itself overflows at 710 clients.
        spare=_in_proportion(lambda n: np.exp(n - n.max())),
    ),
    "id-to-size": Rule(
        "IdToSizeFncPartitioner",
        "sizes in proportion to a function of the client's number, named module:attribute",
        required=("partition_id_to_size_fn",),
        spare=_by_function,
    ),
    "distribution": Rule(
        "DistributionPartitioner",
        "given (or log-normal) amounts of a fixed number of neighbouring classes per client",
        _LABEL,
        ("distribution_array", "sigma", "preassigned_num_samples_per_label", "rescale"),
        ("num_unique_labels_per_partition",),
    ),
    "natural-id": Rule("NaturalIdPartitioner", "one client per owner that the data name", ("partition_by",)),
    "grouped-natural-id": Rule(
        "GroupedNaturalIdPartitioner",
        "one client per group of owners",
        ("partition_by",),
        ("mode", "sort_unique_ids"),
        ("group_size",),
    ),
    "continuous": Rule(
        "ContinuousPartitioner",
        "samples sorted by label (or owner) blended with noise, cut into equal parts",
        _LABEL,
        ("partition_by",),
        ("strictness",),
    ),
    "resampled": Rule(
        "",
        "any number of clients that draw samples with replacement, each from its own Dirichlet(alpha) class mixture",
        ("num_partitions", "alpha"),
        ("alpha",),
        ("samples_per_client",),
    ),
}


def even_sizes(samples: int, clients: int) -> list[int]:
    """Return `clients` sizes that differ by one at most.

    Examples
    --------
    >>> even_sizes(8, 3)
    [3, 3, 2]
    """
    return [samples // clients + (k < samples % clients) for k in range(clients)]


def ask_library(rule: Rule, task: Task, seed: int) -> list[np.ndarray]:
    """Return the shards of the flwr-datasets partitioner.

    Raises
    ------
    Exception
        Whatever the library raises.
    """
    import flwr_datasets.partitioner as library

    from fedkd.data.rows import Rows

    passed = {
        "num_partitions": task.clients,
        "partition_by": "owner" if rule.natural else "label",
        "seed": seed,
        "alpha": task.alpha,
        "min_partition_size": 0,  # the library would try again by itself, 11 times, and then give up
        "partition_sizes": even_sizes(len(task.labels), task.clients),
    }
    arguments = {key: passed[key] for key in rule.passes} | _options(rule, task, seed)
    columns = {"label": task.labels} | ({} if task.owners is None else {"owner": task.owners})
    # The library warns about what is noted here anyway, divides by zero, and shows a progress bar.
    quiet = contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), np.errstate(all="ignore"), quiet:
        warnings.simplefilter("ignore")
        partitioner = getattr(library, rule.library)(**arguments)
        partitioner.dataset = Rows.of(columns)
        count = partitioner.num_partitions if rule.natural else task.clients
        return [np.asarray(partitioner.load_partition(k).rows, dtype=np.int64) for k in range(count)]


def _options(rule: Rule, task: Task, seed: int) -> dict[str, Any]:
    """Return the scenario's options as the library wants them."""
    options = dict(task.options)
    options.pop("alpha", None)  # part of the task
    if rule.library == "IdToSizeFncPartitioner":
        options["partition_id_to_size_fn"] = _function(options["partition_id_to_size_fn"])
    if rule.library == "DistributionPartitioner":
        options.setdefault("preassigned_num_samples_per_label", 0)
        sigma = options.pop("sigma", 2.0)
        if "distribution_array" in options:
            options["distribution_array"] = np.asarray(options["distribution_array"])
        else:
            # Li et al., Federated Optimization in Heterogeneous Networks, 2020: log-normal amounts.
            classes = int(task.labels.max()) + 1
            columns = options["num_unique_labels_per_partition"] * task.clients // classes
            draws = np.random.default_rng(seed).lognormal(0.0, sigma, (classes, max(columns, 1)))
            options["distribution_array"] = draws
    return options


def _function(name: Any) -> Callable:
    found = load_object(str(name), key="partition.options.partition_id_to_size_fn")
    if not callable(found):
        raise ScenarioError(f"{name!r} is no function", key="partition.options.partition_id_to_size_fn")
    return found
