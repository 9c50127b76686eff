"""FedGEMS: Cheng, Wu, Xiao, Liu, FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge Fusion,
2021 (2110.11027), Algorithm 1 and equations 1 to 6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fedkd.client import trainer
from fedkd.client.local import Aux, LocalTraining
from fedkd.data.batches import Batch
from fedkd.losses.response import label_and_teacher
from fedkd.payloads import Knowledge, ProxyOutputs, Request
from fedkd.seeds import Purpose
from fedkd.server.distiller import Distiller
from fedkd.server.ensemble import Ensemble
from fedkd.server.logit_pool import LogitPool
from fedkd.server.members import StoredMember
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.targets import Targets
from fedkd.server.uploads import Upload

if TYPE_CHECKING:
    from fedkd.client.student import Student


class AnswerRequests(LocalTraining):
    """Learn the public set from its labels and the server's logits, then private data; answer requests for logits."""

    method: FedGEMS
    keeps_model = True
    sees_proxy = True
    actions = ("logits",)

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Digest the public set, once the server has learnt something."""
        assert student.proxy is not None
        if "proxy-outputs" in knowledge:
            said = knowledge.get(ProxyOutputs)
            said.check(student.num_classes, torch.arange(len(student.proxy)), "logits")
            trainer.digest(
                student,
                said.ids,
                said.values,
                self.public_loss,
                epochs=self.method.public_epochs,
                batch_size=self.method.public_batch_size,
                labelled=True,
            )
        return {}

    def public_loss(self, logits: Tensor, server: Tensor, labels: Tensor) -> Tensor:
        """Return ε·CE + (1 − ε)·KL(server ‖ client), mean over the batch (equation 6)."""
        return label_and_teacher(logits, server, labels, share=self.method.epsilon)

    def share(self, student: Student) -> Knowledge:
        """Share nothing but the number of examples: the server asks when it distils."""
        return Knowledge(num_examples=student.num_examples)

    def on_logits(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Answer with logits on the requested samples of the public set."""
        assert student.proxy is not None
        asked = knowledge.get(Request)
        asked.check(len(student.proxy))
        logits = student.predict(student.proxy.data, asked.ids)
        return Knowledge.of(ProxyOutputs(asked.ids, logits, "logits"), num_examples=student.num_examples)


@dataclass(kw_only=True)
class FedGEMS(DistillationStrategy):
    """Cheng et al., FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge Fusion, 2021.

    The server trains a larger model (``models.server``) on a labelled public set. Samples that it classifies
    correctly are learnt from their labels, and its logits for them remembered. Of those that it gets wrong, the ones
    with remembered logits are learnt from label and memory, ε·CE + (1 − ε)·KL(remembered ‖ server); logits of the
    others, and of no more, are asked of the clients, whose mean takes the place of the memory: softmax over clients
    of 1 / H (their entropy), only those that are right. Clients learn the public set from labels and the server's
    logits with the same ε, then their private data, and own their models.
    Reported is the accuracy of the server's model.

    ``selective = False`` is FedGEM: clients send logits for the whole public set, of which the plain mean is learnt.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.11027"
    year: ClassVar[int] = 2021
    requires: ClassVar[frozenset[str]] = frozenset({"proxy", "proxy-labels"})
    heterogeneous: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = False
    travels_up: ClassVar[str] = "proxy-outputs: 4·|R|·C + 4·|R| (ids); R = requested samples"
    travels_down: ClassVar[str] = "request: 4·|R| (ids); from round 2 on proxy-outputs: 4·|P|·C + 4·|P| (ids)"
    pitfalls: ClassVar[str] = (
        "the labelled public set is half of all data in the paper, and a server trained on it alone reaches 84 of "
        "FedGEMS's 88 % on CIFAR-10: compare with that; ports swap the KL's arguments and divide it by C"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "both"
    server_data: ClassVar[str] = "labelled public set"
    client_data: ClassVar[str] = "the same labelled public set"
    differences: ClassVar[str] = (
        "No code was released. The paper judges samples and asks for logits batch by batch while the server learns; "
        "here once a round, with the model that the round began with, and clients are trained before the server. "
        "Samples that no client gets right are learnt from their label alone, of which the paper says nothing. Its "
        "plateau schedule, which needs a set to judge by, is left out. Assumed: batches of 256 public samples, weight "
        "decay 1e-4 on the server."
    )
    verified: ClassVar[str] = (
        "selection, weights and loss by hand in float64; ε = 1 is supervised training, whatever clients know; requests "
        "are exactly the samples that are wrong and not remembered; bytes; resume"
    )
    local = AnswerRequests

    epsilon: float = field(default=0.75, metadata={"ge": 0, "le": 1, "help": "ε, weight of labels beside distillation"})
    selective: bool = field(default=True, metadata={"help": "whether clients and samples are selected; off is FedGEM"})
    public_epochs: int = field(default=1, metadata={"ge": 1, "help": "clients' passes over the public set a round"})
    public_batch_size: int = field(default=256, metadata={"ge": 1, "help": "public samples a step, on clients"})
    server_epochs: int = field(default=1, metadata={"ge": 1, "help": "the server's passes over the public set a round"})
    server_batch_size: int = field(default=256, metadata={"ge": 1, "help": "public samples a step, on the server"})
    server_lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam's learning rate on the server"})
    server_weight_decay: float = field(default=1e-4, metadata={"ge": 0, "help": "L2 weight decay on the server"})

    def bind(self, server: Any) -> None:
        """Start with an empty pool."""
        super().bind(server)
        self.pool = LogitPool(len(server.proxy), server.federation.num_classes)
        self.said: Tensor | None = None
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.present: list[int] = []

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the server's logits on the public set, once it has been trained."""
        knowledge = Knowledge()
        if self.said is not None:
            knowledge = Knowledge.of(ProxyOutputs(torch.arange(len(self.said)), self.said, "logits"))
        return dict.fromkeys(selected, knowledge)

    def check(self, upload: Upload) -> None:
        """Accept whatever a client says after its training: nothing of it is used."""

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Note who is there to be asked."""
        self.present = [upload.partition_id for upload in uploads]

    def distill(self) -> None:
        """Judge the public set, ask for what is missing, and train the server model."""
        server, [(arch, state)] = self.server, self.students.items()
        labels = torch.as_tensor(server.proxy.labels, dtype=torch.int64)
        if self.said is None:
            self.said = server.predict(arch, state, server.proxy.data)
        right = self.said.argmax(1) == labels
        if self.selective:
            self.pool.put(right.nonzero().squeeze(1), self.said[right])
        asked = self.missing(right)
        targets, weights = self.pool.values.clone(), (self.pool.known & ~right).float()
        if len(asked):
            taught = self.fused(list(self.answers(asked)), labels)
            targets[taught.ids], weights[taught.ids] = taught.values, 1.0

        def loss(logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
            weight = weights[batch.ids.cpu()].to(logits.device)
            return label_and_teacher(logits, target, batch.y, share=self.epsilon, taught=weight)

        distiller = Distiller(
            optimizer="adam",
            lr=self.server_lr,
            weight_decay=self.server_weight_decay,
            schedule="constant",
            steps=0,
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            clip=0.0,
            t_squared=False,
            reduction="batchmean",
            returns="last",
            device=server.device,
            channels_last=server.channels_last,
            precision=server.scenario.system.server_precision,
        )
        model = server.model(arch, state)
        report = distiller.fit(
            model,
            server.proxy.data,
            Targets(targets, "logits", torch.arange(len(labels))),
            generator=self.rng(Purpose.DISTILLATION),
            loss=loss,
            carried=self.memory,
        )
        self.students = {arch: server.state_of(model)}
        self.said = server.predict(arch, self.students[arch], server.proxy.data)
        counts = {"right": int(right.sum()), "asked": len(asked), "distilled": int(weights.sum())}
        self.distilled[arch] = asdict(report) | counts

    def missing(self, right: Tensor) -> Tensor:
        """Return the samples to ask for: wrong and not remembered; all of them in FedGEM."""
        wanted = ~right & ~self.pool.known if self.selective else torch.ones_like(right)
        return wanted.nonzero().squeeze(1)

    def answers(self, asked: Tensor) -> Iterable[Upload]:
        """Ask the round's clients for logits on some samples."""

        def check(upload: Upload) -> None:
            upload.knowledge.get(ProxyOutputs).check(self.server.federation.num_classes, asked, "logits")

        request = Knowledge.of(Request(asked))
        return self.exchange("query.logits", dict.fromkeys(self.present, request), check=check)

    def fused(self, uploads: list[Upload], labels: Tensor) -> Targets:
        """Return the weighted mean of the clients' logits, for the samples that anybody gets right."""
        members = []
        for upload in uploads:
            out = upload.knowledge.get(ProxyOutputs)
            kept = out.values.argmax(1) == labels[out.ids] if self.selective else torch.ones(len(out.ids)).bool()
            if bool(kept.any()):
                members.append(StoredMember(out.ids[kept], out.values[kept]))
        if not members:
            return Targets(torch.zeros(0, self.server.federation.num_classes), "logits", torch.zeros(0).long())
        ensemble = Ensemble(members, space="logits", weights="entropy" if self.selective else None)
        return ensemble.targets()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the pool, the optimiser, and what the server says of the public set."""
        said = {} if self.said is None else {"logits": self.said}
        return {**super().state_dict(), "pool": self.pool.state_dict(), "memory": self.memory, "said": said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.pool.load_state_dict(state["pool"])
        self.memory = {name: dict(each) for name, each in state["memory"].items()}
        self.said = state["said"].get("logits")
