"""Payloads: round trip through Flower records, bytes by the formulas, refusals."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.errors import KnowledgeError
from fedkd.payloads import (
    ClassOutputs,
    FeatureMaps,
    Knowledge,
    PeerOutputs,
    ProxyOutputs,
    Request,
    SampleKnowledge,
    Weights,
)

STATE = {"w": torch.randn(3, 2), "b": torch.randn(3), "bn.num_batches_tracked": torch.tensor(7)}


def test_everything_survives_the_wire():
    sent = Knowledge.of(
        Weights(STATE, "cnn"),
        Weights({"w": torch.ones(1)}, "cnn", kind="teacher"),
        ProxyOutputs(torch.tensor([4, 1]), torch.rand(2, 3), "logits"),
        ClassOutputs(torch.rand(3, 3), torch.tensor([1.0, 0.0, 2.0]), "probs"),
        Request(torch.tensor([5, 6, 7])),
        num_examples=11,
        metrics={"loss": 0.5},
    )

    got = Knowledge.from_records(sent.to_records({"server-round": 3}))

    assert got.num_examples == 11 and got.metrics == {"loss": 0.5}
    assert got.get(Weights).arch == "cnn"
    for name, tensor in STATE.items():
        assert torch.equal(got.get(Weights).state[name], tensor)
        assert got.get(Weights).state[name].dtype == tensor.dtype
    assert torch.equal(got.get(Weights, "teacher").state["w"], torch.ones(1))
    assert got.get(ProxyOutputs).ids.tolist() == [4, 1] and got.get(ProxyOutputs).space == "logits"
    assert torch.equal(got.get(ProxyOutputs).values, sent.get(ProxyOutputs).values)
    assert got.get(ClassOutputs).present.tolist() == [True, False, True]
    assert got.get(Request).ids.tolist() == [5, 6, 7]
    assert got.nbytes == sent.nbytes


def test_bytes_are_the_formulas():
    assert Weights(STATE, "cnn").nbytes == 4 * (6 + 3) + 8  # float32 scalars, one int64 counter
    assert ProxyOutputs(torch.arange(50), torch.rand(50, 10), "probs").nbytes == 4 * 50 * 10 + 4 * 50
    assert ClassOutputs(torch.rand(10, 10), torch.ones(10), "probs").nbytes == 4 * 10 * 10 + 4 * 10
    assert Request(torch.arange(50)).nbytes == 4 * 50


@pytest.mark.parametrize("payload", ["weights", "proxy-outputs", "class-outputs", "request"])
def test_bytes_are_those_of_the_arrays_on_the_wire(payload):
    knowledge = Knowledge.of(
        Weights(STATE, "cnn"),
        ProxyOutputs(torch.arange(5), torch.rand(5, 3), "probs"),
        ClassOutputs(torch.rand(3, 3), torch.ones(3), "probs"),
        Request(torch.arange(5)),
    )
    arrays = knowledge.to_records().array_records[payload].values()
    assert knowledge.nbytes[payload] == sum(a.numpy().nbytes for a in arrays)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w": torch.full((3, 2), float("nan"))}, "NaN"),
        ({"w": torch.zeros(2, 3)}, "wrong shape"),
        ({"w": torch.zeros(3, 2, dtype=torch.float64)}, "wrong type"),
        ({"other": torch.zeros(1)}, "wrong keys"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, reason):
    with pytest.raises(KnowledgeError, match=reason):
        Weights(STATE | change, "cnn").check(STATE)


def test_proxy_outputs_that_were_not_asked_for_are_refused():
    ids, good = torch.tensor([2, 5]), torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    ProxyOutputs(ids, good, "probs").check(2, ids, "probs")
    bad = {
        "wrong space": (ProxyOutputs(ids, good, "logits"), 2),
        "wrong sample ids": (ProxyOutputs(ids.flip(0), good, "probs"), 2),
        "wrong shape": (ProxyOutputs(ids, good, "probs"), 3),
        "NaN": (ProxyOutputs(ids, good * float("nan"), "probs"), 2),
        "no probability": (ProxyOutputs(ids, good * 2, "probs"), 2),
    }
    for reason, (outputs, classes) in bad.items():
        with pytest.raises(KnowledgeError, match=reason):
            outputs.check(classes, ids, "probs")


def test_absurd_outputs_and_features_are_refused():
    ids, good, labels = torch.arange(2), torch.full((2, 2), -1e6), torch.tensor([0, 1])

    def check(logits, features):
        ProxyOutputs(ids, logits, "logits").check(2, ids, "logits")
        ClassOutputs(logits, torch.ones(2), "logits").check(2, "logits")
        PeerOutputs(ids, torch.tensor([3]), torch.ones(1), logits[None], False).check(2, 2)
        SampleKnowledge(ids, logits).check(2, ids)
        FeatureMaps(ids, features, logits, labels).check(2, (2,), 2)

    check(good, good)
    for logits, features in ((good * 1.01, good), (-good * 3e32, good), (good, good * 2)):
        with pytest.raises(KnowledgeError, match="beyond 1e\\+06 they are of a model that has diverged"):
            check(logits, features)


def test_class_tables_of_other_classes_are_refused():
    table = ClassOutputs(torch.full((3, 3), 1 / 3), torch.tensor([1.0, 0.0, 1.0]), "probs")
    table.check(3, "probs")
    with pytest.raises(KnowledgeError, match="wrong classes"):
        table.check(4, "probs")
    with pytest.raises(KnowledgeError, match="negative"):
        ClassOutputs(table.means, -table.counts, "probs").check(3, "probs")


def test_a_request_outside_the_proxy_set_is_refused():
    with pytest.raises(KnowledgeError, match="outside"):
        Request(torch.tensor([0, 10])).check(10)


def test_records_of_unknown_type_are_refused_not_evaluated():
    records = RecordDict({"x": ArrayRecord({"a": Array(torch.ones(1).numpy())})})
    with pytest.raises(KnowledgeError, match="unknown type"):
        Knowledge.from_records(records)
    records["x.meta"] = ConfigRecord({"type": "ProxyOutputs"})
    with pytest.raises(KnowledgeError, match="cannot be read"):
        Knowledge.from_records(records)


def test_a_payload_that_is_missing_is_named():
    with pytest.raises(KnowledgeError, match="no weights in the message"):
        Knowledge().get(Weights)


def test_another_payload_under_a_known_name_is_refused():
    swapped = Knowledge({"weights": ProxyOutputs(torch.arange(2), torch.rand(2, 3), "probs")})
    with pytest.raises(KnowledgeError, match="weights is a ProxyOutputs, not a Weights"):
        swapped.get(Weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_outputs_of_another_type_are_refused(dtype):
    ids = torch.arange(2)
    with pytest.raises(KnowledgeError, match="wrong type"):
        ProxyOutputs(ids, torch.ones(2, 3).to(dtype), "logits").check(3, ids, "logits")
    with pytest.raises(KnowledgeError, match="wrong type"):
        ClassOutputs(torch.ones(3, 3).to(dtype), torch.ones(3), "logits").check(3, "logits")


@pytest.mark.parametrize("metrics", [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": [1.0]}])
def test_metrics_that_are_no_finite_numbers_are_refused(metrics):
    records = Knowledge(num_examples=1).to_records()
    records["metrics"] = MetricRecord({"num-examples": 1, **metrics})
    with pytest.raises(KnowledgeError, match="'loss' is not a finite number"):
        Knowledge.from_records(records)


@pytest.mark.parametrize("count", [-1, 10**400, 1.5])
def test_counts_that_are_none_are_refused(count):
    records = Knowledge().to_records()
    records["metrics"] = MetricRecord({"num-examples": count})
    with pytest.raises(KnowledgeError, match="not a count"):
        Knowledge.from_records(records)


def test_arrays_without_data_are_refused():
    records = Knowledge.of(Request(torch.arange(3))).to_records()
    records["request"] = ArrayRecord({"ids": Array("int32", (3,), "numpy.ndarray", b"")})
    with pytest.raises(KnowledgeError, match="cannot be read"):
        Knowledge.from_records(records)
