"""Weights of members: numbers by hand, sums, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.server import weighting


def test_by_size() -> None:
    assert weighting.by_size([10, 30, 0]).tolist() == [0.25, 0.75, 0.0]
    with pytest.raises(KnowledgeError, match="all members are 0"):
        weighting.by_size([0, 0])
    with pytest.raises(KnowledgeError, match="not negative"):
        weighting.by_size([1, -1])
    with pytest.raises(KnowledgeError, match="no members"):
        weighting.uniform(0)


def test_by_class_is_uniform_on_classes_that_nobody_has() -> None:
    weights = weighting.by_class(torch.tensor([[6, 0, 0], [2, 0, 5]]))
    # class 0: 6/8, 2/8; class 1: nobody; class 2: only the second
    assert weights.tolist() == [[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]]
    with pytest.raises(KnowledgeError, match="members first"):
        weighting.by_class(torch.tensor([1, 2]))


def test_by_certainty() -> None:
    # FedAUX: scores 0.2 and 0.6 weigh 1/4 and 3/4; without any certainty members weigh equally
    weights = weighting.by_certainty(torch.tensor([[0.2, 0.0], [0.6, 0.0]], dtype=torch.double))
    assert weights.flatten().tolist() == pytest.approx([0.25, 0.5, 0.75, 0.5])


def test_entropy_by_hand() -> None:
    # H(1/2, 1/4, 1/4) = 1/2·log 2 + 2·1/4·log 4 = 1.5 log 2; 0·log 0 = 0
    h = weighting.entropy(torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]))
    assert h.tolist() == pytest.approx([1.5 * math.log(2), 0.0])


def test_by_entropy_by_hand() -> None:
    half = [0.5, 0.5, 0.0, 0.0]  # H = log 2 = 0.693147, 1/H = 1.442695
    quarter = [0.25] * 4  # H = log 4, 1/H = 0.721348
    probs = torch.tensor([[half], [quarter]])
    assert weighting.by_entropy(probs, "inverse").flatten().tolist() == pytest.approx([2 / 3, 1 / 3])
    # softmax(1.442695, 0.721348) = 1 / (1 + e^-0.721348) = 1 / (1 + 0.486096) = 0.672904
    assert weighting.by_entropy(probs).flatten().tolist() == pytest.approx([0.672904, 0.327096], abs=1e-6)


def test_by_entropy_mask() -> None:
    probs = torch.full((3, 2, 2), 0.5)
    mask = torch.tensor([[True, False], [True, False], [False, False]])
    weights = weighting.by_entropy(probs, mask=mask)
    assert weights.tolist() == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]


def test_certain_members_do_not_overflow() -> None:
    probs = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.5, 0.5]]])
    for rule in ("softmax", "inverse"):
        weights = weighting.by_entropy(probs, rule).flatten()
        assert weights[:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    with pytest.raises(ScenarioError, match="median"):
        weighting.by_entropy(probs, "median")  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6))
def test_weights_sum_to_one(members: int, samples: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(members, samples, classes, generator=generator).mul(5).softmax(2)
    counts = torch.randint(0, 3, (members, classes), generator=generator)
    for weights in (
        weighting.uniform(members),
        weighting.by_size(counts.sum(1) + 1),
        weighting.by_class(counts),
        weighting.by_certainty(probs[:, :, 0]),
        weighting.by_entropy(probs),
        weighting.by_entropy(probs, "inverse"),
    ):
        total = weights.sum(0)
        assert bool((weights >= 0).all())
        assert torch.allclose(total, torch.ones_like(total))
