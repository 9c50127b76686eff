"""What the server keeps between rounds: federation, models, the grid, traffic, refusals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedkd.data.federation import Federation, build_federation
from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, RunError
from fedkd.payloads import CONFIG, Knowledge, State, Weights
from fedkd.students import (
    build_student,
    has_batch_norm,
    pick_device,
    predict,
    reestimate_norms,
    snapshot,
    travelling,
)

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.scenario import Scenario

Event = dict[str, Any]
LIVE_ONLY = frozenset({"started", "reply"})  # events for progress bars, not for metrics.jsonl
NODES_TIMEOUT = 30.0  # seconds to wait for a foreign grid's nodes


@dataclass(frozen=True, eq=False)
class Upload:
    """What one client sent back, read and checked.

    Parameters
    ----------
    partition_id : int
        The client.
    arch : str
        Its architecture.
    knowledge : Knowledge
        What it shared.
    message : Message
        The Flower message that brought it.
    """

    partition_id: int
    arch: str
    knowledge: Knowledge
    message: Message

    @property
    def num_examples(self) -> int:
        """Training samples behind the upload."""
        return self.knowledge.num_examples

    @property
    def state(self) -> State:
        """The uploaded weights.

        Raises
        ------
        KnowledgeError
            The upload holds none.
        """
        return self.knowledge.get(Weights).state


class ServerRuntime:
    """The server's side of a scenario.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario.
    grid : Grid
        Runs the clients: one of `fedkd.engine`, or Flower's own.
    on_event : callable, optional
        Receives every event, a dict that can be written as JSON.
    """

    def __init__(self, scenario: Scenario, grid: Grid, on_event: Callable[[Event], None] | None = None) -> None:
        self.scenario = scenario
        self.grid = grid
        self.federation: Federation = build_federation(scenario)
        self.device = pick_device(scenario.system.device)
        self.on_event = on_event or (lambda event: None)
        self.traffic: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
        self._models: dict[str, tuple[nn.Module, State]] = {}

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.scenario.run.seed

    @property
    def archs(self) -> list[str]:
        """Architectures of the federation, in order of first appearance."""
        return list(dict.fromkeys(self.federation.archs))

    @property
    def server_arch(self) -> str:
        """Architecture of a server model: ``models.server``, else that of the first client."""
        return self.scenario.models.server or self.federation.archs[0]

    @property
    def proxy(self) -> ProxySet:
        """The proxy set.

        Raises
        ------
        RunError
            The scenario has none; a strategy that uses it must declare ``requires = {"proxy"}``.
        """
        if self.federation.proxy is None:
            raise RunError("the strategy uses the proxy set, but the scenario has none")
        return self.federation.proxy

    def initial(self, arch: str) -> State:
        """Return the part of an architecture's seeded initial state that travels."""
        return self._built(arch)[1]

    def model(self, arch: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return the server's module of an architecture with a state loaded (see `complete`).

        The module is reused: the next call with the same `arch` overwrites it.
        """
        model, _ = self._built(arch)
        if state is not None:
            model.load_state_dict(self.complete(arch, state))
        return model

    def complete(self, arch: str, state: Mapping[str, Tensor]) -> State:
        """Return a whole state for one that travelled without its running statistics.

        With ``models.buffers = "params_only"`` the server has no statistics of BatchNorm layers: they are estimated
        on the proxy set, so that they depend on the weights alone and not on what the server did before.
        """
        if self.scenario.models.buffers == "all":
            return dict(state)
        model, _ = self._built(arch)
        model.load_state_dict(dict(state), strict=False)
        if has_batch_norm(model):
            ids = torch.arange(len(self.proxy))
            reestimate_norms(model, self.proxy.data, ids, device=self.device, channels_last=self.channels_last)
        return snapshot(model.state_dict())

    def state_of(self, model: nn.Module) -> State:
        """Return the part of a model's state that travels."""
        return snapshot(travelling(model, self.scenario.models.buffers))

    def _built(self, arch: str) -> tuple[nn.Module, State]:
        if arch not in self._models:
            model = build_student(self.scenario, self.federation.dataset, arch).to(self.device)
            if self.channels_last:
                model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            self._models[arch] = (model, self.state_of(model))
        return self._models[arch]

    @property
    def channels_last(self) -> bool:
        """Whether image batches use the channels-last layout."""
        return self.scenario.client.channels_last and self.federation.dataset.kind == "image"

    def predict(self, arch: str, state: Mapping[str, Tensor], data: ArrayData) -> Tensor:
        """Return a model's logits on all of `data`, in evaluation mode, float32 on the CPU, shape [N, C]."""
        return self._logits(self.model(arch, state), data, torch.arange(len(data)))

    @property
    def has_labels(self) -> bool:
        """Whether the server has labelled samples of its own."""
        return len(self.federation.server_labels) > 0

    def label_accuracy(self, model: nn.Module) -> float:
        """Return a model's accuracy on the server's labelled samples (cut from the training data, never test)."""
        ids = torch.as_tensor(self.federation.server_labels)
        labels = torch.tensor(np.asarray(self.federation.train.labels)[ids.numpy()], dtype=torch.int64)
        return float((self._logits(model, self.federation.train, ids).argmax(1) == labels).double().mean())

    def _logits(self, model: nn.Module, data: ArrayData, ids: Tensor) -> Tensor:
        return predict(model, data, ids, device=self.device, channels_last=self.channels_last)

    def emit(self, event: str, **fields: Any) -> None:
        """Send an event to whoever listens."""
        self.on_event({"event": event, **fields})

    def exchange(
        self,
        message_type: str,
        knowledge: Mapping[int, Knowledge],
        *,
        round: int,
        check: Callable[[Upload], None],
        config: Mapping[str, Any] | None = None,
    ) -> Iterator[Upload]:
        """Send knowledge to clients and yield their checked uploads, in partition order.

        Replies that are errors, or that `check` refuses, are emitted as ``refused`` events and left out.

        Parameters
        ----------
        message_type : str
            ``train``, ``evaluate``, ``query``, or one of them with ``.<action>``.
        knowledge : mapping of int to Knowledge
            What each client gets, by partition id. Clients that get the same object share one content.
        round : int
            Communication round.
        check : callable
            Raises `KnowledgeError` for an upload to be refused.
        config : mapping, optional
            Further scalars for the clients.
        """
        messages = self.messages(message_type, knowledge, round=round, config=config)
        return self.gather(messages, round=round, check=check)

    def gather(self, messages: Iterable[Message], *, round: int, check: Callable[[Upload], None]) -> Iterator[Upload]:
        """Send messages that are ready and yield the checked uploads in partition order, as in `exchange`."""
        replies = self.grid.send_and_receive(messages)
        if not hasattr(self.grid, "nodes"):  # a foreign grid replies in order of arrival
            replies = sorted(replies, key=lambda reply: self.partition_of[reply.metadata.src_node_id])
        yield from self.read(replies, round=round, check=check)

    def messages(
        self,
        message_type: str,
        knowledge: Mapping[int, Knowledge],
        *,
        round: int,
        config: Mapping[str, Any] | None = None,
    ) -> list[Message]:
        """Return the messages of an exchange, and count their bytes; parameters as in `exchange`."""
        contents: dict[int, RecordDict] = {}
        messages = []
        for partition_id in sorted(knowledge):
            item = knowledge[partition_id]
            if id(item) not in contents:
                contents[id(item)] = item.to_records({**(config or {}), "server-round": round})
            self.traffic["down"].update(item.nbytes)
            messages.append(
                Message(
                    content=contents[id(item)],
                    message_type=message_type,
                    dst_node_id=self.node_of[partition_id],
                    group_id=str(round),
                )
            )
        return messages

    def read(self, replies: Iterable[Message], *, round: int, check: Callable[[Upload], None]) -> Iterator[Upload]:
        """Yield the uploads in replies that are no errors and that `check` accepts; count their bytes."""
        for reply in replies:
            partition_id = self.partition_of[reply.metadata.src_node_id]
            try:
                if reply.has_error():
                    raise KnowledgeError(reply.error.reason or f"error {reply.error.code}")
                received = Knowledge.from_records(reply.content)
                self.traffic["up"].update(received.nbytes)
                upload = Upload(partition_id, self.federation.archs[partition_id], received, reply)
                check(upload)
            except Exception as error:  # whatever an upload may cause, it costs its sender alone
                reason = str(error) if isinstance(error, KnowledgeError) else f"{type(error).__name__}: {error}"
                self.emit("refused", round=round, partition_id=partition_id, reason=reason)
                continue
            yield upload

    @cached_property
    def partition_of(self) -> dict[int, int]:
        """Partition id of every node id."""
        return {node: partition for partition, node in self.node_of.items()}

    @cached_property
    def node_of(self) -> dict[int, int]:
        """Node id of every partition id: from our grid's table, or asked for once on a foreign grid.

        Raises
        ------
        RunError
            A foreign grid has not got enough nodes.
        """
        nodes = getattr(self.grid, "nodes", None)
        if nodes is None:
            return self._ask_nodes()
        return {int(p): nodes.node_id(int(p)) for p in nodes.partition_ids}

    def _ask_nodes(self) -> dict[int, int]:
        expected, deadline = self.federation.num_clients, time.monotonic() + NODES_TIMEOUT
        while len(node_ids := list(self.grid.get_node_ids())) < expected:
            if time.monotonic() > deadline:
                raise RunError(
                    f"the scenario has {expected} clients but Flower offers {len(node_ids)} nodes; "
                    f"set it with: flwr federation simulation-config --num-supernodes {expected}"
                )
            time.sleep(0.1)
        content = Knowledge().to_records()
        replies = self.grid.send_and_receive(
            [Message(content=content, message_type="query", dst_node_id=node) for node in node_ids]
        )
        table = {}
        for reply in replies:
            if reply.has_error():
                raise RunError(
                    f"a node could not say which client it is: {reply.error.reason}\n"
                    f"  the scenario has {expected} clients, Flower has {len(node_ids)} nodes; set the number with: "
                    f"flwr federation simulation-config --num-supernodes {expected}"
                )
            table[int(reply.content.config_records[CONFIG]["partition-id"])] = reply.metadata.src_node_id  # type: ignore[arg-type]
        missing = [p for p in range(expected) if p not in table]
        if missing:
            raise RunError(f"no node holds clients {missing[:5]}")
        return table
