"""Seeded selection of clients by partition id: the same whatever the method, engine or arrival order."""

from collections.abc import Callable, Sequence

import numpy as np

from fedkd.seeds import Purpose, rng


def how_many(clients: int, participation: float) -> int:
    """Return the number of clients of a round: their share of the federation, rounded, at least one.

    Examples
    --------
    >>> how_many(20, 0.4), how_many(20, 0.001)
    (8, 1)
    """
    return max(1, int(np.floor(participation * clients + 0.5)))


def select(
    eligible: Sequence[int] | np.ndarray, clients: int, participation: float, seed: int, round: int
) -> list[int]:
    """Draw the clients of a round, uniformly without replacement.

    Parameters
    ----------
    eligible : sequence of int
        Partition ids of clients that have training samples, ascending. Only the ids that are drawn are looked at, so
        that the cost does not grow with the population.
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
    return draw(eligible, how_many(clients, participation), seed, round)


def draw(
    eligible: Sequence[int] | np.ndarray,
    count: int,
    seed: int,
    round: int,
    available: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[int]:
    """Draw so many clients, or as many as there are, uniformly without replacement.

    Parameters
    ----------
    eligible, seed, round
        As in `select`.
    count : int
        How many.
    available : callable, optional
        Tells which of some partition ids, int64 [n], can take part, booleans [n]; default all. Asked for no more
        clients than it takes to find enough.
    """
    tried, more = min(count, len(eligible)), 0
    while True:
        places = rng(seed, Purpose.SELECTION, round, more).choice(len(eligible), tried, replace=False)
        drawn = np.array([eligible[place] for place in places], dtype=np.int64)
        chosen = drawn if available is None else drawn[available(drawn)][:count]
        if available is None or len(chosen) == count or tried == len(eligible):
            return sorted(chosen.tolist())
        tried, more = min(4 * tried, len(eligible)), more + 1
