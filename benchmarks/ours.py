"""A plain Flower app on our engine: the app that stock Flower runs too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from common import WORKERS, Clock, Side, Workload, make_model
from flower import TimedFedAvg, client_app
from flwr.app import Message, RecordDict

from fedkd.arrays import array_record, view
from fedkd.engine import Nodes, RayGrid, SimulationGrid
from fedkd.server.averaging import StateMean
from fedkd.students import keep_freed_memory

State = dict[str, torch.Tensor]


def grid_of(load: Workload) -> RayGrid:
    """Return the engine over the clients of a workload, with the plain Flower app."""
    torch.set_num_threads(1)  # the workers have the cores; a second thread here would spin on one of them
    keep_freed_memory()  # as a run does
    return RayGrid(lambda: client_app(load), Nodes.alike(load.clients), workers=WORKERS)


def messages_of(grid: SimulationGrid, load: Workload, state: State) -> list[Message]:
    """Return one message with the weights for each client of a round."""
    arrays = array_record({name: tensor.numpy() for name, tensor in state.items()})
    content = RecordDict({"arrays": arrays})
    return [grid.create_message(content, "train", grid.nodes.node_id(p), "1") for p in range(load.selected)]


def mean_of(replies: Iterable[Message]) -> StateMean:
    """Return the mean of the weights in replies."""
    mean = StateMean("the model")
    for reply in replies:
        mean.add(weights_of(reply))
    return mean


def weights_of(reply: Message) -> State:
    """Return the weights in a reply, for reading alone."""
    return {name: torch.from_numpy(view(array)) for name, array in reply.content["arrays"].items()}  # type: ignore[union-attr]


class Sums:
    """Averages the weights of a cohort where its clients ran."""

    def __call__(self, replies: list[tuple[int, Message]]) -> tuple[list[float], StateMean]:
        """Return what is left of each reply, its number of examples, and the mean."""
        mean = StateMean("the model")
        mean.add_all([(weights_of(reply), 1.0) for _, reply in replies])
        return [reply.content["metrics"]["num-examples"] for _, reply in replies], mean  # type: ignore[index]

    def merge(self, part: StateMean, other: StateMean) -> StateMean:
        """Return the mean of both."""
        part.merge(other)
        return part


def replies(side: Side, clock: Clock) -> dict[str, Any]:
    """Every reply comes to the server, which averages them."""
    load, state = side.load, dict(make_model(side.load).state_dict())
    with grid_of(load) as grid:
        for _ in range(clock.total):
            state = mean_of(grid.send_and_receive(messages_of(grid, load, state))).result()
            clock.tick()
    return clock.result()


def sums(side: Side, clock: Clock) -> dict[str, Any]:
    """Workers average, cohort by cohort."""
    load, state = side.load, dict(make_model(side.load).state_dict())
    with grid_of(load) as grid:
        for _ in range(clock.total):
            *_, last = grid.send_and_fold(messages_of(grid, load, state), Sums())
            state = last.part.result()
            clock.tick()
    return clock.result()


def apps(side: Side, clock: Clock) -> dict[str, Any]:
    """The very apps of stock Flower, its FedAvg included."""
    with grid_of(side.load) as grid:
        TimedFedAvg(side.load, clock).run(grid)
    return clock.result()
