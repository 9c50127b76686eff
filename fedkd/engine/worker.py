"""What computes for clients: one loaded app that answers the messages of a cohort, in any process."""

import copy
import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedkd import graphs
from fedkd.arrays import BufferArray, buffered
from fedkd.caches import forget
from fedkd.cohorts import Parts
from fedkd.engine.measure import Measured, measure
from fedkd.engine.parcels import pack
from fedkd.meeting import meet
from fedkd.threads import one_thread

Record = ArrayRecord | MetricRecord | ConfigRecord
AppFactory = Callable[[], ClientApp]


class Fold(Protocol):
    """Makes of the replies of a cohort what the server still needs of them, where the clients ran."""

    def __call__(self, replies: list[tuple[int, Message]]) -> tuple[list[Any], Any]:
        """Return a result for each reply, which come with their partition ids, and the cohort's part of a sum."""
        ...

    def merge(self, part: Any, other: Any) -> Any:
        """Return the part of both, of which the second is of later cohorts; the first may be changed, either kept."""
        ...


class Answer(NamedTuple):
    """What came of one message."""

    reply: Message
    state: RecordDict | None  # the client's new state; None: it keeps the one it had, if it had one


def private(records: RecordDict) -> RecordDict:
    """Copy records so that whoever changes the copy changes nothing for anybody else.

    Only the bytes of arrays are shared, which are immutable; so the copy costs a microsecond per array,
    whatever their size.

    Examples
    --------
    >>> import numpy as np
    >>> ours = RecordDict({"w": ArrayRecord([np.zeros(2)]), "m": MetricRecord({"loss": [1.0]})})
    >>> theirs = private(ours)
    >>> theirs.metric_records["m"]["loss"].append(2.0)
    >>> ours.metric_records["m"]["loss"]
    [1.0]
    >>> theirs["w"]["0"].data is ours["w"]["0"].data
    True
    """
    twin = records.copy()
    for name, record in records.items():
        twin[name] = _private_record(record)
    return twin


def _private_record(record: Record) -> Record:
    twin = record.copy()
    for name, value in record.items():
        if isinstance(value, list) or (isinstance(value, Array) and not isinstance(value, BufferArray)):
            twin[name] = copy.copy(value)  # pyright: ignore[reportArgumentType]
    return twin


def unchanged(before: RecordDict | None, after: RecordDict) -> bool:
    """Whether records are what `private` makes of others: arrays of the same bytes, not only of equal ones.

    Examples
    --------
    >>> import numpy as np
    >>> ours = RecordDict({"w": ArrayRecord([np.zeros(2)]), "m": MetricRecord({"loss": [1.0]})})
    >>> theirs = private(ours)
    >>> unchanged(ours, theirs)
    True
    >>> theirs["w"] = ArrayRecord([np.zeros(2)])
    >>> unchanged(ours, theirs), unchanged(ours, RecordDict())
    (False, False)
    """
    before = before or RecordDict()
    return list(before) == list(after) and all(_same_record(before[name], after[name]) for name in before)


def _same_record(one: Record, other: Record) -> bool:
    if type(one) is not type(other) or list(one) != list(other):
        return False
    return all(_same_value(one[name], other[name]) for name in one)


def _same_value(one: Any, other: Any) -> bool:
    if not isinstance(one, Array):
        return repr(one) == repr(other)  # which, unlike values, are alike for NaN and differ for 1, 1.0 and True
    if one is other or isinstance(one, BufferArray) or isinstance(other, BufferArray):
        return one is other
    return one.data is other.data and (one.dtype, one.shape, one.stype) == (other.dtype, other.shape, other.stype)


TOO_LATE = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "TimeoutError: not finished in time")
"""Error of a client that did not finish before the deadline of the call."""


def describe(error: BaseException) -> str:
    """Name an exception, its message and the line that raised it.

    Examples
    --------
    >>> describe(ValueError("no samples"))
    'ValueError: no samples'
    >>> class Broken(Exception):
    ...     def __str__(self):
    ...         raise ValueError
    >>> describe(Broken())
    'Broken: (its message cannot be made)'
    """
    try:
        said = str(error)
    except Exception:  # it is a client's, and may be broken itself
        said = "(its message cannot be made)"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {said}{place}"


class CohortRunner:
    """Answers messages with a ClientApp, one after another.

    An app that has an attribute ``meets``, a function of the messages of a cohort, and returns True from it, gets
    all of them before it has to answer the first, in a meeting (see `fedkd.meeting`).

    Parameters
    ----------
    app : ClientApp
        Any Flower app.
    num_partitions : int
        Clients in the federation; apps find it in ``context.node_config["num-partitions"]``.
    run_config : dict
        The run's configuration, as apps find it in ``context.run_config``.
    """

    def __init__(self, app: ClientApp, num_partitions: int, run_config: dict[str, Any]) -> None:
        self.app, self.num_partitions, self.run_config = app, num_partitions, run_config

    def run(
        self,
        messages: Sequence[Message],
        partitions: Sequence[int],
        states: Sequence[RecordDict | None],
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer the messages of a cohort.

        Parameters
        ----------
        messages : sequence of Message
            Instructions with message ids, one for each client.
        partitions : sequence of int
            Partition id of each client.
        states : sequence of RecordDict or None
            ``Context.state`` of each client; None is the empty state. Left as they are.
        deadline : float, optional
            Unix time after which no further client is started; the rest get error replies.

        Returns
        -------
        list of Answer
            In the order of the messages. A client that raises gets an error reply and keeps its state.
        """

        def answer(message: Message, partition: int, state: RecordDict | None) -> Answer:
            if deadline is not None and time.time() >= deadline:
                return Answer(Message(TOO_LATE, reply_to=message), None)
            return self._answer(message, partition, state)

        calls = [partial(answer, *client) for client in zip(messages, partitions, states, strict=True)]
        meets = getattr(self.app, "meets", None)
        with one_thread():
            if meets is not None and len(calls) > 1 and meets(messages):
                return meet(calls)
            return [call() for call in calls]

    def measure(self, messages: Sequence[Message], partitions: Sequence[int], memory: bool) -> Measured:
        """Answer the messages of a cohort, throw answers and states away, and return what that took."""

        def work() -> tuple[str, ...]:
            answers = self.run(messages, partitions, [None] * len(messages))
            return tuple(str(answer.reply.error.reason) for answer in answers if answer.reply.has_error())

        return measure(work, memory=memory)

    def _answer(self, message: Message, partition: int, state: RecordDict | None) -> Answer:
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config={"partition-id": partition, "num-partitions": self.num_partitions},
            state=private(state) if state is not None else RecordDict(),
            run_config=dict(self.run_config),
        )
        try:
            received = make_message(copy.copy(message.metadata), private(message.content))
            reply = self.app(received, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the client returned {type(reply).__name__} and no Message")
            if not isinstance(context.state, RecordDict):
                raise TypeError(f"the client made its state {type(context.state).__name__}, no RecordDict")
            return Answer(reply, None if unchanged(state, context.state) else private(context.state))
        # A client that calls sys.exit() has failed; it must not take the federation with it.
        except (Exception, SystemExit) as error:
            raised = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, describe(error))
            return Answer(Message(raised, reply_to=message), None)


KEPT, EMPTY, NEW = range(3)
"""What became of a client's state: as it was, emptied, or the object that the task returned."""


class Cohort(NamedTuple):
    """A cohort on its way to a worker. Numbers in `contents` refer to objects that travel by reference."""

    number: int
    metadata: list[Metadata]
    contents: list[int | list[tuple[str, int | Record]]]  # a shared content, or records, some of them shared
    partitions: list[int]


class Order(NamedTuple):
    """What a worker is to do in a task."""

    cohorts: list[Cohort]
    keep: bool  # whether whole replies stay beside what the fold makes of them
    deadline: float | None
    shared: int  # how many of the task's objects are contents and records; the clients' states follow, if there are any
    apart: bool  # whether each client's new state is an object of its own
    packets: int  # for what the fold makes (see `fedkd.engine.parcels`)

    def pickled(self) -> "Order | bytes":
        """Return this pickled, which is faster than by Ray; as it is if records travel in it: Ray copies no arrays."""
        contents = [content for cohort in self.cohorts for content in cohort.contents if not isinstance(content, int)]
        if all(isinstance(part, int) for content in contents for _, part in content):
            return pickle.dumps(self, protocol=5)
        return self


class Receipt(NamedTuple):
    """What the driver learns of a cohort before it reads the replies."""

    changes: list[int]  # KEPT, EMPTY or NEW for each client
    seconds: float


class Yield(NamedTuple):
    """What came of a task.

    There are results of each cohort where there is a fold; else whole replies are wanted, an object of their own.
    """

    receipts: list[Receipt]
    results: list[list[Any]] | None
    loose: list[tuple[int, int, Any]]  # parts that the fold made (see `fedkd.cohorts.Parts`)
    states: list[RecordDict | None] | None  # new states of clients of which nobody expected any


class Worker:
    """Body of a Ray actor: loads the app once, keeps it and whatever the app keeps, runs cohort after cohort.

    Parameters
    ----------
    app_factory : callable
        Makes the ClientApp in this process.
    num_partitions : int
        Clients in the federation.
    run_config : dict
        The run's configuration.
    """

    def __init__(self, app_factory: AppFactory, num_partitions: int, run_config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._parts: tuple[AppFactory, int, dict[str, Any]] | None = (app_factory, num_partitions, run_config)
        self._runner: CohortRunner | None = None

    def rest(self) -> None:
        """Let go of the app and of what this process keeps for it: nobody knows when this worker will be wanted."""
        self._parts = self._runner = None
        forget()
        gc.unfreeze()
        gc.collect()

    def begin(self, app_factory: AppFactory, num_partitions: int, run_config: dict[str, Any]) -> None:
        """Load another app, after a rest; raises what the factory raises."""
        self._parts = app_factory, num_partitions, run_config
        self.load()

    def load(self) -> None:
        """Load the app, unless it is loaded; raises what the factory raises."""
        if self._runner is None:
            assert self._parts is not None  # a worker that rests has to begin first
            factory, num_partitions, run_config = self._parts
            self._runner = CohortRunner(factory(), num_partitions, run_config)
            gc.freeze()  # see `fedkd.garbage`

    def replace_app(self, app_factory: AppFactory) -> None:
        """Make the next app by another factory."""
        assert self._parts is not None
        self._parts = app_factory, *self._parts[1:]
        self._runner = None
        gc.unfreeze()

    def run(self, order: Order | bytes, pickled_fold: bytes | None, *objects: Any) -> Any:
        """Run cohorts, one after the other.

        Parameters
        ----------
        order : Order or bytes
            The cohorts, and what to do with them; may be pickled.
        pickled_fold : bytes, optional
            A pickled `Fold`, which makes slim replies and a partial result of a cohort's replies (see
            `SimulationGrid.send_and_fold`).
        objects
            Shared contents and records, then one RecordDict or None for each client. Ray resolves references here,
            because they are arguments of their own.

        Returns
        -------
        Yield or tuple
            A `Yield`, or a parcel of it and its packets; the whole replies of each cohort, unless there is a fold and
            they are not to be kept; and a state for each client, if each is to be an object of its own. Every object
            costs time.
        """
        self.load()
        if isinstance(order, bytes):
            order = pickle.loads(order)
        assert isinstance(order, Order)
        fold: Fold | None = None if pickled_fold is None else pickle.loads(pickled_fold)
        receipts, results, wholes, states = [], [], [], []
        parts = Parts(fold.merge if fold is not None else _no_merge)
        at = order.shared
        for cohort in order.cohorts:
            began = time.perf_counter()
            until = at + len(cohort.partitions)
            before = objects[at:until] or [None] * len(cohort.partitions)
            at = until
            answers = self._answers(cohort, order, objects, before)
            replies = [answer.reply for answer in answers]
            if fold is not None:
                result, part = folded(fold, cohort.partitions, replies)
                results.append(result)
                with one_thread():
                    parts.add(cohort.number, part)
            if fold is None or order.keep:
                wholes.append([_ready(reply) for reply in replies])
            states += [for_transport(a.state) if a.state else None for a in answers]
            changes = [KEPT if a.state is None else NEW if a.state else EMPTY for a in answers]
            receipts.append(Receipt(changes, time.perf_counter() - began))
        bundled = None if order.apart or not any(states) else states
        done = Yield(receipts, None if fold is None else results, parts.loose(), bundled)
        more = [*([wholes] if fold is None or order.keep else []), *(states if order.apart else [])]
        returned = [*pack(done, order.packets), *more]
        return returned if len(returned) > 1 else done

    def _answers(
        self, cohort: Cohort, order: Order, objects: Sequence[Any], states: Sequence[RecordDict | None]
    ) -> list[Answer]:
        assert self._runner is not None
        return self._runner.run(_messages(cohort, objects), cohort.partitions, states, order.deadline)

    def measure(self, cohorts: Sequence[Cohort], memory: bool, *objects: Any) -> list[Measured]:
        """Run cohorts for the sake of measuring, see `SimulationGrid.measure`; objects as in `run`."""
        self.load()
        assert self._runner is not None
        return [self._runner.measure(_messages(cohort, objects), cohort.partitions, memory) for cohort in cohorts]

    def idle(self) -> None:
        """Give back what the allocator keeps of the GPU: others may need it until the next cohort comes."""
        if torch.cuda.is_initialized():
            graphs.let_go()
            torch.cuda.empty_cache()

    def compute(self, function: Callable[..., Any], arguments: list[Any], *objects: Any) -> Any:
        """Call a function of which some arguments are `Stored`: replies in, or themselves, one of the objects."""
        return function(*(a.value(objects) if isinstance(a, Stored) else a for a in arguments))


class Stored(NamedTuple):
    """Stands for an argument of `Worker.compute` that travels by reference."""

    number: int  # among the objects
    path: tuple[int, ...] = ()  # where in the object it is

    def value(self, objects: Sequence[Any]) -> Any:
        """Return the argument."""
        found = objects[self.number]
        for step in self.path:
            found = found[step]
        return found


def _ready(reply: Message) -> Message:
    """Make a reply ready for transport."""
    if reply.has_content():
        reply.content = for_transport(reply.content)
    return reply


def _no_merge(part: Any, other: Any) -> Any:
    raise AssertionError("nothing was folded")


def folded(fold: Fold, partitions: Sequence[int], replies: list[Message]) -> tuple[list[Any], Any]:
    """Return what a fold makes of the replies of a cohort."""
    with one_thread():
        return fold(list(zip(partitions, replies)))


def _messages(cohort: Cohort, objects: Sequence[Any]) -> list[Message]:
    return [
        make_message(metadata, _content(content, objects))
        for metadata, content in zip(cohort.metadata, cohort.contents)
    ]


def _content(content: int | list[tuple[str, int | Record]], objects: Sequence[Any]) -> RecordDict:
    if isinstance(content, int):
        return objects[content]
    return RecordDict({name: objects[part] if isinstance(part, int) else part for name, part in content})


def for_transport(records: Any) -> Any:
    """Return records (or one record) of which Ray maps the arrays into memory instead of copying them."""
    if isinstance(records, RecordDict):
        ready = {name: for_transport(record) for name, record in records.items()}
        return records if all(ready[name] is record for name, record in records.items()) else RecordDict(ready)
    return buffered(records) if isinstance(records, ArrayRecord) else records
