import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd import scenario
from fedkd.data import federation as federations
from fedkd.data import partition as module
from fedkd.data.federation import Architectures, build_federation
from fedkd.data.partition import names, partition, skew
from fedkd.data.shards import Drawn, Shards, local_split
from fedkd.data.skew import Skew, label_counts
from fedkd.errors import ScenarioError
from fedkd.scenario import Scenario
from fedkd.seeds import Purpose, rng


def resampled(**changes):
    options = {"samples_per_client": 12} | changes.pop("options", {})
    return scenario.Partition(**({"name": "resampled", "clients": 50, "options": options} | changes))


def draw(labels, seed=0, **changes):
    return partition(np.asarray(labels), resampled(**changes), num_classes=int(max(labels)) + 1, seed=seed).indices


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other))


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=8))
def test_shards_are_the_arrays_that_they_were_made_of(lists):
    shards = Shards.of(np.array(one, dtype=np.int64) for one in lists)

    assert [shard.tolist() for shard in shards] == lists
    assert shards.sizes.tolist() == [len(one) for one in lists]
    names = np.arange(100)[::-1]
    assert [shard.tolist() for shard in shards.renamed(names)] == [sorted(99 - i for i in one) for one in lists]
    again = Shards.grouped(shards.samples, shards.owners, len(lists))
    assert same(again, shards)
    with pytest.raises(IndexError):
        shards[len(lists)]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "dirichlet", "alpha": 0.05, "min_samples": 8, "validation": 0.1, "test": 0.29},
        {"name": "dirichlet", "alpha": 1e-3},
        {"name": "iid", "test": 0.2},
    ],
)
def test_a_federation_is_what_one_object_for_each_client_would_be(spec):
    """Against the straightforward computation: a split, a name and a row of counts for every client in turn."""
    made = Scenario.model_validate(
        {
            "partition": {"clients": 15, **spec},
            "proxy": {"source": "held-out", "size": 100, "server_labels": 30},
            "models": {"student": {"mlp": 0.7, "cnn": 0.3}},
            "run": {"seed": 4},
        }
    )
    fed = build_federation(made)
    labels = fed.dataset.y_train
    assert fed.proxy is not None and fed.proxy.data.rows is not None
    rest = np.setdiff1d(np.arange(len(labels)), [*fed.proxy.data.rows, *fed.server_labels])
    divided = partition(labels[rest], made.partition, num_classes=10, seed=4)
    counts, sizes = np.zeros((15, 10), dtype=int), []
    for k in range(15):
        stream = rng(4, Purpose.LOCAL_SPLIT, partition=k)
        split = local_split(rest[divided.indices[k]], made.partition.validation, made.partition.test, stream)
        for use in ("train", "validation", "test"):
            assert np.array_equal(getattr(fed.shards[k], use), getattr(split, use))
        np.add.at(counts[k], labels[split.train], 1)
        sizes.append(len(split.train))

    assert np.array_equal(fed.counts, counts) and fed.counts.dtype == np.int64
    assert fed.sizes.tolist() == sizes and fed.eligible.tolist() == [k for k in range(15) if sizes[k]]
    assert fed.skew == straightforward_skew(counts)
    dealt = ["mlp"] * 11 + ["cnn"] * 4  # 10.5 and 4.5: the first named gets the client
    order = rng(4, Purpose.ARCHITECTURE).permutation(15)
    assert list(fed.archs) == [fed.archs[k] for k in range(15)] == [dealt[k] for k in order]


def straightforward_skew(counts):
    shares = counts[counts.sum(axis=1) > 0]
    shares = shares / shares.sum(axis=1, keepdims=True)
    whole = counts.sum(axis=0) / counts.sum()

    def entropy(p):
        return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)

    divergence = (entropy((shares + whole) / 2) - (entropy(shares) + entropy(whole)) / 2) / np.log(2)
    return Skew(float(np.clip(divergence, 0, 1).mean()), float(np.exp(entropy(shares)).mean()))


def test_skew_of_many_clients_is_that_of_all_at_once():
    counts = np.random.default_rng(0).integers(0, 5, (9000, 4))

    assert skew(counts) == straightforward_skew(counts)


def test_labels_are_counted_with_gaps_and_empty_clients():
    counts = label_counts(np.array([2, 0, 2], dtype=np.uint8), [np.array([], dtype=int), np.array([0, 2, 2])], 4)

    assert counts.tolist() == [[0, 0, 0, 0], [0, 0, 3, 0]]


def test_architectures_are_few_names_for_any_number_of_clients():
    dealt = Architectures(("a", "b", "a"), 10**9)
    assert dealt[999_999_999] == "a" and dealt[4] == "b" and dealt.names == ("a", "b")
    drawn = Architectures(("a", "b", "c"), 4, np.array([2, 0, 2, 0], dtype=np.uint8))
    assert list(drawn) == ["c", "a", "c", "a"] and drawn.names == ("c", "a") and drawn[-1] == "a"


# --- many clients -----------------------------------------------------------------------------------------------------


def test_many_clients_are_divided_without_the_library(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 5, 1003)
    specs = {
        name: scenario.Partition(name=name, clients=40, options=options)
        for name, options in (("iid", {}), ("linear", {}), ("dirichlet", {"self_balancing": True, "alpha": 0.3}))
    }
    asked = {name: partition(labels, spec, num_classes=5, seed=1) for name, spec in specs.items()}
    monkeypatch.setattr(module, "MANY", 39)
    monkeypatch.setattr(module, "ask_library", lambda *args: pytest.fail("the library was asked"))
    ours = {name: partition(labels, spec, num_classes=5, seed=1) for name, spec in specs.items()}

    for name in ("iid", "linear"):
        assert same(ours[name].indices, asked[name].indices) and ours[name].notes == ()
    shards = ours["dirichlet"].indices
    assert sorted(np.concatenate(shards)) == list(range(1003))
    unbalanced = partition(labels, scenario.Partition(clients=40, alpha=0.3), num_classes=5, seed=1)
    assert shards.sizes.std() < unbalanced.indices.sizes.std()


def test_parts_of_equal_size_are_those_of_numpy():
    from fedkd.data.rows import Rows

    rows = Rows.of({"label": np.arange(23)})
    for parts in (1, 4, 23, 30):
        expected = np.array_split(np.arange(23), parts)
        assert same([rows.shard(parts, k).rows for k in range(parts)], expected)
    assert rows.shard(4, 1, contiguous=False).rows.tolist() == [1, 5, 9, 13, 17, 21]


def test_labels_of_some_clients_stand_for_a_large_federation(monkeypatch):
    monkeypatch.setattr(federations, "COUNTED", 10)
    fed = build_federation(Scenario.model_validate({"partition": {"name": "iid", "clients": 25}}))

    assert list(fed.counted) == list(range(0, 25, 3)) and fed.counts.shape == (9, 10)
    assert fed.counts[2].sum() == fed.sizes[6] and len(fed.sizes) == 25
    assert any("every 3th of 25" in note for note in fed.notes)


@pytest.mark.parametrize("student", ["mlp", ["mlp", "cnn"], {"mlp": 0.5, "cnn": 0.5}])
def test_a_million_clients_cost_a_few_bytes_each(student):
    sections = {
        "data": {"source": "synthetic", "options": {"classes": 4, "dimensions": 8, "train": 500, "test": 50}},
        "models": {"student": student},
    }
    build_federation(Scenario.model_validate(sections | {"partition": resampled(clients=10)}))  # decodes the data
    tracemalloc.start()
    fed = build_federation(Scenario.model_validate(sections | {"partition": resampled(clients=1_000_000)}))
    assert len(fed.eligible) == fed.num_clients == 1_000_000 and fed.archs[999_999] in ("mlp", "cnn")
    assert fed.counts.shape == (10_000, 4) and fed.skew.jensen_shannon > 0
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert kept < 30e6 and peak < 100e6


# --- samples drawn for each client ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_label_distributions_are_dirichlet(alpha):
    classes, size, clients = 4, 200, 1500
    labels = np.repeat(np.arange(classes), [40, 60, 100, 200])
    drawn = draw(labels, clients=clients, alpha=alpha, options={"samples_per_client": size})
    shares = label_counts(labels, [drawn[k] for k in range(clients)], classes) / size

    assert np.abs(shares.mean(axis=0) - 1 / classes).max() < 0.04  # whatever the classes' own shares
    # Variance of a Dirichlet component, and of the multinomial draw on top: E[p(1 - p)] / n.
    variance = (1 / classes) * (1 - 1 / classes) / (classes * alpha + 1)
    expected = variance + (1 / classes - variance - 1 / classes**2) / size
    assert shares.var(axis=0).mean() == pytest.approx(expected, rel=0.12)


def test_samples_of_a_class_are_equally_likely_and_may_come_twice():
    labels = np.array([0, 1] * 5)
    drawn = draw(labels, clients=400, alpha=5.0, options={"samples_per_client": 20})
    every = np.concatenate([drawn[k] for k in range(400)])

    assert all((np.diff(drawn[k]) >= 0).all() and len(drawn[k]) == 20 for k in range(5))
    assert np.abs(np.bincount(every, minlength=10) / len(every) - 0.1).max() < 0.02
    assert len(np.unique(drawn[0])) < 20


def test_draws_depend_on_seed_and_client_alone():
    labels = np.arange(300) % 7
    forwards, backwards = draw(labels), draw(labels, clients=10**7)
    first = [forwards[k] for k in range(50)]

    assert same(first, [backwards[k] for k in reversed(range(50))][::-1])
    assert not any(np.array_equal(a, b) for a, b in zip(first, draw(labels, seed=1)))
    assert not np.array_equal(first[0], first[1])
    code = (
        "import numpy as np; from fedkd.data.shards import Drawn;"
        "print(Drawn(np.arange(300) % 7, 50, 12, 0.5, 0)[33].tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(first[33].tolist())


def test_tiny_alphas_and_missing_classes():
    labels = np.array([1, 4] * 30)
    for alpha in (1e-3, 1e-200):
        drawn = draw(labels, alpha=alpha)
        counts = label_counts(labels, [drawn[k] for k in range(50)], 5)
        assert (counts.sum(axis=1) == 12).all() and (counts.max(axis=1) == 12).mean() > 0.9
        assert 10 < (counts[:, 1] == 12).sum() < 40
    listed = draw(labels, options={"alpha": [1000.0, 1e-6]})
    assert all((labels[listed[k]] == 1).all() for k in range(50))


def test_the_partitioner_is_listed_and_its_federation_runs_on():
    assert "replacement" in names()["resampled"] and "samples_per_client (required)" in names()["resampled"]
    made = Scenario.model_validate(
        {"partition": resampled(clients=3000), "proxy": {"source": "held-out", "size": 200, "server_labels": 40}}
    )
    fed = build_federation(made)
    assert fed.proxy is not None and fed.proxy.data.rows is not None
    held_back = np.concatenate([fed.proxy.data.rows, fed.server_labels])

    assert fed.num_clients == 3000 > len(fed.train) and set(fed.sizes) == {12} and len(fed.eligible) == 3000
    assert not np.isin(np.concatenate([fed.shards[k].train for k in range(200)]), held_back).any()
    assert len(fed.shards[7].test) == len(fed.shards[7].validation) == 0
    assert isinstance(Drawn(fed.dataset.y_train, 5, 1, 0.5, 0).sizes, np.ndarray)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"options": {"samples_per_client": 0}}, "partition.options.samples_per_client"),
        ({"options": {"samples_per_client": 2.5}}, "partition.options.samples_per_client"),
        ({"options": {"samples_per_client": True}}, "partition.options.samples_per_client"),
        ({"min_samples": 13}, "partition.options.samples_per_client"),
        ({"test": 0.2}, "partition.test"),
        ({"validation": 0.2}, "partition.validation"),
        ({"options": {"alpha": -1.0}}, "partition.options.alpha"),
        ({"options": {"alpha": [1.0, 2.0]}}, "partition.options.alpha"),
        ({"options": {"size": 2}}, "partition.options.size"),
    ],
)
def test_what_such_clients_cannot_have_is_refused(changes, key):
    with pytest.raises(ScenarioError) as error:
        draw(np.arange(30) % 3, **changes)
    assert error.value.key == key


def test_the_option_that_it_needs_is_named():
    with pytest.raises(ScenarioError, match="samples_per_client"):
        module.check(scenario.Partition(name="resampled"))
    with pytest.raises(ScenarioError, match="resampled"):
        partition(np.zeros(5, dtype=int), scenario.Partition(name="iid", clients=6), num_classes=1, seed=0)
