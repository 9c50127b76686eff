"""Entropy coding: symbols as bytes, about as many as their entropy asks for, by a range coder that learns as it goes.

Coder and decoder estimate the frequencies of symbols from what has passed already, so no table travels. Frequencies are
taken anew for blocks of symbols that grow, and a stream starts from those of the streams before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.errors import KnowledgeError, ScenarioError

if TYPE_CHECKING:
    from fedkd.codecs.quantise import Plane

FIRST = 8
"""Symbols of a stream that pass before its own frequencies are first taken; they are taken again at every doubling."""

STRENGTH = 16.0
"""How many symbols of a stream the frequencies of the streams before it count for."""


def encode(planes: Sequence[Plane]) -> np.ndarray:
    """Return symbols as 32-bit words.

    Parameters
    ----------
    planes : sequence of (np.ndarray, int)
        Symbols in 0..alphabet - 1, int [streams, n], and the alphabet. Streams of a plane are expected to have
        similar statistics.

    Returns
    -------
    np.ndarray
        uint32 [words].

    Examples
    --------
    A thousand symbols, one in a hundred of which is not 0, have an entropy of 81 bits. Learning that costs as much.

    >>> rare = np.zeros((1, 1000), dtype=np.int64)
    >>> rare[0, ::100] = 1
    >>> words = encode([(rare, 2)])
    >>> len(words), np.array_equal(decode(words, [(1, 1000, 2)])[0], rare)
    (5, True)
    """
    coder = library().stream.queue.RangeEncoder()
    for values, alphabet in planes:
        statistics = _Statistics(alphabet)
        for stream in values.astype(np.int32):
            statistics.begin()
            for start, stop in _blocks(len(stream), alphabet):
                coder.encode(stream[start:stop], statistics.model())
                statistics.learn(stream[start:stop])
    return coder.get_compressed()


def decode(words: np.ndarray, shapes: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
    """Return the symbols of every plane, int32 [streams, n].

    Parameters
    ----------
    words : np.ndarray
        Of `encode`, uint32 [words].
    shapes : sequence of (int, int, int)
        Streams, symbols in each and alphabet of every plane.

    Raises
    ------
    KnowledgeError
        These are not the words of any such symbols.
    """
    coder = library().stream.queue.RangeDecoder(np.ascontiguousarray(words, dtype=np.uint32))
    planes = []
    try:
        for streams, symbols, alphabet in shapes:
            statistics, values = _Statistics(alphabet), np.zeros((streams, symbols), dtype=np.int32)
            for stream in values:
                statistics.begin()
                for start, stop in _blocks(symbols, alphabet):
                    stream[start:stop] = coder.decode(statistics.model(), stop - start)
                    statistics.learn(stream[start:stop])
            planes.append(values)
    except AssertionError as error:  # what the library raises for words that it cannot have made
        raise KnowledgeError(f"coded outputs cannot be decoded: {error}") from None
    # Other words may decode as well; what is not as it would have been coded has been tampered with.
    if not np.array_equal(encode([(p, alphabet) for p, (*_, alphabet) in zip(planes, shapes)]), words):
        raise KnowledgeError("coded outputs are not what any outputs would be coded as")
    return planes


def library() -> Any:
    """Return the library of range coders.

    Raises
    ------
    ScenarioError
        It is not installed.
    """
    try:
        import constriction
    except ImportError:
        problem = "quantised outputs are coded by the package constriction, which is not installed"
        hint = "pip install constriction (where there is no wheel, this builds it, and needs Rust)"
        raise ScenarioError(problem, hint=hint) from None
    return constriction


class _Statistics:
    """Frequencies of the symbols of one plane."""

    def __init__(self, alphabet: int) -> None:
        self.plane = np.full(alphabet, 0.5)
        self.stream = self.plane

    def begin(self) -> None:
        """Begin a stream."""
        self.stream = STRENGTH * self.plane / self.plane.sum()

    def model(self) -> Any:
        """Return the library's model of the next symbols."""
        return library().stream.model.Categorical(self.stream / self.stream.sum(), perfect=False)

    def learn(self, passed: np.ndarray) -> None:
        counts = np.bincount(passed, minlength=len(self.plane))
        self.plane, self.stream = self.plane + counts, self.stream + counts


def _blocks(symbols: int, alphabet: int) -> Iterator[tuple[int, int]]:
    """Yield where blocks start and stop; an alphabet of one symbol says nothing, and takes no bytes."""
    start, stop = 0, FIRST
    while start < symbols and alphabet > 1:
        yield start, min(stop, symbols)
        start, stop = stop, 2 * stop
