"""Simulated clients on Ray workers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message

from fedkd.cohorts import Costs, in_tasks
from fedkd.engine.grid import STORED, Fetch, Item, Outcome, SimulationGrid
from fedkd.engine.measure import Measured, median
from fedkd.engine.nodes import Nodes
from fedkd.engine.parcels import unpack
from fedkd.engine.placement import Node
from fedkd.engine.worker import (
    KEPT,
    NEW,
    AppFactory,
    Cohort,
    Fold,
    Order,
    Receipt,
    Record,
    Stored,
    Yield,
    for_transport,
)
from fedkd.errors import LostError, RunError

if TYPE_CHECKING:
    from fedkd.engine.dispatcher import Done
    from fedkd.engine.pool import Pool

log = logging.getLogger(__name__)

AHEAD = 2
"""Results of `compute` for each worker that are made before somebody asks for them."""

_SMALL = (int, float, str, bool, type(None))


class RayGrid(SimulationGrid):
    """Runs clients on Ray workers that keep the app, and whatever the app keeps, from round to round.

    Joins Ray where it is initialised, else starts it, and stops it again in `close`. A worker that dies is
    replaced and its cohorts are run again, with the same result.

    Parameters
    ----------
    app_factory : callable
        Makes the ClientApp in each worker; pickled by Ray.
    nodes : Nodes
        The federation.
    run_config : dict, optional
        Configuration of the run.
    workers : int
        Worker processes, one CPU each; 0 (default) = one for each CPU of the cluster.
    gpus_per_worker : float
        Share of a GPU for each worker, default 0.
    worker_bytes : int
        Memory of a node that Ray sets aside for each worker; 0 (default) = none.
    address : str
        Ray cluster to join; empty (default) = start Ray on this machine.

    Raises
    ------
    fedkd.errors.RunError
        Ray cannot hold so many workers, or the app cannot be loaded (when the first message is sent).
    """

    def __init__(
        self,
        app_factory: AppFactory,
        nodes: Nodes,
        run_config: dict[str, Any] | None = None,
        *,
        cohort: int = 0,
        workers: int = 0,
        gpus_per_worker: float = 0.0,
        worker_bytes: int = 0,
        address: str = "",
    ) -> None:
        from fedkd.engine.pool import Pool  # Ray costs half a second; who runs inline does not pay for it

        super().__init__(nodes, run_config, cohort=cohort)
        self._costs = Costs()
        self._stateful = (
            True  # whether clients seem to have states: each is an object of its own then, which costs time
        )
        self._packets: dict[str, int] = {}  # kind of message -> packets in which sums come home
        self._pool: Pool = Pool(
            (app_factory, len(nodes), self.run_config),
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            worker_bytes=worker_bytes,
            address=address,
        )

    def state_dict(self) -> dict[int, RecordDict]:
        """Fetch ``Context.state`` by partition id, for clients whose state is not empty."""
        fetched = zip(partitions := sorted(self._states), self._fetch(partitions))
        return {partition: state for partition, state in fetched if state is not None}

    def _fetch(self, partitions: list[int]) -> list[RecordDict | None]:
        fetched = iter(self._get([self._states[p] for p in partitions if p in self._states], "states of clients"))
        return [next(fetched) if p in self._states else None for p in partitions]

    def _get(self, refs: list[Any], what: str) -> list[Any]:
        try:
            return self._pool.get(refs)
        except self._pool.LOST as error:
            raise LostError(f"{what} were lost with their node ({type(error).__name__})") from error

    def _stored(self, state: RecordDict) -> Any:
        return self._pool.put(state)

    def close(self) -> None:
        """Stop the workers, and Ray where this grid started it; read `state_dict` before."""
        super().close()
        self._pool.close()

    def compute(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Call the function on the workers, see `SimulationGrid.compute`."""
        from fedkd.engine.dispatcher import LOST, Done, Job

        jobs = list(jobs)
        uses = Counter(id(argument) for job in jobs for argument in job)
        function_ref = self._pool.put(function)
        put: dict[int, Any] = {}

        def made(job: tuple[Any, ...]) -> Job:
            objects: list[Any] = []
            arguments: list[Any] = []
            for argument in job:
                stored = argument.__dict__.get(STORED) if isinstance(argument, Message) else None
                if stored is not None:
                    arguments.append(Stored(len(objects), stored[1]))
                    objects.append(stored[0])  # the reference
                elif uses[id(argument)] > 1 and not isinstance(argument, _SMALL):
                    if id(argument) not in put:
                        put[id(argument)] = self._pool.put(argument)
                    arguments.append(Stored(len(objects)))
                    objects.append(put[id(argument)])
                else:
                    arguments.append(argument)
            return Job("compute", (function_ref, arguments, *objects))

        made_jobs = [made(job) for job in jobs]
        with self._pool.dispatch(made_jobs, ahead=AHEAD * len(self._pool.actors)) as result:
            for number in range(len(made_jobs)):
                done = result(number)
                if isinstance(done, Error):
                    if done.code == LOST:
                        raise LostError("uploads were lost with their node")
                    raise RunError(f"a computation on a worker failed: {done.reason}")
                assert isinstance(done, Done)
                yield done.first

    @contextmanager
    def _running(
        self, items: list[Item], cohorts: list[list[int]], deadline: float | None, fold: Fold | None, keep: bool
    ) -> Iterator[Fetch]:
        from fedkd.engine.dispatcher import Job, Pieces

        first = [items[cohort[0]] for cohort in cohorts]
        kinds = [
            (one.message.metadata.message_type, self.nodes.archs[self.nodes.index(one.partition)]) for one in first
        ]
        samples = [self._samples(items[position].partition for position in cohort) for cohort in cohorts]
        costs = [self._costs.of(kind, count) for kind, count in zip(kinds, samples)]
        tasks = dict(enumerate(in_tasks(costs, len(self._pool.actors))))
        stateful, self._stateful = self._stateful or bool(self._states), False
        wholes = fold is None or keep  # whether whole replies are an object of their own
        summed = None if fold is None or not kinds else kinds[0][0]
        packets = 0 if summed is None else self._packets.pop(summed, 0)
        before = 1 + packets + wholes  # objects that a task returns before clients' states
        home = {number: (task, place) for task, numbers in tasks.items() for place, number in enumerate(numbers)}
        shared = _Shared([item.message.content for item in items], self._pool.put)
        pickled_fold = None if fold is None else self._pool.pickled(fold)

        def job(numbers: range) -> Job:
            objects: list[Any] = []
            bundles = []
            for number in numbers:
                chosen = [items[position] for position in cohorts[number]]
                contents = [shared.part(item.message.content, objects) for item in chosen]
                metadata, partitions = [i.message.metadata for i in chosen], [i.partition for i in chosen]
                bundles.append(Cohort(number, metadata, contents, partitions))
            partitions = [partition for bundle in bundles for partition in bundle.partitions]
            order = Order(bundles, keep, deadline, len(objects), stateful, packets).pickled()

            def arguments() -> tuple[Any, ...]:
                states = [self._states.get(p) for p in partitions] if self._states else []
                return (order, pickled_fold, *objects, *states)

            def repaired() -> tuple[Any, ...]:
                self._rebuild(partitions)
                return arguments()

            returns = before + (len(partitions) if stateful else 0)
            reads = (1,) if summed is None else range(1, 1 + packets)
            return Job("run", arguments(), returns, tuple(reads), repaired)

        def pieces(numbers: range) -> list[Job]:
            return [job(range(number, number + 1)) for number in numbers]

        # Not in `job`, which would then refer to itself: what a call holds would wait for the garbage collector.
        jobs = [replace(job(n), pieces=partial(pieces, n) if len(n) > 1 else None) for n in tasks.values()]

        done: dict[int, Done | Error] = {}
        left = {task: len(numbers) for task, numbers in tasks.items()}
        limit = math.inf if deadline is None else deadline
        with self._pool.dispatch(jobs, deadline=limit) as result:

            def fetch(number: int) -> tuple[list[Outcome], list[tuple[int, int, Any]]]:
                task, place = home[number]
                loose = []
                while task not in done:
                    ended = result(task)
                    if isinstance(ended, Pieces):
                        for other, piece in zip(tasks.pop(task), ended.numbers):
                            home[other], tasks[piece], left[piece] = (piece, 0), range(other, other + 1), 1
                        task, place = home[number]
                    else:
                        done[task], loose = self._taken(ended, before, summed)
                ended = done[task]
                left[task] -= 1
                if not left[task]:
                    del done[task]  # the caller keeps what it needs longer
                if isinstance(ended, Error):
                    failed = [items[position].message for position in cohorts[number]]
                    return [
                        Outcome(ended if fold is not None else Message(ended, reply_to=message), KEPT)
                        for message in failed
                    ], loose
                receipt: Receipt = ended.first.receipts[place]
                of_cohorts = ended.first.results if fold is not None else ended.read[0]
                replies, of_cohorts[place] = of_cohorts[place], None  # not kept longer than needed
                self._costs.learn(kinds[number], samples[number], receipt.seconds)
                start = before + sum(len(cohorts[other]) for other in tasks[task][:place])
                return [
                    Outcome(
                        reply,
                        change,
                        ended.refs[start + k] if change == NEW else None,
                        (ended.refs[before - 1], (place, k)) if wholes else None,
                    )
                    for k, (reply, change) in enumerate(zip(replies, receipt.changes))
                ], loose

            yield fetch

    def _taken(
        self, ended: Done | Error, before: int, summed: str | None
    ) -> tuple[Done | Error, list[tuple[int, int, Any]]]:
        """Return a task, with a reference to each client's new state, and the parts that it has made."""
        if isinstance(ended, Error):
            return ended, []
        done: Yield = ended.first
        if summed is not None:
            done, packets = unpack(ended.first, ended.read)
            self._packets[summed] = max(packets, self._packets.get(summed, 0))
        refs = ended.refs
        if done.states is not None:  # nobody expected them: for once they have passed the driver
            refs = [*refs[:before], *(self._pool.put(state) if state else None for state in done.states)]
        self._stateful |= any(change == NEW for receipt in done.receipts for change in receipt.changes)
        # What has been handed over is not kept longer than needed.
        return ended._replace(first=done._replace(loose=[], states=None), refs=refs), done.loose

    def measure(
        self, cohorts: Sequence[Sequence[Message]], *, memory: bool = False, everywhere: bool = False
    ) -> list[Measured]:
        """Run cohorts on one of the workers, or on all of them, see `SimulationGrid.measure`."""
        from fedkd.engine.dispatcher import Done, Job

        contents = [message.content for messages in cohorts for message in messages]
        shared, objects, bundles = _Shared(contents, self._pool.put), [], []
        for messages in cohorts:
            partitions = self._registered(messages)
            parts = [shared.part(message.content, objects) for message in messages]
            bundles.append(Cohort(len(bundles), [message.metadata for message in messages], parts, partitions))
        if memory and not everywhere:
            self._pool.tell("measure", bundles[:1], memory, *objects)
        jobs = [Job("measure", (bundles, memory, *objects)) for _ in range(self.workers if everywhere else 1)]
        found: list[list[Measured]] = []
        with self._pool.dispatch(jobs) as result:
            for number in range(len(jobs)):
                done = result(number)
                if isinstance(done, Error):
                    raise RunError(done.reason)
                assert isinstance(done, Done)
                found.append(done.first)
        return [median(runs) for runs in zip(*found)]

    def expect(self, seconds_per_sample: Mapping[str, float]) -> None:
        """Let the first round start what takes long first, see `SimulationGrid.expect`."""
        for arch, seconds in seconds_per_sample.items():
            self._costs.learn(("train", arch), 1, seconds)

    def load_app(self, app_factory: AppFactory) -> None:
        """Let every worker make the app before its next cohort, see `SimulationGrid.load_app`."""
        self._pool.load_app(app_factory)

    @property
    def workers(self) -> int:
        """Worker processes."""
        return len(self._pool.actors)

    def machines(self, gpus: bool) -> list[Node]:
        """Return the machines of the cluster."""
        from fedkd.engine.machines import machines

        return machines(gpus)

    def whole(self, reply: Message) -> Message:
        """Fetch the whole reply, see `SimulationGrid.whole`."""
        if STORED not in reply.__dict__:
            return reply
        reference, path = reply.__dict__[STORED]
        return make_message(reply.metadata, Stored(0, path).value(self._get([reference], "uploads")).content)

    def _samples(self, partitions: Iterable[int]) -> int:
        places = [self.nodes.index(partition) for partition in partitions]
        return int(self.nodes.num_examples[places].sum())

    def _rebuild(self, partitions: list[int]) -> None:
        """Replace states that were lost with their node by what `on_lost` still has of them."""
        for partition in partitions:
            if partition in self._states and self._pool.is_lost(self._states[partition]):
                log.warning("the state of client %d was lost with its node", partition)
                state = self.on_lost(partition)
                self._states.pop(partition)
                if state:
                    self._states[partition] = self._pool.put(state)


class _Shared:
    """What several messages of a call hold, in the object store once: whole contents, else single records."""

    def __init__(self, contents: list[RecordDict], put: Callable[[Any], Any]) -> None:
        self._contents = Counter(id(content) for content in contents)
        self._records = Counter(id(record) for content in contents for record in content.values())
        self._refs: dict[int, Any] = {}
        self._put = put

    def part(self, content: RecordDict, objects: list[Any]) -> int | list[tuple[str, int | Record]]:
        """Return a content in terms of `objects`, to which what is missing is added."""
        if self._contents[id(content)] > 1:
            return self._number(content, objects)
        return [
            (name, self._number(record, objects) if self._records[id(record)] > 1 else for_transport(record))
            for name, record in content.items()
        ]

    def _number(self, shared: RecordDict | Record, objects: list[Any]) -> int:
        if id(shared) not in self._refs:
            self._refs[id(shared)] = self._put(for_transport(shared))
        ref = self._refs[id(shared)]
        for number, other in enumerate(objects):
            if other is ref:
                return number
        objects.append(ref)
        return len(objects) - 1
