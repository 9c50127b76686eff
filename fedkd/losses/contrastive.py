"""Losses of contrastive learning, where two views of a sample should be alike and all others differ."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.response import at_least_float32


def nt_xent(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    r"""Return the normalised, temperature-scaled cross-entropy of pairs (SimCLR), mean over both views.

    Of 2N embeddings :math:`z`, each has one partner :math:`j(i)`:
    :math:`-\frac1{2N} \sum_i \log \frac{\exp(s_{i,j(i)} / \tau)}{\sum_{k \ne i} \exp(s_{ik} / \tau)}`, where
    :math:`s` is the cosine similarity.

    Parameters
    ----------
    first, second : Tensor
        Embeddings of two views of the same samples, [N, d], N >= 1.
    temperature : float
        :math:`\tau > 0`.

    Returns
    -------
    Tensor
        Scalar; 0 for a single sample, which has nothing to differ from.

    Notes
    -----
    Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.

    Examples
    --------
    Two samples whose views are equal, and orthogonal to those of the other: log(e + 2) - 1

    >>> z = torch.eye(2)
    >>> round(nt_xent(z, z, temperature=1.0).item(), 4)
    0.5514
    """
    z = F.normalize(at_least_float32(torch.cat([first, second])), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, torch.finfo(z.dtype).min)
    partner = torch.arange(len(z), device=z.device).roll(len(first))
    return F.cross_entropy(similarity, partner)
