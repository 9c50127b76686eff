"""The federation of a scenario: data, who has which samples, which model, and what the server may use."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from fedkd import scenario
from fedkd.data import cache
from fedkd.data.batches import ArrayData
from fedkd.data.partition import Partition, check, partition
from fedkd.data.partitioners import MANY, RULES
from fedkd.data.poison import draw_attackers, flipped
from fedkd.data.proxy import ProxySet, build_proxy, cut
from fedkd.data.shards import Shards, Splits, position
from fedkd.data.skew import Skew, label_counts, skew
from fedkd.data.sources import Dataset, load
from fedkd.errors import ScenarioError
from fedkd.seeds import Purpose, rng

COUNTED = 10_000
"""Clients whose labels are counted at most, to tell how skewed a federation is."""

_KEPT = 4  # federations kept in a process: a sweep returns to the same few
_federations: OrderedDict[str, Federation] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class Federation:
    """The resolved clients of a scenario.

    What belongs to one client is made when it is asked for, so that clients who never take part cost next to nothing.

    Attributes
    ----------
    dataset : Dataset
        The task's data.
    train, test : ArrayData
        Training and test samples; ids in `shards` and `server_labels` count training samples.
    shards : sequence of Split
        Each client's sample ids, by partition id.
    archs : Architectures
        Each client's model, by partition id.
    proxy : ProxySet or None
        Samples for distillation; held-out ones belong to no client.
    server_labels : np.ndarray
        Ids of labelled training samples that only the server has, int64, maybe empty.
    notes : tuple of str
        What the partition had to retry or repair.
    attackers : np.ndarray
        Partition ids of the clients that attack, int64, ascending.
    poisoned : ArrayData or None
        Training samples with wrong labels, on which attackers train where they flip labels.
    """

    dataset: Dataset = field(repr=False)
    train: ArrayData = field(repr=False)
    test: ArrayData = field(repr=False)
    shards: Splits = field(repr=False)
    archs: Architectures = field(repr=False)
    proxy: ProxySet | None
    server_labels: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()
    attackers: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0, dtype=np.int64))
    poisoned: ArrayData | None = field(repr=False, default=None)

    def data_of(self, client: int) -> ArrayData:
        """Return the training samples as a client sees them: with wrong labels, if it flips them."""
        return self.train if self.poisoned is None or client not in self.attackers else self.poisoned

    @property
    def num_clients(self) -> int:
        """Number of clients, those without samples included."""
        return len(self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.dataset.num_classes

    @cached_property
    def sizes(self) -> np.ndarray:
        """Training samples of each client, int64 [clients]."""
        return self.shards.sizes

    @cached_property
    def eligible(self) -> np.ndarray:
        """Partition ids of the clients with at least one training sample, int64, ascending."""
        return np.flatnonzero(self.sizes).astype(np.int64, copy=False)

    @property
    def counted(self) -> range:
        """Partition ids of the clients whose labels are counted: all, or every n-th of more than `COUNTED`."""
        return range(0, self.num_clients, -(-self.num_clients // COUNTED))

    @cached_property
    def counts(self) -> np.ndarray:
        """Training samples of each of the `counted` clients and each class, int64 [counted, classes]."""
        labels = self.dataset.y_train
        return label_counts(labels, [self.shards[k].train for k in self.counted], self.num_classes)

    @cached_property
    def skew(self) -> Skew:
        """How far label distributions of the `counted` clients are from the whole."""
        return skew(self.counts)


class Architectures(Sequence[str]):
    """Each client's model, as a few names and at most one small number a client.

    Parameters
    ----------
    names : sequence of str
        The models.
    clients : int
        Number of clients.
    codes : np.ndarray, optional
        Which of the names each client has, integers [clients]; by default they are dealt out in turn.

    Examples
    --------
    >>> dealt = Architectures(("cnn", "mlp"), 5)
    >>> dealt[2], list(dealt), dealt.names
    ('cnn', ['cnn', 'mlp', 'cnn', 'mlp', 'cnn'], ('cnn', 'mlp'))
    """

    def __init__(self, names: Sequence[str], clients: int, codes: np.ndarray | None = None) -> None:
        self._names, self._clients, self._codes = tuple(names), clients, codes

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: Any) -> str:
        k = position(client, self._clients)
        return self._names[k % len(self._names) if self._codes is None else self._codes[k]]

    def __iter__(self) -> Iterator[str]:
        if self._codes is None:
            return itertools.islice(itertools.cycle(self._names), self._clients)
        return (self._names[code] for code in self._codes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The models that clients have, each once, in the order in which they come first."""
        if self._codes is None:
            return tuple(dict.fromkeys(self._names[: self._clients]))
        codes, first = np.unique(self._codes, return_index=True)
        return tuple(dict.fromkeys(self._names[code] for code in codes[np.argsort(first)]))


def build_federation(scenario: scenario.Scenario) -> Federation:
    """Return the federation of a scenario, the same for the same data, partition, proxy, models and seed.

    Training data are cut to ``train_samples``; held-out proxy samples and the server's labelled samples are
    cut from them at random; the clients divide the rest. The last few federations are kept in the process.

    Parameters
    ----------
    scenario : Scenario
        The scenario.

    Raises
    ------
    ScenarioError
        If the scenario asks for something impossible, such as more clients than samples.
    DataError
        If data are not there or not as they should be.
    """
    parts: dict[str, Any] = dict.fromkeys(("data", "partition", "proxy", "models", "attacks"), True)
    sections = scenario.model_copy(update={"name": "", "label": "", "description": ""}).model_dump_json(
        include=parts | {"run": {"seed"}}
    )
    surroundings = [os.environ.get("FEDKD_DATA", ""), str(cache.cache_folder()), os.getcwd()]
    key = cache.digest(sections, surroundings)
    with _lock:
        if key not in _federations:
            _federations[key] = _build(scenario)
        _federations.move_to_end(key)
        while len(_federations) > _KEPT:
            _federations.popitem(last=False)
        return _federations[key]


def _build(setting: scenario.Scenario) -> Federation:
    spec, seed = setting.partition, setting.run.seed
    check(spec)  # cheap, so before any data are read
    dataset = load(setting.data)
    if setting.data.augment != "none" and dataset.kind != "image":
        raise ScenarioError(
            f"{setting.data.augment!r} is for images, {setting.data.source} holds {dataset.kind} samples",
            key="data.augment",
            hint="none",
        )
    train, test = (
        ArrayData(x, y, kind=dataset.kind, mean=dataset.mean, std=dataset.std)
        for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test))
    )
    held_out, server_labels, rest = cut(setting.proxy, len(train), seed=seed)
    divided = _partition_once(dataset, rest, spec, seed)
    shards = Splits(divided.indices, rest, spec.validation, spec.test, seed)
    attacks, poison = setting.attacks, {}
    if attacks.kind != "none":
        poison["attackers"] = draw_attackers(attacks, shards.sizes, seed)
    if attacks.kind == "label-flip":
        poison["poisoned"] = train.relabelled(flipped(dataset.y_train, attacks.flip, dataset.num_classes))
    return Federation(
        dataset=dataset,
        train=train,
        test=test,
        shards=shards,
        archs=assign_architectures(setting.models.student, spec.clients, seed),
        proxy=build_proxy(setting.proxy, setting.data, dataset, train, held_out, seed=seed),
        server_labels=server_labels,
        notes=(*_absent(setting.data, dataset), *divided.notes, *_uncounted(spec.clients)),
        **poison,
    )


def _absent(data: scenario.Data, dataset: Dataset) -> list[str]:
    """Return a note for every cut that leaves out classes: its file may be in the order of the classes."""
    return [
        f"data.{key} = {len(y)} keeps the first samples, which hold {present} of {dataset.num_classes} classes"
        for key, cut_to, y in (
            ("train_samples", data.train_samples, dataset.y_train),
            ("test_samples", data.test_samples, dataset.y_test),
        )
        if cut_to and (present := len(np.unique(y))) < dataset.num_classes
    ]


def _uncounted(clients: int) -> list[str]:
    """Return a note where the labels of only some clients are counted."""
    step = -(-clients // COUNTED)
    return [f"class counts and skew are those of every {step}th of {clients} clients"] if step > 1 else []


def _partition_once(dataset: Dataset, rest: np.ndarray, spec: scenario.Partition, seed: int) -> Partition:
    """Return the partition, kept on disk: workers then need not import the library, which takes seconds."""
    labels = dataset.y_train[rest]
    owners = None if dataset.natural_ids is None else dataset.natural_ids[rest]
    divide = partial(partition, labels, spec, num_classes=dataset.num_classes, seed=seed, natural_ids=owners)
    if RULES[spec.name].shared:  # drawn in no time
        return divide()

    def make() -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        made = divide()
        assert isinstance(made.indices, Shards)
        return {"samples": made.indices.samples, "ends": made.indices.ends}, {"notes": list(made.notes)}

    key = [
        importlib.metadata.version("flwr-datasets"),
        np.__version__,
        MANY,
        spec.model_dump(mode="json", exclude={"validation", "test"}),
        seed,
        cache.digest(labels, *(() if owners is None else (owners,))),
    ]
    arrays, facts = cache.fetch(f"partition-{spec.name}", key, make)
    return Partition(Shards(arrays["samples"], arrays["ends"]), tuple(facts["notes"]))


def assign_architectures(student: str | Sequence[str] | Mapping[str, float], clients: int, seed: int) -> Architectures:
    """Return each client's model.

    Parameters
    ----------
    student : str, list of str or dict of str to float
        One model for all; a list that is dealt out in turn; or shares, whose counts are rounded by largest
        remainder and dealt out at random.
    clients : int
        Number of clients.
    seed : int
        The run's seed.

    Raises
    ------
    ScenarioError
        If it is empty or a share is not a number > 0.

    Examples
    --------
    >>> list(assign_architectures(["a", "b"], 3, seed=0))
    ['a', 'b', 'a']
    >>> sorted(assign_architectures({"a": 0.5, "b": 0.25, "c": 0.25}, 6, seed=0))
    ['a', 'a', 'a', 'b', 'b', 'c']
    """
    if isinstance(student, str):
        student = [student]
    if not student or not all(student):
        raise ScenarioError("names no model", key="models.student", hint='such as "cnn"')
    if not isinstance(student, Mapping):
        return Architectures(student, clients)
    shares = np.array(list(student.values()), dtype=float)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ScenarioError(f"shares must be numbers > 0, are {dict(student)}", key="models.student")
    exact = shares / shares.sum() * clients
    counts = np.floor(exact + 1e-9).astype(int)
    # Stable: of equal remainders the first named gets the client.
    largest = np.argsort(-(exact - counts).round(9), kind="stable")[: clients - counts.sum()]
    counts[largest] += 1
    dealt = np.repeat(np.arange(len(student), dtype=np.min_scalar_type(len(student))), counts)
    return Architectures(tuple(student), clients, dealt[rng(seed, Purpose.ARCHITECTURE).permutation(clients)])
