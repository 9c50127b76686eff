"""Stock Flower: a quickstart's apps, with data in memory, on Flower's own simulation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from common import WORKERS, Clock, Side, Workload, make_model, this_side, train
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

idle, training = ClientApp(), ClientApp()


@idle.train()
def unchanged(message: Message, context: Context) -> Message:
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@training.train()
def fit(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    side = this_side()
    model = side.model  # kept: making one costs as much as two steps
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    x, y = side.shards(int(context.node_config["partition-id"]))
    train(model, x, y, side.load)
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(RecordDict(content), reply_to=message)


def client_app(load: Workload) -> ClientApp:
    """Return the plain Flower app of a workload, for any grid."""
    return training if load.steps else idle


class TimedFedAvg(FedAvg):
    """Flower's FedAvg, which tells the clock when a round is over."""

    def __init__(self, load: Workload, clock: Clock) -> None:
        share = load.selected / load.clients
        super().__init__(fraction_train=share, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.load, self.clock = load, clock

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Average the replies."""
        result = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return result

    def run(self, grid: Grid) -> None:
        """Run all rounds, quietly."""
        logging.getLogger("flwr").setLevel(logging.ERROR)
        arrays = ArrayRecord(make_model(self.load).state_dict())
        self.start(grid, arrays, num_rounds=self.clock.total)


def run(side: Side, clock: Clock) -> dict[str, Any]:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        TimedFedAvg(side.load, clock).run(grid)

    backend = {
        "init_args": {"address": "local", "num_cpus": WORKERS, "include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, client_app(side.load), num_supernodes=side.load.clients, backend_config=backend)
    return clock.result()
