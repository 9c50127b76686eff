"""FedCAD: He, Chen, Yang, Zhang, Zeng, Class-Wise Adaptive Self Distillation for Federated Learning on Non-IID Data
(Student Abstract), AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import kd
from fedkd.payloads import ClassWeights, Knowledge, State, Weights
from fedkd.server.credibility import class_credibility, confusion
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs


class ClassWiseDistillation(LocalTraining):
    """Cross-entropy, and the squared distance to the received model's logits, weighted by class."""

    method: FedCAD
    distils = True

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Load the weights, keep them as teacher, and take in how credible it is on each class."""
        super().absorb(student, knowledge)
        weights = knowledge.get(ClassWeights)
        weights.check(student.num_classes)
        return {"credibility": weights.values.to(student.device)}

    def channel_weights(self, taught: Tensor, labels: Tensor, aux: Aux) -> Tensor:
        """Return the factors M of the differences of logits, for each class [C] or for each sample, too [B, C]."""
        return self.method.m_max * F.relu(aux["credibility"] - self.method.threshold)

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy + mean over the batch of Σ_c (M_c (z_teacher,c − z_c))², of logits: no temperature, no T²."""
        taught = teachers[0].logits
        distilled = kd(
            out.logits,
            taught,
            temperature=1.0,
            reduction="batchmean",
            t_squared=False,
            kind="mse",
            class_weight=self.channel_weights(taught, batch.y, aux).square(),
        )
        return {**super().loss(params, batch, out, teachers, aux), "kd": distilled}


@dataclass(kw_only=True)
class FedCAD(FedAvg):
    """He et al., Class-Wise Adaptive Self Distillation for Federated Learning on Non-IID Data, AAAI 2022.

    The received model teaches each class as far as it can be believed about it. Before every round the server
    measures that on labelled samples of its own: with A_jc the share of class j that the model takes for class c,
    the credibility of class c is A_cc·(1 − max_{j≠c} A_jc). It travels with the weights.

    The published abstract gives no formula and no code was released; what is here is what its authors published
    later as FedSSD, without that method's factor for each sample.
    """

    paper: ClassVar[str] = "https://doi.org/10.1609/aaai.v36i11.21620"
    year: ClassVar[int] = 2022
    requires: ClassVar[frozenset[str]] = frozenset({"server-labels"})
    travels_down: ClassVar[str] = "weights: 4·|θ|; class-weights: 4·C"
    pitfalls: ClassVar[str] = (
        "a class that has no sample among the server's labels is not distilled; "
        "squared differences of logits are not bounded: clip gradients (client.clip = 0.5, as a port does), or "
        "large m_max or learning rates diverge"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    server_data: ClassVar[str] = "a few labelled samples"
    differences: ClassVar[str] = (
        "No code was released and the abstract has no formula. Assumed, after FedSSD by the same authors: class "
        "credibility from the confusion matrix, weights M_c = m_max·max(0, credibility_c − 0.1) on the squared "
        "differences of logits, averages weighted by examples. The labelled samples are the paper's auxiliary set."
    )
    verified: ClassVar[str] = (
        "confusion matrix against scikit-learn, credibility and loss by hand, m_max = 0 against FedAvg, bytes, resume"
    )
    local = ClassWiseDistillation

    m_max: float = field(default=1.0, metadata={"ge": 0, "help": "scale of the channel weights; 0 is FedAvg"})
    threshold: float = field(
        default=0.1, metadata={"ge": 0, "lt": 1, "help": "credibility up to which a class is not distilled at all"}
    )

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the global model and how credible it is on each class."""
        by_arch = {
            arch: Knowledge.of(Weights(state, arch), ClassWeights(self.credibility(arch, state)))
            for arch, state in self.students.items()
        }
        return {p: by_arch[self.server.federation.archs[p]] for p in selected}

    def credibility(self, arch: str, state: State) -> Tensor:
        """Return a model's credibility on each class, float32 [C], and note it in the round's event."""
        found = class_credibility(confusion(*self.server.label_logits(arch, state))).float()
        self.distilled[arch] = {"credibility": found.tolist()}
        return found
