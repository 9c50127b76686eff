"""Simulated time: how fast clients are, when they can be reached, and what an exchange with them takes.

Nothing here measures anything: all seconds are simulated ones, computed from bytes, samples and seeds, so the same
run gives the same times on every machine.
"""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from fedkd.errors import DataError, KnowledgeError, LateError, RunError
from fedkd.seeds import Purpose, rng

POLL = 60.0
"""Simulated seconds after which a server that lacks clients looks again who is available."""

PATIENCE = 7 * 24 * 3600.0
"""Simulated seconds after which it gives up."""

_BLOCK = 256  # clients whose numbers are drawn at once

Draw = Callable[[np.random.Generator], np.ndarray]
Choose = Callable[[int, Callable[[np.ndarray], np.ndarray] | None], list[int]]


def _per_client(
    draw: Draw, seed: int, purpose: Purpose, round: int, partitions: np.ndarray, again: int = 0
) -> np.ndarray:
    """Return the row of each client in what `draw` makes for blocks of clients, [_BLOCK, ...].

    So a few clients cost a few draws, and a million of them a few thousand. `again` numbers further draws for the
    same clients and round.
    """
    blocks, rows = np.divmod(partitions, _BLOCK)
    drawn, place = np.unique(blocks, return_inverse=True)
    table = np.stack([draw(rng(seed, purpose, round, (again << 32) + int(block))) for block in drawn])
    return table[place, rows]


def _uniform(generator: np.random.Generator) -> np.ndarray:
    return generator.random(_BLOCK)


# --- devices -------------------------------------------------------------------------------------------------


class Devices(ABC):
    """What clients can do."""

    @abstractmethod
    def of(self, partitions: np.ndarray) -> np.ndarray:
        """Return samples per second, bytes per second up, and down, float64 [n, 3], of clients by partition id."""


@dataclass(frozen=True)
class LogNormal(Devices):
    """Every quantity is the median times the exponential of normal noise, drawn once for each client.

    Parameters
    ----------
    median : tuple of float
        Samples per second, bytes per second up, and down.
    sigma : tuple of float
        Standard deviation of the logarithm of each; 0 gives all clients the median.
    seed : int
        The run's seed.

    Examples
    --------
    >>> LogNormal((100.0, 1e6, 4e6)).of(np.array([0, 7])).tolist()
    [[100.0, 1000000.0, 4000000.0], [100.0, 1000000.0, 4000000.0]]
    """

    median: tuple[float, float, float]
    sigma: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seed: int = 0

    def of(self, partitions: np.ndarray) -> np.ndarray:
        """Draw the devices of these clients alone, so that a large population costs nothing."""
        if not len(partitions) or not any(self.sigma):
            return np.tile(np.array(self.median), (len(partitions), 1))
        normal = _per_client(
            lambda generator: generator.standard_normal((_BLOCK, 3)), self.seed, Purpose.DEVICE, 0, partitions
        )
        return np.array(self.median) * np.exp(np.array(self.sigma) * normal)


@dataclass(frozen=True, eq=False)
class Listed(Devices):
    """Devices from a table.

    Parameters
    ----------
    table : numpy.ndarray
        As `Devices.of` returns them, one row for each partition id.
    """

    table: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> Listed:
        """Read CSV or JSON lines with samples_per_second, up and down: one row for each client, in order.

        Raises
        ------
        DataError
            With the line and what is wrong in it.
        """
        columns = ("samples_per_second", "up", "down")
        rows = []
        for line, row in _rows(path, columns):
            for name, value in zip(columns, row, strict=True):
                if not value > 0:
                    raise DataError(f"{path}, line {line}: {name} must be > 0, is {value:g}")
            rows.append(row)
        return cls(np.array(rows))

    def of(self, partitions: np.ndarray) -> np.ndarray:
        """Look them up."""
        return self.table[partitions]


# --- availability --------------------------------------------------------------------------------------------


class Availability(ABC):
    """When clients can be reached."""

    @abstractmethod
    def available(self, round: int, time: float, partitions: np.ndarray, again: int = 0) -> np.ndarray:
        """Tell which clients can be asked to take part in a round that begins at a simulated time.

        Parameters
        ----------
        round : int
            Communication round.
        time : float
            Simulated seconds since the run began.
        partitions : numpy.ndarray
            The clients, int64 [n].
        again : int
            How often the server has looked before in this round.

        Returns
        -------
        numpy.ndarray
            Booleans [n].
        """


@dataclass(frozen=True)
class Bernoulli(Availability):
    """A client is available with a fixed probability, drawn anew in every round.

    Parameters
    ----------
    probability : float
        In (0, 1].
    seed : int
        The run's seed.
    """

    probability: float
    seed: int = 0

    def available(self, round: int, time: float, partitions: np.ndarray, again: int = 0) -> np.ndarray:
        """Draw for each client."""
        if not len(partitions):
            return np.zeros(0, dtype=bool)
        drawn = _per_client(_uniform, self.seed, Purpose.AVAILABILITY, round, partitions, again)
        return drawn < self.chance(time, partitions)

    def chance(self, time: float, partitions: np.ndarray) -> np.ndarray:
        """Return the probability of each client at a simulated time, float64 [n]."""
        return np.full(len(partitions), self.probability)


@dataclass(frozen=True)
class Diurnal(Bernoulli):
    """The probability follows the hour of the client's day: p · (1 + cos 2π(t / day − φ)) / 2, each with its φ.

    So it is `probability` at the client's best hour and 0 half a day later.

    Parameters
    ----------
    probability : float
        At the best hour, in (0, 1].
    seed : int
        The run's seed.
    day : float
        Simulated seconds of a day.
    """

    day: float = 86400.0

    def chance(self, time: float, partitions: np.ndarray) -> np.ndarray:
        """Return the probability of each client at a simulated time, float64 [n]."""
        if not len(partitions):
            return np.zeros(0)
        phase = _per_client(_uniform, self.seed, Purpose.DEVICE, 1, partitions)
        return self.probability * (1 + np.cos(2 * np.pi * (time / self.day - phase))) / 2


class Trace(Availability):
    """Clients are available in the intervals of a trace, which repeats after its last end.

    Parameters
    ----------
    intervals : sequence of (int, float, float)
        Partition id, start and end in simulated seconds, in any order; those of one client may overlap. A client
        without any is never available.

    Examples
    --------
    >>> trace = Trace([(0, 0, 10), (1, 5, 20), (0, 12, 14)])
    >>> [trace.available(1, time, np.array([0, 1])).tolist() for time in (0, 6, 11, 20)]
    [[True, False], [True, True], [False, True], [True, False]]
    """

    def __init__(self, intervals: Sequence[tuple[int, float, float]]) -> None:
        merged: list[tuple[int, float, float]] = []
        for client, start, end in sorted(intervals):
            if merged and merged[-1][0] == client and start <= merged[-1][2]:
                _, start, before = merged.pop()
                end = max(end, before)
            merged.append((client, start, end))
        clients, starts, ends = zip(*merged, strict=True)
        self.length = max(ends)
        self.clients, self._ends = np.array(clients, dtype=np.int64), np.array(ends)
        self._keys = self.clients + np.array(starts) / self.length  # sorted by client, then by start

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Read CSV or JSON lines with client (partition id), start and end (simulated seconds): one row an interval.

        Raises
        ------
        DataError
            With the line and what is wrong in it.
        """
        intervals = []
        for line, (client, start, end) in _rows(path, ("client", "start", "end")):
            if client % 1 or not 0 <= client < 2**53:
                raise DataError(f"{path}, line {line}: client must be a partition id, is {client:g}")
            if not 0 <= start < end:
                raise DataError(f"{path}, line {line}: must be 0 <= start < end, is {start:g} and {end:g}")
            intervals.append((int(client), start, end))
        return cls(intervals)

    def available(self, round: int, time: float, partitions: np.ndarray, again: int = 0) -> np.ndarray:
        """Look up which clients are in one of their intervals."""
        now = time % self.length
        # The last interval that begins by now, if it is the client's own.
        last = np.searchsorted(self._keys, partitions + now / self.length, side="right") - 1
        return (last >= 0) & (self.clients[last] == partitions) & (now < self._ends[last])


def _rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield line number and the numbers in the columns, from CSV with a header or from JSON lines."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            first = next(lines, (1, ""))
            split = _json_lines if first[1].lstrip().startswith("{") else _csv_lines
            count = 0
            for number, row in split(path, chain([first], lines), columns):
                yield number, tuple(_number(path, number, name, row.get(name)) for name in columns)
                count += 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not count:
        raise DataError(f"{path} holds no rows; CSV with {','.join(columns)} in its first line, or JSON lines")


def _csv_lines(path: str | Path, lines: Iterator[tuple[int, str]], columns: Collection[str]):
    header = [name.strip() for name in next(csv.reader([next(lines)[1]]), [])]
    if not set(columns) <= set(header):
        raise DataError(f"{path}, line 1: the columns must be {','.join(columns)}, are {','.join(header) or 'none'}")
    for number, line in lines:
        values = next(csv.reader([line]))
        if len(values) != len(header):
            raise DataError(f"{path}, line {number}: {len(values)} values for {len(header)} columns")
        yield number, dict(zip(header, values, strict=True))


def _json_lines(path: str | Path, lines: Iterator[tuple[int, str]], columns: Collection[str]):
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: this is not JSON: {error}") from error
        if not isinstance(row, dict) or not set(columns) <= set(row):
            raise DataError(f"{path}, line {number}: must be an object with {', '.join(columns)}")
        yield number, row


def _number(path: str | Path, line: int, name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise DataError(f"{path}, line {line}: {name} must be a number, is {value!r}")
    return number


# --- time ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What one exchange takes its clients; small and picklable, so that lateness can be told where clients run.

    Parameters
    ----------
    clients : dict of int to (float, float, float)
        By partition id: seconds of the download, seconds a sample, seconds a byte of the upload.
    deadline : float
        Seconds for which the server waits; infinite = for everybody.

    Examples
    --------
    >>> timing = Timing({3: (2.0, 0.01, 1e-6)}, deadline=60.0)
    >>> timing.seconds(3, samples=500, up=1_000_000)
    8.0
    >>> timing.check(3, timing.seconds(3, samples=500, up=1_000_000, slowdown=20.0))
    Traceback (most recent call last):
    fedkd.errors.LateError: too late in simulated time: 103 s, the deadline is 60 s
    """

    clients: Mapping[int, tuple[float, float, float]]
    deadline: float = math.inf

    def seconds(self, partition: int, *, samples: float, up: float, slowdown: float = 1.0) -> float:
        """Return download + samples · slowdown + upload of a client, in simulated seconds.

        Parameters
        ----------
        partition : int
            The client.
        samples : float
            Training samples that it has seen.
        up : float
            Bytes that it sends.
        slowdown : float
            Factor on its computing time.

        Raises
        ------
        KnowledgeError
            The client reports a negative number, or numbers of which no finite duration follows.
        """
        download, per_sample, per_byte = self.clients[partition]
        duration = download + samples * per_sample * slowdown + up * per_byte
        if not (samples >= 0 and slowdown >= 0 and duration < math.inf):
            raise KnowledgeError(f"no duration follows from {samples} samples with a slowdown of {slowdown}")
        return duration

    def check(self, partition: int, seconds: float) -> None:
        """Refuse a client that misses the deadline.

        Raises
        ------
        LateError
            With its seconds.
        """
        if seconds > self.deadline:
            raise LateError(f"too late in simulated time: {seconds:.6g} s, the deadline is {self.deadline:g} s")

    def duration(self, accepted: Collection[float], missed: bool) -> float:
        """Return the simulated seconds of the exchange: those of the slowest accepted client, or the deadline.

        Parameters
        ----------
        accepted : collection of float
            Seconds of the clients whose uploads are used.
        missed : bool
            Whether the server waited for somebody in vain: then the deadline passes, if there is one.
        """
        return self.deadline if missed and self.deadline < math.inf else max(accepted, default=0.0)


class Clock:
    """Simulated time of a run.

    Parameters
    ----------
    devices : Devices
        How fast clients are.
    availability : Availability, optional
        When they can be reached; default always.
    seed : int
        The run's seed.
    deadline : float
        Simulated seconds for which the server waits in an exchange; infinite = for everybody.
    over_selection : float
        Factor, at least 1, on the number of clients asked; as many as without it are waited for.
    dropout : float
        Probability that a client drops out in the middle of a round.

    Attributes
    ----------
    time : float
        Simulated seconds since the run began.
    """

    def __init__(
        self,
        devices: Devices,
        availability: Availability | None = None,
        *,
        seed: int = 0,
        deadline: float = math.inf,
        over_selection: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        self.devices, self.availability, self.seed = devices, availability, seed
        self.deadline, self.over_selection, self.dropout = deadline, over_selection, dropout
        self.time = 0.0
        self._selected: frozenset[int] = frozenset()
        self._wanted = 0

    def select(self, round: int, wanted: int, choose: Choose, least: int) -> list[int]:
        """Choose clients among those that are available; where they are too few, time passes until there are more.

        Parameters
        ----------
        round : int
            Communication round.
        wanted : int
            Clients whose replies the round is to have.
        choose : callable
            Returns so many partition ids. Its second argument tells which of some partition ids are available; None:
            everybody is.
        least : int
            Fewest clients with which a round can begin.

        Returns
        -------
        list of int
            Over-selected: more than `wanted`, if so many are available.

        Raises
        ------
        RunError
            Too few clients became available in a simulated week.
        """
        asked = math.ceil(wanted * self.over_selection - 1e-9)  # 1.1 · 10 is a little more than 11
        for again in range(int(PATIENCE / POLL)):
            available = None
            if self.availability is not None:
                available = partial(self.availability.available, round, self.time, again=again)
            chosen = choose(asked, available)
            if len(chosen) >= least or available is None:
                self._selected, self._wanted = frozenset(chosen), min(wanted, len(chosen))
                return chosen
            self.time += POLL
        days = PATIENCE / 86400
        raise RunError(
            f"round {round}: in {days:g} simulated days there were never {least} clients available at once\n"
            "  lower system.min_replies, or let clients be available more often ([clock])"
        )

    def waits_for(self, partitions: Collection[int]) -> int:
        """Return how many of the clients of an exchange the server waits for: fewer than all if over-selected."""
        return self._wanted if self._selected == frozenset(partitions) else len(partitions)

    def dropped(self, round: int, partitions: Sequence[int]) -> set[int]:
        """Return the clients that drop out of a round."""
        if not self.dropout or not len(partitions):
            return set()
        ids = np.asarray(partitions, dtype=np.int64)
        drawn = _per_client(_uniform, self.seed, Purpose.CLIENT_DROPOUT, round, ids)
        return set(ids[drawn < self.dropout].tolist())

    def timing(self, down: Mapping[int, int]) -> Timing:
        """Return what an exchange takes the clients that get so many bytes, by partition id."""
        ids = np.fromiter(down, dtype=np.int64, count=len(down))
        rates = self.devices.of(ids)
        return Timing(
            {
                partition: (size / rate[2], 1 / rate[0], 1 / rate[1])
                for (partition, size), rate in zip(down.items(), rates.tolist(), strict=True)
            },
            self.deadline,
        )
