"""Weights of ensemble members: pure functions that make them from sizes, class counts, scores or outputs.

All of them return float64 tensors that sum to one over the members, which are the first dimension. `Ensemble`
takes weights of shape [K] for each member, [K, C] for each class, [K, N] for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError, ScenarioError

Score = Callable[[Tensor], Tensor]
"""From a member's probabilities [n, C] to the log of its weight on each sample [n], up to a constant."""

MIN_ENTROPY = 1e-6  # nats; floor for a member that is certain, whose reciprocal entropy is infinite


def uniform(members: int) -> Tensor:
    """Return equal weights, shape [K].

    Examples
    --------
    >>> uniform(4)
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    if members < 1:
        raise KnowledgeError("no members to weigh")
    return torch.full((members,), 1.0 / members, dtype=torch.float64)


def by_size(sizes: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Return weights proportional to the number of samples behind each member, shape [K].

    Parameters
    ----------
    sizes : sequence of int
        Samples of each member, not all 0.

    Examples
    --------
    >>> by_size([1, 3])
    tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    n = _non_negative(sizes, "sizes", dims=1)
    if float(n.sum()) == 0:
        raise KnowledgeError("the sizes of all members are 0")
    return n / n.sum()


def by_class(counts: np.ndarray | Tensor) -> Tensor:
    """Return weights for each class, proportional to the samples that each member has of it.

    Parameters
    ----------
    counts : Tensor
        Samples of each class at each member, shape [K, C].

    Returns
    -------
    Tensor
        Shape [K, C]. Members weigh equally on a class that nobody has: nothing is known about it, and zero
        weights would leave it without an average.

    Examples
    --------
    >>> by_class(torch.tensor([[1, 0, 2], [3, 0, 2]]))
    tensor([[0.2500, 0.5000, 0.5000],
            [0.7500, 0.5000, 0.5000]], dtype=torch.float64)
    """
    return _columns(_non_negative(counts, "class counts", dims=2))


def by_certainty(scores: np.ndarray | Tensor) -> Tensor:
    """Return weights for each sample from scores: s_k(x) / Σ_k s_k(x) (FedAUX, Sattler et al. 2021).

    Parameters
    ----------
    scores : Tensor
        Certainty of each member on each sample, >= 0, shape [K, N].

    Returns
    -------
    Tensor
        Shape [K, N]; equal weights where every score is 0.
    """
    return _columns(_non_negative(scores, "certainty scores", dims=2))


def above_outliers(scores: Sequence[float], width: float = 1.5) -> list[bool]:
    """Return which scores are no outliers below: at least mean - width · sd of all but the best (FedDF's code).

    Parameters
    ----------
    scores : sequence of float
        Accuracies of the members, say. Of fewer than three none is an outlier.
    width : float
        Standard deviations (of the population) that are allowed.

    Examples
    --------
    Without the best, 0.9: mean 0.5, standard deviation 0.2, so the limit is 0.2.

    >>> above_outliers([0.9, 0.6, 0.6, 0.6, 0.6, 0.1])
    [True, True, True, True, True, False]
    """
    if len(scores) < 3:
        return [True] * len(scores)
    rest = np.sort(np.asarray(scores, dtype=np.float64))[:-1]
    return [bool(score >= rest.mean() - width * rest.std()) for score in scores]


def by_entropy(probs: Tensor, rule: Literal["softmax", "inverse"] = "softmax", mask: Tensor | None = None) -> Tensor:
    """Return weights for each sample that fall with the entropy H of a member's prediction.

    Parameters
    ----------
    probs : Tensor
        Probabilities of each member, shape [K, N, C].
    rule : str
        ``softmax``: softmax over members of 1/H (FedGEMS: Cheng et al. 2021); ``inverse``: proportional to
        1/H. Entropies are in nats, at least `MIN_ENTROPY`.
    mask : Tensor, optional
        Bool, shape [K, N]; False leaves a member out (FedGEMS: members that are wrong on a labelled sample).

    Returns
    -------
    Tensor
        Shape [K, N]; a column is zero where the mask leaves nobody.

    Examples
    --------
    Entropies log 2 and log 4, so 1/H = 1.4427 and 0.7213, which is 2 : 1:

    >>> p = torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25]]])
    >>> by_entropy(p, "inverse").squeeze(1)
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    score = entropy_score(rule)(probs)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    return normalise_log(score)


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy in nats of distributions along the last dimension, float64; 0·log 0 = 0.

    Examples
    --------
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.0000, 0.6931], dtype=torch.float64)
    """
    p = probs.double()
    return torch.xlogy(p, p).sum(-1).abs()  # of a sum <= 0: no negative zero


def entropy_score(rule: Literal["softmax", "inverse"] | str) -> Score:
    """Return the logarithm of the weight of `by_entropy` as a function of a member's probabilities.

    An ensemble can so weigh its members while they stream by: weights are normalised as they come.

    Raises
    ------
    ScenarioError
        The rule is unknown.
    """
    if rule == "softmax":
        return lambda probs: entropy(probs).clamp(min=MIN_ENTROPY).reciprocal()
    if rule == "inverse":
        return lambda probs: -entropy(probs).clamp(min=MIN_ENTROPY).log()
    raise ScenarioError(f"entropy rule {rule!r} is unknown", hint="softmax or inverse")


def normalise_log(log_weights: Tensor) -> Tensor:
    """Return exp(log_weights) scaled to sum to one over the first dimension; zero where all are -inf."""
    return torch.softmax(log_weights, dim=0).nan_to_num(0.0)


def _columns(weights: Tensor) -> Tensor:
    total = weights.sum(0)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(torch.float64).tiny), 1.0 / len(weights))


def _non_negative(values: Sequence[int] | np.ndarray | Tensor, what: str, dims: int) -> Tensor:
    tensor = torch.as_tensor(values).double()
    if tensor.ndim != dims or not len(tensor):
        raise KnowledgeError(f"{what} have shape {tuple(tensor.shape)}, not {dims} dimension(s) with members first")
    if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
        raise KnowledgeError(f"{what} must be finite and not negative")
    return tensor
