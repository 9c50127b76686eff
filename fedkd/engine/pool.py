"""Ray workers: started, replaced when they die, and fed by a dispatcher.

Whole replies are left in the object store until somebody reads them.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from flwr.app import Error
from flwr.common.constant import ErrorCode
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from fedkd import kept
from fedkd.cluster import runtime_env, start_ray
from fedkd.engine.dispatcher import PATIENCE, RETRIES, Dispatcher, Done, Job, Pieces, cause
from fedkd.engine.machines import machines
from fedkd.engine.worker import Worker
from fedkd.errors import RunError

log = logging.getLogger(__name__)

SMALL = 64 << 10
"""Bytes up to which an argument of several jobs is sent along with each of them: an object of its own takes longer."""


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
            options = {"num_gpus": gpus_per_worker, "memory": worker_bytes or None, "runtime_env": runtime_env()}
            self._make = ray.remote(Worker).options(num_cpus=1, **options)
            self._has_gpus = gpus_per_worker > 0
            self._parts = [ray.put(part) for part in parts]
            self._kind = kept.kind_of(workers, options)
            rested = kept.take(self._kind)
            self.actors: list[Any] = rested or [self._make.remote(*self._parts) for _ in range(workers)]
            self.loading: dict[int, Any] = {
                place: actor.begin.remote(*self._parts) if rested else actor.load.remote()
                for place, actor in enumerate(self.actors)
            }
        except BaseException:
            if self._started_ray:
                ray.shutdown()
            raise
        self.gone: set[int] = set()  # places where one worker after another died before it could begin
        self.failure: RunError | None = None  # once there is no place left
        self._stillborn = Counter[int]()
        self._dispatchers: set[Dispatcher] = set()
        self._started = self._closed = False
        self._tidy = True  # whether workers have nothing left to do

    def get(self, refs: list[Any]) -> list[Any]:
        """Fetch objects."""
        return ray.get(refs)

    def put(self, value: Any) -> Any:
        """Put one object into the store and return its reference."""
        return ray.put(value)

    def pickled(self, value: Any) -> Any:
        """Pickle an argument of many jobs: bytes, to be sent along with each, if they are few, else a reference."""
        pickled = cloudpickle.dumps(value)  # pyright: ignore[reportPrivateImportUsage]
        return pickled if len(pickled) <= SMALL else ray.put(pickled)

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

    def ask(self, place: int) -> None:
        """Let the worker in a place show that it is still ready for jobs; until then it counts as loading."""
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
            log.warning("a worker died while it loaded the client app (%s); another one is started", cause(error))
            self.replace(place, actor)
            return
        self.loading.pop(place, None)
        self.gone.add(place)
        left = len(self.actors) - len(self.gone)
        if not left:
            self.failure = RunError(
                f"workers die while they load the client app, {times} times in each place: {cause(error)}\n"
                "  is there memory for so many? --workers sets their number"
            )
            raise self.failure
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
                    return Error(ErrorCode.UNKNOWN, cause(error))
                except RayError as error:  # the node that held it is gone
                    dispatcher.lost(number, error)

        try:
            yield result
        finally:
            dispatcher.stop()
            self._tidy &= not dispatcher.unfinished
            self._dispatchers.discard(dispatcher)
            if self._has_gpus and not (self._dispatchers or self._closed):  # nothing more is queued for anybody
                self.tell("idle")

    def close(self) -> None:
        """Stop the workers, or keep them for another pool, and stop Ray where this pool started it.

        May be called twice.
        """
        if self._closed:
            return
        self._closed = True
        # On GPUs each run begins with another kind of worker, and those that wait would hold memory.
        tidy = self._started and self._tidy and not (self._dispatchers or self.gone or self._has_gpus)
        for dispatcher in list(self._dispatchers):
            dispatcher.stop()
        if ray.is_initialized() and not (tidy and not self._started_ray and kept.keep(self._kind, self.actors)):
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
            raise RunError(f"a worker could not load the client app: {cause(error)}") from error
        except RayError as error:
            self.died_loading(place, self.actors[place], error)
            return False
        return True


def _check_room(workers: int, gpus_per_worker: float) -> None:
    total = ray.cluster_resources()
    if workers < 1:
        raise RunError("Ray has no CPU for a worker: add a node that has one, or start the head with --num-cpus")
    for name, wanted in (("CPU", float(workers)), ("GPU", workers * gpus_per_worker)):
        if wanted > total.get(name, 0.0) + 1e-6:
            raise RunError(
                f"{workers} workers need {wanted:g} {name}s, Ray has {total.get(name, 0.0):g}; ask for fewer workers: "
                "fedkd run … --workers N goes on with a run that was begun with more"
            )
