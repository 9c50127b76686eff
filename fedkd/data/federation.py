"""The federation of a scenario: data, who has which samples, which model, and what the server may use."""

from __future__ import annotations

import importlib.metadata
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedkd import scenario
from fedkd.data import cache
from fedkd.data.batches import ArrayData
from fedkd.data.partition import Partition, check, partition
from fedkd.data.proxy import ProxySet, build_proxy, cut
from fedkd.data.skew import Skew, Split, label_counts, local_split, skew
from fedkd.data.sources import Dataset, load
from fedkd.errors import ScenarioError
from fedkd.seeds import Purpose, rng

_KEPT = 4  # federations kept in a process: a sweep returns to the same few
_federations: OrderedDict[str, Federation] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class Federation:
    """The resolved clients of a scenario.

    Attributes
    ----------
    dataset : Dataset
        The task's data.
    train, test : ArrayData
        Training and test samples; ids in `shards` and `server_labels` count training samples.
    shards : tuple of Split
        Each client's sample ids, by partition id.
    archs : tuple of str
        Each client's model.
    counts : np.ndarray
        Training samples of each client and class, int64 [clients, classes].
    skew : Skew
        How far clients' label distributions are from the whole.
    proxy : ProxySet or None
        Samples for distillation; held-out ones belong to no client.
    server_labels : np.ndarray
        Ids of labelled training samples that only the server has, int64, maybe empty.
    notes : tuple of str
        What the partition had to retry or repair.
    """

    dataset: Dataset = field(repr=False)
    train: ArrayData = field(repr=False)
    test: ArrayData = field(repr=False)
    shards: tuple[Split, ...] = field(repr=False)
    archs: tuple[str, ...] = field(repr=False)
    counts: np.ndarray = field(repr=False)
    skew: Skew
    proxy: ProxySet | None
    server_labels: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def num_clients(self) -> int:
        """Number of clients, those without samples included."""
        return len(self.shards)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.dataset.num_classes

    @property
    def sizes(self) -> np.ndarray:
        """Training samples of each client, int64 [clients]."""
        return np.array([len(shard.train) for shard in self.shards], dtype=np.int64)

    @property
    def eligible(self) -> np.ndarray:
        """Partition ids of the clients with at least one training sample, int64."""
        return np.flatnonzero(self.sizes).astype(np.int64)


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
    sections = scenario.model_copy(update={"name": "", "label": "", "description": ""}).model_dump_json(
        include={"data": True, "partition": True, "proxy": True, "models": True, "run": {"seed"}}
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
    archs = assign_architectures(setting.models.student, spec.clients, seed)  # of no more clients than samples
    shards = tuple(
        local_split(rest[mine], spec.validation, spec.test, rng(seed, Purpose.LOCAL_SPLIT, partition=k))
        for k, mine in enumerate(divided.indices)
    )
    counts = label_counts(dataset.y_train, [shard.train for shard in shards], dataset.num_classes)
    return Federation(
        dataset=dataset,
        train=train,
        test=test,
        shards=shards,
        archs=archs,
        counts=counts,
        skew=skew(counts),
        proxy=build_proxy(setting.proxy, setting.data, dataset, train, held_out, seed=seed),
        server_labels=server_labels,
        notes=(*_absent(setting.data, dataset), *divided.notes),
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


def _partition_once(dataset: Dataset, rest: np.ndarray, spec: scenario.Partition, seed: int) -> Partition:
    """Return the partition, kept on disk: workers then need not import the library, which takes seconds."""
    labels = dataset.y_train[rest]
    owners = None if dataset.natural_ids is None else dataset.natural_ids[rest]

    def make() -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
        made = partition(labels, spec, num_classes=dataset.num_classes, seed=seed, natural_ids=owners)
        ends = np.cumsum([len(mine) for mine in made.indices])
        return {"samples": np.concatenate(made.indices), "ends": ends}, {"notes": list(made.notes)}

    key = [
        importlib.metadata.version("flwr-datasets"),
        np.__version__,
        spec.model_dump(mode="json", exclude={"validation", "test"}),
        seed,
        cache.digest(labels, *(() if owners is None else (owners,))),
    ]
    arrays, facts = cache.fetch(f"partition-{spec.name}", key, make)
    return Partition(tuple(np.split(arrays["samples"], arrays["ends"][:-1])), tuple(facts["notes"]))


def assign_architectures(
    student: str | Sequence[str] | Mapping[str, float], clients: int, seed: int
) -> tuple[str, ...]:
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
    >>> assign_architectures(["a", "b"], 3, seed=0)
    ('a', 'b', 'a')
    >>> sorted(assign_architectures({"a": 0.5, "b": 0.25, "c": 0.25}, 6, seed=0))
    ['a', 'a', 'a', 'b', 'b', 'c']
    """
    if isinstance(student, str):
        student = [student]
    if not student or not all(student):
        raise ScenarioError("names no model", key="models.student", hint='such as "cnn"')
    if not isinstance(student, Mapping):
        return tuple(student[k % len(student)] for k in range(clients))
    shares = np.array(list(student.values()), dtype=float)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ScenarioError(f"shares must be numbers > 0, are {dict(student)}", key="models.student")
    exact = shares / shares.sum() * clients
    counts = np.floor(exact + 1e-9).astype(int)
    # Stable: of equal remainders the first named gets the client.
    largest = np.argsort(-(exact - counts).round(9), kind="stable")[: clients - counts.sum()]
    counts[largest] += 1
    dealt = [name for name, count in zip(student, counts, strict=True) for _ in range(count)]
    order = rng(seed, Purpose.ARCHITECTURE).permutation(clients)
    return tuple(dealt[k] for k in order)
