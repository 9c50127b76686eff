"""The simulated clock of a scenario, and exchanges that take time on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from fedkd.client.faults import SLOWDOWN
from fedkd.client.handlers import SAMPLES
from fedkd.data.local import find_file
from fedkd.engine.clock import Availability, Bernoulli, Clock, Devices, Diurnal, Listed, LogNormal, Timing, Trace
from fedkd.scenario import Scenario
from fedkd.server.uploads import Check, Upload, Verdict

Inspect = Callable[[Message, Sequence[Check]], tuple[int, Verdict]]


def make_clock(scenario: Scenario) -> Clock | None:
    """Return the clock of a scenario, or None where its profile is ``none``.

    Raises
    ------
    DataError
        A file is missing or malformed.
    """
    spec = scenario.clock
    if spec.profile == "none":
        return None
    return Clock(
        make_devices(scenario),
        make_availability(scenario),
        seed=scenario.run.seed,
        deadline=spec.deadline or math.inf,
        over_selection=spec.over_selection,
        dropout=spec.dropout,
    )


def make_devices(scenario: Scenario) -> Devices:
    """Return the devices of ``clock.profile``; raises as `make_clock`."""
    spec = scenario.clock
    if spec.profile.startswith("file:"):
        return Listed.read(_find(spec.profile, scenario))
    spread = (spec.samples_per_second_sigma, spec.up_sigma, spec.down_sigma)
    median = (spec.samples_per_second, spec.up, spec.down)
    return LogNormal(median, spread if spec.profile == "lognormal" else (0.0, 0.0, 0.0), scenario.run.seed)


def make_availability(scenario: Scenario) -> Availability | None:
    """Return what ``clock.availability`` says, None for always; raises as `make_clock`."""
    spec, seed = scenario.clock, scenario.run.seed
    if spec.availability.startswith("trace:"):
        return Trace.read(_find(spec.availability, scenario))
    if spec.availability == "bernoulli":
        return Bernoulli(spec.probability, seed)
    if spec.availability == "diurnal":
        return Diurnal(spec.probability, seed, spec.day)
    return None


def _find(setting: str, scenario: Scenario) -> Path:
    return find_file(setting.partition(":")[2], scenario.data.folder)


@dataclass(frozen=True)
class InTime:
    """Refuses what misses the deadline; can be pickled, for workers that sum uploads.

    Parameters
    ----------
    timing : Timing
        Of the exchange.
    """

    timing: Timing

    def __call__(self, upload: Upload) -> None:
        """Raise `LateError` if the upload is too late."""
        self.timing.check(upload.partition_id, self.seconds(upload, upload.knowledge.nbytes))

    def seconds(self, upload: Upload, nbytes: Mapping[str, int]) -> float:
        """Return when an upload of so many bytes arrives, in simulated seconds after the exchange began."""
        said = upload.said
        return self.timing.seconds(
            upload.partition_id,
            samples=float(said.get(SAMPLES, 0)),
            up=sum(nbytes.values()),
            slowdown=float(said.get(SLOWDOWN, 1)),
        )


class TimedExchange:
    """One exchange on the simulated clock: who drops out, who is late, and how long it takes.

    Parameters
    ----------
    clock : Clock
        Its time moves when the exchange ends.
    round : int
        Communication round.
    down : dict of int to int
        Bytes that each client gets, by partition id.
    """

    def __init__(self, clock: Clock, round: int, down: Mapping[int, int]) -> None:
        self._clock = clock
        self.dropped = sorted(clock.dropped(round, list(down)))
        self.in_time = InTime(clock.timing(down))
        self._asked, self._wanted = len(down), clock.waits_for(down)
        self._arrived: dict[int, float] = {}
        self._missed = bool(self.dropped)

    def dropouts(self) -> Iterator[tuple[int, Verdict]]:
        """Yield those who drop out: they have got the server's knowledge, and send nothing."""
        return ((p, Verdict({}, reason="dropped out", missed=True)) for p in self.dropped)

    def judge(
        self, replies: Iterable[Message], inspect: Inspect, checks: Sequence[Check]
    ) -> Iterator[tuple[int, Verdict]]:
        """Yield what comes of the replies, in partition order; then the exchange has ended.

        Parameters
        ----------
        replies : iterable of Message
            In partition order.
        inspect : callable
            Reads a reply and makes checks; returns whose it is and the verdict.
        checks : sequence of callable
            The exchange's own; lateness comes before them.
        """
        yield from self.dropouts()
        if self._wanted < self._asked:
            yield from self._first(replies, inspect, checks)
        else:
            for reply in replies:
                p, verdict = inspect(reply, [self.in_time, *checks])
                self.note(p, verdict)
                yield p, verdict
        self.end()

    def _first(
        self, replies: Iterable[Message], inspect: Inspect, checks: Sequence[Check]
    ) -> Iterator[tuple[int, Verdict]]:
        """Accept the first usable uploads to arrive, as many as are wanted."""
        verdicts: dict[int, Verdict] = {}
        arrivals = []
        for reply in replies:
            p, verdict = inspect(reply, [self.in_time])
            if verdict.upload is None:
                verdicts[p] = verdict
                self._missed |= verdict.missed
            else:
                arrivals.append((self.in_time.seconds(verdict.upload, verdict.nbytes), p, reply))
        late = 0
        for _, p, reply in sorted(arrivals, key=lambda arrival: arrival[:2]):
            if len(self._arrived) < self._wanted:
                _, verdicts[p] = inspect(reply, checks)
                self.note(p, verdicts[p])
            else:
                late += 1
                number = f"finished as number {self._wanted + late} of {self._wanted}"
                verdicts[p] = Verdict({}, reason=f"too late in simulated time: {number}")
        yield from sorted(verdicts.items())

    def note(self, partition_id: int, verdict: Verdict) -> None:
        """Note when a usable upload arrived, or that the server waits for one in vain."""
        if verdict.upload is not None:
            self._arrived[partition_id] = self.in_time.seconds(verdict.upload, verdict.nbytes)
        self._missed |= verdict.missed

    def end(self) -> None:
        """Let the exchange's duration pass on the clock."""
        missed = self._missed and len(self._arrived) < self._wanted
        self._clock.time += self.in_time.timing.duration(self._arrived.values(), missed)


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's arrays as they travel.

    Examples
    --------
    >>> from flwr.app import ArrayRecord
    >>> num_bytes(RecordDict({"weights": ArrayRecord([np.zeros((2, 3), np.float32), np.zeros(2)])}))
    40
    """
    arrays = (array for record in content.array_records.values() for array in record.values())
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
