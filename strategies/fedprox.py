"""FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, Federated Optimization in Heterogeneous Networks,
MLSys 2020 (1812.06127), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs
    from fedkd.payloads import Knowledge


class Proximal(LocalTraining):
    """Cross-entropy and (μ/2)·‖w − w_global‖² over the parameters."""

    method: FedProx

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Load the weights, and keep a copy of the parameters as the anchor."""
        super().absorb(student, knowledge)
        return {"anchor": {name: p.detach().clone() for name, p in student.model.named_parameters()}}

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy and the proximal term."""
        squares = ((p - aux["anchor"][name]).square().sum() for name, p in params.items())
        distance = sum(squares, start=out.logits.new_zeros(()))
        return {**super().loss(params, batch, out, teachers, aux), "prox": 0.5 * self.method.mu * distance}


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020.

    FedAvg whose clients are held near the global model by a proximal term. Buffers of norm layers are not
    penalised.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1812.06127"
    year: ClassVar[int] = 2020
    pitfalls: ClassVar[str] = "mu is written with and without the factor 1/2 (FedAUX's code: without)"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = ""
    differences: ClassVar[str] = (
        "The paper draws clients with probability n_k / n and averages uniformly; its code draws uniformly and "
        "weights by examples, and so do the defaults. The code's mu is 0 unless given. Stragglers that do part of the "
        "work, which both simulate, are left to [clock]."
    )
    verified: ClassVar[str] = "proximal term and anchor by hand, mu = 0 against FedAvg, bytes"
    local = Proximal

    mu: float = field(
        default=0.01,
        metadata={"ge": 0, "help": "coefficient of the proximal term; the paper tries 0.001 to 1"},
    )
