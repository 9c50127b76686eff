"""FedGKD: Yao, Pan, Dai, Wan, Ding, Yu, Jin, Xu, Sun, FedGKD: Toward Heterogeneous Federated Learning via Global
Knowledge Distillation, IEEE Transactions on Computers 2024 (2107.00051).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import kd
from fedkd.payloads import Knowledge, State, Weights
from fedkd.server.averaging import mean_state
from fedkd.server.uploads import Upload
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs


class GlobalDistillation(LocalTraining):
    """Cross-entropy and KD against the mean of the last M global models."""

    method: FedGKD

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Load the weights; the teacher is the buffer's mean if it was sent, else the received model itself.

        No teacher in round 1: the initial model knows nothing.
        """
        super().absorb(student, knowledge)
        if student.round > 1:
            student.teach(knowledge.get(Weights, "teacher" if "teacher" in knowledge else "weights"))
        return {}

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy + c·T²·KL(teacher ‖ student), mean over the batch, T² on (paper and code)."""
        terms = super().loss(params, batch, out, teachers, aux)
        if not teachers:
            return {**terms, "kd": 0.0 * terms["ce"]}
        distilled = kd(
            out.logits,
            teachers[0].logits,
            temperature=self.method.temperature,
            reduction="batchmean",
            t_squared=True,
            kind=self.method.kind,
        )
        return {**terms, "kd": self.method.coefficient * distilled}


@dataclass(kw_only=True)
class FedGKD(FedAvg):
    """Yao et al., FedGKD: Toward Heterogeneous Federated Learning via Global Knowledge Distillation, 2021.

    Clients distil from the *weight* average of the last M global models. Averages are uniform. With M = 1 the
    teacher is the received model and nothing more travels than in FedAvg.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2107.00051"
    year: ClassVar[int] = 2021
    heterogeneous: ClassVar[bool] = True
    travels_down: ClassVar[str] = "weights: 4·|θ|; from round 2 on, with buffer > 1: teacher: 4·|θ|"
    pitfalls: ClassVar[str] = "the paper writes the coefficient as γ/2 with γ = 0.2; the code as 0.1"
    local = GlobalDistillation

    weighting: Literal["examples", "uniform"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="uniform", metadata={"help": "weights of the average: 1 / K (paper and code), or n_k / n"}
    )
    buffer: int = field(default=5, metadata={"ge": 1, "help": "M, global models behind the teacher"})
    coefficient: float = field(default=0.1, metadata={"ge": 0, "help": "weight of the distillation term (γ/2)"})
    temperature: float = field(default=1.0, metadata={"gt": 0, "help": "softmax temperature"})
    kind: Literal["kl", "mse"] = field(default="kl", metadata={"help": "kl, or mse on logits"})

    def bind(self, server: Any) -> None:
        """Start with an empty buffer."""
        super().bind(server)
        self.history: list[dict[str, State]] = []

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the global model and, with M > 1, the mean of the buffer."""
        if self.buffer == 1 or not self.history:
            return super().broadcast(selected)
        by_arch = {
            arch: Knowledge.of(
                Weights(state, arch),
                Weights(mean_state([past[arch] for past in self.history]), arch, kind="teacher"),
            )
            for arch, state in self.students.items()
        }
        return {p: by_arch[self.server.federation.archs[p]] for p in selected}

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average, and push the result into the buffer (first in, first out)."""
        super().fuse(uploads)
        if self.buffer > 1:
            self.history = [*self.history, self.students][-self.buffer :]

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the buffer."""
        return {**super().state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the buffer."""
        super().load_state_dict(state)
        self.history = [{arch: dict(s) for arch, s in past.items()} for past in state["history"]]
