"""Label distributions of clients, and how skewed they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 4096  # clients at once: the shares of all would be several copies of their counts


def label_counts(labels: np.ndarray, indices: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Return how many samples of each class each client has, int64 [clients, classes].

    Examples
    --------
    >>> label_counts(np.array([0, 1, 1]), [np.array([0, 1]), np.array([2]), np.array([], dtype=int)], 2)
    array([[1, 1],
           [0, 1],
           [0, 0]])
    """
    owners = np.repeat(np.arange(len(indices)), [len(index) for index in indices])
    cells = owners * num_classes + labels[np.concatenate([*indices, np.empty(0, dtype=np.int64)])]
    return np.bincount(cells, minlength=len(indices) * num_classes).reshape(len(indices), num_classes)


@dataclass(frozen=True)
class Skew:
    """How far clients are from the whole.

    Attributes
    ----------
    jensen_shannon : float
        Mean Jensen-Shannon divergence (base 2, 0 to 1) of a client's label distribution from the global one.
    effective_classes : float
        Mean exponential of the entropy of a client's labels: 1 for one class, C for C equally frequent ones.
    """

    jensen_shannon: float
    effective_classes: float


def skew(counts: np.ndarray) -> Skew:
    """Return the skew of a table [clients, classes]; clients without samples are left out, never NaN.

    Examples
    --------
    >>> skew(np.array([[5, 0], [0, 5], [0, 0]]))  # doctest: +ELLIPSIS
    Skew(jensen_shannon=0.3112..., effective_classes=1.0)
    >>> skew(np.array([[3, 3], [4, 4]]))
    Skew(jensen_shannon=0.0, effective_classes=2.0)
    >>> skew(np.zeros((2, 3)))
    Skew(jensen_shannon=0.0, effective_classes=0.0)
    """
    counts = np.asarray(counts)
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        return Skew(0.0, 0.0)
    whole = counts.sum(axis=0) / counts.sum()
    entropies, divergences = [], []
    for rows in np.split(counts, range(_ROWS, len(counts), _ROWS)):
        shares = rows / rows.sum(axis=1, keepdims=True)
        entropy = _entropy(shares)
        divergence = _entropy((shares + whole) / 2) - (entropy + _entropy(whole)) / 2
        entropies.append(entropy)
        # Rounding can leave -1e-17 for equal distributions.
        divergences.append(np.clip(divergence / np.log(2), 0.0, 1.0))
    return Skew(float(np.concatenate(divergences).mean()), float(np.exp(np.concatenate(entropies)).mean()))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis, with 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
