"""FedCAD and FedSSD: channel weights, loss, what travels, and what they must have in common with FedAvg."""

import math

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from sklearn.metrics import confusion_matrix

from fedkd import plugins
from fedkd.data.batches import Batch
from fedkd.errors import ScenarioError
from fedkd.models import Outputs
from fedkd.payloads import ClassWeights, Knowledge, Weights
from fedkd.students import predict
from strategies.fedcad import ClassWiseDistillation, FedCAD
from strategies.fedssd import FedSSD, SelectiveDistillation

LABELS = {"proxy__server_labels": 40}
BOTH = ["fedcad", "fedssd"]


def outputs(*rows):
    logits = torch.tensor(rows)
    return Outputs(logits, logits, ())


def batch(*labels):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)))


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def equal(one, two):
    return all(torch.equal(tensor, two.students["mlp"][name]) for name, tensor in one.students["mlp"].items())


def test_fedcad_weighs_squared_differences_of_logits_by_class():
    local = ClassWiseDistillation(FedCAD(m_max=2.0, threshold=0.1))
    student, teacher = outputs([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]), outputs([3.0, 1.0, 0.0], [1.0, 2.0, 5.0])
    # M = 2·(0.5 − 0.1, 0.3 − 0.1, 0) = (0.8, 0.4, 0), as 0.05 lies below the threshold.
    terms = local.loss({}, batch(0, 1), student, (teacher,), {"credibility": torch.tensor([0.5, 0.3, 0.05])})

    first = (0.8 * 3) ** 2 + (0.4 * 0) ** 2
    second = (0.8 * 0) ** 2 + (0.4 * 1) ** 2
    assert float(terms["kd"]) == pytest.approx((first + second) / 2)
    ce = (math.log(1 + math.e + math.e**2) + math.log(3)) / 2
    assert float(terms["ce"]) == pytest.approx(ce)


def test_fedssd_weighs_by_class_and_sample():
    local = SelectiveDistillation(FedSSD(m_max=1.5, threshold=0.1))
    # The teacher's probabilities of the labels are 3/4 and 1/4: M_sample = 1 − √(1/4) and 1 − √(3/4).
    student, teacher = outputs([0.0, 0.0], [0.0, 0.0]), outputs([math.log(3), 0.0], [math.log(3), 0.0])

    terms = local.loss({}, batch(0, 1), student, (teacher,), {"credibility": torch.tensor([0.9, 0.4])})

    one = 1.5 * (0.9 * 0.5 - 0.1) * math.log(3)  # class 0 of the first sample; its class 1 does not differ
    two = 1.5 * (0.9 * (1 - math.sqrt(0.75)) - 0.1) * math.log(3)
    assert float(terms["kd"]) == pytest.approx((one**2 + two**2) / 2, rel=1e-5)


def test_fedssd_in_float64_numpy():
    draw = np.random.default_rng(1)
    taught, own, trust = draw.normal(size=(16, 5)) * 3, draw.normal(size=(16, 5)), draw.uniform(size=5)
    labels = draw.integers(5, size=16)

    local = SelectiveDistillation(FedSSD())
    logits = [torch.tensor(z, dtype=torch.float32) for z in (own, taught)]
    out, teacher = (Outputs(z, z, ()) for z in logits)
    terms = local.loss({}, batch(*labels), out, (teacher,), {"credibility": torch.tensor(trust, dtype=torch.float32)})

    powers = np.exp(taught - taught.max(1, keepdims=True))
    right = (powers / powers.sum(1, keepdims=True))[np.arange(16), labels]
    weights = np.maximum(trust[None] * (1 - np.sqrt(1 - right))[:, None] - 0.1, 0)
    expected = np.mean(((weights * (taught - own)) ** 2).sum(1))
    assert float(terms["kd"]) == pytest.approx(expected, rel=1e-4)


def test_a_sure_teacher_makes_fedssd_fedcad_and_a_clueless_one_fedavg():
    trust = {"credibility": torch.tensor([0.9, 0.8])}
    student = outputs([0.5, 0.0])
    sure, wrong = outputs([60.0, 0.0]), outputs([-60.0, 0.0])
    by_class = ClassWiseDistillation(FedCAD()).loss({}, batch(0), student, (sure,), trust)
    by_both = SelectiveDistillation(FedSSD()).loss({}, batch(0), student, (sure,), trust)
    torch.testing.assert_close(by_both["kd"], by_class["kd"])
    assert float(SelectiveDistillation(FedSSD()).loss({}, batch(0), student, (wrong,), trust)["kd"]) == 0.0


@pytest.mark.parametrize("local", [ClassWiseDistillation(FedCAD()), SelectiveDistillation(FedSSD())])
def test_a_student_that_equals_its_teacher_has_loss_zero(local):
    out = outputs([1.0, -2.0, 0.5], [0.0, 3.0, 1.0])
    terms = local.loss({}, batch(0, 2), out, (out,), {"credibility": torch.ones(3)})
    assert float(terms["kd"]) == 0.0


def test_the_teachers_probability_may_be_one():
    local = SelectiveDistillation(FedSSD())
    weights = local.channel_weights(torch.tensor([[200.0, 0.0]]), torch.tensor([0]), {"credibility": torch.ones(2)})
    assert weights.tolist() == [pytest.approx([0.9, 0.9])]


@pytest.mark.parametrize("name", BOTH)
def test_the_servers_own_samples_say_how_credible_the_model_is(small, federate, name):
    strategy, events = federate(small(name, **LABELS))
    strategy.round += 1

    sent = strategy.broadcast([0, 1])[1]

    server, model = strategy.server, strategy.students["mlp"]
    assert all(torch.equal(tensor, model[name]) for name, tensor in sent.get(Weights).state.items())
    ids = server.federation.server_labels
    labels = np.asarray(server.federation.train.labels)[ids]
    guesses = predict(server.model("mlp", model), server.federation.train, ids).argmax(1).numpy()
    matrix = confusion_matrix(labels, guesses, labels=range(4), normalize="true")
    expected = [matrix[c, c] * (1 - max(matrix[j, c] for j in range(4) if j != c)) for c in range(4)]
    assert sent.get(ClassWeights).values.tolist() == pytest.approx(expected)
    assert max(expected) > 0.1  # the model has learnt something
    for event in rounds_of(events):
        assert event["bytes_down"]["class-weights"] == 4 * 4 * 4  # four clients, four classes
        assert len(event["distill"]["mlp"]["credibility"]) == 4


@pytest.mark.parametrize("name", BOTH)
def test_weight_zero_is_fedavg_to_the_bit_and_another_is_not(small, federate, name):
    plain, _ = federate(small("fedavg", **LABELS))
    for changes in ({"m_max": 0.0}, {"threshold": 0.999}):
        zero, _ = federate(small({"name": name, **changes}, **LABELS))
        assert equal(zero, plain)
    regularised, _ = federate(small({"name": name, "threshold": 0.0}, **LABELS))
    assert not equal(regularised, plain)


@pytest.mark.parametrize("name", BOTH)
def test_every_architecture_has_its_own_credibility(small, federate, name):
    scenario = small(
        name,
        models__student=["mlp", "cnn"],
        models__options={},
        data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
        run__participation=1.0,
        client__steps=2,
        **LABELS,
    )
    _, events = federate(scenario)
    last = rounds_of(events)[-1]
    assert last["received"] == 6 and last["distill"].keys() == {"mlp", "cnn"}
    assert last["distill"]["mlp"] != last["distill"]["cnn"]


@pytest.mark.parametrize(
    ("values", "reason"), [([1.0, 1.0], "wrong classes"), ([float("nan")] * 4, "NaN"), ([2.0] * 4, "outside")]
)
def test_a_client_refuses_weights_that_are_none(small, federate, values, reason):
    bad = Knowledge.of(ClassWeights(torch.tensor(values))).to_records()["class-weights"]

    def mod(message, context, call_next):
        if context.node_config["partition-id"] == 2 and "class-weights" in message.content:
            message.content = RecordDict({**message.content, "class-weights": bad})
        return call_next(message, context)

    _, events = federate(small("fedssd", run__rounds=2, run__participation=1.0, **LABELS), mods=[mod])
    refused = [e for e in events if e["event"] == "refused"]
    assert [e["round"] for e in refused] == [1, 2] and all(reason in e["reason"] for e in refused)
    assert [e["received"] for e in rounds_of(events)] == [5, 5]


@pytest.mark.parametrize("name", BOTH)
def test_labels_on_the_server_are_needed(small, name):
    with pytest.raises(ScenarioError, match="server_labels"):
        plugins.make_strategy(small(name))


@pytest.mark.parametrize("name", BOTH)
def test_they_resume_to_the_same_bits(small, resumes, name):
    resumes(small({"name": name, "threshold": 0.0}, **LABELS))


@pytest.mark.parametrize("name", BOTH)
def test_they_run_on_digits(small, federate, name):
    scenario = small(name, data={"source": "digits", "options": {}}, run__rounds=2, **LABELS)
    _, events = federate(scenario)
    assert rounds_of(events)[-1]["accuracy"] > 0.2


def test_ray_gives_the_same_bits_as_this_process(small, tmp_path, ray_session):
    from fedkd import run

    system = {"trainer": "sequential", "cohort": 2}
    inline = run.execute(small("fedssd", system=system, run__rounds=2, **LABELS), out=tmp_path / "inline")
    system |= {"engine": "ray", "workers": 2}
    result = run.execute(small("fedssd", system=system, run__rounds=2, **LABELS), out=tmp_path / "ray")
    assert result.summary["predictors"] == inline.summary["predictors"]
