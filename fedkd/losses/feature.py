"""Losses on features and feature maps; pure functions, vectorisable."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import Reduction, at_least_float32


def hint(student: Tensor, teacher: Tensor, *, reduction: Reduction) -> Tensor:
    r"""Return the FitNets hint loss: :math:`\frac12 \| t - s \|^2`.

    Parameters
    ----------
    student, teacher : Tensor
        Equal shapes [N, ...]. If widths differ, map the student to the teacher first, or use a relation loss.
    reduction : {"batchmean", "mean_all"}
        Sum over a sample's elements as in the formula, mean over samples; or mean over all elements, as most
        released code has it.

    Returns
    -------
    Tensor
        Scalar.

    Raises
    ------
    ValueError
        If shapes differ or the reduction is unknown.

    Notes
    -----
    Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.

    Examples
    --------
    >>> hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]]), reduction="batchmean").item()
    4.5
    """
    if reduction not in ("batchmean", "mean_all"):
        raise ValueError(f"reduction must be 'batchmean' or 'mean_all', is {reduction!r}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    total = 0.5 * (at_least_float32(student) - at_least_float32(teacher)).square().sum()
    return total / max(len(student) if reduction == "batchmean" else student.numel(), 1)


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Return the distance of attention maps, mean over samples.

    For layers l it is :math:`\frac12 \sum_l \| q_s^l / \|q_s^l\| - q_t^l / \|q_t^l\| \|_2`, where the map q
    is the sum over channels of squared activations, flattened over space. So models of unequal width can
    teach each other.

    Parameters
    ----------
    student, teacher : sequence of Tensor
        Feature maps of the same layers, [N, c, H, W] with equal H and W in each pair.

    Returns
    -------
    Tensor
        Scalar, at most the number of layers times √½: a map has no negative entries.

    Raises
    ------
    ValueError
        If the numbers of maps or their heights and widths differ, or there are none.

    Notes
    -----
    Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, with squared activations; its
    factor beta is the weight of the term, about 1000 in the paper.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} maps, teacher {len(teacher)}; both need the same number, from 1")
    layers = []
    for s, t in zip(student, teacher, strict=True):
        if s.ndim != 4 or t.ndim != 4 or s.shape[2:] != t.shape[2:]:
            raise ValueError(f"maps {tuple(s.shape)} and {tuple(t.shape)} differ in height or width, or are no maps")
        difference = _attention_map(s) - _attention_map(t)
        layers.append(torch.linalg.vector_norm(difference, dim=1).sum() / max(len(s), 1))
    return 0.5 * torch.stack(layers).sum()


def _attention_map(maps: Tensor) -> Tensor:
    return F.normalize(at_least_float32(maps).square().sum(1).flatten(1), dim=1)
