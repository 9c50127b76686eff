"""Partitions: training samples divided among clients. Always a result or an error, never a hang or NaN."""

from __future__ import annotations

import difflib
import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd import scenario
from fedkd.data.partitioners import MANY, RULES, Rule, Task, ask_library
from fedkd.data.shards import Drawn, Holdings, Shards, Split, local_split
from fedkd.data.skew import Skew, label_counts, skew
from fedkd.errors import ScenarioError
from fedkd.seeds import Purpose, rng

__all__ = ["Partition", "Skew", "Split", "check", "label_counts", "local_split", "names", "partition", "skew"]

#: How often a seeded partitioner is asked, each time with another seed, before its result is repaired;
#: after so many errors it is not asked again.
ATTEMPTS, FAILURES = 10, 3
#: Streams of the draws besides the attempts, which count from 1.
_SPARE, _CHOICE, _REPAIR = 101, 102, 103


@dataclass(frozen=True)
class Partition:
    """Which samples each client has.

    Attributes
    ----------
    indices : Holdings
        Sample numbers of each client, int64, sorted, made when they are asked for; no sample is in two of them,
        unless the partitioner shares samples among clients.
    notes : tuple of str
        What did not go by the book: retries, repairs, samples that nobody has.
    """

    indices: Holdings
    notes: tuple[str, ...] = ()


def names() -> dict[str, str]:
    """Return the partitioners: name, and one line with the options each takes.

    Examples
    --------
    >>> names()["size"]
    'given numbers of samples; options: partition_sizes (required)'
    """
    described = {}
    for name, rule in RULES.items():
        options = [f"{option} (required)" for option in rule.required] + list(rule.optional)
        described[name] = rule.summary + (f"; options: {', '.join(options)}" if options else "")
    return described


def check(spec: scenario.Partition) -> None:
    """Refuse a partition section that no data could satisfy.

    Raises
    ------
    ScenarioError
        If the partitioner or an option is unknown, a required option is missing, or the shares for local
        validation and test leave nothing for training.
    """
    if spec.name not in RULES:
        close = difflib.get_close_matches(spec.name, RULES, n=1)
        hint = (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(RULES)}"
        raise ScenarioError(f"unknown partitioner {spec.name!r}", key="partition.name", hint=hint)
    rule = RULES[spec.name]
    known = (*rule.required, *rule.optional)
    elsewhere = {
        "num_partitions": "partition.clients",
        "seed": "run.seed",
        "min_partition_size": "partition.min_samples",
    }
    for option in spec.options:
        key = f"partition.options.{option}"
        if option in elsewhere:
            raise ScenarioError("is set elsewhere", key=key, hint=f"use {elsewhere[option]}")
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = (f"did you mean {close[0]!r}? " if close else "") + f"options: {', '.join(known) or 'none'}"
            raise ScenarioError(f"{spec.name} has no such option", key=key, hint=hint)
    for option in rule.required:
        if option not in spec.options:
            raise ScenarioError(
                f"{spec.name} needs this option", key=f"partition.options.{option}", hint=names()[spec.name]
            )
    if rule.skewed:
        _alpha(spec)
    column = spec.options.get("partition_by", "label")
    if column not in ("label", "owner"):
        key = "partition.options.partition_by"
        raise ScenarioError(f"{column!r} is no column", key=key, hint="label or owner")
    sizes = spec.options.get("partition_sizes")
    if sizes is not None:
        key = "partition.options.partition_sizes"
        if not isinstance(sizes, list) or any(type(size) is not int or size < 0 for size in sizes):
            raise ScenarioError(f"must be a list of whole numbers >= 0, is {sizes!r}", key=key)
        if len(sizes) != spec.clients:
            raise ScenarioError(f"has {len(sizes)} sizes for {spec.clients} clients", key=key)
    if rule.shared:
        _check_shared(spec)
    if spec.validation + spec.test >= 1:
        raise ScenarioError(
            f"validation {spec.validation} and test {spec.test} leave nothing for training",
            key="partition.validation",
            hint="their sum must be below 1",
        )


def _check_shared(spec: scenario.Partition) -> None:
    """Refuse what clients that draw their samples with replacement cannot have."""
    key, size = "partition.options.samples_per_client", spec.options["samples_per_client"]
    if type(size) is not int or size < 1:
        raise ScenarioError(f"must be a whole number >= 1, is {size!r}", key=key)
    if spec.min_samples > size:
        raise ScenarioError(f"{spec.min_samples} is more than the {size} that every client has", key=key)
    for name in ("validation", "test"):
        if getattr(spec, name):
            raise ScenarioError(
                f"{spec.name} draws samples with replacement: some would be in both parts of a client's data",
                key=f"partition.{name}",
                hint="set it to 0; the data's own test samples are nobody's",
            )


def _alpha(spec: scenario.Partition) -> Any:
    """Return the concentration as the library takes it: a number or a list of numbers, all > 0."""
    if "alpha" not in spec.options:
        return 0.5 if spec.alpha is None else float(spec.alpha)
    key, value = "partition.options.alpha", spec.options["alpha"]
    if spec.alpha is not None:
        raise ScenarioError("is given twice", key=key, hint="drop it, or drop partition.alpha")
    values: list[Any] = value if isinstance(value, list) and value else [value]
    if any(type(v) not in (int, float) or not 0 < v < float("inf") for v in values):
        raise ScenarioError(f"must be a number > 0 or a list of such, is {value!r}", key=key)
    return [float(v) for v in value] if isinstance(value, list) else float(value)


def partition(
    labels: np.ndarray,
    spec: scenario.Partition,
    *,
    num_classes: int,
    seed: int,
    natural_ids: np.ndarray | None = None,
) -> Partition:
    """Divide samples among clients.

    Parameters
    ----------
    labels : np.ndarray
        Label of each sample, integers [N] in 0..num_classes-1.
    spec : scenario.Partition
        Partitioner, clients and parameters.
    num_classes : int
        Number of classes.
    seed : int
        The run's seed.
    natural_ids : np.ndarray or None
        Owner of each sample, int64 [N].

    Returns
    -------
    Partition
        The sample numbers of each client, the same for the same arguments.

    Raises
    ------
    ScenarioError
        If there are more clients than samples, `min_samples` cannot be met, or the partitioner cannot divide
        these data; the message gives the library's reason.

    Notes
    -----
    Samples are shuffled first, since several partitioners cut them in the order given. A partitioner that
    fails, or a Dirichlet draw that leaves a client with fewer than `min_samples`, is tried again with another
    seed, at most `ATTEMPTS` times. If only errors came, the same kind of partition is drawn without the
    library where possible. Clients with too few samples are then filled with random samples of the largest
    clients. Each of this is noted.

    More than `partitioners.MANY` clients are drawn without the library from the start where possible.
    """
    check(spec)
    labels = np.asarray(labels)
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels must be in 0..{num_classes - 1}")
    rule = RULES[spec.name]
    if rule.shared:
        return Partition(Drawn(labels, spec.clients, spec.options["samples_per_client"], _alpha(spec), seed))
    if spec.clients > len(labels):
        raise ScenarioError(
            f"{spec.clients} clients are more than the {len(labels)} training samples to divide",
            key="partition.clients",
            hint='take fewer clients, more training samples, or a smaller proxy set; with name = "resampled" '
            "clients may share samples",
        )
    if spec.clients * spec.min_samples > len(labels):
        raise ScenarioError(
            f"{spec.clients} clients cannot have {spec.min_samples} samples each: there are {len(labels)}",
            key="partition.min_samples",
            hint=f"at most {len(labels) // spec.clients}",
        )
    sizes = spec.options.get("partition_sizes", [])
    if sum(sizes) > len(labels):
        raise ScenarioError(
            f"asks for {sum(sizes)} samples, but there are {len(labels)}",
            key="partition.options.partition_sizes",
        )
    owners_wanted = rule.natural or spec.options.get("partition_by") == "owner"
    if owners_wanted and natural_ids is None:
        raise ScenarioError(
            f"{spec.name} needs to know who owns each sample, which these data do not say",
            key="partition.name",
            hint="npz: natural_ids; hub: data.options.owner_column; synthetic: data.options.owners",
        )
    order = rng(seed, Purpose.PARTITION).permutation(len(labels))
    task = Task(
        labels=np.unique(labels[order], return_inverse=True)[1].astype(np.int64),
        owners=None if natural_ids is None else np.asarray(natural_ids)[order],
        clients=spec.clients,
        alpha=_alpha(spec) if rule.skewed else None,
        min_samples=spec.min_samples,
        options=spec.options,
    )
    notes: list[str] = []
    if spec.alpha is not None and not rule.skewed:
        notes.append(f"partition.alpha has no effect on {spec.name}")
    shards = _draw(rule, task, spec.name, seed, notes)
    if rule.natural:
        shards = _choose(shards, spec, seed, notes)
    unused = len(labels) - len(shards.samples)
    if unused:
        notes.append(f"{spec.name} gives {unused} of {len(labels)} samples to nobody")
    shards = _filled(shards, spec, seed, notes)
    return Partition(shards.renamed(order), tuple(notes))


def _draw(rule: Rule, task: Task, name: str, seed: int, notes: list[str]) -> Shards:
    """Return shards from the library, or drawn like it where it gives none.

    A draw that leaves a client short of `min_samples` is tried again where luck decides the sizes; the last
    resort is the draw that lacks the fewest samples, to be repaired.
    """
    failure: Exception | None = None
    best, least = None, 0
    attempts = _attempts(task) if rule.seeded else 1
    for attempt in range(1, attempts + 1):
        try:
            shards = _asked(rule, task, seed, attempt)
        except ScenarioError:
            raise
        except Exception as error:  # the library raises errors of many types
            failure = error
            notes.append(f"{rule.library}, attempt {attempt}: {_brief(error)}")
            if len(notes) >= FAILURES:
                break
            continue
        lacking = int(np.maximum(task.min_samples - shards.sizes, 0).sum())
        if not lacking or not rule.lucky:
            if best is not None:
                notes.append(f"{name}: draw {attempt} is the first in which all have {task.min_samples} samples")
            return shards
        if best is None or lacking < least:
            best, least = shards, lacking
    if best is not None:
        notes.append(f"{name}: in none of {attempts} draws did all clients have {task.min_samples} samples")
        return best
    if rule.spare is None:
        raise ScenarioError(
            f"{name} cannot divide these data: {_brief(failure)}",
            key="partition.options" if task.options else "partition.name",
            hint=f"{name}: {names()[name]}",
        ) from failure
    notes.append(f"{name} was drawn without {rule.library}")
    try:
        return rule.spare(task, rng(seed, Purpose.PARTITION, round=_SPARE))
    except ValueError as error:  # such as a list of alphas of the wrong length
        raise ScenarioError(f"{name} cannot divide these data: {_brief(error)}", key="partition.options") from error


def _attempts(task: Task) -> int:
    """Return how many draws are worth trying: fewer of large federations, where each takes long."""
    work = task.clients * (int(task.labels.max()) + 1)
    return int(np.clip(200_000 // work, 1, ATTEMPTS))


def _brief(error: Exception | None) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _asked(rule: Rule, task: Task, seed: int, attempt: int) -> Shards:
    """Return the library's shards, checked: any number of them, disjoint, of samples that exist."""
    stream = rng(seed, Purpose.PARTITION, round=attempt)
    if rule.spare is not None and task.clients > MANY:
        return rule.spare(task, stream)
    shards = Shards.of(ask_library(rule, task, int(stream.integers(2**31))))
    every = shards.samples
    inside = every.size == 0 or (every.min() >= 0 and every.max() < len(task.labels))
    if not inside or len(np.unique(every)) != len(every):
        raise ValueError("its shards overlap or name samples that do not exist")
    return shards


def _choose(shards: Shards, spec: scenario.Partition, seed: int, notes: list[str]) -> Shards:
    """Return as many of the natural shards as there are clients, chosen at random."""
    if len(shards) < spec.clients:
        raise ScenarioError(
            f"{spec.clients} clients are more than the {len(shards)} that {spec.name} finds in the data",
            key="partition.clients",
            hint=f"set it to {len(shards)} or less",
        )
    if len(shards) == spec.clients:
        return shards
    chosen = np.sort(rng(seed, Purpose.PARTITION, round=_CHOICE).permutation(len(shards))[: spec.clients])
    notes.append(f"{spec.clients} of {len(shards)} natural clients were chosen at random")
    return Shards.of(shards[k] for k in chosen)


def _filled(shards: Shards, spec: scenario.Partition, seed: int, notes: list[str]) -> Shards:
    """Return shards in which those with fewer than `min_samples` got random samples of the largest ones."""
    sizes = shards.sizes
    short = np.flatnonzero(sizes < spec.min_samples).tolist()
    if not short:
        return shards
    if len(shards.samples) < spec.min_samples * len(shards):
        raise ScenarioError(
            f"{spec.name} gives out {len(shards.samples)} samples: too few for {len(shards)} clients "
            f"with {spec.min_samples} each",
            key="partition.min_samples",
        )
    stream = rng(seed, Purpose.PARTITION, round=_REPAIR)
    moved = int((spec.min_samples - sizes[short]).sum())
    # A sorted list is a heap, and nobody gives before the `moved` largest have given.
    largest = [(-int(sizes[k]), k) for k in np.argsort(-sizes, kind="stable")[:moved].tolist()]
    stacks: dict[int, list[int]] = {}
    changed: dict[int, list[int]] = {}
    for k in short:
        changed[k] = shards[k].tolist()
        for _ in range(spec.min_samples - len(changed[k])):
            size, donor = heapq.heappop(largest)
            if donor not in stacks:
                stacks[donor] = stream.permutation(shards[donor]).tolist()
            changed[k].append(stacks[donor].pop())
            heapq.heappush(largest, (size + 1, donor))
    changed |= stacks
    notes.append(
        f"{moved} samples were moved from the largest clients ({len(stacks)}) to those "
        f"with fewer than {spec.min_samples} ({len(short)})"
    )
    owners, clients = shards.owners, len(shards)
    rest = ~np.isin(owners, list(changed))
    samples = [shards.samples[rest], *(np.array(mine, dtype=np.int64) for mine in changed.values())]
    owners = [owners[rest], *(np.full(len(mine), k) for k, mine in changed.items())]
    return Shards.grouped(np.concatenate(samples), np.concatenate(owners), clients)
