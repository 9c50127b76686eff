"""Reduces that need the outputs of all members at once: medians and the trimmed mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedkd.errors import ScenarioError

TINY = 1e-12  # distances below this count as zero in the geometric median

Reduce = Callable[[Tensor, Tensor], Tensor]
"""From values [K, n, C] and weights [K, n] (0: no output of this member), both float64, to [n, C]."""


def median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the median of every coordinate over the members present; of two in the middle, their mean.

    Examples
    --------
    >>> median(torch.tensor([[[1.0]], [[9.0]], [[2.0]]]).double(), torch.ones(3, 1))
    tensor([[2.]], dtype=torch.float64)
    """
    present = (weights > 0).sum(0)
    return _mean_of_ranks(values, weights, (present - 1) // 2, present // 2)


def trimmed(share: float = 0.2) -> Reduce:
    """Return the trimmed mean of every coordinate.

    Parameters
    ----------
    share : float
        Share of the members that is left out at each end, in [0, 0.5), rounded down; 0 is the mean.
    """
    if not 0 <= share < 0.5:
        raise ScenarioError(f"the trimmed share must be at least 0 and below 0.5, is {share}")

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        present = (weights > 0).sum(0)
        cut = (present * share + 1e-9).long()
        return _mean_of_ranks(values, weights, cut, present - 1 - cut)

    return reduce


def _mean_of_ranks(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean over members of the sorted values from rank `low` to rank `high` [n]; those absent sort last."""
    ordered = values.masked_fill((weights <= 0).unsqueeze(2), torch.inf).sort(0).values
    rank = torch.arange(len(values)).view(-1, 1)
    keep = ((rank >= low) & (rank <= high)).unsqueeze(2)
    return torch.where(keep, ordered, 0.0).sum(0) / (high - low + 1).unsqueeze(1)


def geometric(iterations: int = 200, tolerance: float = 1e-9) -> Reduce:
    """Return the weighted geometric median of each sample's outputs: Weiszfeld's iteration from their mean.

    Parameters
    ----------
    iterations : int
        Most iterations.
    tolerance : float
        A sample stops when a step is shorter than this, relative to 1 + the norm of the estimate.

    Notes
    -----
    Vardi and Zhang's form (PNAS 2000), which does not stick where an estimate meets a member that is not the
    median.
    """

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        w = weights.unsqueeze(2)
        estimate = (w * values).sum(0) / w.sum(0)
        moving = torch.ones(len(estimate), 1, dtype=torch.bool)
        for _ in range(iterations):
            offset = values - estimate
            distance = offset.norm(dim=2, keepdim=True)
            apart = distance > TINY
            pull = torch.where(apart, w / distance.clamp(min=TINY), 0.0)
            target = (pull * values).sum(0) / pull.sum(0).clamp(min=TINY)
            force = (pull * offset).sum(0).norm(dim=1, keepdim=True)
            stay = (torch.where(apart, 0.0, w).sum(0) / force.clamp(min=TINY)).clamp(max=1.0)
            step = (1 - stay) * (target - estimate)
            # Samples stop one by one, so that a result does not depend on which samples share its chunk.
            estimate = torch.where(moving, estimate + step, estimate)
            length, scale = step.norm(dim=1, keepdim=True), 1 + estimate.norm(dim=1, keepdim=True)
            moving &= length > tolerance * scale
            if not bool(moving.any()):
                break
        return estimate

    return reduce


REDUCES: dict[str, Reduce] = {"median": median, "trimmed": trimmed(), "geometric": geometric()}
"""Reduces by name, beside ``mean``, which is streamed. They are recomputed for chunks of samples."""
