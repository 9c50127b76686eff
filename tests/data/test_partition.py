import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkd import scenario
from fedkd.data import partition as module
from fedkd.data import partitioners
from fedkd.data.partition import check, label_counts, local_split, names, partition, skew
from fedkd.errors import ScenarioError


def divide(labels, seed=0, natural_ids=None, **spec):
    labels = np.asarray(labels)
    classes = int(labels.max()) + 1
    return partition(labels, scenario.Partition(**spec), num_classes=classes, seed=seed, natural_ids=natural_ids)


def labels_of(samples=300, classes=5, seed=0):
    return np.random.default_rng(seed).integers(0, classes, samples)


def assert_sound(done, samples, clients, covers=True):
    assert len(done.indices) == clients
    every = np.concatenate(done.indices)
    assert len(np.unique(every)) == len(every) and every.dtype == np.int64
    assert all((np.diff(mine) > 0).all() for mine in done.indices)
    assert every.size == 0 or (every.min() >= 0 and every.max() < samples)
    if covers:
        assert len(every) == samples


EVERY = {
    "iid": ({}, True),
    "dirichlet": ({"self_balancing": True}, True),
    "inner-dirichlet": ({}, True),
    "pathological": ({"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"}, True),
    "shard": ({"num_shards_per_partition": 2}, False),
    "size": ({"partition_sizes": [10, 20, 30, 40, 50, 60, 1, 2, 3, 4]}, False),
    "linear": ({}, True),
    "square": ({}, True),
    "exponential": ({}, True),
    "id-to-size": ({"partition_id_to_size_fn": "numpy:sqrt"}, True),
    "distribution": ({"num_unique_labels_per_partition": 2}, True),
    "natural-id": ({}, True),
    "grouped-natural-id": ({"group_size": 3}, True),
    "continuous": ({"strictness": 0.5}, True),
}


def test_every_partitioner_is_tried():
    assert {*EVERY, "resampled"} == set(names())  # which divides nothing, see test_shards.py


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("min_samples", [0, 4])
def test_every_partitioner(name, min_samples):
    options, covers = EVERY[name]
    owners = np.random.default_rng(1).integers(0, 30 if "grouped" in name else 10, 300)
    spec = dict(name=name, clients=10, options=options, min_samples=min_samples)

    done = divide(labels_of(), natural_ids=owners, **spec)
    again = divide(labels_of(), natural_ids=owners, **spec)
    other = divide(labels_of(), natural_ids=owners, seed=1, **spec)

    assert_sound(done, 300, 10, covers)
    assert min(map(len, done.indices)) >= min_samples
    assert all(np.array_equal(a, b) for a, b in zip(done.indices, again.indices)) and done.notes == again.notes
    if "natural" not in name:
        assert any(not np.array_equal(a, b) for a, b in zip(done.indices, other.indices))


def test_partitioners_do_what_they_say():
    labels = labels_of(1000)
    counts = lambda done: label_counts(labels, done.indices, 5)  # noqa: E731

    assert {len(i) for i in divide(labels, name="iid", clients=8).indices} == {125}
    assert [len(i) for i in divide(labels, name="linear", clients=4).indices] == [100, 200, 300, 400]
    done = divide(labels, name="pathological", clients=10, options={"num_classes_per_partition": 2})
    assert ((counts(done) > 0).sum(axis=1) == 2).all()
    owners = np.arange(1000) % 3
    done = divide(labels, name="natural-id", clients=3, natural_ids=owners)
    assert [sorted(set(owners[i])) for i in done.indices] == [[0], [1], [2]]
    skewed, even = (skew(counts(divide(labels, clients=10, alpha=a))) for a in (0.05, 100.0))
    assert skewed.jensen_shannon > 0.3 > 0.05 > even.jensen_shannon
    assert skewed.effective_classes < 2.5 < 4.5 < even.effective_classes


@pytest.mark.parametrize("seed", range(5))
def test_dirichlet_at_quickstart_size(seed):
    labels = np.random.default_rng(9).integers(0, 10, 1100)
    done = divide(labels, seed=seed, name="dirichlet", clients=20, alpha=0.1, min_samples=10)

    assert_sound(done, 1100, 20)
    assert min(map(len, done.indices)) >= 10


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-200])
@pytest.mark.parametrize("name", ["dirichlet", "inner-dirichlet"])
@pytest.mark.parametrize("min_samples", [0, 10])
def test_tiny_alpha_ends_quickly(alpha, name, min_samples):
    start = time.perf_counter()
    done = divide(labels_of(1100, 10), name=name, clients=20, alpha=alpha, min_samples=min_samples)

    assert time.perf_counter() - start < 5
    assert_sound(done, 1100, 20)
    figures = skew(label_counts(labels_of(1100, 10), done.indices, 10))
    assert 0.3 < figures.jensen_shannon <= 1 and 1 <= figures.effective_classes < 4
    if min_samples:
        assert min(map(len, done.indices)) == 10 or name == "inner-dirichlet"
        assert done.notes


def test_repairs_and_retries_are_noted():
    done = divide(labels_of(400), name="dirichlet", clients=20, alpha=0.01, min_samples=15)

    assert any(f"in none of {module.ATTEMPTS} draws" in note for note in done.notes)
    assert any("samples were moved from the" in note for note in done.notes)


def test_own_draw_replaces_a_library_that_gives_nothing(monkeypatch):
    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(module, "ask_library", broken)
    for name, smallest in (("dirichlet", 0), ("inner-dirichlet", 60), ("linear", 20), ("exponential", 0)):
        done = divide(labels_of(300), name=name, clients=5, alpha=0.3)
        assert_sound(done, 300, 5)
        assert min(map(len, done.indices)) >= smallest
        assert any("was drawn without" in note for note in done.notes)
    with pytest.raises(ScenarioError, match="broken"):
        divide(labels_of(300), name="shard", clients=5, options={"shard_size": 3})


def test_wrong_library_results_are_not_believed(monkeypatch):
    twice = [np.array([0, 1]), np.array([1, 2])]
    monkeypatch.setattr(module, "ask_library", lambda *args: twice)

    with pytest.raises(ScenarioError, match="overlap"):
        divide([0, 1, 0, 1], name="shard", clients=2, options={"shard_size": 1})


def test_empty_clients_are_allowed_unless_asked_otherwise():
    assert min(map(len, divide(labels_of(100), name="exponential", clients=20).indices)) == 0
    assert min(map(len, divide(labels_of(100), name="exponential", clients=20, min_samples=1).indices)) == 1
    assert_sound(divide(labels_of(2000), name="exponential", clients=1000), 2000, 1000)


def test_classes_may_be_missing():
    labels = np.array([1, 4] * 30)
    for name in ("dirichlet", "inner-dirichlet"):
        assert_sound(divide(labels, name=name, clients=4), 60, 4)


def test_natural_clients_are_chosen_at_random():
    owners = np.arange(60) % 12
    done = divide(labels_of(60), name="natural-id", clients=5, natural_ids=owners)

    assert [len(i) for i in done.indices] == [5] * 5 and "5 of 12 natural clients" in done.notes[0]
    with pytest.raises(ScenarioError, match="12 that natural-id finds") as error:
        divide(labels_of(60), name="natural-id", clients=13, natural_ids=owners)
    assert error.value.key == "partition.clients"


@pytest.mark.parametrize(
    ("spec", "key", "text"),
    [
        ({"name": "dirichle"}, "partition.name", "'dirichlet'"),
        ({"options": {"self_balancin": True}}, "partition.options.self_balancin", "'self_balancing'"),
        ({"options": {"seed": 1}}, "partition.options.seed", "run.seed"),
        ({"options": {"alpha": -1}}, "partition.options.alpha", "> 0"),
        ({"options": {"alpha": 1}, "alpha": 1.0}, "partition.options.alpha", "twice"),
        ({"name": "pathological"}, "partition.options.num_classes_per_partition", "needs"),
        (
            {"name": "size", "options": {"partition_sizes": [1, -1]}},
            "partition.options.partition_sizes",
            ">= 0",
        ),
        (
            {"name": "size", "options": {"partition_sizes": [1]}},
            "partition.options.partition_sizes",
            "20 clients",
        ),
        ({"validation": 0.5, "test": 0.5}, "partition.validation", "below 1"),
        ({"name": "iid", "options": {"x": 1}}, "partition.options.x", "none"),
        (
            {"name": "continuous", "options": {"strictness": 1, "partition_by": "y"}},
            "partition.options.partition_by",
            "owner",
        ),
    ],
)
def test_impossible_sections_are_refused_without_data(spec, key, text):
    with pytest.raises(ScenarioError) as error:
        check(scenario.Partition(**spec))

    assert error.value.key == key and text in str(error.value)


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ({"clients": 301}, "partition.clients"),
        ({"clients": 100, "min_samples": 4}, "partition.min_samples"),
        ({"name": "natural-id"}, "partition.name"),
        ({"name": "pathological", "options": {"num_classes_per_partition": 9}}, "partition.options"),
        ({"name": "continuous", "options": {"strictness": 2}}, "partition.options"),
        (
            {"clients": 2, "name": "size", "options": {"partition_sizes": [300, 1]}},
            "partition.options.partition_sizes",
        ),
        ({"options": {"alpha": [1.0, 2.0]}}, "partition.options"),
        (
            {"name": "id-to-size", "options": {"partition_id_to_size_fn": "nowhere:f"}},
            "partition.options.partition_id_to_size_fn",
        ),
        (
            {"name": "id-to-size", "options": {"partition_id_to_size_fn": "numpy:zeros_like"}},
            "partition.options",
        ),
    ],
)
def test_what_data_cannot_satisfy_is_refused(spec, key):
    with pytest.raises(ScenarioError) as error:
        divide(labels_of(300), **spec)

    assert error.value.key == key


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["iid", "dirichlet", "inner-dirichlet", "linear", "square", "exponential"]),
    samples=st.integers(1, 120),
    classes=st.integers(1, 6),
    clients=st.integers(1, 40),
    least=st.integers(0, 5),
    alpha=st.floats(1e-9, 1e4),
    seed=st.integers(0, 2**32),
)
def test_always_a_partition_or_an_error(name, samples, classes, clients, least, alpha, seed):
    labels = np.random.default_rng(seed).integers(0, classes, samples)
    spec = scenario.Partition(name=name, clients=clients, alpha=alpha, min_samples=least)
    if clients > samples or clients * least > samples:
        with pytest.raises(ScenarioError):
            partition(labels, spec, num_classes=classes, seed=seed)
        return

    done = partition(labels, spec, num_classes=classes, seed=seed)

    assert_sound(done, samples, clients)
    assert min(map(len, done.indices)) >= least
    figures = skew(label_counts(labels, done.indices, classes))
    assert 0 <= figures.jensen_shannon <= 1 and 1 <= figures.effective_classes <= classes + 1e-9


def test_skew_by_hand():
    # Two clients with one class each: H(whole) = 1 bit, H((1/4, 3/4)) = 0.8113 bit; 0.8113 - 0.5 = 0.3113.
    figures = skew(np.array([[7, 0], [0, 7], [0, 0]]))

    assert figures.jensen_shannon == pytest.approx(0.311278, abs=1e-6)
    assert figures.effective_classes == 1
    assert skew(np.zeros((3, 4), dtype=int)) == skew(np.zeros((0, 4))) == module.Skew(0.0, 0.0)


@given(size=st.integers(0, 50), validation=st.floats(0, 0.5), test=st.floats(0, 0.49))
def test_local_split(size, validation, test):
    ids = np.arange(100, 100 + size)
    split = local_split(ids, validation, test, np.random.default_rng(0))

    assert sorted(np.concatenate([split.train, split.validation, split.test])) == ids.tolist()
    assert len(split.train) > 0 or size == 0
    assert len(split.test) <= test * size + 1e-6


def test_large_partitions_take_no_per_sample_machinery():
    labels = labels_of(60_000, 10)
    divide(labels[:100], clients=5)  # imports the library
    start = time.perf_counter()
    divide(labels, name="dirichlet", clients=500, alpha=0.5)

    assert time.perf_counter() - start < 2


def test_library_is_asked_with_the_names_of_the_scenario(monkeypatch):
    seen = {}
    import flwr_datasets.partitioner as library

    class Spy(library.ShardPartitioner):
        def __init__(self, **arguments):
            seen.update(arguments)
            super().__init__(**arguments)

    monkeypatch.setattr(library, "ShardPartitioner", Spy)
    task = partitioners.Task(np.arange(40) % 4, None, 5, None, 0, {"shard_size": 4})
    partitioners.ask_library(partitioners.RULES["shard"], task, 7)

    assert seen == {"num_partitions": 5, "partition_by": "label", "seed": 7, "shard_size": 4}
