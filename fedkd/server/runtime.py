"""What the server keeps between rounds: federation, models, the grid, traffic, refusals."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedkd.cohorts import compose
from fedkd.data.federation import Federation, build_federation
from fedkd.data.proxy import ProxySet
from fedkd.errors import RunError
from fedkd.payloads import CONFIG, Knowledge, State, Weights
from fedkd.server.clock import TimedExchange, make_clock, num_bytes
from fedkd.server.compute import Compute
from fedkd.server.totals import Total
from fedkd.server.uploads import Check, FoldUploads, Place, Upload, Verdict, failed, inspect
from fedkd.students import (
    build_student,
    complete,
    pick_device,
    predict,
    snapshot,
    travelling,
)

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.scenario import Scenario

Event = dict[str, Any]
LIVE_ONLY = frozenset({"started", "reply"})  # events for progress bars, not for metrics.jsonl
NODES_TIMEOUT = 30.0  # seconds to wait for a foreign grid's nodes


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
        self.clock = make_clock(scenario)
        self.traffic: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
        self._models: dict[str, tuple[nn.Module, State]] = {}
        self._compute: Compute | None = None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.scenario.run.seed

    @property
    def archs(self) -> list[str]:
        """Architectures of the federation, in order of first appearance."""
        return list(self.federation.archs.names)

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

    @cached_property
    def expected(self) -> dict[str, State]:
        """Names, shapes and types of what travels, by architecture: tensors without memory, on the device ``meta``."""
        return {arch: {name: tensor.to("meta") for name, tensor in self.initial(arch).items()} for arch in self.archs}

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
        on the proxy set.
        """
        if self.scenario.models.buffers == "all":
            return dict(state)
        data = None if self.federation.proxy is None else self.federation.proxy.data
        return complete(self._built(arch)[0], state, data, device=self.device, channels_last=self.channels_last)

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

    @property
    def compute(self) -> Compute:
        """Computes models' outputs on the workers of the grid that there is now: a preflight may replace it."""
        if self._compute is None or self._compute.grid is not self.grid or self._compute.scenario is not self.scenario:
            self._compute = Compute(self.scenario, self.grid, self.federation)
        return self._compute

    def predict(self, arch: str, state: State, data: ArrayData) -> Tensor:
        """Return a model's logits on all of `data`, in evaluation mode, float32 on the CPU, shape [N, C]."""
        return self.compute.member(Weights(state, arch)).outputs(data, torch.arange(len(data)))

    @property
    def has_labels(self) -> bool:
        """Whether the server has labelled samples of its own."""
        return len(self.federation.server_labels) > 0

    def label_accuracy(self, model: nn.Module) -> float:
        """Return a model's accuracy on the server's labelled samples (cut from the training data, never test)."""
        ids, labels = self._labelled
        logits = predict(model, self.federation.train, ids, device=self.device, channels_last=self.channels_last)
        return float((logits.argmax(1) == labels).double().mean())

    def label_accuracies(self, uploads: Sequence[Upload]) -> Iterator[float]:
        """Yield the accuracy of uploaded models on the server's labelled samples; the workers run them."""
        ids, labels = self._labelled
        for logits in self.compute.logits([upload.message for upload in uploads], self.federation.train, ids):
            yield float((logits.argmax(1) == labels).double().mean())

    def label_logits(self, arch: str, state: State) -> tuple[Tensor, Tensor]:
        """Return a model's logits on the server's labelled samples, float32 [n, C], and their labels, int64 [n]."""
        ids, labels = self._labelled
        return self.compute.member(Weights(state, arch)).outputs(self.federation.train, ids), labels

    @cached_property
    def _labelled(self) -> tuple[Tensor, Tensor]:
        """Ids and labels of the server's labelled samples."""
        ids = np.asarray(self.federation.server_labels)
        labels = np.asarray(self.federation.train.labels)[ids]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)

    def emit(self, event: str, **fields: Any) -> None:
        """Send an event to whoever listens."""
        self.on_event({"event": event, **fields})

    def exchange(
        self,
        message_type: str,
        knowledge: Mapping[int, Knowledge],
        *,
        round: int,
        checks: Sequence[Check],
        config: Mapping[str, Any] | None = None,
    ) -> Iterator[Upload]:
        """Send knowledge to clients and yield their checked uploads, in partition order.

        Replies that are errors, or that a check refuses, are emitted as ``refused`` events and left out.

        Parameters
        ----------
        message_type : str
            ``train``, ``evaluate``, ``query``, or one of them with ``.<action>``.
        knowledge : mapping of int to Knowledge
            What each client gets, by partition id. Clients that get the same object share one content.
        round : int
            Communication round.
        checks : sequence of callable
            Raise `KnowledgeError` for an upload to be refused.
        config : mapping, optional
            Further scalars for the clients.
        """
        messages = self.messages(message_type, knowledge, round=round, config=config)
        return self.gather(messages, round=round, checks=checks)

    def gather(self, messages: Iterable[Message], *, round: int, checks: Sequence[Check]) -> Iterator[Upload]:
        """Send messages that are ready and yield the checked uploads in partition order, as in `exchange`."""
        messages, timed = self._timed(messages, round)
        cohorts = self._cohorts(self.partition_of(message.metadata.dst_node_id) for message in messages)
        replies = self.grid.send_and_receive(messages)
        if not self._grid_is_ours:  # a foreign grid replies in order of arrival
            replies = sorted(replies, key=lambda reply: self.partition_of(reply.metadata.src_node_id))
        yield from self.read(replies, round=round, checks=checks, cohorts=cohorts, timed=timed)

    @property
    def sums_on_workers(self) -> bool:
        """Whether uploads can be summed where the clients run: on our grids, unless the first to arrive are sought."""
        return hasattr(self.grid, "send_and_fold") and (self.clock is None or self.clock.over_selection == 1)

    def exchange_sums(
        self,
        message_type: str,
        knowledge: Mapping[int, Knowledge],
        total: Total,
        *,
        round: int,
        checks: Sequence[Check],
        keep: bool,
    ) -> Iterator[tuple[list[Upload], Total | None]]:
        """Send knowledge to clients and sum their uploads on the workers; yield cohort by cohort.

        Parameters
        ----------
        message_type, knowledge, round
            As in `exchange`.
        total : Total
            An empty sum; it checks what it adds.
        checks : sequence of callable
            Further checks; can be pickled.
        keep : bool
            Whether whole uploads stay where they are, for those who ask for an upload's weights later.

        Yields
        ------
        list of Upload, Total or None
            A cohort's accepted uploads, without their payloads; with the last cohort, the sum of all of them.
        """
        federation = self.federation
        messages, timed = self._timed(self.messages(message_type, knowledge, round=round), round)
        if timed is not None:
            checks = [timed.in_time, *checks]
            for p, verdict in timed.dropouts():
                self._account(verdict, p, round)
        asked = [self.partition_of(message.metadata.dst_node_id) for message in messages]
        fold = FoldUploads(total.empty(), {p: federation.archs[p] for p in asked}, tuple(checks))
        cohorts = self._cohorts(asked)
        grid: Any = self.grid
        fetch = grid.whole if keep else None
        for folded in grid.send_and_fold(messages, fold, keep=keep):
            accepted = []
            for p, note, message in zip(folded.partitions, folded.results, folded.kept):
                if isinstance(note, Error):
                    verdict = failed(note)
                else:
                    verdict = note.verdict(p, federation.archs[p], cohorts[p], message, fetch)
                if timed is not None:
                    timed.note(p, verdict)
                accepted.extend(self._account(verdict, p, round))
            yield accepted, folded.part
        if timed is not None:
            timed.end()

    def _timed(self, messages: Iterable[Message], round: int) -> tuple[list[Message], TimedExchange | None]:
        """Return the messages that are answered, and their exchange on the simulated clock, if it takes time there."""
        messages = list(messages)
        # What the simulator measures takes no time, as it does not travel.
        if self.clock is None or any(message.metadata.message_type == "evaluate" for message in messages):
            return messages, None
        contents = {id(message.content): message.content for message in messages}
        sizes = {key: num_bytes(content) for key, content in contents.items()}
        down = {self.partition_of(m.metadata.dst_node_id): sizes[id(m.content)] for m in messages}
        timed = TimedExchange(self.clock, round, down)
        dropped = set(timed.dropped)
        return [m for m in messages if self.partition_of(m.metadata.dst_node_id) not in dropped], timed

    def _cohorts(self, partition_ids: Iterable[int]) -> dict[int, Place]:
        """Return each client's cohort."""
        chosen = sorted(set(partition_ids))
        cohorts = compose(chosen, [self.federation.archs[p] for p in chosen], self.scenario.system.cohort)
        places = [Place(number, chosen[cohort[-1]]) for number, cohort in enumerate(cohorts)]
        return {chosen[position]: place for cohort, place in zip(cohorts, places) for position in cohort}

    def _account(self, verdict: Verdict, partition_id: int, round: int) -> list[Upload]:
        """Count the bytes of an upload; return it, or report why it is refused."""
        self.traffic["up"].update(verdict.nbytes)
        if verdict.upload is not None:
            return [verdict.upload]
        self.emit("refused", round=round, partition_id=partition_id, reason=verdict.reason)
        return []

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
                    dst_node_id=self.node_of(partition_id),
                    group_id=str(round),
                )
            )
        return messages

    def read(
        self,
        replies: Iterable[Message],
        *,
        round: int,
        checks: Sequence[Check],
        cohorts: Mapping[int, Place] | None = None,
        timed: TimedExchange | None = None,
    ) -> Iterator[Upload]:
        """Yield the uploads in replies that are no errors and that the checks accept; count their bytes."""
        if cohorts is None:
            replies = list(replies)
            cohorts = self._cohorts(self.partition_of(reply.metadata.src_node_id) for reply in replies)

        def judged(reply: Message, checks: Sequence[Check]) -> tuple[int, Verdict]:
            p = self.partition_of(reply.metadata.src_node_id)
            return p, inspect(reply, p, self.federation.archs[p], checks, cohorts[p])

        if timed is None:
            verdicts = (judged(reply, checks) for reply in replies)
        else:
            verdicts = timed.judge(replies, judged, checks)
        for p, verdict in verdicts:
            yield from self._account(verdict, p, round)

    @property
    def _grid_is_ours(self) -> bool:
        return hasattr(self.grid, "nodes")

    def partition_of(self, node_id: int) -> int:
        """Return the partition id of a node."""
        grid: Any = self.grid
        return grid.nodes.partition(node_id) if self._grid_is_ours else self._foreign_partitions[node_id]

    def node_of(self, partition_id: int) -> int:
        """Return the node id of a client: our grids know it, a foreign one is asked once.

        Raises
        ------
        RunError
            A foreign grid has not got enough nodes.
        """
        grid: Any = self.grid
        return grid.nodes.node_id(partition_id) if self._grid_is_ours else self._foreign_nodes[partition_id]

    @cached_property
    def _foreign_partitions(self) -> dict[int, int]:
        return {node: partition for partition, node in self._foreign_nodes.items()}

    @cached_property
    def _foreign_nodes(self) -> dict[int, int]:
        return self._ask_nodes()

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
