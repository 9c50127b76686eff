"""Robust means of an ensemble's members, by hand and against slow ones."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.server.ensemble import Ensemble
from fedkd.server.members import StoredMember
from fedkd.server.reduces import geometric, spectral, trimmed


def stored(row: list[float], space: str = "logits", weight: float = 1.0) -> StoredMember:
    return StoredMember([0], torch.tensor([row]), space, weight)


def values(members: list, **options) -> Tensor:
    return Ensemble(members, **options).targets().values


FIVE = [stored([x, -x]) for x in (1.0, 2.0, 3.0, 4.0, 100.0)]


def test_median_and_trimmed_mean() -> None:
    assert values(FIVE, reduce="median").tolist() == [[3.0, -3.0]]
    assert values(FIVE[:4], reduce="median").tolist() == [[2.5, -2.5]]
    # a fifth of five members off at each end: (2 + 3 + 4)/3
    assert values(FIVE, reduce="trimmed").tolist() == [[3.0, -3.0]]
    # 0.4 of five is two at each end; 0 is the mean, 110/5
    assert values(FIVE, reduce=trimmed(0.4)).tolist() == [[3.0, -3.0]]
    assert values(FIVE, reduce=trimmed(0.0)).tolist() == [[22.0, -22.0]]


def test_coordinatewise_median_of_probabilities_is_renormalised() -> None:
    rows = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]
    # medians 0.2, 0.3, 0.3 sum to 0.8
    result = values([stored(r, space="probs") for r in rows], space="probs", reduce="median")
    assert result.flatten().tolist() == pytest.approx([0.25, 0.375, 0.375])
    # three members that agree on nothing: medians are all 0
    hot = [stored(r, space="probs") for r in torch.eye(3).tolist()]
    assert values(hot, space="probs", reduce="median").flatten().tolist() == pytest.approx([1 / 3] * 3)


def test_geometric_median_by_hand() -> None:
    # In one dimension it is the median: 3 of 1, 2, 3, 4, 100 (points lie on a line)
    assert values(FIVE, reduce="geometric").flatten().tolist() == pytest.approx([3.0, -3.0], abs=1e-4)
    # Corners of a square and its centre
    square = [stored(r) for r in ([0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0])]
    assert values(square, reduce="geometric").flatten().tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    # Fermat point of an isosceles triangle (±1, 0), (0, 3): 120° angles at (0, 1/√3)
    triangle = [stored(r) for r in ([-1.0, 0.0], [1.0, 0.0], [0.0, 3.0])]
    result = values(triangle, reduce="geometric").flatten().tolist()
    assert result == pytest.approx([0.0, 1 / math.sqrt(3)], abs=1e-5)


def test_geometric_median_does_not_stick_to_a_member() -> None:
    # The mean of -4, 0, 1, 1, 2 is the member 0; the median is 1
    members = [stored([x, 0.0]) for x in (-4.0, 0.0, 1.0, 1.0, 2.0)]
    assert values(members, reduce="geometric").flatten().tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


def test_geometric_median_with_weights_and_bounded_iterations() -> None:
    members = [stored([0.0, 0.0], weight=5.0), stored([9.0, 1.0]), stored([7.0, 3.0])]
    # one member outweighs the others: it is the median
    assert values(members, reduce="geometric").flatten().tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    # no iteration at all: the weighted mean (16/7, 4/7)
    start = values(members, reduce=geometric(iterations=0)).flatten().tolist()
    assert start == pytest.approx([16 / 7, 4 / 7])


def test_weighted_median_and_trimmed_mean() -> None:
    # Like five members 1, 2, 2, 2, 9
    members = [stored([1.0, -1.0]), stored([2.0, -2.0], weight=3.0), stored([9.0, -9.0])]
    assert values(members, reduce="median").tolist() == [[2.0, -2.0]]
    assert values(members, reduce="trimmed").tolist() == [[2.0, -2.0]]
    # 1 and 9 have half of the weight each: their middle
    assert values(members, reduce="median", weights=[2.0, 0.0, 2.0]).tolist() == [[5.0, -5.0]]
    # A fifth of the weight 10 is 2: off go 1 (weight 1) and 9 (weight 2), not what weighs more than that
    assert values(members, reduce="trimmed", weights=[1.0, 7.0, 2.0]).tolist() == [[2.0, -2.0]]
    assert values(members, reduce="trimmed", weights=[1.0, 6.0, 3.0]).flatten().tolist() == pytest.approx(
        [(6 * 2 + 3 * 9) / 9, -(6 * 2 + 3 * 9) / 9]
    )
    # Weights of each sample: there, the second member alone
    each = values(members, reduce="median", weights=torch.tensor([[0.0], [1.0], [0.0]]), per="sample")
    assert each.tolist() == [[2.0, -2.0]]


def slow_filter(members, corrupted, weights):
    """The spectral filter of one sample in NumPy: eigenvectors of the covariance matrix, one step at a time."""
    w, left = weights / weights.sum(), 2 * corrupted
    while left > 1e-12:
        share = w / w.sum()
        offset = members - share @ members
        variance, axes = np.linalg.eigh((offset * share[:, None]).T @ offset)
        if variance[-1] < 1e-20:
            break
        distance = ((offset @ axes[:, variance > variance[-1] * (1 - 1e-5)]) ** 2).sum(1) * (w > 0)
        loss = w * (distance / distance.max())
        step = min(1.0, left / loss.sum())
        w, left = w - step * loss, left - step * loss.sum()
    return w @ members / w.sum()


def test_spectral_filter_by_hand() -> None:
    # On a line: 0, 0, 0, 1 with mean 1/4 have squared distances 1, 1, 1, 9 (sixteenths). The first step would take
    # 1/4 (1/9 + 1/9 + 1/9 + 1) = 1/3 of the weight; 2 ε = 0.2 is 0.6 of it. Left are 3 · 7/30 and 1/10.
    members = [stored([x, 2.0]) for x in (0.0, 0.0, 0.0, 1.0)]
    assert values(members, reduce=spectral(0.1)).flatten().tolist() == pytest.approx([0.1 / 0.8, 2.0])
    assert values(members, reduce=spectral(0.4)).flatten().tolist() == pytest.approx([0.0, 2.0])
    assert values(members, reduce=spectral(0.0)).flatten().tolist() == pytest.approx([0.25, 2.0])
    # The corners of a triangle: all directions are equal, and so are all members
    hot = [stored(row, space="probs") for row in torch.eye(3).tolist()]
    assert values(hot, space="probs", reduce="spectral").flatten().tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("corrupted", [0.05, 0.2, 0.45])
def test_spectral_filter_against_a_slow_one(corrupted: float) -> None:
    draw = np.random.default_rng(3)
    members = draw.dirichlet(np.full(4, 0.6), size=(9, 30))
    weights = draw.random(9)
    weights[2] = 0.0
    fast = spectral(corrupted)(torch.tensor(members), torch.tensor(weights).unsqueeze(1).expand(9, 30))
    slow = [slow_filter(members[:, n], corrupted, weights) for n in range(30)]
    np.testing.assert_allclose(fast.numpy(), slow, rtol=0, atol=1e-9)


def test_spectral_filter_survives_a_quarter_of_outliers() -> None:
    draw = np.random.default_rng(0)
    members = 0.1 * draw.normal(size=(20, 50, 10))
    honest = members[5:].mean(0)
    members[:5] += 3.0
    found = spectral(0.25)(torch.tensor(members), torch.ones(20, 50, dtype=torch.double)).numpy()
    assert np.abs(found - honest).max() < 0.1  # one standard deviation of a member; the mean is off by 0.75
    assert np.abs(members.mean(0) - honest).min() > 0.6
