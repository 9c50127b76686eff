"""The dispatcher: feeds workers with jobs, and does what was lost with a worker again elsewhere."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import Error
from flwr.common.constant import ErrorCode
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from fedkd.engine.worker import TOO_LATE, describe
from fedkd.errors import RunError

if TYPE_CHECKING:
    from fedkd.engine.pool import Pool

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Cohorts that a worker has at once: the one it computes, and the next, whose arguments travel meanwhile."""

RETRIES = 3
"""How often a cohort is run again when the worker that ran it died."""

PATIENCE = 60.0
"""Seconds without any worker after which the user is told that the grid waits for Ray."""

LOST = ErrorCode.NODE_UNAVAILABLE
"""Code of the error of a job that cannot be done because an argument was lost with its node."""

DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError)


@dataclass(frozen=True, eq=False)
class Job:
    """A call of one of the methods of `Worker`.

    Parameters
    ----------
    method : str
        The method.
    arguments : tuple
        Its arguments.
    returns : int
        How many objects it returns.
    reads : tuple of int
        Which of the others the caller reads when the call has ended; the rest stay references. Default: none.
    repair : callable, optional
        Called when arguments were lost with the node that held them; returns arguments to try again with.
    pieces : callable, optional
        Returns the same work as several jobs: what is done instead when it cannot be done as one, so that whoever is
        to blame for that fails alone.
    """

    method: str
    arguments: tuple[Any, ...]
    returns: int = 1
    reads: tuple[int, ...] = ()
    repair: Callable[[], tuple[Any, ...]] | None = None
    pieces: Callable[[], list[Job]] | None = None


class Done(NamedTuple):
    """A job that has ended."""

    first: Any  # the first object that it returned
    read: list[Any]  # those that the caller reads
    refs: list[Any]  # references to all of them


class Pieces(NamedTuple):
    """A job that is done in pieces."""

    numbers: list[int]  # of the jobs to ask for instead


class Dispatcher(threading.Thread):
    """Feeds the workers during one call, so that they run ahead while the caller reads replies.

    A thread of its own, woken by events alone: a job has ended, a worker is ready, a value was lost, stop. All
    decisions are taken in this thread; the caller only waits.

    Parameters
    ----------
    pool : Pool
        The workers.
    jobs : sequence of Job
        The jobs.
    order : sequence of int
        The jobs in the order in which they are handed out.
    deadline : float
        Unix time; may be infinite.
    ahead : int
        How many jobs may be begun beyond the number of those that were asked for.
    """

    def __init__(self, pool: Pool, jobs: Sequence[Job], order: Sequence[int], deadline: float, ahead: int) -> None:
        super().__init__(name="fedkd-dispatcher", daemon=True)
        self._pool, self._jobs, self._deadline = pool, list(jobs), deadline
        self._pending = deque(order)
        self._room = ahead  # jobs that may still be begun
        self._in_flight: dict[int, tuple[int, Any]] = {}  # job -> place and actor, oldest first
        self._begun: set[int] = set()
        self._deaths = Counter()
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._watched: dict[int, Any] = {}  # place -> what comes of the load of the worker there, which is waited for
        self._results: dict[int, tuple[Any, list[Any]] | Pieces | Error] = {}
        self._crash: BaseException | None = None
        self._changed = threading.Condition()

    # ---- called by others

    @property
    def unfinished(self) -> bool:
        """Whether workers have jobs that nobody waits for any more; to be asked after `stop`."""
        return bool(self._in_flight)

    def job(self, number: int) -> Job:
        """Return a job."""
        return self._jobs[number]

    def wait(self, number: int) -> tuple[Any, list[Any]] | Pieces | Error:
        """Wait for a job and hand over the first object that it returned and references to all, or the error."""
        self._events.put(self._more)
        with self._changed:
            self._changed.wait_for(lambda: number in self._results or self._crash)
            if number in self._results:
                return self._results.pop(number)
        crash = self._crash or RuntimeError()
        raise crash if isinstance(crash, RunError) else RunError(f"the engine failed: {describe(crash)}") from crash

    def lost(self, number: int, error: Exception) -> None:
        """Report that the value of a finished job cannot be read."""
        self._events.put(lambda: self._again([number], error, "results of a cohort were lost with their node"))

    def stop(self) -> None:
        """End the thread; jobs that workers have begun are finished, and nobody hears of them."""
        self._events.put(None)
        if self.is_alive():
            self.join()

    # ---- in the thread

    def run(self) -> None:
        """Hand out jobs until told to stop."""
        try:
            while True:
                self._fill()
                try:
                    event = self._events.get(timeout=min(self._remaining(), PATIENCE))
                except queue.Empty:
                    event = self._expire if self._remaining() <= 0 else self._tell
                if event is None:
                    return self._fail(RuntimeError("the grid was closed"))
                event()
        except BaseException as error:  # the caller must not wait for a dead thread
            self._fail(error)

    def _remaining(self) -> float:
        return max(0.0, self._deadline - time.time())

    def _tell(self) -> None:
        """Say so if there are jobs and no worker: Ray may have no place for one until another node comes."""
        if self._pending and not self._in_flight and not self._ready():
            log.warning("no worker is there: Ray has not started one; still waiting")

    def _more(self) -> None:
        self._room += 1

    def _watch(self) -> None:
        """Hear when workers have loaded the app; they get no jobs before: their node may have no room for them."""
        me = weakref.ref(self)  # a worker may never load, and must not hold all that this call holds
        for place, ref in list(self._pool.loading.items()):
            if self._watched.get(place) is not ref:
                self._watched[place] = ref

                def loaded(done: Any, place: int = place, actor: Any = self._pool.actors[place]) -> None:
                    if (dispatcher := me()) is not None:
                        dispatcher._events.put(lambda: dispatcher._loaded(place, actor, done))

                ref.future().add_done_callback(loaded)

    def _loaded(self, place: int, actor: Any, future: Any) -> None:
        if self._pool.actors[place] is not actor:
            return
        try:
            future.result()
        except RayTaskError as error:
            raise RunError(f"a worker could not load the client app: {cause(error)}") from error
        except RayError as error:
            if place in self._pool.loading:  # else another dispatcher has heard of it before
                self._pool.died_loading(place, actor, error)
        else:
            self._pool.loaded(place)

    def _fill(self) -> None:
        if self._pool.failure is not None:  # of which another dispatcher may have been the one to hear
            raise self._pool.failure
        self._watch()
        load = Counter(place for place, _ in self._in_flight.values())
        ready = self._ready()
        while self._pending and ready and (self._room > 0 or self._pending[0] in self._begun):
            place = min(ready, key=load.__getitem__)
            if load[place] == IN_FLIGHT or (load[place] and len(self._pending) <= len(self._pool.actors)):
                return  # the last ones are for whoever is free first
            load[place] += 1
            self._submit(self._pending.popleft(), place)

    def _ready(self) -> list[int]:
        out = self._pool.loading.keys() | self._pool.gone
        return [place for place in range(len(self._pool.actors)) if place not in out]

    def _submit(self, number: int, place: int) -> None:
        job, actor = self._jobs[number], self._pool.actors[place]
        if number not in self._begun:
            self._begun.add(number)
            self._room -= 1
        returned = getattr(actor, job.method).options(num_returns=job.returns).remote(*job.arguments)
        refs = [returned] if job.returns == 1 else returned
        self._in_flight[number] = (place, actor)

        def ended(future: Any) -> None:
            self._events.put(lambda: self._ended(number, place, actor, future, refs))

        refs[0].future().add_done_callback(ended)

    def _ended(self, number: int, place: int, actor: Any, future: Any, refs: list[Any]) -> None:
        if self._in_flight.get(number) != (place, actor):
            return  # its worker was given up meanwhile, and the job is somewhere else
        try:
            first = future.result()
        except RayTaskError as error:
            repair = self._jobs[number].repair
            if repair is not None and isinstance(error.cause, ObjectLostError):
                self._jobs[number] = replace(self._jobs[number], arguments=repair())
                self._again([number], error, "arguments of a cohort were lost with their node")
            else:  # our own code raised, or a reply cannot be pickled: again would not help
                del self._in_flight[number]
                lost = isinstance(error.cause, ObjectLostError)
                self._give_up(number, Error(LOST if lost else ErrorCode.UNKNOWN, cause(error)))
        except DEATHS as error:
            orphans = [job for job, (_, other) in self._in_flight.items() if other == actor]
            self._pool.replace(place, actor)
            self._ask_idle_workers()
            self._again(orphans, error)
        except RayError as error:
            what = (
                "results of a cohort were lost with their node" if isinstance(error, ObjectLostError) else "Ray failed"
            )
            self._again([number], error, what)
        else:
            del self._in_flight[number]
            self._finish(number, (first, refs))

    def _ask_idle_workers(self) -> None:
        """Give no jobs to idle workers until they show that they live: their node may have left with all of them."""
        busy = {place for place, _ in self._in_flight.values()} | self._pool.loading.keys() | self._pool.gone
        for place in range(len(self._pool.actors)):
            if place not in busy:
                self._pool.ask(place)

    def _again(self, numbers: list[int], error: Exception, what: str = "a worker died") -> None:
        """Queue jobs again, in front; the first of them was being computed, so the blame is its alone."""
        blamed = numbers[0]
        self._deaths[blamed] += 1
        for number in numbers:
            self._in_flight.pop(number, None)
        self._pending.extendleft(reversed(numbers[1:]))
        times, kind = self._deaths[blamed], type(error).__name__
        if self._jobs[blamed].pieces is None and times <= RETRIES:
            self._pending.appendleft(blamed)
        else:  # whoever it is, it must not fail others that happen to be in the same job
            reason = f"{kind}: {what}, {times} times for this cohort; {cause(error)}"
            self._give_up(blamed, Error(ErrorCode.CLIENT_APP_CRASHED, reason))
        given_up = isinstance(self._results.get(blamed), Error)
        log.warning("%s (%s); its clients are %s", what, kind, "given up" if given_up else "run again elsewhere")

    def _give_up(self, number: int, error: Error) -> None:
        """End a job with an error, or do it in pieces."""
        pieces = self._jobs[number].pieces
        if pieces is None:
            return self._finish(number, error)
        numbers = range(len(self._jobs), len(self._jobs) + len(made := pieces()))
        self._jobs += made
        self._begun.update(numbers)
        self._pending.extendleft(reversed(numbers))
        self._finish(number, Pieces(list(numbers)))

    def _expire(self) -> None:
        """Give up what has not finished. Its workers are replaced: a client may never return."""
        for place, actor in dict.fromkeys(self._in_flight.values()):
            self._pool.replace(place, actor)
        for number in [*self._in_flight, *self._pending]:
            self._finish(number, TOO_LATE)
        self._in_flight.clear()
        self._pending.clear()
        self._deadline = math.inf

    def _finish(self, number: int, result: tuple[Any, list[Any]] | Pieces | Error) -> None:
        with self._changed:
            self._results[number] = result
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._crash = error
            self._changed.notify_all()


def cause(error: Exception) -> str:
    """Return what an exception of Ray says, in a line."""
    raised = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(raised, BaseException):
        return describe(raised)
    return str(error).strip().split("\n")[0]
