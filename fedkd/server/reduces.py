"""Reduces that need the outputs of all members at once: medians, the trimmed mean, the spectral filter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedkd.errors import ScenarioError

TINY = 1e-12  # distances below this count as zero in the geometric median

Reduce = Callable[[Tensor, Tensor], Tensor]
"""From values [K, n, C] and weights [K, n] (0: no output of this member), both float64, to [n, C]."""


def median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted median of every coordinate: half of the weight is on either side; of two such, their mean.

    Examples
    --------
    >>> median(torch.tensor([[[1.0]], [[9.0]], [[2.0]]]).double(), torch.ones(3, 1))
    tensor([[2.]], dtype=torch.float64)
    """
    ordered, _, upto, total = _ordered(values, weights)
    half, slack = total / 2, 1e-9 * total
    low, high = (reached.int().argmax(0, keepdim=True) for reached in (upto >= half - slack, upto > half + slack))
    return (ordered.gather(0, low) + ordered.gather(0, high)).squeeze(0) / 2


def trimmed(share: float = 0.2) -> Reduce:
    """Return the weighted trimmed mean of every coordinate.

    Parameters
    ----------
    share : float
        Share of the weight, in [0, 0.5), that is left out at each end, as far as whole members fit into it; 0 is the
        mean.
    """
    if not 0 <= share < 0.5:
        raise ScenarioError(f"the trimmed share must be at least 0 and below 0.5, is {share}")

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        ordered, weight, upto, total = _ordered(values, weights)
        least = total * (share + 1e-9)
        kept = torch.where((upto > least) & (total - upto + weight > least), weight, 0.0)
        return torch.where(kept > 0, kept * ordered, 0.0).sum(0) / kept.sum(0)

    return reduce


def _ordered(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sorted values of every coordinate, their weights, sums of those so far, all [K, n, C], and in all.

    Members that are absent come last.
    """
    ordered, order = values.masked_fill((weights <= 0).unsqueeze(2), torch.inf).sort(0)
    weight = weights.to(values.dtype).unsqueeze(2).expand_as(values).gather(0, order)
    upto = weight.cumsum(0)
    return ordered, weight, upto, upto[-1]


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


def spectral(corrupted: float = 0.2) -> Reduce:
    """Return the mean of each sample's outputs after outliers have lost their weight, by the spectral filter.

    Outliers that move a mean also stretch the members along some direction. So, again and again: find the direction of
    the largest variance, and take from every member's weight in proportion to its squared distance from the mean along
    it, of which the farthest loses all. Members that agree but for their noise lose evenly.

    Parameters
    ----------
    corrupted : float
        ε, share of the weight that may be corrupted, in [0, 0.5); 0 is the mean.

    Notes
    -----
    Diakonikolas, Kamath, Kane, Li, Moitra, Stewart, Being Robust (in High Dimensions) Can Be Practical, ICML 2017, in
    the form that lowers weights instead of removing members at random. It stops there when the largest variance is no
    more than that of uncorrupted members, which is not known of outputs of models. Here it stops when a share 2 ε of
    the weight is gone, the most that it takes in theory: ε corrupted, and no more than that of the others. As with a
    trimmed mean, honest members lose some weight even if nobody is corrupted. Directions of equal variance count
    together, so that the order of members does not matter.
    """
    if not 0 <= corrupted < 0.5:
        raise ScenarioError(f"the corrupted share must be at least 0 and below 0.5, is {corrupted}")

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        x, w = values.transpose(0, 1), (weights / weights.sum(0)).T.clone()
        left = torch.full((len(x),), 2 * corrupted, dtype=x.dtype)
        busy = (left > TINY).nonzero().squeeze(1)
        while len(busy):
            now = w[busy]
            share = (now / now.sum(1, keepdim=True)).unsqueeze(2)
            offset = x[busy] - (share * x[busy]).sum(1, keepdim=True)
            _, spread, axes = torch.linalg.svd(share.sqrt() * offset, full_matrices=False)
            top = spread >= spread[:, :1] * (1 - 1e-6)
            distance = ((offset @ axes.mT).square() * top.unsqueeze(1)).sum(2).masked_fill(now <= 0, 0.0)
            farthest = distance.amax(1, keepdim=True)
            loss = now * (distance / farthest.clamp(min=TINY**2))  # of the farthest exactly all
            step = (left[busy] / loss.sum(1).clamp(min=TINY)).clamp(max=1.0)
            w[busy] = (now - step.unsqueeze(1) * loss).clamp(min=0.0)
            left[busy] -= step * loss.sum(1)
            busy = busy[(left[busy] > TINY) & (farthest.squeeze(1) > TINY**2)]
        return (w.unsqueeze(2) * x).sum(1) / w.sum(1, keepdim=True)

    return reduce


REDUCES: dict[str, Reduce] = {
    "median": median,
    "trimmed": trimmed(),
    "geometric": geometric(),
    "spectral": spectral(),
}
"""Reduces by name, beside ``mean``, which is streamed. They are recomputed for chunks of samples."""
