"""What must hold for every method: oracles that do not know how the method is written (methods of the literature)."""

import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedkd import methods
from fedkd.client import sequential, vectorised

STRATEGIES = list(methods.built_in())  # all of them, so that a new one is not forgotten
# Whose bytes depend on clients' sizes, neighbours or mistakes: tested in the files of these methods.
BYTES_VARY = {"fedgems", "fedgkt", "distributed", "fedmd", "cfd", "mhat", "cronus"}


@pytest.fixture
def small(small, needs):
    """Scenarios as elsewhere, with what the method needs."""

    def make(strategy="fedavg", **changes):
        name = strategy if isinstance(strategy, str) else strategy["name"]
        return small(strategy, **{**needs(name), **changes})

    return make


def rounds_of(events):
    """Return the round events without what depends on the clock."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


# Where a teacher could leave traces: in running statistics, or in the random numbers of dropout and augmentation.
DISTURBED = {
    "plain": {},
    "batch-norm": {
        "models": {"student": "cnn", "norm": "batch", "options": {"width": 0.25}},
        "data": {"augment": "crop-flip", "options": {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}},
        "proxy__size": 20,
        "client__steps": 3,
    },
    "dropout": {"models": {"student": "leaky:leaky", "options": {}}},
}


@pytest.fixture(params=DISTURBED)
def disturbed(request, monkeypatch):
    """Changes of the scenario to each of the models that a teacher could disturb, and to one that it could not."""

    def leaky(num_classes, input_shape):
        return nn.Sequential(nn.Linear(*input_shape, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes))

    monkeypatch.setitem(sys.modules, "leaky", SimpleNamespace(leaky=leaky))
    return DISTURBED[request.param]


def equal_students(first, second):
    assert first.students.keys() == second.students.keys() and first.students
    for arch in first.students:
        for name, tensor in first.students[arch].items():
            assert torch.equal(tensor, second.students[arch][name]), name


@pytest.mark.parametrize(
    ("strategy", "fedavg"),
    [
        ({"name": "fedprox", "mu": 0.0}, {"name": "fedavg"}),
        ({"name": "fedntd", "beta": 0.0}, {"name": "fedavg"}),
        ({"name": "fedgkd", "coefficient": 0.0, "buffer": 1}, {"name": "fedavg", "weighting": "uniform"}),
        ({"name": "fedgkd", "coefficient": 0.0, "buffer": 3}, {"name": "fedavg", "weighting": "uniform"}),
    ],
)
def test_coefficient_zero_is_bit_identical_to_fedavg(small, federate, strategy, fedavg, disturbed):
    zero, _ = federate(small(strategy, **disturbed))
    plain, _ = federate(small(fedavg, **disturbed))
    equal_students(zero, plain)


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "fedprox", "mu": 1.0},
        {"name": "fedntd", "beta": 1.0},
        {"name": "fedgkd", "coefficient": 1.0, "buffer": 2, "weighting": "examples"},
    ],
)
def test_a_positive_coefficient_is_not(small, federate, strategy):
    regularised, _ = federate(small(strategy))
    plain, _ = federate(small("fedavg"))
    assert any(not torch.equal(t, plain.students["mlp"][n]) for n, t in regularised.students["mlp"].items())


@pytest.mark.parametrize("teacher", ["global", "last:2", "ema:0.9", "own"])
def test_a_scenario_term_of_weight_zero_changes_no_bit(small, federate, teacher, disturbed):
    term = {"loss": "kd", "weight": 0.0, "teacher": teacher, "temperature": 2.0}
    with_term, events = federate(small("fedavg", **disturbed, client__terms=[term]))
    plain, _ = federate(small("fedavg", **disturbed))
    equal_students(with_term, plain)
    assert "kd" in rounds_of(events)[-1]["train"]


def test_two_terms_that_share_a_teacher_give_the_sum_of_their_weights(small, federate):
    one = {"loss": "kd", "weight": 0.5, "teacher": "last:2"}
    idle = {"loss": "mse", "weight": 0.0, "teacher": "last:2"}
    alone, _ = federate(small("fedavg", client__terms=[one]))
    both, _ = federate(small("fedavg", client__terms=[one, idle]))
    equal_students(alone, both)
    average = {"loss": "kd", "weight": 0.5, "teacher": "ema:0.9"}
    alone, _ = federate(small("fedavg", client__terms=[average]))
    both, _ = federate(small("fedavg", client__terms=[average, average | {"weight": 0.0}]))
    equal_students(alone, both)


def test_fd_with_gamma_zero_is_training_alone(small, federate, tap_of, disturbed):
    zero, alone, slight = tap_of(), tap_of(), tap_of()
    federate(small({"name": "fd", "gamma": 0.0}, **disturbed), mods=[zero])
    federate(small("local", **disturbed), mods=[alone])
    federate(small({"name": "fd", "gamma": 1e-3}, **disturbed), mods=[slight])
    assert zero.models() == alone.models() != slight.models()
    assert len(alone.models()) == 3 * 4  # rounds, clients in each


def test_a_scenario_term_pulls_the_student_to_its_teacher(small, federate):
    strong = {"loss": "kd", "weight": 2.0, "teacher": "global"}
    start = federate(small("fedavg"), rounds=1)[0].students["mlp"]
    free, _ = federate(small("fedavg", run__rounds=2))
    held, _ = federate(small("fedavg", run__rounds=2, client__terms=[strong]))

    def moved(strategy):
        return sum(float((t - start[n]).norm()) for n, t in strategy.students["mlp"].items())

    assert moved(held) < 0.9 * moved(free)


TOGETHER = {
    "fedgkd_vote": {"coefficient": 1.0},
    "fedcad": {"threshold": 0.0, "m_max": 0.5},
    "fedssd": {"threshold": 0.0, "m_max": 0.5},
    "fedftg": {"iterations": 1},
}
NEVER_TOGETHER = {"centralized": "the server trains one model on all data; there are no clients that could meet"}


def noting(seen):
    """Return a mod that notes all arrays that clients send up and keep, by round, kind of message and client."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        at = (
            message.content["config"]["server-round"],
            message.metadata.message_type,
            context.node_config["partition-id"],
        )
        places = {"sent": reply.content.array_records, "kept": context.state.array_records}
        seen[at] += [
            (f"{place}/{kind}/{name}", array.numpy().copy())
            for place, records in places.items()
            for kind, record in records.items()
            for name, array in record.items()
        ]
        return reply

    return mod


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in NEVER_TOGETHER])
def test_clients_trained_together_learn_what_they_learn_alone(small, federate, name, monkeypatch, fast):
    together, alone = [], []
    train_one, train_all = sequential.train, vectorised._Cohort.train
    monkeypatch.setattr(sequential, "train", lambda task: alone.append(1) or train_one(task))
    monkeypatch.setattr(vectorised._Cohort, "train", lambda self: together.append(len(self.tasks)) or train_all(self))
    method = fast(name) | TOGETHER.get(name, {})
    everybody = {"run__rounds": 2, "run__participation": 1.0, "system__cohort": 6}
    ours, theirs = defaultdict(list), defaultdict(list)
    one, events = federate(small(method, **everybody, system__trainer="sequential"), mods=[noting(ours)])
    assert alone and not together
    alone.clear()
    other, others = federate(small(method, **everybody, system__trainer="vectorised"), mods=[noting(theirs)])

    assert set(together) == {6} if name != "fedmd" else max(together) == 6  # whose clients stop at different passes
    assert not alone or name == "fedmd"
    # Clients send or keep nearly the same numbers after every message, and each has some after every round.
    compared = set()
    assert ours.keys() == theirs.keys()
    for (round, kind, client), arrays in ours.items():
        for (place, array), (same, twin) in zip(arrays, theirs[round, kind, client], strict=True):
            assert place == same and array.dtype == twin.dtype
            if array.dtype.kind == "f":
                np.testing.assert_allclose(twin, array, rtol=1e-4, atol=1e-4, err_msg=f"{place} of {client} in {round}")
                compared |= {(round, client)} if array.size > 1 else set()
            else:
                np.testing.assert_array_equal(twin, array)
    assert compared >= {(round, client) for round in (1, 2) for client in range(6)}
    for arch, state in one.students.items():
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, other.students[arch][key], rtol=1e-3, atol=1e-3)
    for before, after in zip(rounds_of(events), rounds_of(others), strict=True):
        assert before["train"] == pytest.approx(after["train"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_seed_same_metrics_other_seed_other_metrics(small, federate, name, fast):
    first = rounds_of(federate(small(fast(name)))[1])
    again = rounds_of(federate(small(fast(name)))[1])
    other = rounds_of(federate(small(fast(name), run__seed=1))[1])
    assert first == again != other


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in BYTES_VARY])
def test_measured_bytes_are_the_formulas(small, federate, name, fast):
    theta = 4 * (12 * 16 + 16 + 16 * 4 + 4)  # the MLP 12-16-4 in float32
    classes, open_size, clients = 4, 40, 4  # participation 0.7 of 6 clients: 4
    outputs, request = 4 * open_size * classes + 4 * open_size, 4 * open_size
    table = 4 * classes**2 + 4 * classes
    nothing = {"local": {}, "centralized": {}}
    credible = {"weights": theta, "class-weights": 4 * classes}
    own_up = nothing | {"fedftg": {"weights": theta, "label-counts": 4 * classes}}
    up = {**own_up, "dsfl": {"proxy-outputs": outputs}, "fd": {"class-outputs": table}}.get(name, {"weights": theta})
    first = {
        **nothing,
        "dsfl": {"request": request},
        "fd": {},
        "fedcad": credible,
        "fedssd": credible,
    }.get(name, {"weights": theta})
    later = {
        "dsfl": {"request": request, "proxy-outputs": outputs},
        "fd": {"class-outputs": table},
        "fedgkd": {"weights": theta, "teacher": theta},
        "fedgkd_vote": {"weights": theta, "teacher-weights": 4},  # one teacher in round 2: the model itself
    }.get(name, first)

    _, events = federate(small(fast(name)), rounds=2)

    one, two = rounds_of(events)
    clients = 6 if name == "centralized" else clients
    assert one["received"] == clients
    assert one["bytes_up"] == {kind: clients * n for kind, n in up.items()} == two["bytes_up"]
    assert one["bytes_down"] == {kind: clients * n for kind, n in first.items()}
    assert two["bytes_down"] == {kind: clients * n for kind, n in later.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_goes_through_a_checkpoint(small, federate, name, tmp_path, fast):
    from fedkd import checkpoint, plugins

    strategy, _ = federate(small(fast(name)))
    checkpoint.save(strategy.state_dict(), tmp_path)
    copy = plugins.make_strategy(small(fast(name)))
    copy.bind(strategy.server)
    copy.load_state_dict(checkpoint.load(tmp_path))
    again, before = copy.state_dict(), strategy.state_dict()
    assert again.keys() == before.keys() and again["round"] == 3

    def compare(one, two):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two)
        elif isinstance(one, dict):
            assert one.keys() == two.keys()
            for key in one:
                compare(one[key], two[key])
        elif isinstance(one, list):
            assert len(one) == len(two)
            for left, right in zip(one, two, strict=True):
                compare(left, right)
        else:
            assert one == two

    compare(before, again)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "feddf", "fedaux", "fedgkd", "fedntd", "dsfl", "fd"])
def test_different_models_in_one_federation(small, federate, name, fast):
    scenario = small(
        fast(name),
        models__student=["mlp", "cnn", "resnet8"],
        models__options={},
        data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
        run__participation=1.0,
        run__rounds=2,
        proxy__size=20,
        client__steps=2,
    )
    _, events = federate(scenario)
    last = rounds_of(events)[-1]
    assert last["received"] == 6 and 0 <= last["accuracy"] <= 1
    whose = {"fd": "clients", "dsfl": "server"}.get(name, "mean of 3 server models")
    assert last["whose"] == whose
    if name not in ("fd", "dsfl"):
        each = [last["predictors"][f"server/{arch}"]["agreement"] for arch in ("mlp", "cnn", "resnet8")]
        assert last["agreement"] == pytest.approx(sum(each) / 3)
