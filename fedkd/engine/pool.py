"""Ray workers and the dispatcher that feeds them.

Cohorts are pulled, dead workers replaced, replies left in the object store until somebody reads them.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
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

from fedkd.cluster import runtime_env, start_ray
from fedkd.engine.machines import machines
from fedkd.engine.worker import TOO_LATE, Worker, describe
from fedkd.errors import RunError

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Cohorts that a worker has at once: the one it computes, and the next, whose arguments travel meanwhile."""

RETRIES = 3
"""How often a cohort is run again when the worker that ran it died."""

PATIENCE = 60.0
"""Seconds without all workers after which the user is told that the grid waits for Ray."""

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


class Pool:
    """A fixed number of long-lived Ray workers.

    Parameters
    ----------
    parts : tuple
        Arguments of `Worker`; put into the object store once.
    workers : int
        Number of workers, one CPU each; 0 = one for each CPU of the cluster.
    gpus_per_worker : float
        GPU share of each.
    worker_bytes : int
        Memory that Ray sets aside for each; 0 = none.
    address : str
        Cluster to join if Ray is not initialised; empty = start Ray here.

    Raises
    ------
    RunError
        Ray has too few CPUs or GPUs for the workers.
    """

    LOST = RayError  # raised by `get` for what was lost with its node

    def __init__(
        self, parts: tuple[Any, ...], *, workers: int, gpus_per_worker: float, worker_bytes: int = 0, address: str
    ) -> None:
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            start_ray(address, workers)
        try:
            workers = workers or sum(int(node.cpus) for node in machines(gpus=False))
            _check_room(workers, gpus_per_worker)
            self._make = ray.remote(Worker).options(
                num_cpus=1,
                num_gpus=gpus_per_worker,
                memory=worker_bytes or None,
                runtime_env=runtime_env(),
            )
            self._has_gpus = gpus_per_worker > 0
            self._parts = [ray.put(part) for part in parts]
            self.actors: list[Any] = [self._make.remote(*self._parts) for _ in range(workers)]
            self.loading: dict[int, Any] = {place: a.load.remote() for place, a in enumerate(self.actors)}
        except BaseException:
            if self._started_ray:
                ray.shutdown()
            raise
        self.gone: set[int] = set()  # places where one worker after another died before it could begin
        self._stillborn = Counter[int]()
        self._dispatchers: set[Dispatcher] = set()
        self._started = self._closed = False

    def get(self, refs: list[Any]) -> list[Any]:
        """Fetch objects."""
        return ray.get(refs)

    def put(self, value: Any) -> Any:
        """Put one object into the store and return its reference."""
        return ray.put(value)

    def is_lost(self, ref: Any) -> bool:
        """Whether an object is gone with the node that held it."""
        try:
            ray.get(ref)
        except RayError:
            return True
        return False

    def replace(self, place: int, actor: Any) -> None:
        """End a worker and start a fresh one in its place, unless somebody already did."""
        if self.actors[place] is actor:
            ray.kill(actor, no_restart=True)
            self.actors[place] = self._make.remote(*self._parts)
            self.loading[place] = self.actors[place].load.remote()

    def loaded(self, place: int) -> None:
        """Take note that the worker in a place is ready for jobs."""
        self.loading.pop(place, None)
        self._stillborn[place] = 0

    def died_loading(self, place: int, actor: Any, error: Exception) -> None:
        """Start another worker for one that died before it could begin, but not for ever.

        Raises
        ------
        RunError
            There is no place left where a worker lives.
        """
        if self.actors[place] is not actor:
            return
        self._stillborn[place] += 1
        times = self._stillborn[place]
        if times <= RETRIES:
            log.warning("a worker died while it loaded the client app (%s); another one is started", _cause(error))
            self.replace(place, actor)
            return
        self.loading.pop(place, None)
        self.gone.add(place)
        left = len(self.actors) - len(self.gone)
        if not left:
            raise RunError(
                f"workers die while they load the client app, {times} times in each place: {_cause(error)}\n"
                "  is there memory for so many? --workers sets their number"
            )
        log.warning("a worker died %d times while it loaded the client app; %d are left", times, left)

    def load_app(self, app_factory: Any) -> None:
        """Let all workers, and those that come in their place, answer with another app from their next job on."""
        self._parts[0] = ray.put(app_factory)
        self.tell("replace_app", self._parts[0])

    def tell(self, method: str, *arguments: Any) -> None:
        """Let every worker call one of its methods before its next job; nobody waits, or hears what came of it."""
        for actor in self.actors:
            getattr(actor, method).remote(*arguments)

    @contextmanager
    def dispatch(
        self, jobs: Sequence[Job], order: Sequence[int] = (), *, deadline: float = math.inf, ahead: int = 0
    ) -> Iterator[Callable[[int], Done | Pieces | Error]]:
        """Run jobs on the workers while the context is open.

        Parameters
        ----------
        jobs : sequence of Job
            The jobs.
        order : sequence of int
            The jobs in the order in which they are handed out; default: as they are.
        deadline : float
            Unix time after which jobs that have not finished fail; may be infinite.
        ahead : int
            How many jobs may be begun beyond the number of those that were asked for; 0 = all.

        Yields
        ------
        callable
            Waits for one job and returns what came of it; if it is done in `Pieces`, their numbers, to be asked for
            likewise. To be asked once for each job.
        """
        self._wait_until_loaded()
        dispatcher = Dispatcher(self, jobs, order or range(len(jobs)), deadline, ahead or len(jobs))
        self._dispatchers.add(dispatcher)
        dispatcher.start()

        def result(number: int) -> Done | Pieces | Error:
            while True:
                done = dispatcher.wait(number)
                if isinstance(done, Error | Pieces):
                    return done
                first, refs = done
                try:
                    return Done(first, ray.get([refs[k] for k in dispatcher.job(number).reads]), refs)
                except RayTaskError as error:
                    return Error(ErrorCode.UNKNOWN, _cause(error))
                except RayError as error:  # the node that held it is gone
                    dispatcher.lost(number, error)

        try:
            yield result
        finally:
            dispatcher.stop()
            self._dispatchers.discard(dispatcher)
            if self._has_gpus and not (self._dispatchers or self._closed):  # nothing more is queued for anybody
                self.tell("idle")

    def close(self) -> None:
        """Stop the workers, and Ray where this pool started it. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for dispatcher in list(self._dispatchers):
            dispatcher.stop()
        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor, no_restart=True)
            if self._started_ray:
                ray.shutdown()

    def _wait_until_loaded(self) -> None:
        """Wait for the first worker, so that an app that cannot be loaded is one clear error; others may follow."""
        if self._closed:
            raise RunError("the grid is closed")
        # Waiting here and not in the constructor: workers import and load while the server prepares itself.
        if self._started:
            return
        if not ray.wait(list(self.loading.values()), timeout=PATIENCE)[0]:
            free = ray.available_resources().get("CPU", 0.0)
            log.warning("Ray has not started a worker yet: %g CPUs are free; still waiting", free)
        while not self._one_has_loaded():
            pass
        self._started = True

    def _one_has_loaded(self) -> bool:
        """Wait until a worker has loaded the app, or died of it, which is not the same as an app that raises."""
        [ref], _ = ray.wait(list(self.loading.values()))
        place = next(place for place, other in self.loading.items() if other == ref)
        try:
            ray.get(ref)
        except RayTaskError as error:
            raise RunError(f"a worker could not load the client app: {_cause(error)}") from error
        except RayError as error:
            self.died_loading(place, self.actors[place], error)
            return False
        return True


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
        self._watched: dict[int, Any] = {}  # place -> the worker there that is being waited for
        self._results: dict[int, tuple[Any, list[Any]] | Pieces | Error] = {}
        self._crash: BaseException | None = None
        self._changed = threading.Condition()

    # ---- called by others

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
                    event = self._events.get(timeout=self._remaining())
                except queue.Empty:
                    event = self._expire
                if event is None:
                    return self._fail(RuntimeError("the grid was closed"))
                event()
        except BaseException as error:  # the caller must not wait for a dead thread
            self._fail(error)

    def _remaining(self) -> float | None:
        return None if math.isinf(self._deadline) else max(0.0, self._deadline - time.time())

    def _more(self) -> None:
        self._room += 1

    def _watch(self) -> None:
        """Hear when workers have loaded the app; they get no jobs before: their node may have no room for them."""
        for place, ref in list(self._pool.loading.items()):
            actor = self._pool.actors[place]
            if self._watched.get(place) is not actor:
                self._watched[place] = actor

                def loaded(done: Any, place: int = place, actor: Any = actor) -> None:
                    self._events.put(lambda: self._loaded(place, actor, done))

                ref.future().add_done_callback(loaded)

    def _loaded(self, place: int, actor: Any, future: Any) -> None:
        if self._pool.actors[place] is not actor:
            return
        try:
            future.result()
        except RayTaskError as error:
            raise RunError(f"a worker could not load the client app: {_cause(error)}") from error
        except RayError as error:
            if place in self._pool.loading:  # else another dispatcher has heard of it before
                self._pool.died_loading(place, actor, error)
        else:
            self._pool.loaded(place)

    def _fill(self) -> None:
        self._watch()
        load = Counter(place for place, _ in self._in_flight.values())
        out = self._pool.loading.keys() | self._pool.gone
        ready = [place for place in range(len(self._pool.actors)) if place not in out]
        while self._pending and ready and (self._room > 0 or self._pending[0] in self._begun):
            place = min(ready, key=load.__getitem__)
            if load[place] == IN_FLIGHT or (load[place] and len(self._pending) <= len(self._pool.actors)):
                return  # the last ones are for whoever is free first
            load[place] += 1
            self._submit(self._pending.popleft(), place)

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
                self._give_up(number, Error(LOST if lost else ErrorCode.UNKNOWN, _cause(error)))
        except DEATHS as error:
            orphans = [job for job, (_, other) in self._in_flight.items() if other == actor]
            self._pool.replace(place, actor)
            self._again(orphans, error)
        except RayError as error:
            self._again([number], error)
        else:
            del self._in_flight[number]
            self._finish(number, (first, refs))

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
            reason = f"{kind}: {what}, {times} times for this cohort; {_cause(error)}"
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


def _check_room(workers: int, gpus_per_worker: float) -> None:
    total = ray.cluster_resources()
    for name, wanted in (("CPU", float(workers)), ("GPU", workers * gpus_per_worker)):
        if wanted > total.get(name, 0.0) + 1e-6:
            raise RunError(
                f"{workers} workers need {wanted:g} {name}s, Ray has {total.get(name, 0.0):g}; ask for fewer workers: "
                "fedkd run … --workers N goes on with a run that was begun with more"
            )


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(error, RayTaskError) and isinstance(cause, BaseException):
        return describe(cause)
    return str(error).strip().split("\n")[0]
