"""What a process that computes for clients keeps between messages: data, models, the method's client half."""

from __future__ import annotations

import torch
from flwr.app import Context
from torch import nn

from fedkd import plugins
from fedkd.arrays import array_record
from fedkd.caches import cached
from fedkd.client.local import LocalTraining
from fedkd.client.shared import SharedModel
from fedkd.client.student import Student
from fedkd.data.federation import Federation, build_federation
from fedkd.payloads import State
from fedkd.scenario import Scenario
from fedkd.students import build_student, pick_device, snapshot

MEMORY = "fedkd.memory"
_MODEL = "model/"


class Runtime:
    """The clients' side of a scenario in one process.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario; federation, models and method follow from it.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.federation: Federation = build_federation(scenario)
        self.method = plugins.make_strategy(scenario)
        self.local: LocalTraining = self.method.local(self.method)
        self.device = pick_device(scenario.system.device)
        self._models: dict[str, SharedModel] = {}
        self._modules: dict[str, nn.Module] = {}

    def student(self, partition_id: int, round: int, context: Context) -> Student:
        """Return a client's student with its memory, and its model as the client last knew it.

        Parameters
        ----------
        partition_id : int
            The client's number in the federation.
        round : int
            Communication round.
        context : Context
            Flower's context; the client's memory is in its state.
        """
        scenario, federation = self.scenario, self.federation
        arch = federation.archs[partition_id]
        shared = self._model(arch)
        memory = _recall(context)
        own = {k.removeprefix(_MODEL): v for k, v in memory.items() if k.startswith(_MODEL)}
        return Student(
            partition_id=partition_id,
            round=round,
            arch=arch,
            shared=shared,
            away={**shared.initial, **own},
            data=federation.data_of(partition_id),
            shard=federation.shards[partition_id],
            test=federation.test,
            client=scenario.client,
            seed=scenario.run.seed,
            num_classes=federation.num_classes,
            device=self.device,
            augment=scenario.data.augment,
            proxy=federation.proxy if self.local.sees_proxy else None,
            build=self.module,
            graphs=scenario.system.graphs,
            memory={k: v for k, v in memory.items() if not k.startswith(_MODEL)},
        )

    def keep(self, student: Student, context: Context) -> None:
        """Write the client's memory back: its own model if the method keeps it, else only what may not travel."""
        memory = dict(student.memory)
        travels = {} if self.local.keeps_model else student.shared.travelling
        memory |= {_MODEL + name: tensor for name, tensor in student.state.items() if name not in travels}
        if memory:
            context.state[MEMORY] = array_record({name: tensor.numpy() for name, tensor in snapshot(memory).items()})
        elif MEMORY in context.state:
            del context.state[MEMORY]

    def module(self, arch: str) -> nn.Module:
        """Return this process's module of any architecture of the scenario, beside the students' own."""
        if arch not in self._modules:
            self._modules[arch] = self._built(arch)
        return self._modules[arch]

    def _built(self, arch: str) -> nn.Module:
        model = build_student(self.scenario, self.federation.dataset, arch).to(self.device)
        if self.scenario.client.channels_last and self.federation.dataset.kind == "image":
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model

    def _model(self, arch: str) -> SharedModel:
        if arch not in self._models:
            self._models[arch] = SharedModel(self._built(arch), self.scenario.models.buffers)
        return self._models[arch]


def _recall(context: Context) -> State:
    kept = context.state.array_records.get(MEMORY)
    return {name: torch.from_numpy(array.numpy()) for name, array in kept.items()} if kept else {}


@cached(maxsize=4)
def runtime_of(scenario_json: str) -> Runtime:
    """Return this process's runtime for a scenario in JSON, built once."""
    return Runtime(Scenario.model_validate_json(scenario_json))
