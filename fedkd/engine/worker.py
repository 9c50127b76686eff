"""What computes for clients: one loaded app that answers the messages of a cohort, in any process."""

import copy
import os
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedkd.threads import one_thread

Record = ArrayRecord | MetricRecord | ConfigRecord
AppFactory = Callable[[], ClientApp]


class Answer(NamedTuple):
    """What came of one message."""

    reply: Message
    state: RecordDict | None  # the client's new state; None: it keeps the one it had


def private(records: RecordDict) -> RecordDict:
    """Copy records so that whoever changes the copy changes nothing for anybody else.

    Only the bytes of arrays are shared, which are immutable; so the copy costs microseconds per array,
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
    return RecordDict({name: _private_record(record) for name, record in records.items()})


def _private_record(record: Record) -> Record:
    if not isinstance(record, ArrayRecord):
        return copy.deepcopy(record)
    twin = ArrayRecord()
    for name, array in record.items():
        twin[name] = copy.copy(array)
    return twin


TOO_LATE = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "TimeoutError: not finished in time")
"""Error of a client that did not finish before the deadline of the call."""


def describe(error: BaseException) -> str:
    """Name an exception, its message and the line that raised it.

    Examples
    --------
    >>> describe(ValueError("no samples"))
    'ValueError: no samples'
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class CohortRunner:
    """Answers messages with a ClientApp, one after another.

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
        answers = []
        for message, partition, state in zip(messages, partitions, states):
            if deadline is not None and time.time() >= deadline:
                answers.append(Answer(Message(TOO_LATE, reply_to=message), None))
                continue
            with one_thread():
                answers.append(self._answer(message, partition, state))
        return answers

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
            return Answer(reply, private(context.state))
        # A client that calls sys.exit() has failed; it must not take the federation with it.
        except (Exception, SystemExit) as error:
            raised = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, describe(error))
            return Answer(Message(raised, reply_to=message), None)


KEPT, EMPTY, NEW = range(3)
"""What became of a client's state: as it was, emptied, or the object that the task returned."""


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
        self._parts = app_factory, num_partitions, run_config
        self._runner: CohortRunner | None = None

    def load(self) -> None:
        """Load the app, unless it is loaded; raises what the factory raises."""
        if self._runner is None:
            factory, num_partitions, run_config = self._parts
            self._runner = CohortRunner(factory(), num_partitions, run_config)

    def run(
        self,
        metadata: list[Metadata],
        contents: list[list[tuple[str, int | Record]]],
        partitions: list[int],
        deadline: float | None,
        shared: int,
        *objects: Any,
    ) -> tuple[Any, ...]:
        """Run one cohort.

        Parameters
        ----------
        metadata : list of Metadata
            Of each message.
        contents : list of list of (str, int or record)
            Records of each message by name; an int stands for that one among the shared records.
        partitions : list of int
            Partition id of each client.
        deadline : float, optional
            Unix time after which no further client is started.
        shared : int
            How many of `objects` are shared records; the states of the clients follow.
        objects
            Shared records, then one RecordDict or None for each client. Ray resolves references here, because
            they are arguments of their own.

        Returns
        -------
        tuple
            Receipt (one of KEPT, EMPTY, NEW for each client), list of replies, then a state for each client.
        """
        self.load()
        assert self._runner is not None
        messages = [
            make_message(
                one,
                RecordDict({name: objects[part] if isinstance(part, int) else part for name, part in content}),
            )
            for one, content in zip(metadata, contents)
        ]
        answers = self._runner.run(messages, partitions, objects[shared:], deadline)
        receipt = [KEPT if a.state is None else NEW if a.state else EMPTY for a in answers]
        return receipt, [a.reply for a in answers], *(a.state or None for a in answers)
