"""What is measured: accuracy, loss, calibration and agreement of models on test data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.errors import UncoveredError
from fedkd.server.members import Member, stream

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.server.ensemble import Ensemble

Predict = Member | Callable[["ArrayData"], Tensor]
"""What can be evaluated: a member, or a function from data to logits [N, C]."""


def predictions(predictors: Mapping[str, Predict], data: ArrayData) -> dict[str, Tensor]:
    """Return the logits [N, C] of all predictors on all of the data; members that workers run are run together."""
    members = {name: predict for name, predict in predictors.items() if isinstance(predict, Member)}
    outputs = [values for _, values in stream(list(members.values()), data, torch.arange(len(data)))]
    logits = dict(zip(members, outputs, strict=True))
    return {name: p(data) if not isinstance(p, Member) else logits[name] for name, p in predictors.items()}


def log_probs(ensemble: Ensemble, data: ArrayData, num_classes: int) -> Tensor:
    """Return an ensemble's log-probabilities [N, C]; uniform ones where none of its members has finite outputs."""
    found = torch.full((len(data), num_classes), -math.log(num_classes))
    try:
        targets = ensemble.targets(data)
    except UncoveredError:
        return found
    return found.index_copy(0, targets.ids, targets.log_probs())


def scores(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Any]:
    """Score predictions.

    Parameters
    ----------
    logits : Tensor
        Shape [N, C]; logarithms of probabilities do as well.
    labels : Tensor
        Shape [N], int64.
    bins : int
        Equal-width bins of the calibration error.

    Returns
    -------
    dict
        ``accuracy`` in [0, 1]; ``loss``, the mean cross-entropy in nats, infinite or NaN where logits are not finite;
        ``per_class``, the recall of each class
        (None for a class without test samples); ``calibration_error``, the expected calibration error of Guo et al.
        2017, in [0, 1].

    Examples
    --------
    >>> scores(torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1]))["per_class"]
    [1.0, 0.0]
    """
    confidence, guess = logits.double().softmax(1).max(1)
    broken = confidence.isnan()  # logits that are not finite
    confidence, guess = confidence.nan_to_num(), torch.where(broken, logits.argmax(1), guess)
    correct = (guess == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, bin_of, correct - confidence)
    classes = logits.shape[1]
    seen = torch.bincount(labels, minlength=classes)
    hits = torch.zeros(classes, dtype=torch.double).index_add_(0, labels, correct)
    return {
        "accuracy": float(correct.mean()),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "per_class": [float(h / n) if n else None for h, n in zip(hits, seen, strict=True)],
        "calibration_error": float(gap.abs().sum() / len(labels)),
    }


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of samples on which two sets of logits [N, C] predict the same class."""
    return float((first.argmax(1) == second.argmax(1)).double().mean())


def spread(accuracies: Sequence[float]) -> dict[str, float]:
    """Mean, and mean of the worst decile (at least one client), of clients' accuracies.

    Examples
    --------
    >>> spread([0.5, 0.7, 0.9])
    {'accuracy': 0.7, 'worst_decile': 0.5, 'clients': 3}
    """
    ordered = sorted(accuracies)
    worst = ordered[: max(1, len(ordered) // 10)]
    return {
        "accuracy": round(sum(ordered) / len(ordered), 12),
        "worst_decile": round(sum(worst) / len(worst), 12),
        "clients": len(ordered),
    }
