"""Training on all data in one place: the ceiling of every table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import Context, RecordDict

from fedkd.client.runtime import runtime_of
from fedkd.client.trainer import learn
from fedkd.data.partition import Split
from fedkd.payloads import Knowledge, State, Weights
from fedkd.server.strategy import DistillationStrategy

LABEL = 4  # bytes of a label that travels


@dataclass(kw_only=True)
class Centralized(DistillationStrategy):
    """All training data in one place: the ceiling of every table.

    One model is trained by the server on the union of all clients' training samples, with the clients' settings:
    loss, batch size, optimiser, schedule, augmentation, and a round is ``client.epochs`` passes over *all* samples,
    or ``client.steps`` steps. It starts from the initial weights that clients would get, and leaves out what the
    partition keeps for validation and test, the proxy set and the server's labels.
    """

    travels_up: ClassVar[str] = (
        "once, before round 1: training-data: Σ n_k·(b + 4), b bytes of a stored sample and 4 of its label"
    )
    travels_down: ClassVar[str] = "nothing"
    pitfalls: ClassVar[str] = (
        "a round sees all data, one of a federation only what the selected clients hold: compare by steps, too; "
        "[faults] and [attacks] do not reach it, and simulated time stands still"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = ""
    server_data: ClassVar[str] = "all clients' training data"
    differences: ClassVar[str] = "A baseline without a paper: what one client that holds all data would do."
    verified: ClassVar[str] = "with one client and one server thread the bits of FedAvg; bytes; resume"

    def bind(self, server: Any) -> None:
        """Gather the ids of everybody's samples."""
        super().bind(server)
        shards, eligible = server.federation.shards, server.federation.eligible
        self.samples = np.unique(np.concatenate([shards[k].train for k in eligible.tolist()]))
        self.memory: State = {}
        self.at_home: State = {}

    def prepare(self) -> None:
        """Count the bytes of the samples and labels that have to be brought together."""
        x = self.server.federation.train.x
        self.server.traffic["up"]["training-data"] += len(self.samples) * (x.nbytes // len(x) + LABEL)

    def select(self) -> list[int]:
        """Return all clients: everybody's data take part."""
        return self.server.federation.eligible.tolist()

    def train(self, selected: list[int], keep: bool) -> None:
        """Do what a client with all samples would do in this round; no message is sent."""
        self.received = len(selected)  # whose data it has
        runtime, federation = runtime_of(self.server.scenario.model_dump_json()), self.server.federation
        ((arch, state),) = self.students.items()
        with runtime.student(0, self.round, Context(0, 0, {}, RecordDict(), {})) as student:
            student.data, student.shard = federation.train, Split(self.samples, self.samples[:0], self.samples[:0])
            student.memory = dict(self.memory)
            student.set_state(self.at_home)
            aux = runtime.local.absorb(student, Knowledge.of(Weights(state, arch)))
            learn(student, runtime.local, aux)
            self.train_metrics = dict(student.metrics)
            self.students = {arch: student.weights().state}
            self.memory = {name: tensor.cpu().clone() for name, tensor in student.memory.items()}
            home = student.state.keys() - student.shared.travelling.keys()
            self.at_home = {name: student.state[name].cpu().clone() for name in sorted(home)}

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, what the model remembers, and buffers that do not travel."""
        return {**super().state_dict(), "memory": self.memory, "at_home": self.at_home}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.memory, self.at_home = dict(state["memory"]), dict(state["at_home"])
