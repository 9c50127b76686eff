"""FedSSD: He, Chen, Yang, Yu, Huang, Gu, Learning Critically: Selective Self-Distillation in Federated Learning on
Non-IID Data, IEEE Transactions on Big Data 2022 (2504.14694).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fedkd.client.local import Aux
from strategies.fedcad import ClassWiseDistillation, FedCAD


class SelectiveDistillation(ClassWiseDistillation):
    """Cross-entropy, and the squared distance to the received model's logits, weighted by class and sample."""

    method: FedSSD

    def channel_weights(self, taught: Tensor, labels: Tensor, aux: Aux) -> Tensor:
        """Return M [B, C]; a sample counts as 1 − √(1 − p), p the teacher's probability of its label."""
        right = taught.float().softmax(-1).gather(1, labels[:, None])
        sample = 1 - (1 - right).clamp(min=0).sqrt()
        return self.method.m_max * F.relu(aux["credibility"] * sample - self.method.threshold)


@dataclass(kw_only=True)
class FedSSD(FedCAD):
    """He et al., Learning Critically: Selective Self-Distillation in Federated Learning on Non-IID Data, 2022.

    The received model teaches as far as it can be believed about a class and about a sample:
    M_c(x) = m_max·max(0, M_class[c]·M_sample(x) − 0.1) weighs the difference of the logits of class c. M_class[c] =
    A_cc·(1 − max_{j≠c} A_jc) comes from the confusion matrix A of the global model on labelled samples of the server;
    M_sample(x) = 1 − √(1 − p(y|x)) is near 1 only where the model is sure of the sample's label.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2504.14694"
    year: ClassVar[int] = 2022
    pitfalls: ClassVar[str] = (
        "summaries say that it needs no auxiliary data, but the confusion matrix takes labelled samples; "
        "a class that has none of them is not distilled; clip gradients (client.clip = 0.5, as a port does)"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    server_data: ClassVar[str] = "a few labelled samples"
    differences: ClassVar[str] = (
        "The authors released no code that could be found; formulas are those of the paper as a re-implementation "
        "states them. The paper's m_max was not available: 1 is that re-implementation's. It also clips gradients at "
        "0.5 (client.clip = 0.5), which is not the default here."
    )
    verified: ClassVar[str] = (
        "confusion matrix against scikit-learn, weights and loss by hand, m_max = 0 against FedAvg, "
        "both trainers against each other, bytes, resume"
    )
    local = SelectiveDistillation

    threshold: float = field(
        default=0.1, metadata={"ge": 0, "lt": 1, "help": "credibility of class times sample up to which M is 0"}
    )
