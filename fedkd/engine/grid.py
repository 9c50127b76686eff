"""What Flower grids over simulated clients have in common; `InlineGrid` and `RayGrid` say where clients run."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from flwr.app import DEFAULT_TTL, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkd.cohorts import Parts, compose
from fedkd.engine.measure import Measured
from fedkd.engine.nodes import Nodes
from fedkd.engine.placement import Node
from fedkd.engine.worker import KEPT, AppFactory, Fold

STORED = "_fedkd_stored"
"""Attribute of a delivered reply: where the whole one is."""

SERVER = 1
"""Node id of the server, as Flower's SuperLink has it."""


class Item(NamedTuple):
    """One message on its way to one client."""

    partition: int
    message: Message


class Outcome(NamedTuple):
    """What came of an `Item`; a state is whatever the grid keeps for a client, None the empty one."""

    reply: Any  # a message; with a fold, what it made of that, or an error
    change: int  # KEPT, EMPTY or NEW; with KEPT the client has the state it had before
    state: Any = None
    stored: Any = None  # where the whole reply is, for `compute` and `whole`


class Folded(NamedTuple):
    """What a cohort came to."""

    partitions: list[int]
    results: list[Any]  # what the fold made of each reply; an `Error` where there is none
    kept: list[Message | None]  # stands for the whole reply, if it was to be kept
    part: Any  # in the last one: the part of all cohorts


Fetch = Callable[[int], tuple[list[Outcome], list[tuple[int, int, Any]]]]
"""Waits for a cohort; returns what came of its messages, and parts that came with it (see `fedkd.cohorts.Parts`)."""


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
    cohort : int
        Most clients in a cohort; 0 (default) = a sixteenth of those that are asked at once.
    """

    def __init__(self, nodes: Nodes, run_config: dict[str, Any] | None = None, *, cohort: int = 0) -> None:
        self.nodes = nodes
        self.run_config = dict(run_config or {})
        self.cohort = cohort
        self.on_lost: Callable[[int], RecordDict | None] = lambda partition: None
        self._numbers = itertools.count(1)
        self._states: dict[int, Any] = {}  # partition id -> handle of a state that is not empty
        self._changed: set[int] = set()  # partition ids whose state is not the one that was last taken
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
        metadata = Metadata(  # as Message(content, dst_node_id, …) makes it, in a fifth of the time
            run_id=self._run.run_id,
            message_id="",
            src_node_id=SERVER,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id or "",
            created_at=time.time(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
            src_task_id=TaskIdentity.task_id,
        )
        return make_message(metadata, content)

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

    def send_and_fold(self, messages: Iterable[Message], fold: Fold, *, keep: bool = False) -> Iterator[Folded]:
        """Send messages and fold the replies where the clients ran, so that the replies themselves do not travel.

        Parameters
        ----------
        messages : iterable of Message
            At most one for each client, in any order.
        fold : callable
            ``fold([(partition id, reply), …]) -> (results, part)`` for the replies of one cohort, in partition order.
            Results are what the server still needs of each: counts, metrics, or why a reply was left out. Its method
            ``merge(part, other) -> part`` joins the parts of neighbouring cohorts. Runs in workers: pickled once.
        keep : bool
            Whether the whole replies stay where they are, for `compute` and `whole`. Default: they are dropped.

        Yields
        ------
        Folded
            One for each cohort, in the order of `fedkd.cohorts.compose`, as soon as it can be had. Cohorts and the
            order of merging depend on the messages alone, so the part in the last one has the same bits on every
            engine; it is None where no cohort made one.

        Raises
        ------
        ValueError
            Two messages to one client, a message without content, or for a node that is not in the federation.
        """
        items = []
        for message in messages:
            self._register(message)
            items.append(Item(self.nodes.partition(message.metadata.dst_node_id), message))
        items.sort(key=lambda item: item.partition)
        if any(one.partition == other.partition for one, other in itertools.pairwise(items)):
            raise ValueError("two messages to one client cannot be folded")
        cohorts, parts = self._cohorts(items), Parts(fold.merge)
        with self._running(items, cohorts, None, fold, keep) as fetch:
            for number, cohort in enumerate(cohorts):
                outcomes, loose = fetch(number)
                for level, index, part in loose:
                    parts.add(index, part, level)
                for position, outcome in zip(cohort, outcomes):
                    self._commit(items[position].partition, outcome)
                yield Folded(
                    [items[position].partition for position in cohort],
                    [outcome.reply for outcome in outcomes],
                    [
                        None if o.stored is None else _stand_in(items[p].message, o.stored)
                        for p, o in zip(cohort, outcomes)
                    ],
                    parts.result() if number == len(cohorts) - 1 else None,
                )

    @abstractmethod
    def whole(self, reply: Message) -> Message:
        """Return the whole reply for what stands for it after `send_and_fold` with ``keep = True``."""

    @abstractmethod
    def compute(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Call ``function(*job)`` for every job where clients are computed, with one torch thread each.

        Parameters
        ----------
        function : callable
            Can be pickled. Calls must not depend on each other.
        jobs : iterable of tuple
            Arguments. A reply that this grid delivered may be among them: it is read where it is stored. Objects
            that several jobs name travel once.

        Yields
        ------
        Any
            Results in the order of the jobs, a bounded number of them computed ahead.

        Raises
        ------
        RunError
            The function raised.
        """

    @abstractmethod
    def measure(
        self, cohorts: Sequence[Sequence[Message]], *, memory: bool = False, everywhere: bool = False
    ) -> list[Measured]:
        """Run cohorts in one worker, one after another, for the sake of measuring.

        Every client starts with the empty state. Replies and new states are thrown away.

        Parameters
        ----------
        cohorts : sequence of sequence of Message
            Messages of each cohort, in partition order.
        memory : bool
            Whether the memory at the peak is what is wanted: all that is free is given back to the system before each
            cohort, which takes longer then. Other workers run the first cohort, to warm up.
        everywhere : bool
            Whether all workers run the cohorts at once and share caches and memory as in a round; the median of what
            they took is returned.

        Returns
        -------
        list of Measured
            One for each cohort.

        Raises
        ------
        RunError
            The worker died whenever it tried.
        """

    @abstractmethod
    def expect(self, seconds_per_sample: Mapping[str, float]) -> None:
        """Take in how long training takes, by architecture, for the order in which cohorts start.

        Parameters
        ----------
        seconds_per_sample : mapping of str to float
            Of a client, as measured before; what cohorts take from now on counts more.
        """

    @property
    @abstractmethod
    def workers(self) -> int:
        """Worker processes; 0 = everything is computed in this process."""

    @abstractmethod
    def machines(self, gpus: bool) -> list[Node]:
        """Return what there is to compute on, with GPUs or without."""

    @abstractmethod
    def load_app(self, app_factory: AppFactory) -> None:
        """Answer messages with another app from now on; states stay as they are."""

    # ---- states of clients

    def state_dict(self) -> dict[int, RecordDict]:
        """Return ``Context.state`` by partition id, for clients whose state is not empty."""
        return {partition: self._states[partition] for partition in sorted(self._states)}

    def take_changed(self) -> Iterator[tuple[int, RecordDict | None]]:
        """Return the states that have changed since the last call (None: emptied), for an incremental checkpoint.

        They come one by one, by partition id: together they may be more than there is memory for.
        """
        changed, self._changed = sorted(self._changed), set()
        return ((partition, self._fetch([partition])[0]) for partition in changed)

    def has_changed(self, partition: int) -> bool:
        """Whether the state of a client is newer than what `take_changed` returned last."""
        return partition in self._changed

    def _fetch(self, partitions: list[int]) -> list[RecordDict | None]:
        """Return the states of clients, None for those that have none."""
        return [self._states.get(partition) for partition in partitions]

    def load_state_dict(self, states: Mapping[int, RecordDict] | Iterable[tuple[int, RecordDict]]) -> None:
        """Replace the states of all clients; those that are not named start empty.

        Parameters
        ----------
        states : mapping, or iterable of pairs
            By partition id. Pairs are read one by one: together they may be more than there is memory for.

        Raises
        ------
        ValueError
            For a partition id that is not in the federation; nothing is changed then.
        """
        loaded: dict[int, Any] = {}
        pairs: Any = states.items() if isinstance(states, Mapping) else states
        for partition, state in pairs:
            self.nodes.index(partition)
            if state:
                loaded[partition] = self._stored(state)
        self._states, self._changed = loaded, set()

    def _stored(self, state: RecordDict) -> Any:
        """Return what is kept for a state."""
        return state

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
        self, items: list[Item], cohorts: list[list[int]], deadline: float | None, fold: Fold | None, keep: bool
    ) -> AbstractContextManager[Fetch]:
        """Run cohorts (positions into `items`) while the context is open; its value waits for one of them."""

    def _cohorts(self, items: list[Item]) -> list[list[int]]:
        archs = [self.nodes.archs[self.nodes.index(item.partition)] for item in items]
        return compose([item.partition for item in items], archs, self.cohort)

    def _commit(self, partition: int, outcome: Outcome) -> None:
        if outcome.change != KEPT:
            self._changed.add(partition)
            self._states.pop(partition, None)
            if outcome.state is not None:
                self._states[partition] = outcome.state

    def _registered(self, messages: Iterable[Message]) -> list[int]:
        """Register messages and return the partition ids that they go to."""
        for message in messages:
            self._register(message)
        return [self.nodes.partition(message.metadata.dst_node_id) for message in messages]

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
        cohorts = self._cohorts(items)
        home = {position: number for number, cohort in enumerate(cohorts) for position in cohort}
        ready: dict[int, Outcome] = {}
        with self._running(items, cohorts, deadline, None, False) as fetch:
            for position, (partition, message) in enumerate(items):
                if position not in ready:
                    number = home[position]
                    ready.update(zip(cohorts[number], fetch(number)[0]))
                outcome = ready.pop(position)
                self._commit(partition, outcome)
                yield self._addressed(outcome.reply, message, outcome.stored)

    def _addressed(self, reply: Message, message: Message, stored: Any = None) -> Message:
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
        addressed = make_message(metadata, reply.content)
        if stored is not None:
            addressed.__dict__[STORED] = stored
        return addressed


def _stand_in(message: Message, stored: Any) -> Message:
    """Return an empty message that stands for the reply to another one."""
    stand_in = make_message(message.metadata, RecordDict())
    stand_in.__dict__[STORED] = stored
    return stand_in
