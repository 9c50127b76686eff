"""Label distributions of clients, how skewed they are, and each client's own split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def label_counts(labels: np.ndarray, indices: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Return how many samples of each class each client has, int64 [clients, classes].

    Examples
    --------
    >>> label_counts(np.array([0, 1, 1]), [np.array([0, 1]), np.array([2]), np.array([], dtype=int)], 2)
    array([[1, 1],
           [0, 1],
           [0, 0]])
    """
    counts = np.zeros((len(indices), num_classes), dtype=np.int64)
    for row, index in zip(counts, indices, strict=True):
        row += np.bincount(labels[index], minlength=num_classes)
    return counts


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
    counts = np.asarray(counts, dtype=float)
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        return Skew(0.0, 0.0)
    shares = counts / counts.sum(axis=1, keepdims=True)
    whole = counts.sum(axis=0) / counts.sum()
    entropy = _entropy(shares)
    divergence = _entropy((shares + whole) / 2) - (entropy + _entropy(whole)) / 2
    # Rounding can leave -1e-17 for equal distributions.
    divergence = np.clip(divergence / np.log(2), 0.0, 1.0)
    return Skew(float(divergence.mean()), float(np.exp(entropy).mean()))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis, with 0 log 0 = 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)


@dataclass(frozen=True)
class Split:
    """A client's samples by use: ids of training, validation and test samples, sorted and disjoint."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def local_split(indices: np.ndarray, validation: float, test: float, rng: np.random.Generator) -> Split:
    """Split a client's samples at random.

    Parameters
    ----------
    indices : np.ndarray
        The client's samples.
    validation, test : float
        Shares of them, rounded down, so that a client with samples always has some to train on.
    rng : np.random.Generator
        Chooses them.

    Examples
    --------
    >>> split = local_split(np.arange(10), 0.2, 0.3, np.random.default_rng(0))
    >>> len(split.train), len(split.validation), len(split.test)
    (5, 2, 3)
    """
    order = rng.permutation(np.asarray(indices, dtype=np.int64))
    # A product such as 0.29 * 100 lies just below the whole number that is meant.
    first = int(validation * len(order) + 1e-9)
    second = first + int(test * len(order) + 1e-9)
    return Split(np.sort(order[second:]), np.sort(order[:first]), np.sort(order[first:second]))
