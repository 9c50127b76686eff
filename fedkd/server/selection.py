"""Seeded selection of clients by partition id: the same whatever the method, engine or arrival order."""

from collections.abc import Sequence

import numpy as np

from fedkd.seeds import Purpose, rng


def select(
    eligible: Sequence[int] | np.ndarray, clients: int, participation: float, seed: int, round: int
) -> list[int]:
    """Draw the clients of a round, uniformly without replacement.

    Parameters
    ----------
    eligible : sequence of int
        Partition ids of clients that have training samples.
    clients : int
        Size of the federation, which `participation` refers to.
    participation : float
        Share of the federation that takes part, in (0, 1].
    seed, round : int
        Run seed and communication round.

    Returns
    -------
    list of int
        Partition ids, ascending: ``round(participation * clients)`` of them, at least one, at most all eligible.

    Examples
    --------
    >>> select(range(10), 10, 0.3, seed=0, round=1) == select(range(10), 10, 0.3, seed=0, round=1)
    True
    >>> len(select(range(10), 10, 0.3, seed=0, round=2))
    3
    """
    count = min(max(1, int(np.floor(participation * clients + 0.5))), len(eligible))
    chosen = rng(seed, Purpose.SELECTION, round).choice(np.sort(np.asarray(eligible)), count, replace=False)
    return sorted(int(p) for p in chosen)
