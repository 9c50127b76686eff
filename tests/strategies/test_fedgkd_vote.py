"""FedGKD-VOTE: votes, loss, what travels, and what it must have in common with FedGKD and FedAvg."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from fedkd import plugins
from fedkd.client.runtime import Runtime
from fedkd.data.batches import Batch
from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.models import Outputs
from fedkd.payloads import Knowledge, TeacherWeights, Weights
from fedkd.students import predict
from strategies.fedgkd import FedGKD, FedGKDVote, GlobalDistillation, VotedDistillation

LN3, LN9 = math.log(3), math.log(9)
LABELS = {"proxy__server_labels": 40}
THETA = 4 * (12 * 16 + 16 + 16 * 4 + 4)  # bytes of the MLP 12-16-4


def outputs(*rows):
    logits = torch.tensor(rows)
    return Outputs(logits, logits, ())


def batch(*labels):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)))


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def equal(one, two):
    return all(torch.equal(tensor, two.students["mlp"][name]) for name, tensor in one.students["mlp"].items())


def test_votes_are_a_softmax_of_negative_losses_newest_first():
    strategy = FedGKDVote(tau=0.5)
    strategy.losses = {"mlp": [1.2, 0.4, 0.9], "cnn": [9.0, 9.0, 9.0]}

    powers = np.exp(-np.array([0.9, 0.4, 1.2], dtype=np.float64) / 0.5)
    np.testing.assert_allclose(strategy.votes("mlp").numpy(), powers / powers.sum(), rtol=1e-6)
    np.testing.assert_allclose(strategy.votes("cnn").numpy(), [1 / 3, 1 / 3, 1 / 3], rtol=1e-6)


def test_votes_by_hand():
    strategy = FedGKDVote(tau=1.0)
    strategy.losses = {"mlp": [LN3, 0.0]}
    assert strategy.votes("mlp").tolist() == pytest.approx([0.75, 0.25])  # 1 and 1/3, divided by their sum


def test_a_model_that_diverged_has_no_vote_and_several_share_it():
    strategy = FedGKDVote()
    labels = torch.tensor([0, 1])
    for logits, finite in (([[1.0, 0.0], [0.0, 1.0]], True), ([[float("nan"), 0.0]] * 2, False)):
        strategy.server = SimpleNamespace(label_logits=lambda *_, out=logits: (torch.tensor(out), labels))
        loss = strategy.validation_loss("mlp", {})
        assert math.isfinite(loss) and (loss == pytest.approx(math.log(1 + math.exp(-1)))) == finite
        strategy.losses = {"mlp": [loss, 0.3]}
        assert strategy.votes("mlp")[1] == pytest.approx(0.0 if not finite else strategy.votes("mlp")[1])
    strategy.losses = {"mlp": [loss, loss]}
    assert strategy.votes("mlp").tolist() == [0.5, 0.5]


def test_the_loss_is_the_voted_sum_of_the_distances_from_each_teacher():
    local = VotedDistillation(FedGKDVote(coefficient=0.1, temperature=2.0))
    student, teachers = outputs([0.0, 0.0]), (outputs([LN9, 0.0]), outputs([0.0, 0.0]), outputs([0.0, LN9]))
    # At T = 2 the first and the last teacher are (3/4, 1/4) and (1/4, 3/4), the student and the second (1/2, 1/2).
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)

    terms = local.loss({}, batch(0), student, teachers, {"votes": torch.tensor([0.5, 0.3, 0.2])})

    assert float(terms["kd"]) == pytest.approx(0.1 * 4 * (0.5 + 0.2) * kl, rel=1e-5)
    assert float(terms["ce"]) == pytest.approx(math.log(2))


def test_a_client_takes_the_teachers_in_the_order_of_their_votes(small):
    runtime = Runtime(small("fedgkd_vote", **LABELS))
    student = runtime.student(0, 3, Context(0, 0, {}, RecordDict(), {}))
    state = student.weights().state
    sent = [
        Weights({name: torch.full_like(tensor, value) for name, tensor in state.items()}, "mlp", kind=kind)
        for kind, value in {"weights": 0.5, "teacher-3": 0.125, "teacher-2": 0.25}.items()
    ]
    aux = runtime.local.absorb(student, Knowledge.of(*sent, TeacherWeights(torch.tensor([0.5, 0.3, 0.2]))))
    assert [{float(t.unique()) for t in teacher.state.values()} for teacher in student.teachers] == [
        {0.5},
        {0.25},
        {0.125},
    ]
    assert aux["votes"].tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_its_gradient_reaches_the_student():  # in the released branch it does not
    local = VotedDistillation(FedGKDVote(coefficient=1.0))
    student = outputs([0.0, 0.0])
    student.logits.requires_grad_()
    local.loss({}, batch(0), student, (outputs([LN3, 0.0]),), {"votes": torch.ones(1)})["kd"].backward()
    # The gradient of KL(t ‖ softmax(z)) is softmax(z) − t = (1/2, 1/2) − (3/4, 1/4).
    torch.testing.assert_close(student.logits.grad, torch.tensor([[-0.25, 0.25]]))


def test_no_teacher_no_term():
    local = VotedDistillation(FedGKDVote())
    assert float(local.loss({}, batch(0), outputs([0.0, 0.0]), (), {})["kd"]) == 0.0


def test_mse_is_a_mean_over_samples_and_classes_as_in_the_released_code():
    local = GlobalDistillation(FedGKD(kind="mse", coefficient=1.0))
    terms = local.loss({}, batch(0, 0), outputs([0.0, 0.0], [1.0, 0.0]), (outputs([2.0, 0.0], [1.0, 4.0]),), {})
    assert float(terms["kd"]) == pytest.approx((4 + 0 + 0 + 16) / 4)


def test_the_last_m_models_travel_with_their_votes(small, federate):
    scenario = small({"name": "fedgkd_vote", "buffer": 3}, run__rounds=5, **LABELS)
    models = [federate(scenario, rounds=r)[0].students["mlp"] for r in (1, 2, 3, 4)]
    strategy, events = federate(scenario, rounds=4)
    strategy.round += 1

    sent = strategy.broadcast([0, 1])[0]

    assert list(sent.payloads) == ["weights", "teacher-weights", "teacher-2", "teacher-3"]
    for kind, model in {"weights": models[3], "teacher-2": models[2], "teacher-3": models[1]}.items():
        assert all(torch.equal(tensor, model[name]) for name, tensor in sent.get(Weights, kind).state.items())
    federation = strategy.server.federation
    ids = federation.server_labels
    labels = np.asarray(federation.train.labels)[ids]
    losses = []
    for model in models[:0:-1]:  # newest first, without the first
        logits = predict(strategy.server.model("mlp", model), federation.train, ids).double().numpy()
        shifted = logits - logits.max(1, keepdims=True)
        losses.append(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(ids)), labels]))
    powers = np.exp(-np.array(losses) / 0.2)
    np.testing.assert_allclose(sent.get(TeacherWeights).values.numpy(), powers / powers.sum(), rtol=1e-5)
    assert rounds_of(events)[-1]["distill"]["mlp"]["validation_loss"] == pytest.approx(losses[0])


def test_bytes_grow_to_m_models(small, federate):
    _, events = federate(small({"name": "fedgkd_vote", "buffer": 3}, run__rounds=5, **LABELS))
    for event in rounds_of(events):
        teachers = min(3, event["round"] - 1)
        expected = {"weights": 4 * THETA}  # four clients a round
        if teachers:
            expected["teacher-weights"] = 4 * 4 * teachers
        expected |= {f"teacher-{number}": 4 * THETA for number in range(2, teachers + 1)}
        assert event["bytes_down"] == expected and event["bytes_up"] == {"weights": 4 * THETA}
    assert sum(expected.values()) == 4 * (3 * THETA + 4 * 3)  # M·4·|θ| + 4·M a client


@pytest.mark.parametrize("buffer", [1, 3])
def test_coefficient_zero_is_fedavg_to_the_bit(small, federate, buffer):
    method = {"name": "fedgkd_vote", "coefficient": 0.0, "buffer": buffer}
    zero, _ = federate(small(method, **LABELS))
    plain, _ = federate(small({"name": "fedavg", "weighting": "uniform"}, **LABELS))
    assert equal(zero, plain)


def test_one_teacher_is_fedgkd_with_one_teacher_to_the_bit(small, federate):
    settings = {"coefficient": 1.0, "buffer": 1}
    vote, _ = federate(small({"name": "fedgkd_vote", **settings}, **LABELS))
    plain, _ = federate(small({"name": "fedgkd", **settings}, **LABELS))
    fedavg, _ = federate(small({"name": "fedavg", "weighting": "uniform"}, **LABELS))
    assert equal(vote, plain) and not equal(vote, fedavg)


def test_every_architecture_has_its_own_teachers_and_votes(small, federate):
    scenario = small(
        "fedgkd_vote",
        models__student=["mlp", "cnn"],
        models__options={},
        data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
        run__participation=1.0,
        client__steps=2,
        **LABELS,
    )
    strategy, events = federate(scenario)
    last = rounds_of(events)[-1]
    assert last["received"] == 6 and last["distill"].keys() == {"mlp", "cnn"}
    strategy.round += 1
    sent = strategy.broadcast([0, 1])
    assert [sent[k].get(Weights, "teacher-2").arch for k in (0, 1)] == ["mlp", "cnn"]
    assert not torch.equal(*(sent[k].get(TeacherWeights).values for k in (0, 1)))


def test_a_client_refuses_votes_that_are_none_and_missing_teachers(small, federate):
    bad = iter([TeacherWeights(torch.tensor([0.7, 0.7])), TeacherWeights(torch.full((4,), 0.25))])

    def mod(message, context, call_next):
        if context.node_config["partition-id"] == 2 and "teacher-2" in message.content:
            spoilt = Knowledge.of(next(bad)).to_records()
            message.content = RecordDict({**message.content, "teacher-weights": spoilt["teacher-weights"]})
        return call_next(message, context)

    _, events = federate(small("fedgkd_vote", run__rounds=4, run__participation=1.0, **LABELS), mods=[mod])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"]) for e in refused] == [(3, 2), (4, 2)]
    assert "do not sum to 1" in refused[0]["reason"] and "no teacher-4" in refused[1]["reason"]
    assert rounds_of(events)[-1]["received"] == 5


def test_a_vote_for_a_teacher_that_did_not_come_is_refused():
    student = SimpleNamespace(load=lambda w: None, teach=lambda w: None, device="cpu")
    knowledge = Knowledge.of(Weights({}, "mlp"), TeacherWeights(torch.tensor([0.5, 0.5])))
    with pytest.raises(KnowledgeError, match="no teacher-2"):
        VotedDistillation(FedGKDVote()).absorb(student, knowledge)  # type: ignore[arg-type]


def test_it_needs_labels_on_the_server(small):
    with pytest.raises(ScenarioError, match="server_labels"):
        plugins.make_strategy(small("fedgkd_vote"))


def test_it_resumes_to_the_same_bits(small, resumes):
    resumes(small({"name": "fedgkd_vote", "buffer": 2}, run__rounds=4, **LABELS))


def test_it_runs_on_digits(small, federate):
    scenario = small("fedgkd_vote", data={"source": "digits", "options": {}}, run__rounds=2, **LABELS)
    _, events = federate(scenario)
    assert rounds_of(events)[-1]["accuracy"] > 0.2
