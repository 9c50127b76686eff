"""Scores of samples and counts of labels: round trip, bytes, refusals."""

import pytest
import torch

from fedkd.arrays import array_record
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, LabelCounts, SampleScores


def test_they_survive_the_wire_and_take_four_bytes_a_number():
    sent = Knowledge.of(SampleScores(torch.tensor([0.25, 1.0, 0.0])), LabelCounts(torch.tensor([7, 0])))
    records = sent.to_records()
    got = Knowledge.from_records(records)
    assert got.get(SampleScores).values.tolist() == [0.25, 1.0, 0.0]
    assert got.get(LabelCounts).counts.tolist() == [7, 0] and got.get(LabelCounts).counts.dtype == torch.int64
    assert sent.nbytes == {"sample-scores": 4 * 3, "label-counts": 4 * 2} == got.nbytes
    for kind, size in sent.nbytes.items():
        assert sum(array.numpy().nbytes for array in records.array_records[kind].values()) == size


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.5, float("nan")], "NaN"),
        ([0.5, float("inf")], "infinite"),
        ([0.5, -0.1], r"outside \[0"),
        ([0.5, 1.1], r"outside \[0, 1\]"),
        ([0.5], "wrong shape"),
        ([0.5, 0.5, 0.5], "wrong shape"),
        ([[0.5, 0.5]], "wrong shape"),
    ],
)
def test_scores_that_are_none_are_refused(values, reason):
    SampleScores(torch.tensor([0.0, 1.0])).check(2, most=1.0)
    with pytest.raises(KnowledgeError, match=reason):
        SampleScores(torch.tensor(values)).check(2, most=1.0)


def test_scores_of_another_type_are_refused():
    with pytest.raises(KnowledgeError, match="wrong type"):
        SampleScores(torch.zeros(2, dtype=torch.float64)).check(2)


# In 64 bits their sum would be 7.
WRAPS = [2**63 - 1, 2**63 - 1, 9], "18446744073709551623 samples"


@pytest.mark.parametrize(
    ("counts", "reason"),
    [([3, 4], "wrong classes"), ([3, 5, -1], "negative"), ([3, 4, 1], "8 samples, but 7 examples"), WRAPS],
)
def test_counts_that_cannot_be_are_refused(counts, reason):
    LabelCounts(torch.tensor([3, 4, 0])).check(3, 7)
    with pytest.raises(KnowledgeError, match=reason):
        LabelCounts(torch.tensor(counts)).check(3, 7)


def test_counts_that_are_no_integers_are_refused_when_read():
    records = Knowledge.of(LabelCounts(torch.tensor([1, 2]))).to_records()
    records["label-counts"] = array_record({"counts": torch.tensor([1.5, float("nan")]).numpy()})
    with pytest.raises(KnowledgeError, match="no integers"):
        Knowledge.from_records(records)
