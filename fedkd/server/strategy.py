"""The server half of a method: a Flower strategy made of seven verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedkd.arrays import array_record
from fedkd.client.local import LocalTraining
from fedkd.errors import KnowledgeError, RunError, TooFewError
from fedkd.payloads import Knowledge, State, Weights
from fedkd.seeds import Purpose, rng
from fedkd.server.averaging import Averages
from fedkd.server.compute import ComputedMember
from fedkd.server.distiller import Distiller
from fedkd.server.ensemble import Ensemble
from fedkd.server.evaluation import Predict, agreement, log_probs, predictions, scores, spread
from fedkd.server.runtime import ServerRuntime
from fedkd.server.selection import draw, how_many, select
from fedkd.server.targets import Targets
from fedkd.server.totals import Total
from fedkd.server.uploads import Held, Upload, Uploads, sum_up


@dataclass(kw_only=True)
class DistillationStrategy(Strategy):
    """Base of all strategies: federated averaging; methods override the verbs that differ.

    Hyper-parameters of a method are the keyword-only fields of its dataclass: a scenario's ``[strategy]`` table is
    validated against them. Their defaults are the paper's; ``presets["code"]`` holds the authors' released
    settings where they differ.

    Notes
    -----
    A round is select → broadcast → (clients: absorb, learn, share) → fuse → distill → evaluate. `prepare` runs once
    before round 1. `exchange` holds further exchanges with clients inside a round. `bind` gives the strategy
    ``self.server``, the data, models and grid of the run.
    """

    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    travels_up: ClassVar[str] = "weights: 4·|θ|"
    travels_down: ClassVar[str] = "weights: 4·|θ|"
    requires: ClassVar[frozenset[str]] = frozenset()
    heterogeneous: ClassVar[bool] = False
    pitfalls: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = ""
    """Where knowledge is distilled; empty = nowhere."""

    server_data: ClassVar[str] = ""
    """Data that the server needs beside the clients', in words; empty = none."""

    client_data: ClassVar[str] = ""
    """Data that clients need beside their own, in words; empty = none."""

    differences: ClassVar[str] = ""
    """Where paper and released code differ, which of them the defaults follow, and what is assumed."""

    verified: ClassVar[str] = ""
    """How the implementation was checked."""

    local: ClassVar[type[LocalTraining]] = LocalTraining
    """Client half of the method."""

    shares_weights: ClassVar[bool] = True
    """Whether clients receive a global model; else they own theirs and are evaluated on the global test set."""

    keeps_members: ClassVar[bool] = False
    """Whether `distill` needs the uploads of the round, as ``self.members``."""

    weighting: ClassVar[str] = "examples"
    """Weights of the average: ``examples`` or ``uniform``. A method may make it a field."""

    def bind(self, server: ServerRuntime) -> None:
        """Give the strategy its run: data, models, grid. Called once, before `start`.

        Parameters
        ----------
        server : ServerRuntime
            The server's side of the scenario.
        """
        self.server = server
        self.round = 0
        self.selected: list[int] = []
        self.members: list[Upload] = []
        self.received = 0
        self.train_metrics: dict[str, float] = {}
        self.distilled: dict[str, Any] = {}
        archs = server.archs if self.shares_weights else [server.server_arch]
        self.students: dict[str, State] = {arch: server.initial(arch) for arch in archs}

    def needs(self) -> frozenset[str]:
        """Return what the scenario must have with these hyper-parameters. Default: `requires`."""
        return self.requires

    # --- the verbs -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Run once before round 1. Default: nothing."""

    def select(self) -> list[int]:
        """Return the partition ids that take part in this round, ascending."""
        federation, run, clock = self.server.federation, self.server.scenario.run, self.server.clock
        if clock is None:
            return select(federation.eligible, federation.num_clients, run.participation, run.seed, self.round)
        return clock.select(
            self.round,
            how_many(federation.num_clients, run.participation),
            lambda count, available: draw(federation.eligible, count, run.seed, self.round, available),
            least=self.server.scenario.system.min_replies,
        )

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Return what each selected client gets. Default: the weights of its architecture.

        Clients that get the same `Knowledge` object share one content on the wire.
        """
        by_arch = {arch: Knowledge.of(Weights(state, arch)) for arch, state in self.students.items()}
        return {p: by_arch[self.server.federation.archs[p]] for p in selected}

    def check(self, upload: Upload) -> None:
        """Refuse an upload that cannot be used. Default: it must fit what `total` sums.

        A method that overrides this gets every upload; one that overrides `total` gets sums.

        Raises
        ------
        KnowledgeError
            With the reason; the upload is counted as refused and the round goes on.
        """
        self.total().check(upload)

    def total(self) -> Total:
        """Return an empty sum of what `fuse` needs of the uploads. Default: weights, averaged by architecture.

        Workers make it, cohort by cohort, so that uploads do not travel, unless somebody needs each of them.
        """
        return Averages(self.server.expected, weights=self.weighting)

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Turn the uploads into models or targets. Default: average by architecture.

        Parameters
        ----------
        uploads : iterable of Upload
            Streamed in partition order; or not read at all, but summed by `sum_up`.
        """
        averages = sum_up(uploads, self.total())
        assert isinstance(averages, Averages)
        self.students = {**self.students, **averages.result()}

    def distill(self) -> None:
        """Improve the students on proxy data. Default: nothing.

        What is put into ``self.distilled`` becomes part of the round's event.
        """

    def predictors(self) -> dict[str, Predict]:
        """Return the models on the server whose accuracy is reported, by name: members, or data → logits [N, C].

        Default: ``server``, one for each architecture where there are several, and ``ensemble`` where the uploads
        of the round are kept.
        """
        compute = self.server.compute
        named: dict[str, Predict] = {}
        for arch, state in self.students.items():
            name = "server" if len(self.students) == 1 else f"server/{arch}"
            named[name] = compute.member(Weights(state, arch))
        if self.members:
            ensemble = self.ensemble()
            named["ensemble"] = lambda data: log_probs(ensemble, data, self.server.federation.num_classes)
        return named

    # --- shared machinery ------------------------------------------------------------------------------------

    def ensemble(self) -> Ensemble:
        """Return the ensemble of this round's uploaded models. Default: the mean of their logits."""
        return Ensemble(self.teachers(), space="logits", reduce="mean")

    def teachers(self) -> list[ComputedMember]:
        """Return this round's uploaded models as members of an ensemble; the workers run them."""
        return [self.server.compute.member(upload.message) for upload in self.members]

    def distiller(self, **settings: Any) -> Distiller:
        """Return a distiller with the server's device, memory layout and precision."""
        server, system = self.server, self.server.scenario.system
        layout = {"device": server.device, "channels_last": server.channels_last}
        return Distiller(**layout, precision=system.server_precision, graphs=system.graphs, **settings)

    def distill_students(
        self, distiller: Distiller, targets: Targets, carried: dict[str, dict[str, dict[str, Tensor]]] | None = None
    ) -> None:
        """Distil every student towards targets for the proxy set; what happened becomes part of the round's event.

        Parameters
        ----------
        distiller : Distiller
            How. Students are validated on the server labels, where there are any.
        targets : Targets
            The same for all of them.
        carried : dict, optional
            States of the optimisers by architecture, which go on from round to round; see `Distiller.fit`.
        """
        server = self.server
        for arch, state in self.students.items():
            model = server.model(arch, state)
            report = distiller.fit(
                model,
                server.proxy.data,
                targets,
                generator=self.rng(Purpose.DISTILLATION),
                validate=server.label_accuracy if server.has_labels else None,
                carried=None if carried is None else carried.setdefault(arch, {}),
            )
            self.students = {**self.students, arch: server.state_of(model)}
            self.distilled[arch] = asdict(report)

    def exchange(
        self,
        action: str,
        knowledge: Mapping[int, Knowledge],
        *,
        check: Callable[[Upload], None] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Iterator[Upload]:
        """Send knowledge to clients and yield their checked uploads in partition order.

        Parameters
        ----------
        action : str
            Flower message type: ``train``, ``evaluate``, ``train.<action>``, ``query.<action>``.
        knowledge : mapping of int to Knowledge
            What each client gets, by partition id.
        check : callable, optional
            Replaces ``self.check``.
        config : mapping, optional
            Further scalars for the clients.

        Raises
        ------
        TooFewError
            In the end: fewer came than ``system.min_replies``, or than were asked if that is less.
        """
        checks = [self.held(knowledge), check or self.check]
        count = 0
        for upload in self.server.exchange(action, knowledge, round=self.round, checks=checks, config=config):
            count += 1
            yield upload
        self.enough(count, "uploads" if action == "train" else f"answers to {action}", asked=len(knowledge))

    def enough(self, replies: int, what: str, *, asked: int | None = None) -> None:
        """Stop the run, resumably, if too few usable replies came.

        Parameters
        ----------
        replies : int
            How many came.
        what : str
            What they are, for the message.
        asked : int, optional
            How many could have come.

        Raises
        ------
        TooFewError
            Fewer than ``system.min_replies`` came, or than could have come if that is less.
        """
        needed = self.server.scenario.system.min_replies
        needed = needed if asked is None else min(needed, asked)
        if replies < needed:
            raise TooFewError(self.round, replies, needed, what)

    def held(self, partition_ids: Iterable[int]) -> Held:
        """Return a check that refuses numbers of examples that these clients cannot have."""
        sizes = self.server.federation.sizes
        return Held({p: int(sizes[p]) for p in partition_ids})

    def rng(self, purpose: Purpose = Purpose.METHOD_SERVER) -> np.random.Generator:
        """Return the server's generator for a purpose in this round."""
        return rng(self.server.seed, purpose, self.round)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: nested dicts and lists of tensors, numbers and strings.

        Methods with more state extend it, and `load_state_dict` with it.
        """
        clock = self.server.clock
        simulated = {} if clock is None else {"simulated_time": clock.time}
        return {"round": self.round, "students": self.students, **simulated}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.round = int(state["round"])
        if self.server.clock is not None:
            self.server.clock.time = float(state["simulated_time"])
        self.students = {arch: dict(student) for arch, student in state["students"].items()}

    # --- one round, and the run ------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        after_round: Callable[[], None] = lambda: None,
    ) -> Result:
        """Run the rounds that are left.

        Replaces Flower's own loop, which has no start round, no hooks between rounds, and carries one ArrayRecord.

        Parameters
        ----------
        grid : Grid
            The grid that the bound server holds.
        initial_arrays : ArrayRecord, optional
            Replaces the initial weights of the (first) architecture.
        num_rounds : int
            Rounds in all; 0 takes the scenario's.
        timeout, train_config, evaluate_config, evaluate_fn
            Of Flower's signature, not used: settings and evaluation are the scenario's.
        after_round : callable
            Called when a round is complete (checkpoints).

        Returns
        -------
        Result
            Final arrays of the first student, and server metrics by round.
        """
        if getattr(self, "server", None) is None or self.server.grid is not grid:
            raise RunError("bind the strategy to a ServerRuntime with this grid before start()")
        scenario = self.server.scenario
        rounds = num_rounds or scenario.run.rounds
        if initial_arrays is not None:
            first = next(iter(self.students), self.server.server_arch)
            self.students[first] = {k: torch.from_numpy(a.numpy()) for k, a in initial_arrays.items()}
        threads = torch.get_num_threads()
        if scenario.system.server_threads:
            torch.set_num_threads(scenario.system.server_threads)
        result = Result()
        try:
            if self.round == 0:
                self.prepare()
            while self.round < rounds:
                self.round += 1
                record = self.run_round(last=self.round == rounds)
                if "accuracy" in record:
                    result.evaluate_metrics_serverapp[self.round] = MetricRecord(
                        {"accuracy": float(record["accuracy"])}
                    )
                after_round()
        finally:
            torch.set_num_threads(threads)
        result.arrays = self.arrays()
        return result

    def run_round(self, last: bool = False) -> dict[str, Any]:
        """Run one round, emit its event, and return the event's fields."""
        server, run = self.server, self.server.scenario.run
        before = {way: dict(kinds) for way, kinds in server.traffic.items()}
        began = server.clock.time if server.clock is not None else 0.0
        clock = [time.perf_counter()]
        self.selected = selected = self.select()
        due = last or self.round % run.evaluate_every == 0
        keep = self.keeps_members or (due and run.evaluate_ensemble and self.shares_weights)
        server.emit("started", round=self.round, clients=selected)
        self.train_metrics, self.distilled = {}, {}
        self.train(selected, keep)
        clock.append(time.perf_counter())
        self.distill()
        clock.append(time.perf_counter())
        measured = self.evaluate() if due else {}
        self.members = []
        clock.append(time.perf_counter())
        seconds = dict(zip(("train", "distill", "evaluate"), np.diff(clock).round(4).tolist(), strict=True))
        traffic = {
            way: {kind: sent for kind, total in kinds.items() if (sent := total - before[way].get(kind, 0))}
            for way, kinds in server.traffic.items()
        }
        record = {
            "round": self.round,
            "selected": len(selected),
            "received": self.received,
            "train": self.train_metrics,
            **({"distill": self.distilled} if self.distilled else {}),
            **measured,
            "bytes_up": traffic["up"],
            "bytes_down": traffic["down"],
            "seconds": seconds,
        }
        if server.clock is not None:
            record |= {"simulated_seconds": server.clock.time - began, "simulated_time": server.clock.time}
        server.emit("round", **record)
        return record

    def train(self, selected: list[int], keep: bool) -> None:
        """Broadcast, let the clients train, and fuse what they share."""
        knowledge = self.broadcast(selected)
        sums = self.server.sums_on_workers and type(self).check is DistillationStrategy.check
        uploads = self.receive(
            lambda: self.exchange("train", knowledge),
            keep,
            (lambda total: self.exchange_sums("train", knowledge, total, keep=keep)) if sums else None,
        )
        self.fuse(uploads)
        if next(uploads, None) is not None:
            raise RunError(f"{type(self).__name__}.fuse left uploads unread: nobody trains unless they are read")

    def exchange_sums(
        self, action: str, knowledge: Mapping[int, Knowledge], total: Total, *, keep: bool
    ) -> Iterator[tuple[list[Upload], Total | None]]:
        """Send knowledge to clients and let the workers sum their uploads, see `ServerRuntime.exchange_sums`."""
        return self.server.exchange_sums(
            action, knowledge, total, round=self.round, checks=[self.held(knowledge)], keep=keep
        )

    def receive(
        self,
        one_by_one: Callable[[], Iterator[Upload]],
        keep: bool,
        on_workers: Callable[[Total], Iterator[tuple[list[Upload], Total | None]]] | None = None,
    ) -> Uploads:
        """Return the uploads of an exchange; count them, average their metrics, keep them as members if asked to.

        Raises
        ------
        TooFewError
            When they are read: fewer uploads arrived than ``system.min_replies``.
        """
        self.members, self.received = [], 0
        reports: dict[int, Knowledge] = {}

        def seen(upload: Upload) -> None:
            self.received += 1
            reports[upload.partition_id] = Knowledge(num_examples=upload.num_examples, metrics=upload.knowledge.metrics)
            if keep:
                self.members.append(upload)
            self.server.emit("reply", round=self.round, partition_id=upload.partition_id)

        def ended() -> None:
            # Sums come cohort by cohort, uploads one by one; members and means of metrics are in partition order.
            self.members.sort(key=lambda upload: upload.partition_id)
            self.train_metrics = mean_metrics(reports[p] for p in sorted(reports))
            self.enough(self.received, "uploads")

        return Uploads(one_by_one, on_workers, seen, ended)

    def evaluate(self) -> dict[str, Any]:
        """Measure all predictors on the global test set, and clients where the scenario or method wants it.

        Returns
        -------
        dict
            ``accuracy`` and ``whose`` it is, ``predictors`` (scores by name), ``agreement`` of student and ensemble.
        """
        federation, run = self.server.federation, self.server.scenario.run
        labels = torch.tensor(np.asarray(federation.test.labels), dtype=torch.int64)
        logits = predictions(self.predictors(), federation.test)
        measured: dict[str, Any] = {name: scores(out, labels) for name, out in logits.items()}
        if not self.shares_weights:
            measured["clients"] = self.evaluate_clients(federation.eligible, on="global")
            measured |= self.measure()
        if run.evaluate_clients != "none":
            chosen = self.selected if run.evaluate_clients == "selected" else federation.eligible
            measured["clients-local"] = self.evaluate_clients(chosen, "local", self.deployed())
        record: dict[str, Any] = {**self.headline(measured), "predictors": measured}
        students = [name for name in logits if name.partition("/")[0] == "server"]
        if "ensemble" in logits and students:
            for name in students:
                measured[name]["agreement"] = agreement(logits[name], logits["ensemble"])
            record["agreement"] = sum(measured[name]["agreement"] for name in students) / len(students)
        return record

    def deployed(self) -> Callable[[int], Knowledge] | None:
        """Return what clients are given to be measured on their own test data, by partition id.

        For methods whose clients use neither the global model nor one of their own alone. Default: see
        `evaluate_clients`.
        """
        return None

    def measure(self) -> dict[str, dict[str, float]]:
        """Return more scores that clients measure on the global test set, by whose they are. Default: none.

        For methods without a global model, in which clients can be evaluated in more than one way.
        """
        return {}

    def headline(self, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the accuracy that tables show, and whose it is."""
        for whose in ("server", "clients"):
            if whose in measured:
                return {"accuracy": measured[whose]["accuracy"], "whose": whose}
        servers = [scored["accuracy"] for name, scored in measured.items() if name.startswith("server/")]
        if servers:
            return {"accuracy": sum(servers) / len(servers), "whose": f"mean of {len(servers)} server models"}
        return {}

    def evaluate_clients(
        self,
        partition_ids: Iterable[int],
        on: Literal["local", "global"],
        knowledge_for: Callable[[int], Knowledge] | None = None,
    ) -> dict[str, float]:
        """Let clients evaluate: the global model if there is one, else their own.

        Parameters
        ----------
        partition_ids : iterable of int
            The clients; those that attack are left out, as nobody wants to know how well they do.
        on : str
            ``local`` for each client's own test split, ``global`` for the global test set.
        knowledge_for : callable, optional
            What a client gets for it, by partition id; default: the global model if there is one, else nothing.

        Returns
        -------
        dict
            ``accuracy`` (mean over clients), ``worst_decile``, ``clients``; empty if nobody has test data.
        """
        server = self.server
        attackers = set(server.federation.attackers.tolist())
        chosen = [p for p in map(int, partition_ids) if p not in attackers]
        models = {arch: Knowledge.of(Weights(state, arch)) for arch, state in self.students.items()}
        nothing = Knowledge()
        knowledge = {p: models[server.federation.archs[p]] if self.shares_weights else nothing for p in chosen}
        if knowledge_for is not None:
            knowledge = {p: knowledge_for(p) for p in chosen}
        traffic = {way: kinds.copy() for way, kinds in server.traffic.items()}
        replies = server.exchange("evaluate", knowledge, round=self.round, checks=[_check_accuracy], config={"on": on})
        accuracies = [u.knowledge.metrics["accuracy"] for u in replies if u.num_examples]
        server.traffic = traffic  # what the simulator measures does not travel in the method
        return spread(accuracies) if accuracies else {}

    # --- Flower's own interface, in terms of the verbs ---------------------------------------------------------

    def arrays(self) -> ArrayRecord:
        """Return the first student's weights as a Flower record."""
        first = next(iter(self.students.values()), {})
        return array_record({name: tensor.numpy() for name, tensor in first.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the train messages of a round (Flower's interface)."""
        self.round = server_round
        return self.server.messages("train", self.broadcast(self.select()), round=server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fuse replies and distill (Flower's interface)."""
        replies = list(replies)
        senders = [self.server.partition_of(reply.metadata.src_node_id) for reply in replies]
        checks = [self.held(senders), self.check]
        self.train_metrics = {}
        self.fuse(
            self.receive(lambda: self.server.read(replies, round=server_round, checks=checks), self.keeps_members)
        )
        self.distill()
        return self.arrays(), MetricRecord(dict(self.train_metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no messages: clients are evaluated by `evaluate` as the scenario says (Flower's interface)."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing (Flower's interface)."""
        return None

    def summary(self) -> None:
        """Print nothing: runs report themselves (Flower's interface)."""


def mean_metrics(reports: Iterable[Knowledge]) -> dict[str, float]:
    """Return the mean of clients' metrics, weighted by their examples."""
    sums: dict[str, float] = {}
    total = 0
    for report in reports:
        total += report.num_examples
        for name, value in report.metrics.items():
            sums[name] = sums.get(name, 0.0) + value * report.num_examples
    return {name: value / max(total, 1) for name, value in sums.items()}


def _check_accuracy(upload: Upload) -> None:
    """Refuse an evaluation without an accuracy, or with one outside [0, 1]."""
    if not 0 <= upload.knowledge.metrics.get("accuracy", -1.0) <= 1:
        raise KnowledgeError("an evaluation without an accuracy between 0 and 1")
