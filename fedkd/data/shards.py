"""Who has which samples, as sequences over flat arrays: a million clients are no million objects."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd.errors import ScenarioError
from fedkd.seeds import Purpose, rng

__all__ = ["Drawn", "Holdings", "Shards", "Split", "Splits", "local_split"]


class Shards(Sequence[np.ndarray]):
    """Samples divided among clients, those of one client side by side in one array.

    Parameters
    ----------
    samples : np.ndarray
        Sample numbers, integers [n].
    ends : np.ndarray
        Where each client's samples end, int64 [clients]; they begin where those of the client before end.

    Examples
    --------
    >>> shards = Shards(np.array([5, 1, 4]), np.array([2, 2, 3]))
    >>> [shard.tolist() for shard in shards], shards.sizes.tolist()
    ([[5, 1], [], [4]], [2, 0, 1])
    """

    def __init__(self, samples: np.ndarray, ends: np.ndarray) -> None:
        self.samples, self.ends = samples, ends

    @classmethod
    def of(cls, arrays: Iterable[np.ndarray]) -> Shards:
        """Return one shard for each array."""
        arrays = [np.asarray(array, dtype=np.int64) for array in arrays]
        ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        return cls(np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64), ends)

    @classmethod
    def grouped(cls, samples: np.ndarray, owners: np.ndarray, clients: int) -> Shards:
        """Return shards by the owner (0..clients-1) of each sample, in the order in which the samples come.

        Examples
        --------
        >>> [shard.tolist() for shard in Shards.grouped(np.array([7, 3, 9]), np.array([1, 0, 1]), 2)]
        [[3], [7, 9]]
        """
        ends = np.cumsum(np.bincount(owners, minlength=clients), dtype=np.int64)
        return cls(samples[np.argsort(owners, kind="stable")], ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, client: Any) -> np.ndarray:
        k = position(client, len(self))
        return self.samples[self.ends[k - 1] if k else 0 : self.ends[k]].astype(np.int64, copy=False)

    @property
    def sizes(self) -> np.ndarray:
        """Number of samples of each client, int64 [clients]."""
        return np.diff(self.ends, prepend=0)

    @property
    def owners(self) -> np.ndarray:
        """Client of each of `samples`, int64 [n]."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def renamed(self, names: np.ndarray) -> Shards:
        """Return the same shards with ``names[i]`` for sample i, each shard in ascending order."""
        samples = names[self.samples]
        return Shards(samples[np.lexsort((samples, self.owners))], self.ends)


class Drawn(Sequence[np.ndarray]):
    """Samples drawn for each client when it is asked for: from its own label distribution, with replacement.

    A client's draw depends on the seed and its number alone, and nothing is kept, so that a population costs
    nothing, however large it is.

    Parameters
    ----------
    labels : np.ndarray
        Label of each sample, integers [N].
    clients : int
        Number of clients.
    size : int
        Samples of each client.
    alpha : float or list of float
        Concentration of the Dirichlet distribution over the classes that occur, from which each client's
        label distribution comes; one for all classes, or one for each.
    seed : int
        The run's seed.

    Raises
    ------
    ScenarioError
        If there are not as many alphas as classes.

    Examples
    --------
    >>> drawn = Drawn(np.array([0, 0, 1, 1]), clients=10**9, size=3, alpha=0.5, seed=0)
    >>> len(drawn), drawn[123_456_789].shape, bool((drawn[7] == drawn[7]).all())
    (1000000000, (3,), True)
    """

    def __init__(self, labels: np.ndarray, clients: int, size: int, alpha: float | list[float], seed: int) -> None:
        classes, labels, self._totals = np.unique(labels, return_inverse=True, return_counts=True)
        if isinstance(alpha, list) and len(alpha) != len(classes):
            raise ScenarioError(
                f"has {len(alpha)} numbers, the data have {len(classes)} classes", key="partition.options.alpha"
            )
        self._clients, self._size, self._seed = clients, size, seed
        self._alpha = np.broadcast_to(np.asarray(alpha, dtype=float), len(classes))
        self._by_class = np.argsort(labels, kind="stable")
        self._starts = np.cumsum(self._totals) - self._totals

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: Any) -> np.ndarray:
        stream = rng(self._seed, Purpose.PARTITION, partition=position(client, self._clients))
        share = stream.dirichlet(self._alpha)
        if not np.isfinite(share).all():  # underflow: the limit alpha -> 0 is one class
            share = np.eye(len(self._alpha))[stream.integers(len(self._alpha))]
        label = np.repeat(np.arange(len(share)), stream.multinomial(self._size, share))
        return np.sort(self._by_class[self._starts[label] + stream.integers(self._totals[label])])

    @property
    def sizes(self) -> np.ndarray:
        """Number of samples of each client, int64 [clients]; takes no memory."""
        return np.broadcast_to(np.int64(self._size), self._clients)


Holdings = Shards | Drawn
"""Sample numbers of each client."""


@dataclass(frozen=True)
class Split:
    """A client's samples by use: ids of training, validation and test samples, sorted and disjoint."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Splits(Sequence[Split]):
    """Each client's samples by use, split when they are asked for, the same at any time.

    Parameters
    ----------
    holdings : Holdings
        Numbers of each client's samples, ascending.
    ids : np.ndarray
        Id of the sample of each number, int64, ascending.
    validation, test : float
        As in `local_split`.
    seed : int
        The run's seed.
    """

    def __init__(self, holdings: Holdings, ids: np.ndarray, validation: float, test: float, seed: int) -> None:
        self._holdings, self._ids, self._seed = holdings, ids, seed
        self._validation, self._test = validation, test

    def __len__(self) -> int:
        return len(self._holdings)

    def __getitem__(self, client: Any) -> Split:
        k = position(client, len(self))
        mine = self._ids[self._holdings[k]]
        if not (self._validation or self._test):
            return Split(mine, mine[:0], mine[:0])
        return local_split(mine, self._validation, self._test, rng(self._seed, Purpose.LOCAL_SPLIT, partition=k))

    @property
    def sizes(self) -> np.ndarray:
        """Training samples of each client, int64 [clients]; splits nobody's."""
        held = self._holdings.sizes
        if not (self._validation or self._test):
            return held
        return held - _part(self._validation, held) - _part(self._test, held)


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
    first = int(_part(validation, len(order)))
    second = first + int(_part(test, len(order)))
    return Split(np.sort(order[second:]), np.sort(order[:first]), np.sort(order[first:second]))


def _part(share: float, size: Any) -> np.ndarray:
    # A product such as 0.29 * 100 lies just below the whole number that is meant.
    return np.asarray(share * size + 1e-9).astype(np.int64)


def position(client: Any, clients: int) -> int:
    """Return a client's number, counted from the end where it is negative.

    Raises
    ------
    IndexError
        There is no such client.
    """
    k = operator.index(client)
    if not -clients <= k < clients:
        raise IndexError(f"client {k} of {clients}")
    return k % clients
