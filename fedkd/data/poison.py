"""Poisoned clients: which clients attack, and the labels on which those train that flip them."""

from __future__ import annotations

import math

import numpy as np

from fedkd.scenario import Attacks
from fedkd.seeds import Purpose, rng


def draw_attackers(attacks: Attacks, sizes: np.ndarray, seed: int) -> np.ndarray:
    """Return the clients that attack.

    Parameters
    ----------
    attacks : Attacks
        The scenario's section.
    sizes : np.ndarray
        Training samples of each client; those without any do not count.
    seed : int
        The run's seed: neither the method nor the kind of attack changes who attacks, and a larger share keeps the
        attackers of a smaller one.

    Returns
    -------
    np.ndarray
        Partition ids, int64, ascending; at least one client is left that is honest.

    Examples
    --------
    >>> draw_attackers(Attacks(kind="random", share=0.3), np.ones(10), seed=0)
    array([0, 7, 8])
    """
    eligible = np.flatnonzero(sizes)
    count = min(math.floor(attacks.share * len(eligible) + 0.5), max(len(eligible) - 1, 0))
    return np.sort(rng(seed, Purpose.ATTACKERS).permutation(eligible)[:count]).astype(np.int64, copy=False)


def flipped(labels: np.ndarray, how: str, num_classes: int) -> np.ndarray:
    """Return wrong labels.

    Parameters
    ----------
    labels : np.ndarray
        True labels, int64 [N].
    how : str
        ``next``: class y becomes y + 1, the last one 0. ``mirror``: it becomes C - 1 - y.
    num_classes : int
        C.

    Examples
    --------
    >>> flipped(np.array([0, 1, 2]), "next", 3), flipped(np.array([0, 1, 2]), "mirror", 3)
    (array([1, 2, 0]), array([2, 1, 0]))
    """
    return (labels + 1) % num_classes if how == "next" else num_classes - 1 - labels
