"""Flower grids over simulated clients: in this process (`InlineGrid`) or on Ray (`RayGrid`)."""

from __future__ import annotations

import itertools
import math
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkd.engine.cohorts import compose, longest_first
from fedkd.engine.worker import KEPT, NEW, AppFactory, CohortRunner, Record
from fedkd.threads import cores

if TYPE_CHECKING:
    from fedkd.engine.pool import Pool

SERVER = 1
"""Node id of the server, as Flower's SuperLink has it."""

FIRST_NODE = 1_000_001
"""Node id of partition 0: far from any partition id, so that nobody mistakes one for the other unnoticed."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The federation as arrays, so that a million clients cost no queries.

    Parameters
    ----------
    partition_ids : numpy.ndarray
        Partition id of each client, int64 [n], distinct.
    archs : tuple of str
        Architecture of each client [n]; cohorts never mix two.
    num_examples : numpy.ndarray
        Training samples of each client, int64 [n]; only the order of dispatch depends on them.

    Examples
    --------
    >>> nodes = Nodes(np.array([4, 2]), ("cnn", "mlp"), np.array([10, 20]))
    >>> nodes.partition(nodes.node_id(2)), nodes.index(2), len(nodes)
    (2, 1, 2)
    """

    partition_ids: np.ndarray
    archs: tuple[str, ...]
    num_examples: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.partition_ids) == len(self.archs) == len(self.num_examples):
            raise ValueError("partition_ids, archs and num_examples have different lengths")
        if len(self._sorted) and (self._sorted[:-1] == self._sorted[1:]).any():
            raise ValueError("partition ids are not distinct")

    @classmethod
    def alike(cls, count: int) -> Nodes:
        """Return `count` clients of one architecture and the same size, for any Flower app.

        Examples
        --------
        >>> Nodes.alike(3).partition_ids
        array([0, 1, 2])
        """
        return cls(np.arange(count), ("",) * count, np.ones(count, np.int64))

    def __len__(self) -> int:
        return len(self.partition_ids)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.partition_ids, kind="stable")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return self.partition_ids[self._order]

    def index(self, partition: int) -> int:
        """Return the position of a client in the arrays; ValueError if there is no such client."""
        place = int(np.searchsorted(self._sorted, partition))
        if place == len(self) or self._sorted[place] != partition:
            raise ValueError(f"no client of this federation has partition id {partition}")
        return int(self._order[place])

    def node_id(self, partition: int) -> int:
        """Return the Flower node id of a client; the same in every run."""
        return FIRST_NODE + int(partition)

    def partition(self, node_id: int) -> int:
        """Return the partition id of a Flower node; ValueError if there is no such node."""
        partition = int(node_id) - FIRST_NODE
        try:
            self.index(partition)
        except ValueError:
            raise ValueError(f"no client of this federation has node id {node_id}") from None
        return partition

    def node_ids(self) -> list[int]:
        """Return the Flower node ids of all clients, in the order of the arrays."""
        return (self.partition_ids + FIRST_NODE).tolist()


class Item(NamedTuple):
    """One message on its way to one client."""

    partition: int
    message: Message


class Outcome(NamedTuple):
    """What came of an `Item`; a state is whatever the grid keeps for a client, None the empty one."""

    reply: Message
    change: int  # KEPT, EMPTY or NEW; with KEPT the client has the state it had before
    state: Any = None


Fetch = Callable[[int], list[Outcome]]


class SimulationGrid(Grid):
    """What both grids have in common: identities, order of replies, states of clients.

    Replies come lazily and in partition order; nothing runs unless somebody reads them. A client's new state
    counts from the moment its reply is handed over, so a reader who stops early leaves the other clients as
    they were, on every engine.

    Parameters
    ----------
    nodes : Nodes
        The federation.
    run_config : dict, optional
        Configuration of the run, as client apps find it in ``context.run_config``.
    """

    def __init__(self, nodes: Nodes, run_config: dict[str, Any] | None = None) -> None:
        self.nodes = nodes
        self.run_config = dict(run_config or {})
        self._numbers = itertools.count(1)
        self._states: dict[int, Any] = {}  # partition id -> handle of a state that is not empty
        self._pushed: dict[str, Message] = {}
        self.set_run(Run.create_empty(1))

    # ---- Flower's interface

    def set_run(self, run: Run) -> None:
        """Set the run; messages that a strategy creates afterwards belong to it."""
        self._run = run
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run.run_id, SERVER, 1

    @property
    def run(self) -> Run:
        """The run that this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message from the server to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all clients."""
        return self.nodes.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages and return their ids. The clients run when the replies are pulled."""
        pushed = {self._register(message): message for message in messages}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients that the named messages go to and return their replies; an id counts once."""
        return list(self._deliver([self._pushed.pop(i) for i in message_ids if i in self._pushed], None))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and yield the replies in partition order, each as soon as it can be had.

        Parameters
        ----------
        messages : iterable of Message
            One for each client that takes part, in any order. Further messages to the same client are sent
            when all of the first ones are answered. Content may differ from client to client; records that
            several messages hold (the same objects) are handed to the workers once.
        timeout : float, optional
            Seconds for the whole call; clients that have not finished by then get error replies.
            Default: no limit.

        Yields
        ------
        Message
            A reply, or an error reply with code and reason, for every message.

        Raises
        ------
        ValueError
            A message without content, or for a node that is not in the federation.
        """
        deadline = None if timeout is None else time.time() + timeout
        messages = list(messages)
        for message in messages:
            self._register(message)
        yield from self._deliver(messages, deadline)

    # ---- states of clients

    def state_dict(self) -> dict[int, RecordDict]:
        """Return ``Context.state`` by partition id, for clients whose state is not empty."""
        return {partition: self._states[partition] for partition in sorted(self._states)}

    def load_state_dict(self, states: dict[int, RecordDict]) -> None:
        """Replace the states of all clients; those that are not named start empty.

        Raises
        ------
        ValueError
            For a partition id that is not in the federation; nothing is changed then.
        """
        for partition in states:
            self.nodes.index(partition)
        self._states = {partition: state for partition, state in states.items() if state}

    def close(self) -> None:
        """Give back what the grid holds; read `state_dict` before."""
        self._states, self._pushed = {}, {}

    def __enter__(self) -> SimulationGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the way of a message

    @abstractmethod
    def _running(
        self, items: list[Item], cohorts: list[list[int]], deadline: float | None
    ) -> AbstractContextManager[Fetch]:
        """Run cohorts (positions into `items`) while the context is open; its value waits for one of them."""

    def _register(self, message: Message) -> str:
        if not message.has_content():
            raise ValueError(f"a message to node {message.metadata.dst_node_id} has no content")
        fields = message.metadata.__dict__
        # Flower's link would assign these. The counter makes ids the same in every run.
        fields.update(_run_id=self._run.run_id, _src_node_id=SERVER, _message_id=f"{next(self._numbers)}")
        return fields["_message_id"]

    def _deliver(self, messages: Iterable[Message], deadline: float | None) -> Iterator[Message]:
        waves: list[list[Item]] = []
        seen: Counter[int] = Counter()
        for message in messages:
            partition = self.nodes.partition(message.metadata.dst_node_id)
            if seen[partition] == len(waves):
                waves.append([])
            waves[seen[partition]].append(Item(partition, message))
            seen[partition] += 1
        for wave in waves:
            yield from self._send(sorted(wave, key=lambda item: item.partition), deadline)

    def _send(self, items: list[Item], deadline: float | None) -> Iterator[Message]:
        archs = [self.nodes.archs[self.nodes.index(item.partition)] for item in items]
        cohorts = compose([item.partition for item in items], archs)
        home = {position: number for number, cohort in enumerate(cohorts) for position in cohort}
        ready: dict[int, Outcome] = {}
        with self._running(items, cohorts, deadline) as fetch:
            for position, (partition, message) in enumerate(items):
                if position not in ready:
                    number = home[position]
                    ready.update(zip(cohorts[number], fetch(number)))
                outcome = ready.pop(position)
                if outcome.change != KEPT:
                    self._states.pop(partition, None)
                    if outcome.state is not None:
                        self._states[partition] = outcome.state
                yield self._addressed(outcome.reply, message)

    def _addressed(self, reply: Message, message: Message) -> Message:
        sent, got = message.metadata, reply.metadata
        metadata = Metadata(
            run_id=sent.run_id,
            message_id=f"{next(self._numbers)}",
            src_node_id=sent.dst_node_id,
            dst_node_id=sent.src_node_id,
            reply_to_message_id=sent.message_id,
            group_id=sent.group_id,
            created_at=got.created_at,
            ttl=got.ttl,
            message_type=sent.message_type,
            src_task_id=sent.dst_task_id,
            dst_task_id=sent.src_task_id,
        )
        if reply.has_error():
            return make_message(metadata, error=reply.error)
        return make_message(metadata, reply.content)


class InlineGrid(SimulationGrid):
    """Runs clients in this process, for tests, debugging and tiny federations.

    Parameters
    ----------
    app_factory : callable
        Makes the ClientApp; called once.
    nodes : Nodes
        The federation.
    run_config : dict, optional
        Configuration of the run.

    Examples
    --------
    >>> from flwr.clientapp import ClientApp
    >>> app = ClientApp()
    >>> @app.train()
    ... def train(message, context):
    ...     return Message(message.content, reply_to=message)
    >>> grid = InlineGrid(lambda: app, Nodes.alike(2))
    >>> asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    >>> [grid.nodes.partition(reply.metadata.src_node_id) for reply in grid.send_and_receive(asked)]
    [0, 1]
    """

    def __init__(self, app_factory: AppFactory, nodes: Nodes, run_config: dict[str, Any] | None = None) -> None:
        super().__init__(nodes, run_config)
        self._runner = CohortRunner(app_factory(), len(nodes), self.run_config)

    @contextmanager
    def _running(self, items: list[Item], cohorts: list[list[int]], deadline: float | None) -> Iterator[Fetch]:
        def fetch(number: int) -> list[Outcome]:
            chosen = [items[position] for position in cohorts[number]]
            answers = self._runner.run(
                [item.message for item in chosen],
                [item.partition for item in chosen],
                [self._states.get(item.partition) for item in chosen],
                deadline,
            )
            return [Outcome(a.reply, KEPT if a.state is None else NEW, a.state or None) for a in answers]

        yield fetch


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
        Worker processes, one CPU each; 0 (default) = one for each core of this machine.
    gpus_per_worker : float
        Share of a GPU for each worker, default 0.
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
        workers: int = 0,
        gpus_per_worker: float = 0.0,
        address: str = "",
    ) -> None:
        from fedkd.engine.pool import Pool  # Ray costs half a second; who runs inline does not pay for it

        super().__init__(nodes, run_config)
        self._pool: Pool = Pool(
            (app_factory, len(nodes), self.run_config),
            workers=workers or cores(),
            gpus_per_worker=gpus_per_worker,
            address=address,
        )

    def state_dict(self) -> dict[int, RecordDict]:
        """Fetch ``Context.state`` by partition id, for clients whose state is not empty."""
        partitions = sorted(self._states)
        return dict(zip(partitions, self._pool.get([self._states[p] for p in partitions])))

    def load_state_dict(self, states: dict[int, RecordDict]) -> None:
        """Replace the states of all clients, as in `SimulationGrid`."""
        super().load_state_dict(states)
        self._states = {partition: self._pool.put(state) for partition, state in self._states.items()}

    def close(self) -> None:
        """Stop the workers, and Ray where this grid started it; read `state_dict` before."""
        super().close()
        self._pool.close()

    @contextmanager
    def _running(self, items: list[Item], cohorts: list[list[int]], deadline: float | None) -> Iterator[Fetch]:
        share = self._shared(items)
        jobs = []
        for cohort in cohorts:
            chosen = [items[position] for position in cohort]
            shared: dict[int, Any] = {}  # id of a record -> its reference, in the order of first use

            def part(record: Record, shared: dict[int, Any] = shared) -> int | Record:
                if id(record) not in share:
                    return record
                shared[id(record)] = share[id(record)]
                return list(shared).index(id(record))

            contents = [[(name, part(r)) for name, r in item.message.content.items()] for item in chosen]
            jobs.append(
                (
                    len(chosen),
                    [item.message.metadata for item in chosen],
                    contents,
                    [item.partition for item in chosen],
                    deadline,
                    len(shared),
                    *shared.values(),
                    *(self._states.get(item.partition) for item in chosen),
                )
            )
        samples = [int(self.nodes.num_examples[self.nodes.index(item.partition)]) for item in items]

        with self._pool.dispatch(
            jobs, longest_first(cohorts, samples), math.inf if deadline is None else deadline
        ) as result:

            def fetch(number: int) -> list[Outcome]:
                done = result(number)
                if isinstance(done, Error):
                    failed = [items[position].message for position in cohorts[number]]
                    return [Outcome(Message(done, reply_to=message), KEPT) for message in failed]
                return [Outcome(reply, change, state if change == NEW else None) for reply, change, state in zip(*done)]

            yield fetch

    def _shared(self, items: list[Item]) -> dict[int, Any]:
        """Put the records that several messages hold into the object store; they go when the call is over."""
        records = {id(r): r for item in items for r in item.message.content.values()}
        uses = Counter(id(r) for item in items for r in item.message.content.values())
        return {key: self._pool.put(record) for key, record in records.items() if uses[key] > 1}
