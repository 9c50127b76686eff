"""Simulated clients in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedkd.engine.grid import STORED, Fetch, Item, Outcome, SimulationGrid
from fedkd.engine.measure import Measured
from fedkd.engine.nodes import Nodes
from fedkd.engine.placement import Node
from fedkd.engine.worker import KEPT, NEW, AppFactory, CohortRunner, Fold, describe, folded
from fedkd.errors import RunError
from fedkd.threads import one_thread


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
    >>> from flwr.app import RecordDict
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

    def __init__(
        self, app_factory: AppFactory, nodes: Nodes, run_config: dict[str, Any] | None = None, *, cohort: int = 0
    ) -> None:
        super().__init__(nodes, run_config, cohort=cohort)
        self._runner = CohortRunner(app_factory(), len(nodes), self.run_config)

    def compute(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """Call the function here, see `SimulationGrid.compute`."""
        for job in jobs:
            try:
                with one_thread():
                    result = function(*(self.whole(a) if isinstance(a, Message) else a for a in job))
            except Exception as error:
                raise RunError(f"a computation failed: {describe(error)}") from error
            yield result

    @contextmanager
    def _running(
        self, items: list[Item], cohorts: list[list[int]], deadline: float | None, fold: Fold | None, keep: bool
    ) -> Iterator[Fetch]:
        def fetch(number: int) -> tuple[list[Outcome], list[tuple[int, int, Any]]]:
            chosen = [items[position] for position in cohorts[number]]
            partitions = [item.partition for item in chosen]
            answers = self._runner.run(
                [item.message for item in chosen],
                partitions,
                [self._states.get(partition) for partition in partitions],
                deadline,
            )
            whole: list[Any] = [answer.reply for answer in answers]
            replies, loose = whole, []
            if fold is not None:
                try:
                    replies, part = folded(fold, partitions, whole)
                except Exception as error:  # fails the cohort, as on a worker
                    failed = Error(ErrorCode.UNKNOWN, describe(error))
                    return [Outcome(failed, KEPT) for _ in chosen], []
                loose = [(0, number, part)]
            kept = whole if keep and fold is not None else [None] * len(whole)
            return [
                Outcome(reply, KEPT if answer.state is None else NEW, answer.state or None, stored)
                for reply, answer, stored in zip(replies, answers, kept)
            ], loose

        yield fetch

    def measure(
        self, cohorts: Sequence[Sequence[Message]], *, memory: bool = False, everywhere: bool = False
    ) -> list[Measured]:
        """Run cohorts here, see `SimulationGrid.measure`."""
        return [self._runner.measure(messages, self._registered(messages), memory) for messages in cohorts]

    def expect(self, seconds_per_sample: Mapping[str, float]) -> None:
        """Do nothing: all is computed in order."""

    def load_app(self, app_factory: AppFactory) -> None:
        """Make the app here, see `SimulationGrid.load_app`."""
        self._runner.app = app_factory()

    @property
    def workers(self) -> int:
        """None."""
        return 0

    def machines(self, gpus: bool) -> list[Node]:
        """Return this process: one CPU, and the GPU if it may use one."""
        if not (gpus and torch.cuda.is_available()):
            return [Node(1)]
        return [Node(1, 1, torch.cuda.mem_get_info()[0])]

    def whole(self, reply: Message) -> Message:
        """Return the whole reply, see `SimulationGrid.whole`."""
        return reply.__dict__.get(STORED, reply)
