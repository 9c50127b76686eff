"""Losses on relations between the samples of a batch; pure functions, vectorisable.

Only similarities cross from teacher to student, so their embeddings may differ in width. All take [N, ...]
tensors, which are flattened, and are means over pairs or triples where papers sum: the weight then does not
depend on the batch size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import at_least_float32


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the mean Huber loss of :math:`\|f_i - f_j\| / \mu` over pairs i ≠ j.

    :math:`\mu` is the mean of the non-zero distances in the batch, for teacher and student separately.

    Parameters
    ----------
    student, teacher : Tensor
        Embeddings, [N, ...]; widths may differ.

    Returns
    -------
    Tensor
        Scalar; zero for a batch of one.

    Notes
    -----
    Park et al., Relational Knowledge Distillation, CVPR 2019.

    Examples
    --------
    >>> line = torch.tensor([[0.0], [1.0], [2.0]])
    >>> rkd_distance(10 * line, line).item()  # distances relative to their mean know no scale
    0.0
    """
    n = len(student)
    loss = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none")
    return loss.sum() / max(n * (n - 1), 1)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the mean Huber loss of the cosine of the angle at j, over distinct i, j, k.

    Memory grows with the cube of the batch.

    Parameters
    ----------
    student, teacher : Tensor
        Embeddings, [N, ...]; widths may differ.

    Returns
    -------
    Tensor
        Scalar; zero for fewer than three samples.

    Notes
    -----
    Park et al., Relational Knowledge Distillation, CVPR 2019.
    """
    n = len(student)
    loss = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
    return loss.sum() / max(n * (n - 1) * (n - 2), 1)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return :math:`\frac{1}{N^2} \| G_t - G_s \|_F^2`, G the dot products with rows of unit length.

    Parameters
    ----------
    student, teacher : Tensor
        Activations, [N, ...]; shapes may differ after the first dimension.

    Returns
    -------
    Tensor
        Scalar.

    Notes
    -----
    Tung, Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, for one pair of layers.
    """
    return (_gram(student) - _gram(teacher)).square().sum() / max(len(student) ** 2, 1)


def correlation_congruence(student: Tensor, teacher: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""Return :math:`\frac{1}{N^2} \| K_s - K_t \|_F^2`, K a Gaussian kernel by its Taylor polynomial.

    :math:`K_{ij} = \sum_{p=0}^{P} e^{-2\gamma} \frac{(2\gamma)^p}{p!} (f_i \cdot f_j)^p` for rows of unit
    length.

    Parameters
    ----------
    student, teacher : Tensor
        Embeddings, [N, ...]; widths may differ.
    gamma : float
        Inverse width of the kernel.
    order : int
        P, the degree of the polynomial.

    Returns
    -------
    Tensor
        Scalar.

    Notes
    -----
    Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019.
    """
    difference = _taylor_kernel(student, gamma, order) - _taylor_kernel(teacher, gamma, order)
    return difference.square().sum() / max(len(student) ** 2, 1)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return f_i - f_j, [N, N, D], and its length, [N, N], with a zero gradient where it is zero."""
    x = at_least_float32(x).flatten(1)
    difference = x[:, None] - x[None]
    squared = difference.square().sum(-1)
    apart = squared > 0
    return difference, torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def _relative_distances(x: Tensor) -> Tensor:
    _, length = _differences(x)
    mean = length.sum() / (length > 0).sum().clamp_min(1)
    return length / mean.clamp_min(torch.finfo(length.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    difference, length = _differences(x)
    unit = difference / torch.where(length > 0, length, 1.0)[..., None]
    return torch.einsum("ijd,kjd->jik", unit, unit)


def _gram(x: Tensor) -> Tensor:
    x = at_least_float32(x).flatten(1)
    return F.normalize(x @ x.T, dim=1)


def _taylor_kernel(x: Tensor, gamma: float, order: int) -> Tensor:
    x = F.normalize(at_least_float32(x).flatten(1), dim=1)
    cosine = x @ x.T
    kernel = torch.ones_like(cosine)
    for p in range(1, order + 1):
        kernel = kernel + (2 * gamma) ** p / math.factorial(p) * cosine**p
    return math.exp(-2 * gamma) * kernel
