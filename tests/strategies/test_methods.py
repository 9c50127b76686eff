"""Each method against its formula, on numbers worked out by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from fedkd import plugins
from fedkd.client.exchange import soft_cross_entropy
from fedkd.client.runtime import Runtime
from fedkd.client.trainer import learn
from fedkd.data.batches import Batch
from fedkd.models import Outputs
from fedkd.payloads import ClassOutputs, ClassWeights, Knowledge, ProxyOutputs, Weights
from strategies.dsfl import DSFL
from strategies.fd import FD, ClassMeans
from strategies.fedgkd import FedGKD, GlobalDistillation
from strategies.fedntd import FedNTD, NotTrueDistillation
from strategies.fedprox import FedProx, Proximal

LN3, LN9 = math.log(3), math.log(9)


def outputs(*rows):
    logits = torch.tensor(rows)
    return Outputs(logits, logits, ())


def batch(*labels):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)))


def test_fedprox_is_half_mu_times_the_squared_distance():
    local = Proximal(FedProx(mu=0.5))
    params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    anchor = {"w": torch.tensor([0.0, 0.0]), "b": torch.tensor([1.0])}
    terms = local.loss(params, batch(0), outputs([0.0, 0.0]), (), {"anchor": anchor})
    assert float(terms["prox"]) == pytest.approx(0.5 * 0.5 * (1 + 4 + 4))
    assert float(terms["ce"]) == pytest.approx(math.log(2))


def test_fedgkd_is_c_times_t_squared_times_kl_from_teacher_to_student():
    local = GlobalDistillation(FedGKD(coefficient=0.1, temperature=2.0))
    # At T = 2 the teacher (ln 9, 0) is (3/4, 1/4), the student (0, 0) is (1/2, 1/2).
    terms = local.loss({}, batch(0), outputs([0.0, 0.0]), (outputs([LN9, 0.0]),), {})
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(terms["kd"]) == pytest.approx(0.1 * 4 * kl, rel=1e-5)


def test_fedgkd_has_no_term_before_there_is_a_teacher():
    local = GlobalDistillation(FedGKD())
    assert float(local.loss({}, batch(0), outputs([0.0, 0.0]), (), {})["kd"]) == 0.0


def test_fedntd_leaves_the_true_class_out_of_both_softmaxes():
    local = NotTrueDistillation(FedNTD(beta=0.3, tau=2.0))
    # What is left at τ = 2 is the teacher's (ln 9, 0) = (3/4, 1/4) and the student's (0, 0) = (1/2, 1/2).
    student = outputs([5.0, 0.0, 0.0], [0.0, -7.0, 0.0])
    teacher = outputs([-2.0, LN9, 0.0], [LN9, 3.0, 0.0])
    student.logits.requires_grad_()
    terms = local.loss({}, batch(0, 1), student, (teacher,), {})
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(terms["ntd"].detach()) == pytest.approx(0.3 * 2**2 * kl, rel=1e-5)
    terms["ntd"].backward()
    # β·τ·(student − teacher) / B; cross-entropy alone fits the label.
    step = 0.3 * 2 * 0.25 / 2
    torch.testing.assert_close(student.logits.grad, torch.tensor([[0.0, -step, step], [-step, 0.0, step]]))


def test_fedntd_with_two_classes_has_no_distillation():
    local = NotTrueDistillation(FedNTD())
    terms = local.loss({}, batch(0, 1), outputs([3.0, -1.0], [0.5, 2.0]), (outputs([0.0, 9.0], [4.0, 1.0]),), {})
    assert float(terms["ntd"]) == 0.0


@pytest.mark.parametrize("local", [GlobalDistillation(FedGKD()), NotTrueDistillation(FedNTD())])
def test_a_student_that_equals_its_teacher_has_loss_zero(local):
    out = outputs([1.0, -2.0, 0.5], [0.0, 3.0, 1.0])
    terms = local.loss({}, batch(0, 2), out, (out,), {})
    assert float(terms[{"FedGKD": "kd", "FedNTD": "ntd"}[type(local.method).__name__]]) == pytest.approx(0, abs=1e-7)


def test_fd_regularises_with_cross_entropy_towards_the_mean_of_the_label():
    local = ClassMeans(FD(gamma=2.0))
    aux = {
        "means": torch.tensor([[0.9, 0.1], [0.3, 0.7]]),
        "present": torch.tensor([1.0, 0.0]),  # nobody else has class 1
    }
    # Softmax of (ln 3, 0) is (3/4, 1/4). The sample of class 1 has no target and counts as zero in the batch mean.
    terms = local.loss({}, batch(0, 1), outputs([LN3, 0.0], [LN3, 0.0]), (), aux)
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25)) / 2
    assert float(terms["fd"]) == pytest.approx(2 * expected, rel=1e-5)


def test_fd_tallies_outputs_by_true_class_over_steps():
    local = ClassMeans(FD())
    tally = local.observe({}, batch(0, 1), outputs([LN3, 0.0], [0.0, 0.0]))
    tally = local.observe(tally, batch(0), outputs([0.0, LN3]))
    assert tally["counts"].tolist() == [2.0, 1.0]
    torch.testing.assert_close(tally["sums"], torch.tensor([[0.75 + 0.25, 0.25 + 0.75], [0.5, 0.5]]))


class _Classes:
    """Stands in for the server: two classes."""

    class federation:
        num_classes = 2


def _fd_with(tables, **hyper):
    strategy = FD(**hyper)
    strategy.server = _Classes()
    strategy.tables = {
        p: ClassOutputs(torch.tensor(means), torch.tensor(counts), strategy.space)
        for p, (means, counts) in tables.items()
    }
    return strategy


TABLES = {
    0: ([[0.8, 0.2], [0.4, 0.6]], [5.0, 5.0]),
    1: ([[0.6, 0.4], [0.0, 0.0]], [9.0, 0.0]),  # has no samples of class 1
    2: ([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
}


def test_fd_sends_the_mean_of_the_others_and_masks_what_nobody_else_has():
    strategy = _fd_with(TABLES)
    total = strategy.sums(strategy.tables.values())

    for_0 = strategy.table_for(0, *total)
    torch.testing.assert_close(for_0.means, torch.tensor([[0.8, 0.2], [0.0, 0.0]]))
    assert for_0.present.tolist() == [True, False]  # only client 0 itself has class 1

    for_1 = strategy.table_for(1, *total)  # plain mean of clients 0 and 2; zeros of missing classes are not in it
    torch.testing.assert_close(for_1.means, torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
    for_1.check(2, "probs")

    newcomer = strategy.table_for(7, *total)
    torch.testing.assert_close(newcomer.means, torch.tensor([[0.8, 0.2], [0.4, 0.6]]))


def test_fd_can_leave_a_clients_own_table_in_its_mean():
    strategy = _fd_with(TABLES, leave_one_out=False)
    total = strategy.sums(strategy.tables.values())
    for client in TABLES:  # (0.8 + 0.6 + 1) / 3, and client 0 alone
        table = strategy.table_for(client, *total)
        torch.testing.assert_close(table.means, torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
        assert table.present.tolist() == [True, True]


def test_fds_code_preset_is_kl_from_the_mean_of_all_logits(small):
    strategy = plugins.make_strategy(small({"name": "fd", "preset": "code"}))
    assert isinstance(strategy, FD)
    local = ClassMeans(strategy)
    tally = local.observe({}, batch(0, 0), outputs([LN9, 0.0], [1.0, -5.0]))
    torch.testing.assert_close(tally["sums"], torch.tensor([[LN9 + 1, -5.0], [0.0, 0.0]]))

    tables = {0: ([[2 * LN9, -1.0], [0.0, 0.0]], [5.0, 0.0]), 1: ([[0.0, 1.0], [0.0, 0.0]], [1.0, 0.0])}
    strategy = _fd_with(tables, **FD.presets["code"])
    own = strategy.table_for(0, *strategy.sums(strategy.tables.values()))
    torch.testing.assert_close(own.means, torch.tensor([[LN9, 0.0], [0.0, 0.0]]))

    # Softmax of the means' logits is (9/10, 1/10), of the client's (3/4, 1/4); nobody has class 1; γ is 1.
    aux = {"means": own.means, "present": own.present.float()}
    terms = local.loss({}, batch(0, 1), outputs([LN3, 0.0], [LN3, 0.0]), (), aux)
    kl = 0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)
    assert float(terms["fd"]) == pytest.approx(kl / 2, rel=1e-5)


def test_fd_does_not_depend_on_the_order_of_clients():
    forward, backward = _fd_with(TABLES), _fd_with(dict(reversed(TABLES.items())))
    for client in (0, 1, 2, 9):
        one = forward.table_for(client, *forward.sums(forward.tables.values()))
        two = backward.table_for(client, *backward.sums(backward.tables.values()))
        torch.testing.assert_close(one.means, two.means, rtol=0, atol=1e-7)


class _Said:
    """An upload that holds given outputs."""

    def __init__(self, rows):
        self.knowledge = Knowledge.of(ProxyOutputs(torch.tensor([3, 8]), torch.tensor(rows), "probs"))


def _dsfl(classes, **hyper):
    """A server that has asked for samples 3 and 8."""
    strategy = DSFL(**hyper)
    strategy.server = SimpleNamespace(federation=SimpleNamespace(num_classes=classes))  # type: ignore[assignment]
    strategy.asked = torch.tensor([3, 8])
    return strategy


def test_dsfl_averages_probabilities_and_sharpens_the_mean():
    strategy = _dsfl(3, temperature=0.1)
    uploads = [_Said([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), _Said([[0.3, 0.5, 0.2], [0.0, 1.0, 0.0]])]

    strategy.fuse(uploads)

    # Means (0.4, 0.4, 0.2) and (0.5, 0.5, 0); softmax of ten times that.
    def softmax10(*mean):
        powers = [math.exp(10 * m) for m in mean]
        return [p / sum(powers) for p in powers]

    expected = torch.tensor([softmax10(0.4, 0.4, 0.2), softmax10(0.5, 0.5, 0.0)])
    torch.testing.assert_close(strategy.labels.values, expected)
    assert strategy.labels.ids.tolist() == [3, 8]

    flipped = _dsfl(3, temperature=0.1)
    flipped.fuse(uploads[::-1])
    torch.testing.assert_close(flipped.labels.values, strategy.labels.values, rtol=0, atol=1e-7)


def test_dsfl_without_entropy_reduction_is_the_plain_mean():
    strategy = _dsfl(2, aggregation="mean")
    strategy.fuse([_Said([[0.5, 0.5], [1.0, 0.0]]), _Said([[0.1, 0.9], [0.0, 1.0]])])
    torch.testing.assert_close(strategy.labels.values, torch.tensor([[0.3, 0.7], [0.5, 0.5]]))


def test_dsfl_digests_with_cross_entropy_on_soft_labels():
    loss = soft_cross_entropy(torch.tensor([[LN3, 0.0]]), torch.tensor([[0.2, 0.8]]))
    assert float(loss) == pytest.approx(-(0.2 * math.log(0.75) + 0.8 * math.log(0.25)), rel=1e-6)


def test_feddf_of_one_client_has_nothing_to_distil(small, federate):
    # One member: the target is the student itself, and the loss of the first step is 0 (no norm layer).
    scenario = small({"name": "feddf", "steps": 5}, run__participation=0.01, run__rounds=1)
    _, events = federate(scenario)
    report = next(e for e in events if e["event"] == "round")["distill"]["mlp"]
    assert report["loss_first"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_feddf_of_one_client_has_nothing_to_distil_at_any_temperature(small, federate, space):
    method = {"name": "feddf", "steps": 5, "space": space, "temperature": 2.0}
    _, events = federate(small(method, run__participation=0.01, run__rounds=1))
    report = next(e for e in events if e["event"] == "round")["distill"]["mlp"]
    assert report["loss_first"] == pytest.approx(0.0, abs=1e-6)


def test_feddf_moves_the_average_towards_the_ensemble(small, federate):
    scenario = small({"name": "feddf", "steps": 200, "batch_size": 32, "lr": 0.01}, run__rounds=1)
    _, events = federate(scenario)
    report = next(e for e in events if e["event"] == "round")["distill"]["mlp"]
    assert report["loss_last"] < 0.2 * report["loss_first"]


def test_feddf_can_start_from_the_previous_student(small, federate):
    average, _ = federate(small({"name": "feddf", "steps": 1, "lr": 1e-9}, run__rounds=1))
    previous, _ = federate(small({"name": "feddf", "steps": 1, "lr": 1e-9, "student_from": "previous"}, run__rounds=1))
    initial = previous.server.initial("mlp")
    for name, tensor in previous.students["mlp"].items():
        torch.testing.assert_close(tensor, initial[name], atol=1e-6, rtol=0)
    assert any(not torch.allclose(t, initial[n], atol=1e-4) for n, t in average.students["mlp"].items())


def test_feddf_drops_members_below_chance(small, federate):
    scenario = small({"name": "feddf", "steps": 2, "drop_worst": True}, proxy__server_labels=40, partition__alpha=0.05)
    _, events = federate(scenario)
    dropped = [e for e in events if e["event"] == "dropped"]
    assert dropped and all(e["accuracy"] < 1.2 / 4 for e in dropped)


def test_feddf_stops_early_on_server_labels(small, federate):
    scenario = small(
        {"name": "feddf", "steps": 1000, "patience": 100, "lr": 1e-9}, proxy__server_labels=40, run__rounds=1
    )
    _, events = federate(scenario)
    report = next(e for e in events if e["event"] == "round")["distill"]["mlp"]
    assert report["stopped_early"] and report["steps"] == 200


def test_fedgkd_teacher_is_the_mean_of_the_last_m_averages(small, federate):
    averages = []
    for rounds in (1, 2, 3):
        strategy, _ = federate(small({"name": "fedgkd", "buffer": 2}), rounds=rounds)
        averages.append(strategy.students["mlp"])
    strategy.round += 1
    sent = strategy.broadcast([0])[0].get(Weights, "teacher").state
    for name, tensor in sent.items():
        expected = (averages[1][name].double() + averages[2][name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=0)


EXAMPLES = ["fedavg", "fedprox", "fedntd", "fedcad", "fedssd", "feddf", "fedbe", "fedftg"]
UNIFORM = ["fedgkd", "fedgkd_vote", "fedaux"]


@pytest.mark.parametrize(
    ("method", "uniform"),
    [
        *(({"name": name}, False) for name in EXAMPLES),
        *(({"name": name}, True) for name in UNIFORM),
        ({"name": "feddf", "preset": "code"}, True),
        ({"name": "fedavg", "weighting": "uniform"}, True),
        ({"name": "fedbe", "weighting": "uniform"}, True),
        ({"name": "fedgkd", "weighting": "examples"}, False),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_the_server_averages_uploads_with_the_weights_of_the_method(
    small, federate, tap_of, fast, needs, monkeypatch, method, uniform
):
    everybody = {"run__rounds": 1, "run__participation": 1.0, **needs(method["name"])}
    scenario, tap = small(fast(method["name"]) | method, **everybody), tap_of()
    monkeypatch.setattr(type(plugins.make_strategy(scenario)), "distill", lambda self: None)
    strategy, _ = federate(scenario, mods=[tap])

    uploads = [passed.up.get(Weights).state for passed in tap.of(1)]
    counts = [len(shard.train) for shard in strategy.server.federation.shards]
    assert len(uploads) == len(counts) == 6
    for name, tensor in strategy.students["mlp"].items():
        x = np.stack([state[name].double().numpy() for state in uploads])
        means = [x.mean(0), np.average(x, axis=0, weights=counts)]
        right, wrong = means if uniform else means[::-1]
        np.testing.assert_allclose(tensor.numpy(), right, rtol=0, atol=1e-6)
        assert np.abs(tensor.numpy() - wrong).max() > 1e-3


def filled(strategy, value, **kind):
    """Return weights of the mlp that are all the same."""
    return Weights({name: torch.full_like(t, value) for name, t in strategy.students["mlp"].items()}, "mlp", **kind)


def is_filled(state, value):
    return all(bool((tensor == value).all()) for tensor in state.values())


@pytest.fixture
def at_a_client(small):
    """Return a function: what absorbs at a client of a method, strategy, a student in some round."""

    def make(method, round, **changes):
        scenario = small(method, **changes)
        strategy = plugins.make_strategy(scenario)
        runtime = Runtime(scenario)
        strategy.students = {"mlp": dict(runtime.student(0, 1, Context(0, 0, {}, RecordDict(), {})).weights().state)}
        return runtime.local, strategy, runtime.student(0, round, Context(0, 0, {}, RecordDict(), {}))

    return make


def test_fedprox_is_held_near_what_was_received(at_a_client):
    local, strategy, student = at_a_client("fedprox", round=3)
    aux = local.absorb(student, Knowledge.of(filled(strategy, 0.25)))
    learn(student, local, aux)
    assert not is_filled(student.state, 0.25) and is_filled(aux["anchor"], 0.25)


@pytest.mark.parametrize(("buffer", "round", "taught"), [(5, 3, [0.5]), (5, 1, []), (1, 3, [0.25]), (1, 1, [])])
def test_fedgkd_distils_from_the_mean_that_was_sent(at_a_client, buffer, round, taught):
    local, strategy, student = at_a_client({"name": "fedgkd", "buffer": buffer}, round)
    sent = [filled(strategy, 0.25)]
    if buffer > 1 and round > 1:
        sent.append(filled(strategy, 0.5, kind="teacher"))
    local.absorb(student, Knowledge.of(*sent))
    assert is_filled(student.state, 0.25)
    assert len(student.teachers) == len(taught)
    assert all(is_filled(teacher.state, value) for teacher, value in zip(student.teachers, taught))


@pytest.mark.parametrize("round", [1, 3])
@pytest.mark.parametrize("name", ["fedntd", "fedcad", "fedssd"])
def test_the_model_received_teaches_and_does_not_learn(at_a_client, needs, name, round):
    local, strategy, student = at_a_client(name, round, **needs(name))
    sent = [filled(strategy, 0.25)]
    if name != "fedntd":
        sent.append(ClassWeights(torch.ones(4)))
    aux = local.absorb(student, Knowledge.of(*sent))
    assert is_filled(student.state, 0.25)
    (teacher,) = student.teachers
    assert is_filled(teacher.state, 0.25)
    before = teacher(student.data.gather(student.shard.train).x).logits.clone()
    learn(student, local, aux)
    assert not is_filled(student.state, 0.25) and is_filled(teacher.state, 0.25)
    after = teacher(student.data.gather(student.shard.train).x).logits
    assert torch.equal(after, before) and not after.requires_grad


@pytest.mark.parametrize("name", ["fedgkd", "fedgkd_vote"])
def test_an_architecture_that_nobody_has_trained_teaches_nobody(small, federate, name):
    changes = {"models__student": ["mlp", "cnn"], "models__options": {}, "proxy__server_labels": 30}
    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    scenario = small({"name": name, "buffer": 3}, **changes, data__options=images, run__participation=0.2)
    strategy, _ = federate(scenario, rounds=1)
    archs, (client,) = strategy.server.federation.archs, strategy.selected
    strategy.round += 1
    for arch in ("mlp", "cnn"):
        somebody = next(p for p in range(6) if archs[p] == arch)
        sent = strategy.broadcast([somebody])[somebody]
        assert (len(sent.payloads) > 1) == (arch == archs[client])


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedgkd", "fedntd", "dsfl", "fd"])
def test_two_rounds_on_digits(federate, digits, name):
    method = {"name": "dsfl", "open_size": 100, "distill_batch_size": 10} if name == "dsfl" else {"name": name}
    _, events = federate(digits(method, models__student="mlp", run__participation=1.0))
    last = [event for event in events if event["event"] == "round"][-1]
    assert last["received"] == 6 and last["accuracy"] > 0.3
