"""Probability vectors on a grid, and grid points as symbols (CFD: Sattler, Marban, Rischke, Samek 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.errors import KnowledgeError

MAX_BITS = 16

Plane = tuple[np.ndarray, int]
"""Symbols, int [streams, n], and the size of their alphabet. A stream is what one class has on all samples."""


def quantise(probs: Tensor, bits: int) -> Tensor:
    """Return the closest probability vectors whose entries are multiples of 1 / (2^bits - 1).

    Parameters
    ----------
    probs : Tensor
        Probabilities, shape [n, C]; rows that sum to one but for rounding.
    bits : int
        b, from 1 to `MAX_BITS`; with 1 bit the result is the one-hot vector of the largest entry.

    Returns
    -------
    Tensor
        Levels m in 0..2^b - 1 that sum to 2^b - 1 in every row, int32 [n, C]; the vector is m / (2^b - 1).

    Notes
    -----
    Largest remainders: all entries are rounded down, and what the sum then lacks goes, one step each, to those that
    lost most; of equal ones to the lowest class. No vector of the grid is closer, whatever the norm: moving a step
    from one entry to another would exchange a larger remainder for a smaller one.

    Examples
    --------
    >>> quantise(torch.tensor([[0.5, 0.3, 0.2]]), 2), quantise(torch.tensor([[0.5, 0.3, 0.2]]), 1)
    (tensor([[1, 1, 1]], dtype=torch.int32), tensor([[1, 0, 0]], dtype=torch.int32))
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from 1 to {MAX_BITS}, are {bits}")
    top = 2**bits - 1
    exact = probs.double()
    exact = exact / exact.sum(1, keepdim=True) * top
    levels = exact.floor()
    lacking = top - levels.sum(1, keepdim=True)
    order = (exact - levels).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (levels + (rank < lacking)).int()


def symbols(levels: Tensor, bits: int, reference: Tensor | None = None) -> list[Plane]:
    """Write levels as symbols, or their change since `reference`.

    One bit: the class, as its distance from the former one around the circle of classes. More: the levels of all
    classes but the last, which follows from the sum, as their distance around the circle of levels, and beyond eight
    bits the high bits before the low ones.

    Parameters
    ----------
    levels : Tensor
        Of `quantise`, int32 [n, C].
    bits : int
        Their bits.
    reference : Tensor, optional
        Earlier levels of the same samples, int32 [n, C].

    Examples
    --------
    >>> now, before = torch.tensor([[0, 1, 0], [1, 0, 0]]), torch.tensor([[0, 1, 0], [0, 1, 0]])
    >>> symbols(now, 1), symbols(now, 1, before)
    ([(array([[1, 0]]), 3)], [(array([[0, 2]]), 3)])
    """
    values, alphabet = _values(levels, bits)
    if reference is not None:
        values = (values - _values(reference, bits)[0]) % alphabet
    if bits <= 8:
        return [(values, alphabet)]
    return [(values >> 8, alphabet >> 8), (values & 255, 256)]


def from_symbols(planes: Sequence[np.ndarray], num_classes: int, bits: int, reference: Tensor | None = None) -> Tensor:
    """Undo `symbols`, given the symbols of its planes.

    Raises
    ------
    KnowledgeError
        No levels have these symbols.
    """
    alphabet = num_classes if bits == 1 else 2**bits
    values = planes[0].astype(np.int64) if bits <= 8 else (planes[0].astype(np.int64) << 8) | planes[1]
    if reference is not None:
        values = (values + _values(reference, bits)[0]) % alphabet
    if bits == 1:
        return F.one_hot(torch.from_numpy(values[0]), num_classes).int()
    last = alphabet - 1 - values.sum(0, keepdims=True)
    if (last < 0).any():
        raise KnowledgeError("quantised outputs sum to more than one")
    return torch.from_numpy(np.concatenate([values, last]).T.astype(np.int32))


def shapes(samples: int, num_classes: int, bits: int) -> list[tuple[int, int, int]]:
    """Return streams, symbols in each, and alphabet of every plane of `symbols`.

    Examples
    --------
    >>> shapes(50, 10, 1), shapes(50, 10, 12)
    ([(1, 50, 10)], [(9, 50, 16), (9, 50, 256)])
    """
    if bits == 1:
        return [(1, samples, num_classes)]
    alphabets = [2**bits] if bits <= 8 else [2 ** (bits - 8), 256]
    return [(num_classes - 1, samples, alphabet) for alphabet in alphabets]


def _values(levels: Tensor, bits: int) -> tuple[np.ndarray, int]:
    """Return symbols without a reference, int64 [streams, n], and their alphabet."""
    if bits == 1:
        return levels.argmax(1, keepdim=True).T.numpy(), levels.shape[1]
    return levels[:, :-1].T.long().numpy(), 2**bits
