import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import federation as module
from fedkd.data.federation import assign_architectures, build_federation
from fedkd.errors import ScenarioError
from fedkd.scenario import Scenario

QUICKSTART = {
    "partition": {"alpha": 0.1, "clients": 20, "min_samples": 10, "validation": 0.1, "test": 0.2},
    "proxy": {"source": "held-out", "size": 200, "server_labels": 50},
}


def make(**sections):
    return Scenario(**(QUICKSTART | sections))  # type: ignore[arg-type]


def test_nobody_shares_a_sample():
    fed = build_federation(make())

    parts = [fed.server_labels, *(ids for s in fed.shards for ids in (s.train, s.validation, s.test))]
    assert fed.proxy is not None and fed.proxy.data.rows is not None
    every = np.concatenate([*parts, fed.proxy.data.rows])
    assert sorted(every) == list(range(len(fed.train)))
    assert len(fed.server_labels) == 50 and len(fed.proxy) == 200
    assert fed.test.x is not fed.train.x and len(fed.test) == len(fed.dataset.y_test)


def test_table_and_sizes_count_training_samples():
    fed = build_federation(make())

    assert fed.counts.shape == (20, 10) == (fed.num_clients, fed.num_classes)
    assert np.array_equal(fed.counts.sum(axis=1), fed.sizes)
    assert np.array_equal(fed.counts[3], np.bincount(fed.dataset.y_train[fed.shards[3].train], minlength=10))
    assert fed.notes and 0 < fed.skew.jensen_shannon < 1 < fed.skew.effective_classes < 10


def test_clients_without_samples_are_not_eligible():
    fed = build_federation(make(partition={"alpha": 1e-3}))

    assert 0 < len(fed.eligible) < 20 and (fed.sizes[fed.eligible] > 0).all()
    assert np.isfinite([fed.skew.jensen_shannon, fed.skew.effective_classes]).all()


def test_same_scenario_same_federation():
    first = build_federation(make())
    assert build_federation(make(strategy={"name": "feddf"}, name="other")) is first
    module._federations.clear()
    start = time.perf_counter()
    again = build_federation(make())

    assert time.perf_counter() - start < 1
    assert all(np.array_equal(a.train, b.train) for a, b in zip(first.shards, again.shards))
    assert again.notes == first.notes
    other = build_federation(make(run={"seed": 1}))
    assert any(not np.array_equal(a.train, b.train) for a, b in zip(first.shards, other.shards))


def test_few_are_kept():
    for seed in range(6):
        build_federation(make(run={"seed": seed}))

    assert len(module._federations) == module._KEPT


def test_train_samples_come_first():
    fed = build_federation(make(data={"train_samples": 300, "test_samples": 100}, proxy={}))

    assert len(fed.train) == 300 == fed.sizes.sum() + sum(len(s.validation) + len(s.test) for s in fed.shards)
    assert len(fed.test) == 100 and fed.proxy is None and len(fed.server_labels) == 0


def test_a_cut_that_leaves_out_classes_is_noted():
    cut = {"train_samples": 3, "test_samples": 100}

    notes = build_federation(make(data=cut, partition={"clients": 2}, proxy={})).notes

    assert len(notes) == 1 and "data.train_samples = 3" in notes[0] and "of 10 classes" in notes[0]


def test_clients_without_number_are_refused_at_once():
    start = time.perf_counter()
    with pytest.raises(ScenarioError, match="more than the"):
        build_federation(make(partition={"clients": 10**12}))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"partition": {"clients": 2000}}, "partition.clients"),
        ({"partition": {"name": "iidd"}}, "partition.name"),
        ({"models": {"student": []}}, "models.student"),
        ({"models": {"student": {"a": -1.0}}}, "models.student"),
        ({"data": {"source": "synthetic", "augment": "flip"}}, "data.augment"),
        ({"data": {"train_samples": 5000}}, "data.train_samples"),
    ],
)
def test_impossible_scenarios(sections, key):
    with pytest.raises(ScenarioError) as error:
        build_federation(make(**sections))
    assert error.value.key == key


def test_natural_owners_survive_the_cuts():
    data = {"source": "synthetic", "options": {"owners": 8, "train": 400}}
    fed = build_federation(make(data=data, partition={"name": "natural-id", "clients": 8}))

    assert fed.dataset.natural_ids is not None
    assert [len(set(fed.dataset.natural_ids[s.train])) for s in fed.shards] == [1] * 8


def test_architectures():
    assert list(assign_architectures("cnn", 3, 0)) == ["cnn"] * 3
    assert list(assign_architectures(["a", "b"], 5, 0)) == ["a", "b", "a", "b", "a"]
    dealt = assign_architectures({"a": 0.7, "b": 0.3}, 10, 0)
    assert dealt.count("a") == 7 and list(dealt) != list(assign_architectures({"a": 0.7, "b": 0.3}, 10, 1))
    assert list(build_federation(make(models={"student": ["x", "y"]})).archs) == ["x", "y"] * 10


@given(
    shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    clients=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_proportions_are_met_within_one_client(shares, clients, seed):
    dealt = assign_architectures({str(i): s for i, s in enumerate(shares)}, clients, seed)

    assert len(dealt) == clients
    for i, share in enumerate(shares):
        assert abs(dealt.count(str(i)) - share / sum(shares) * clients) < 1
