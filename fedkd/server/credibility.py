"""How far a model can be believed about each class, measured on labelled samples of the server."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which share of each class is taken for which.

    Parameters
    ----------
    logits : Tensor
        A model's outputs, shape [n, C]; the largest is its guess.
    labels : Tensor
        True classes, int64, shape [n].

    Returns
    -------
    Tensor
        Float64 [C, C]: row j is how samples of class j are divided among the guesses. The row of a class without
        samples is 0.

    Examples
    --------
    >>> confusion(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 2.0]]), torch.tensor([0, 0, 1])).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    classes = logits.shape[1]
    pairs = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes).double()
    return pairs / pairs.sum(1, keepdim=True).clamp(min=1)


def class_credibility(matrix: Tensor) -> Tensor:
    r"""Return each class's credibility :math:`A_{cc} (1 - \max_{j \ne c} A_{jc})`.

    It is high where samples of the class are recognised and where no other class is often taken for it.

    Parameters
    ----------
    matrix : Tensor
        A of `confusion`, float64 [C, C].

    Returns
    -------
    Tensor
        Between 0 and 1, float64 [C]; 0 for a class without samples.

    Notes
    -----
    He et al., Learning Critically: Selective Self-Distillation in Federated Learning on Non-IID Data, IEEE TBD 2022.

    Examples
    --------
    >>> class_credibility(torch.tensor([[0.5, 0.5], [0.0, 1.0]])).tolist()
    [0.5, 0.5]
    """
    own = matrix.diagonal()
    mistaken = (matrix - torch.diag(own)).amax(0)
    return own * (1 - mistaken)
