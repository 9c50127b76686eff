"""DS-FL: Itahara, Nishio, Koda, Morikura, Yamamoto, Distillation-Based Semi-Supervised Federated Learning for
Communication-Efficient Collaborative Training with Non-IID Private Data, IEEE TMC 2023 (2008.06180).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.client import trainer
from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import kd
from fedkd.payloads import Knowledge, ProxyOutputs, Request
from fedkd.seeds import Purpose
from fedkd.server.distiller import Distiller
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.targets import Targets
from fedkd.server.totals import OutputMeans
from fedkd.server.transforms import Era
from fedkd.server.uploads import Upload, sum_up

if TYPE_CHECKING:
    from fedkd.client.student import Student


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with soft targets, mean over the batch: the paper's loss (ports write KL: the same gradient)."""
    return kd(
        logits,
        target,
        temperature=1.0,
        reduction="batchmean",
        t_squared=False,
        kind="soft_ce",
        target_space="probs",
    )


class OpenSetExchange(LocalTraining):
    """Distil from the open set's global labels, train on private data, predict on the next open subset."""

    method: DSFL
    keeps_model = True
    sees_proxy = True

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Digest last round's sharpened labels, if there are any yet."""
        assert student.proxy is not None
        request = knowledge.get(Request)
        request.check(len(student.proxy))
        if "proxy-outputs" in knowledge:
            labels = knowledge.get(ProxyOutputs)
            Request(labels.ids).check(len(student.proxy))
            labels.check(student.num_classes, labels.ids, "probs")
            trainer.digest(
                student,
                labels.ids,
                labels.values,
                soft_cross_entropy,
                epochs=self.method.distill_epochs,
                batch_size=self.method.distill_batch_size,
            )
        return {}

    def share(self, student: Student) -> Knowledge:
        """Share probabilities on the requested samples."""
        assert student.proxy is not None
        asked = student.knowledge.get(Request)
        probs = student.predict(student.proxy.data, asked.ids).softmax(1)
        return Knowledge.of(ProxyOutputs(asked.ids, probs, "probs"), num_examples=student.num_examples)


@dataclass(kw_only=True)
class DSFL(DistillationStrategy):
    """Itahara et al., Distillation-Based Semi-Supervised Federated Learning, IEEE TMC 2023.

    Clients own their models and send class probabilities on a random subset of an unlabelled open set. The server
    averages them and sharpens the mean by entropy reduction, σ(p̄ / T) of the mean *probabilities*, then distils its
    own model from these labels; clients do the same at the start of their next round. The order within a round is
    the re-implementations' (distil, train, predict): the paper's, rolled by half a round.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2008.06180"
    year: ClassVar[int] = 2020
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    heterogeneous: ClassVar[bool] = True
    travels_up: ClassVar[str] = "proxy-outputs: 4·|o_r|·C + 4·|o_r| (ids)"
    travels_down: ClassVar[str] = "request: 4·|o_r| (ids); from round 2 on proxy-outputs: 4·|o_r|·C + 4·|o_r| (ids)"
    pitfalls: ClassVar[str] = "σ(p̄ / T) flattens flat means of many classes: retune T with C"
    shares_weights: ClassVar[bool] = False
    local = OpenSetExchange

    open_size: int = field(
        default=1_000, metadata={"ge": 1, "help": "|o_r|, open samples a round; at most the proxy set"}
    )
    aggregation: Literal["era", "mean"] = field(
        default="era", metadata={"help": "entropy reduction, or the plain mean (SA)"}
    )
    temperature: float = field(default=0.1, metadata={"gt": 0, "help": "T of the entropy reduction"})
    distill_epochs: int = field(
        default=5, metadata={"ge": 1, "help": "passes over the open subset, clients and server"}
    )
    distill_batch_size: int = field(default=100, metadata={"ge": 1, "help": "open samples a step"})
    server_lr: float = field(default=0.1, metadata={"gt": 0, "help": "SGD learning rate of the server model"})

    def bind(self, server: Any) -> None:
        """Start without global labels."""
        super().bind(server)
        self.labels: ProxyOutputs | None = None

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send last round's global labels, and ask for outputs on this round's open subset."""
        size = len(self.server.proxy)
        subset = self.rng(Purpose.PROXY_SUBSET).choice(size, min(self.open_size, size), replace=False)
        self.asked = torch.from_numpy(np.sort(subset))
        payloads: list[Any] = [Request(self.asked)]
        if self.labels is not None:
            payloads.append(self.labels)
        return dict.fromkeys(selected, Knowledge.of(*payloads))

    def total(self) -> OutputMeans:
        """Sum probabilities; refuse outputs for other samples, of another size, or that are no distributions."""
        return OutputMeans(self.asked, self.server.federation.num_classes, "probs")

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average the clients' probabilities and sharpen the mean."""
        mean = sum_up(uploads, self.total()).result()
        labels = Era(self.temperature)(mean) if self.aggregation == "era" else mean
        self.labels = ProxyOutputs(self.asked, labels.float(), "probs")

    def distill(self) -> None:
        """Train the server model on the sharpened labels."""
        assert self.labels is not None
        distiller = Distiller(
            optimizer="sgd",
            lr=self.server_lr,
            schedule="constant",
            steps=0,
            epochs=self.distill_epochs,
            batch_size=self.distill_batch_size,
            clip=0.0,
            temperature=1.0,
            t_squared=False,
            reduction="batchmean",
            kind="soft_ce",
            device=self.server.device,
            channels_last=self.server.channels_last,
            precision=self.server.scenario.system.server_precision,
        )
        for arch, state in self.students.items():
            model = self.server.model(arch, state)
            report = distiller.fit(
                model,
                self.server.proxy.data,
                Targets(self.labels.values, "probs", self.labels.ids),
                generator=self.rng(Purpose.DISTILLATION),
            )
            self.students = {**self.students, arch: self.server.state_of(model)}
            self.distilled[arch] = asdict(report)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the global labels."""
        labels = {"ids": self.labels.ids, "values": self.labels.values} if self.labels else {}
        return {**super().state_dict(), "labels": labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the global labels."""
        super().load_state_dict(state)
        labels = state["labels"]
        self.labels = ProxyOutputs(labels["ids"], labels["values"], "probs") if labels else None
