"""Weights of classes and teachers: bytes, the wire, refusals."""

import pytest
import torch

from fedkd.errors import KnowledgeError
from fedkd.payloads import ClassWeights, Knowledge, TeacherWeights


def test_they_survive_the_wire_in_four_bytes_each():
    sent = Knowledge.of(ClassWeights(torch.tensor([0.0, 0.25, 1.0])), TeacherWeights(torch.tensor([0.75, 0.25])))

    records = sent.to_records()
    got = Knowledge.from_records(records)

    assert torch.equal(got.get(ClassWeights).values, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(got.get(TeacherWeights).values, torch.tensor([0.75, 0.25]))
    assert sent.nbytes == got.nbytes == {"class-weights": 12, "teacher-weights": 8}
    for kind, nbytes in sent.nbytes.items():
        assert nbytes == sum(array.numpy().nbytes for array in records.array_records[kind].values())
    got.get(ClassWeights).check(3)
    got.get(TeacherWeights).check()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.5, 0.5], "wrong classes"),
        ([[0.5, 0.5, 0.5]], "wrong classes"),
        ([0.5, float("nan"), 0.5], "NaN"),
        ([0.5, float("inf"), 0.5], "NaN or infinite"),
        ([0.5, -0.1, 0.5], r"outside \[0, 1\]"),
        ([0.5, 1.1, 0.5], r"outside \[0, 1\]"),
        (torch.tensor([1, 0, 1]), "wrong type"),
    ],
)
def test_class_weights_that_are_none_are_refused(values, reason):
    with pytest.raises(KnowledgeError, match=reason):
        ClassWeights(torch.as_tensor(values)).check(3)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "wrong shape"),
        ([[1.0]], "wrong shape"),
        ([0.5, 0.4], "sum to 1"),
        ([1.5, -0.5], "outside"),
        ([0.5, float("nan")], "NaN"),
        (torch.tensor([0.5, 0.5], dtype=torch.float64), "wrong type"),
    ],
)
def test_teacher_weights_that_are_none_are_refused(values, reason):
    with pytest.raises(KnowledgeError, match=reason):
        TeacherWeights(torch.as_tensor(values)).check()
