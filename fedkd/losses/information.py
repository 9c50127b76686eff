"""Losses from information theory; pure functions, vectorisable."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import at_least_float32

_EPS = 1e-7  # floor of similarities and of probabilities inside a logarithm


def probabilistic_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return PKT: the KL divergence between the neighbourhoods of every sample, mean over samples.

    :math:`\frac1N \sum_j \sum_{i \ne j} p^t_{i|j} \log (p^t_{i|j} / p^s_{i|j})` with :math:`p_{i|j} = K_{ij}
    / \sum_{k \ne j} K_{kj}` and the cosine kernel :math:`K_{ij} = (\cos(f_i, f_j) + 1) / 2`.

    Parameters
    ----------
    student, teacher : Tensor
        Embeddings, [N, ...]; widths may differ.

    Returns
    -------
    Tensor
        Scalar; zero for fewer than three samples, where neighbourhoods have no choice.

    Notes
    -----
    Passalis, Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.
    """
    p, q = _neighbourhoods(teacher), _neighbourhoods(student)
    return (p * (p.clamp_min(_EPS).log() - q.clamp_min(_EPS).log())).sum() / max(len(student), 1)


def _neighbourhoods(x: Tensor) -> Tensor:
    """Return p, [N, N], whose column j is the distribution over the neighbours i of sample j."""
    x = F.normalize(at_least_float32(x).flatten(1), dim=1)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    kernel = torch.where(others, (0.5 * (x @ x.T + 1)).clamp_min(_EPS), 0.0)
    return kernel / kernel.sum(0, keepdim=True).clamp_min(_EPS)
