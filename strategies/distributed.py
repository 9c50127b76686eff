"""Distributed distillation: Bistritz, Mann, Bambos, Distributed Distillation for On-Device Learning, NeurIPS 2020."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import cross_entropies, kd
from fedkd.payloads import Knowledge, PeerOutputs, ProxyOutputs, Request
from fedkd.seeds import Purpose
from fedkd.server.evaluation import Predict
from fedkd.server.graph import Kind, among, make_graph, metropolis
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.uploads import Upload

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs

ESTIMATE, SAID = "consensus/estimate", "consensus/said"


class PeerLearning(LocalTraining):
    """Cross-entropy on private samples, and the distance from the consensus on reference samples; gossip between."""

    method: DistributedDistillation
    keeps_model = True
    sees_proxy = True
    actions = ("gossip",)

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in which reference samples are talked about; learn towards the estimates that there are already."""
        assert student.proxy is not None
        knowledge.get(Request).check(len(student.proxy))
        if ESTIMATE not in student.memory or not self.method.rho:
            return {}
        # A distribution is not all zeros, so rows that are have not been talked about yet.
        student.public = student.memory[SAID].any(1).nonzero().squeeze(1)
        student.beside = self.method.reference_batch_size
        return {"estimates": student.memory[ESTIMATE][student.public].to(student.device)}

    def loss(
        self, params: Mapping[str, Tensor], batch: Batch, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux
    ) -> dict[str, Tensor]:
        """Mean cross-entropy of private samples + ρ·mean squared distance from the estimate on reference samples."""
        if "estimates" not in aux:
            return super().loss(params, batch, out, teachers, aux)
        shared = (batch.y < 0).to(out.logits.dtype)
        ce = cross_entropies(out.logits, batch.y)
        distance = kd(
            out.logits,
            aux["estimates"][batch.ids.clamp(max=len(aux["estimates"]) - 1)],
            temperature=1.0,
            reduction="batchmean",
            t_squared=False,
            kind=self.method.distance,
            target_space="probs",
            sample_weight=shared * (len(shared) / shared.sum().clamp(min=1)),
        )
        return {"ce": ce.sum() / (1 - shared).sum().clamp(min=1), "consensus": self.method.rho * distance}

    def share(self, student: Student) -> Knowledge:
        """Move the own estimate by the change of the own soft decisions, and share it."""
        assert student.proxy is not None
        ids = student.knowledge.get(Request).ids
        probs = student.predict(student.proxy.data, ids).softmax(1)
        nothing = torch.zeros(len(student.proxy), student.num_classes)
        estimate, said = (student.memory.get(name, nothing).clone() for name in (ESTIMATE, SAID))
        tracks = self.method.consensus == "tracking"
        estimate[ids] = estimate[ids] + probs - said[ids] if tracks else probs
        said[ids] = probs
        student.memory |= {ESTIMATE: estimate, SAID: said}
        return self.tell(student, ids)

    def on_gossip(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Average the own estimate with those of the neighbours."""
        assert student.proxy is not None
        told = knowledge.get(PeerOutputs)
        told.check(student.num_classes, len(student.proxy))
        estimate = student.memory[ESTIMATE].clone()
        weights = told.weights.double()
        theirs = torch.einsum("m,mnc->nc", weights, told.values.double())
        estimate[told.ids] = ((1 - weights.sum()) * estimate[told.ids].double() + theirs).float()
        student.memory |= {ESTIMATE: estimate}
        return self.tell(student, told.ids) if told.more else Knowledge(num_examples=student.num_examples)

    def tell(self, student: Student, ids: Tensor) -> Knowledge:
        """Return the own estimate for some samples."""
        estimate = student.memory[ESTIMATE][ids]
        return Knowledge.of(ProxyOutputs(ids, estimate, self.method.space), num_examples=student.num_examples)


@dataclass(kw_only=True)
class DistributedDistillation(DistillationStrategy):
    """Bistritz, Mann, Bambos, Distributed Distillation for On-Device Learning, NeurIPS 2020.

    Devices of any model talk to their neighbours in a graph, about soft decisions s on an unlabelled reference set.
    Each minimises its private cross-entropy + ρ·‖s_k − z_k‖² on reference samples, where z_k is its estimate of the
    mean soft decision of the whole network. After training it moves the estimate by the change of its own decisions,
    z_k ← z_k + s_k(new) − s_k(old), then averages with its neighbours, z_k ← Σ_j w_kj z_j, as often as
    ``gossip_steps`` says: dynamic average consensus, in which the sum of all estimates stays that of all decisions, so
    that knowledge comes through from devices that are no neighbours. With ``consensus = "restart"`` a round begins
    from the own decisions instead, and knowledge comes as many edges far as there are steps. Weights are Metropolis's.
    On a complete graph one step is the mean of all, either way. The accuracy is the mean over clients of their own
    models.

    The server has no model and reduces nothing: it is the network between neighbours, and every client gets what its
    own neighbours say. A broadcast to all neighbours counts once as upload, and at each of them as download.
    """

    paper: ClassVar[str] = (
        "https://proceedings.neurips.cc/paper/2020/hash/fef6f971605336724b5e6c0c12dc2534-Abstract.html"
    )
    year: ClassVar[int] = 2020
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    heterogeneous: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = False
    travels_up: ClassVar[str] = "proxy-outputs: G·(4·|P_r|·C + 4·|P_r|) (ids); G = gossip steps"
    travels_down: ClassVar[str] = (
        "request: 4·|P_r| (ids); peer-outputs: G·(4·m·|P_r|·C + 4·|P_r| + 8·m); m = neighbours that take part"
    )
    pitfalls: ClassVar[str] = (
        "with partial participation the neighbours of a fixed sparse graph are rarely there together: redraw it; an "
        "upload that is lost leaves the estimates' sum wrong; every device can poison its neighbours' estimates"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    client_data: ClassVar[str] = "unlabelled reference set, the same for all"
    differences: ClassVar[str] = (
        "Of the paper only the abstract and the reviews were available, and no code. Taken from them: soft decisions "
        "on a common unlabelled set, a regulariser on them, propagation as in distributed consensus, convergence "
        "whatever the connections. Assumed: squared distance, ρ = 1, tracking consensus (what makes the claim true "
        "with one step), Metropolis weights, an undirected ring, rounds of local training instead of single steps."
    )
    verified: ClassVar[str] = (
        "graphs and weights against NumPy; estimates against W^G s in float64; sums preserved; complete graph and one "
        "step = mean; ρ = 0 = local training; loss by hand; bytes; resume"
    )
    local = PeerLearning

    rho: float = field(default=1.0, metadata={"ge": 0, "help": "ρ, weight of the distance from the consensus"})
    distance: Literal["mse", "soft_ce"] = field(
        default="mse",
        metadata={"help": "squared distance of probabilities, or, where consensus restarts, cross-entropy"},
    )
    graph: Kind = field(default="ring", metadata={"help": "who is whose neighbour"})
    degree: int = field(default=4, metadata={"ge": 2, "help": "neighbours of each client in a regular graph"})
    probability: float = field(default=0.5, metadata={"gt": 0, "le": 1, "help": "of an edge of an erdos-renyi graph"})
    redraw: bool = field(
        default=False, metadata={"help": "a new graph among each round's participants; else one among all clients"}
    )
    gossip_steps: int = field(default=1, metadata={"ge": 1, "help": "exchanges with all neighbours a round"})
    consensus: Literal["tracking", "restart"] = field(
        default="tracking", metadata={"help": "estimates follow changes of decisions, or begin anew every round"}
    )
    reference_size: int = field(
        default=0, metadata={"ge": 0, "help": "reference samples that a round is about; 0 = the whole proxy set"}
    )
    reference_batch_size: int = field(default=32, metadata={"ge": 1, "help": "reference samples beside every batch"})

    @property
    def space(self) -> str:
        """How estimates are checked: those that track changes may leave the simplex, as plain numbers."""
        return "logits" if self.consensus == "tracking" else "probs"

    def validate(self) -> None:
        """Refuse a cross-entropy with estimates that are no distributions: it has no lower bound."""
        if self.distance == "soft_ce" and self.consensus == "tracking":
            raise ValueError(
                "distance = 'soft_ce' needs estimates that are distributions, and those of consensus = 'tracking' may "
                "leave the simplex, where cross-entropy is unbounded: set distance = 'mse' or consensus = 'restart'"
            )

    def bind(self, server: Any) -> None:
        """Draw the graph."""
        super().bind(server)
        self.students = {}
        self.neighbours = self.drawn(server.federation.eligible.tolist())

    def drawn(self, clients: list[int]) -> dict[int, list[int]]:
        """Return a graph among some clients, of this round."""
        return make_graph(self.graph, clients, self.rng(), degree=self.degree, probability=self.probability)

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Say which reference samples the round is about: what devices would agree upon by a common seed."""
        size = len(self.server.proxy)
        count = min(self.reference_size or size, size)
        self.asked = torch.from_numpy(np.sort(self.rng(Purpose.PROXY_SUBSET).choice(size, count, replace=False)))
        return dict.fromkeys(selected, Knowledge.of(Request(self.asked)))

    def check(self, upload: Upload) -> None:
        """Refuse estimates for other samples, of another size, or that are not finite."""
        upload.knowledge.get(ProxyOutputs).check(self.server.federation.num_classes, self.asked, self.space)

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Hold what has to be passed on."""
        self.estimates = {u.partition_id: u.knowledge.get(ProxyOutputs).values for u in uploads}

    def distill(self) -> None:
        """Let neighbours gossip; who has not answered takes part no further."""
        graph = self.drawn(sorted(self.estimates)) if self.redraw else self.neighbours
        self.distilled["gossip"] = {"disagreement": disagreement(list(self.estimates.values()))}
        for step in range(self.gossip_steps):
            part = among(graph, self.estimates)
            more = step < self.gossip_steps - 1
            weights = metropolis(part)
            told = {p: self.told(part[p], weights[p], more) for p in part if part[p]}
            if not told:
                return
            replies = self.exchange("query.gossip", told, check=self.check if more else lambda upload: None)
            answers = {u.partition_id: u.knowledge.get(ProxyOutputs).values if more else None for u in replies}
            if more:  # those without neighbours keep their own
                alone = {p: own for p, own in self.estimates.items() if p not in told}
                self.estimates = alone | {p: values for p, values in answers.items() if values is not None}

    def told(self, neighbours: list[int], weights: list[float], more: bool) -> Knowledge:
        """Return what a client's neighbours say."""
        values = torch.stack([self.estimates[other] for other in neighbours])
        return Knowledge.of(PeerOutputs(self.asked, torch.tensor(neighbours), torch.tensor(weights), values, more))

    def predictors(self) -> dict[str, Predict]:
        """Return nothing: there is no model on the server."""
        return {}


def disagreement(estimates: list[Tensor]) -> float:
    """Return the root of the mean squared distance of estimates [n, C] from their mean, over clients and samples."""
    stack = torch.stack(estimates).double()
    return float((stack - stack.mean(0)).square().sum(2).mean().sqrt())
