"""FedNTD: Lee, Jeong, Shin, Bae, Yun, Preservation of the Global Knowledge by Not-True Distillation in Federated
Learning, NeurIPS 2022 (2106.03097).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import kd, not_true_mask
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs


class NotTrueDistillation(LocalTraining):
    """Cross-entropy and KD against the received model over the classes that are not the label."""

    method: FedNTD
    distils = True

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy + β·τ²·KL over the C − 1 other logits, mean over the batch; τ² as in the code."""
        distilled = kd(
            out.logits,
            teachers[0].logits,
            temperature=self.method.tau,
            reduction="batchmean",
            t_squared=True,
            class_mask=not_true_mask(batch.y, out.logits.shape[-1]),
        )
        return {**super().loss(params, batch, out, teachers, aux), "ntd": self.method.beta * distilled}


@dataclass(kw_only=True)
class FedNTD(FedAvg):
    """Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated Learning, NeurIPS 2022.

    The received model teaches only the classes that a sample does not belong to, so that what the client's data
    lack is not forgotten while cross-entropy is free to fit the label. With two classes one is left and the term is 0.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.03097"
    year: ClassVar[int] = 2022
    pitfalls: ClassVar[str] = (
        "published numbers are a moving average (factor 0.6) of the curve; with 10 clients it may not beat FedAvg"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    differences: ClassVar[str] = (
        "None in the formula: averages weighted by examples, β = τ = 1. The class in the released code has τ = 3 by "
        "default, which its configurations override; an early version of it left out τ²."
    )
    verified: ClassVar[str] = "loss and its gradient by hand at τ = 2, two classes, β = 0 against FedAvg, bytes"
    local = NotTrueDistillation

    beta: float = field(default=1.0, metadata={"ge": 0, "help": "β, weight of the distillation term"})
    tau: float = field(
        default=1.0, metadata={"gt": 0, "help": "τ, softmax temperature (the code's class default is 3)"}
    )
