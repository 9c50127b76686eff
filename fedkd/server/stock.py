"""Flower's own strategies as ours: ``flwr:FedAdam`` with seeded selection, checked uploads and checkpoints."""

from __future__ import annotations

import dataclasses
import inspect
import random
import typing
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedkd.errors import RunError, ScenarioError
from fedkd.garbage import spared
from fedkd.payloads import CONFIG, METRICS, NUM_EXAMPLES, Weights
from fedkd.server.strategy import DistillationStrategy

_NOT_HERE = {
    "FedProx": "its client half is not Flower's server half: use fedprox",
    "FedXgbBagging": "it averages trees, not weights",
    "FedXgbCyclic": "it averages trees, not weights",
}


def stock_names() -> list[str]:
    """Names of Flower's strategies that can be used: those that average the weights of plain clients."""
    return [
        name
        for name in flower.__all__
        if inspect.isclass(cls := getattr(flower, name)) and issubclass(cls, FedAvg) and name not in _NOT_HERE
    ]


@lru_cache
def stock_class(name: str) -> type[StockStrategy]:
    """Return the adapter class of a Flower strategy; its hyper-parameters are Flower's own.

    Parameters
    ----------
    name : str
        Name in ``flwr.serverapp.strategy``, such as ``FedAdam``.

    Raises
    ------
    ScenarioError
        Flower has no such strategy, or it cannot be used here.

    Examples
    --------
    >>> stock_class("FedAdam").__dataclass_fields__["eta"].default
    0.1
    """
    if name not in stock_names():
        reason = _NOT_HERE.get(name, "Flower has no such strategy for weights")
        hint = "use one of " + ", ".join(f"flwr:{n}" for n in stock_names())
        raise ScenarioError(f"flwr:{name} cannot be used: {reason}", key="strategy.name", hint=hint)
    cls = getattr(flower, name)
    hints = typing.get_type_hints(cls.__init__)
    fields = [
        (p.name, hints[p.name], _field(p, hints[p.name]))
        for p in _parameters(cls).values()
        if hints.get(p.name) in (bool, int, float) and not p.name.startswith(("fraction_", "min_"))
    ]
    namespace = {"inner_class": cls, "__doc__": inspect.getdoc(cls), "__module__": __name__}
    return dataclasses.make_dataclass(name, fields, bases=(StockStrategy,), namespace=namespace, kw_only=True)


class GridView(Grid):
    """A grid of which a strategy sees only the nodes that we have selected."""

    def __init__(self, grid: Grid, node_ids: list[int]) -> None:
        self._grid, self._node_ids = grid, node_ids

    def get_node_ids(self) -> Iterable[int]:
        """Return the selected nodes."""
        return self._node_ids

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the selected nodes."""
        return (NodeInfo(node_id=node_id) for node_id in self._node_ids)

    def set_run(self, run: Any) -> None:
        """Pass on."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Pass on."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Any) -> Any:
        """Pass on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Any) -> Any:
        """Pass on."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        """Pass on."""
        return self._grid.send_and_receive(messages, timeout=timeout)


@dataclasses.dataclass(kw_only=True)
class StockStrategy(DistillationStrategy):
    """A Flower strategy between our selection and our evaluation; made by `stock_class`."""

    inner_class: ClassVar[type[FedAvg]] = FedAvg

    def bind(self, server: Any) -> None:
        """Build Flower's strategy.

        Raises
        ------
        ScenarioError
            Several architectures: Flower's strategies average one.
        """
        super().bind(server)
        if len(self.students) > 1:
            raise ScenarioError(
                f"flwr:{self.inner_class.__name__} averages one architecture, the scenario has {len(self.students)}",
                key="models.student",
                hint="name one model, or use fedavg",
            )
        self.arch = next(iter(self.students))
        names = {field.name for field in dataclasses.fields(self)}
        self.inner = self.inner_class(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=1,
            min_evaluate_nodes=0,
            min_available_nodes=1,
            arrayrecord_key="weights",
            configrecord_key=CONFIG,
            **({"train_loss_key": "loss"} if "train_loss_key" in _parameters(self.inner_class) else {}),
            **{name: getattr(self, name) for name in names},
        )

    def train(self, selected: list[int], keep: bool) -> None:
        """Let Flower's strategy configure the round for the selected clients and aggregate the checked replies."""
        server = self.server
        weights = Weights(self.students[self.arch], self.arch)
        view = GridView(server.grid, [server.node_of(p) for p in selected])
        drawn = random.getstate()  # Flower samples with the global generator; our selection is already made
        try:
            messages = list(self.inner.configure_train(self.round, self.arrays(), ConfigRecord(), view))
        finally:
            random.setstate(drawn)
        meta = ConfigRecord(weights.meta())
        contents: dict[int, RecordDict] = {}
        for message in messages:
            if id(message.content) not in contents:
                message.content["weights.meta"] = meta
                contents[id(message.content)] = message.content
            server.traffic["down"].update({"weights": weights.nbytes})
        messages.sort(key=lambda message: server.partition_of(message.metadata.dst_node_id))
        checks = [self.held(selected), self.check]
        uploads = self.receive(lambda: server.gather(messages, round=self.round, checks=checks), keep)
        replies = []
        for upload in uploads:
            # Flower refuses the whole round if one client reports other metrics than the rest.
            loss = upload.knowledge.metrics.get("loss", 0.0)
            metrics = MetricRecord({NUM_EXAMPLES: upload.num_examples, "loss": loss})
            replies.append(make_message(upload.message.metadata, _separate(upload.message.content, metrics)))
        with spared():  # some of Flower's strategies collect garbage for every reply
            arrays, _ = self.inner.aggregate_train(self.round, replies)
        if arrays is None:
            raise RunError(f"round {self.round}: flwr:{self.inner_class.__name__} could not aggregate the replies")
        self.students = {self.arch: _like(weights.state, arrays)}

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the moments of Flower's strategy."""
        inner = {name: _to_tree(value) for name, value in vars(self.inner).items() if _is_state(value)}
        return {**super().state_dict(), "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the moments of Flower's strategy."""
        super().load_state_dict(state)
        for name, value in state["inner"].items():
            setattr(self.inner, name, _from_tree(value))


def _field(parameter: inspect.Parameter, kind: type) -> Any:
    """Return the dataclass field of one of Flower's parameters; counts must not be negative."""
    metadata = {"ge": 0} if kind is int else {}
    if parameter.default is parameter.empty:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=parameter.default, metadata=metadata)


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _separate(content: RecordDict, metrics: MetricRecord) -> RecordDict:
    """Return records with other metrics, from which Flower's strategies may take arrays out, as some do."""
    separate = RecordDict(dict(content))
    for name, arrays in content.array_records.items():
        separate[name] = ArrayRecord()
        separate.array_records[name].update(arrays)
    separate[METRICS] = metrics
    return separate


def _like(reference: Mapping[str, torch.Tensor], arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """Return arrays as tensors of the reference's types; counters that were averaged are rounded."""
    state = {}
    for name, old in reference.items():
        new = torch.from_numpy(np.array(arrays[name].numpy()))
        state[name] = (new if old.is_floating_point() else new.double().round()).to(old.dtype).reshape(old.shape)
    return state


def _is_state(value: Any) -> bool:
    if isinstance(value, dict | list):
        items = list(value.values()) if isinstance(value, dict) else value
        return bool(items) and all(isinstance(item, np.ndarray | np.generic) for item in items)
    return isinstance(value, ArrayRecord)


def _to_tree(value: Any) -> dict[str, Any]:
    if isinstance(value, ArrayRecord):
        return {"kind": "record", "items": {k: torch.from_numpy(a.numpy().copy()) for k, a in value.items()}}
    if isinstance(value, list):
        return {"kind": "list", "items": {str(i): torch.as_tensor(np.array(a)) for i, a in enumerate(value)}}
    return {"kind": "dict", "items": {k: torch.as_tensor(np.array(a)) for k, a in value.items()}}


def _from_tree(tree: Mapping[str, Any]) -> Any:
    arrays = {k: t.numpy() for k, t in tree["items"].items()}
    if tree["kind"] == "record":
        return ArrayRecord({k: Array(a) for k, a in arrays.items()})
    if tree["kind"] == "list":
        return [arrays[str(i)] for i in range(len(arrays))]
    return arrays
