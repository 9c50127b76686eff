"""FedGKD: Yao, Pan, Dai, Wan, Ding, Yu, Jin, Xu, Sun, FedGKD: Toward Heterogeneous Federated Learning via Global
Knowledge Distillation, IEEE Transactions on Computers 2024 (2107.00051).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import kd
from fedkd.payloads import Knowledge, State, TeacherWeights, Weights
from fedkd.server.averaging import mean_state
from fedkd.server.uploads import Upload
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs

HUGE = 1e6  # validation loss of a model that has diverged


class GlobalDistillation(LocalTraining):
    """Cross-entropy and KD against the mean of the last M global models."""

    method: FedGKD

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Load the weights; the teacher is the buffer's mean, with M = 1 the received model itself.

        No teacher before there is a trained model: the initial one knows nothing.
        """
        super().absorb(student, knowledge)
        if "teacher" in knowledge:
            student.teach(knowledge.get(Weights, "teacher"))
        elif self.method.buffer == 1 and student.round > 1:
            student.teach(knowledge.get(Weights))
        return {}

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy + c·T²·KL(teacher ‖ student), mean over the batch, T² as in the released code."""
        terms = super().loss(params, batch, out, teachers, aux)
        if not teachers:
            return {**terms, "kd": 0.0 * terms["ce"]}
        return {**terms, "kd": self.method.coefficient * self.distance(out, teachers, aux)}

    def distance(self, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux) -> Tensor:
        """Return the distance from the teacher."""
        return self.from_one(out, teachers[0])

    def from_one(self, out: Outputs, teacher: Outputs) -> Tensor:
        """Return T²·KL, or the mean squared difference of logits, over samples and classes as in the released code."""
        return kd(
            out.logits,
            teacher.logits,
            temperature=self.method.temperature,
            reduction="batchmean" if self.method.kind == "kl" else "mean_all",
            t_squared=True,
            kind=self.method.kind,
        )


class VotedDistillation(GlobalDistillation):
    """Cross-entropy and KD against each of the last M global models, weighted by the server's votes."""

    method: FedGKDVote

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Load the weights; they are the first teacher, the older global models that were sent are the others."""
        LocalTraining.absorb(self, student, knowledge)
        if "teacher-weights" not in knowledge:  # nobody has trained the initial model, which knows nothing
            return {}
        votes = knowledge.get(TeacherWeights)
        votes.check()
        student.teach(knowledge.get(Weights))
        for number in range(2, len(votes.values) + 1):
            student.teach(knowledge.get(Weights, f"teacher-{number}"))
        return {"votes": votes.values.to(student.device)}

    def distance(self, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux) -> Tensor:
        """Return the weighted sum of the distances from all teachers."""
        each = [self.from_one(out, teacher) for teacher in teachers]
        return (aux["votes"] * torch.stack(each)).sum()


@dataclass(kw_only=True)
class FedGKD(FedAvg):
    """Yao et al., FedGKD: Toward Heterogeneous Federated Learning via Global Knowledge Distillation, 2021.

    Clients distil from the *weight* average of the last M global models. Averages are uniform. With M = 1 the
    teacher is the received model and nothing more travels than in FedAvg. Of several architectures each has its own
    buffer, into which its averages go; with M = 1 one that nobody has trained by round 2 teaches untrained.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2107.00051"
    year: ClassVar[int] = 2021
    heterogeneous: ClassVar[bool] = True
    travels_down: ClassVar[str] = "weights: 4·|θ|; from round 2 on, with buffer > 1: teacher: 4·|θ|"
    pitfalls: ClassVar[str] = "the paper writes the coefficient as γ/2 with γ = 0.2; the code as 0.1"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    differences: ClassVar[str] = (
        "The defaults are the released code's: uniform averages, M = 5, c = 0.1, T = 1, T², mean over the batch, no "
        'teacher in round 1; of the paper only γ = 0.2, which is the same c, was at hand. kind = "mse" is a mean over '
        "samples and classes, as in the code."
    )
    verified: ClassVar[str] = (
        "loss and teacher by hand, what a client takes as teacher, c = 0 against FedAvg, bytes, resume"
    )
    local = GlobalDistillation

    weighting: Literal["examples", "uniform"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="uniform", metadata={"help": "weights of the average: 1 / K (code), or n_k / n"}
    )
    buffer: int = field(default=5, metadata={"ge": 1, "help": "M, global models behind the teacher"})
    coefficient: float = field(default=0.1, metadata={"ge": 0, "help": "weight of the distillation term (γ/2)"})
    temperature: float = field(default=1.0, metadata={"gt": 0, "help": "softmax temperature"})
    kind: Literal["kl", "mse"] = field(default="kl", metadata={"help": "kl, or mse on logits"})

    def bind(self, server: Any) -> None:
        """Start with empty buffers."""
        super().bind(server)
        self.history: dict[str, list[State]] = {arch: [] for arch in self.students}

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the global model and, with M > 1, the mean of the buffer."""
        by_arch = {}
        for arch, state in self.students.items():
            past = self.history[arch] if self.buffer > 1 else []
            teacher = [Weights(mean_state(past), arch, kind="teacher")] if past else []
            by_arch[arch] = Knowledge.of(Weights(state, arch), *teacher)
        return {p: by_arch[self.server.federation.archs[p]] for p in selected}

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average, and push what is new into the buffers (first in, first out)."""
        before = self.students
        super().fuse(uploads)
        for arch in self.averaged_since(before):
            self.history[arch] = [*self.history[arch], self.students[arch]][-self.buffer :]

    def averaged_since(self, before: Mapping[str, State]) -> list[str]:
        """Return the architectures of which there were uploads; the others keep the model that they had."""
        return [arch for arch, state in self.students.items() if state is not before[arch]]

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the buffer."""
        return {**super().state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the buffers."""
        super().load_state_dict(state)
        self.history = {arch: [dict(one) for one in past] for arch, past in state["history"].items()}


@dataclass(kw_only=True)
class FedGKDVote(FedGKD):
    """Yao et al., FedGKD-VOTE, the variant with M teachers, in FedGKD: Toward Heterogeneous Federated Learning, 2021.

    Clients distil from each of the last M global models by itself, Σ_m v_m·c·T²·KL(teacher_m ‖ student). The votes
    v = softmax(−validation loss / τ) favour the models that do best on labelled samples of the server; the received
    model is the newest teacher, so M models travel.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2107.00051"
    year: ClassVar[int] = 2021
    requires: ClassVar[frozenset[str]] = frozenset({"server-labels"})
    travels_down: ClassVar[str] = (
        "weights: 4·|θ|; from round 2 on teacher-weights: 4·m, and teacher-2 … teacher-m: 4·|θ| each; "
        "m = min(M, round − 1), so M·4·|θ| + 4·M in the end"
    )
    pitfalls: ClassVar[str] = "M models travel to every client and are run on every batch"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    server_data: ClassVar[str] = "a few labelled samples"
    differences: ClassVar[str] = (
        "The formula is the paper's. The released branch cannot be followed: its distillation term is computed without "
        "gradients, an undefined variable is logged, and its temperature of the votes has no default; it also keeps "
        "the untrained initial model among the teachers. The paper's τ and c were not available: 0.2 is 1/M, as in a "
        "re-implementation, and 0.1 is FedGKD's. The labelled samples stand for the paper's validation split."
    )
    verified: ClassVar[str] = (
        "votes and loss by hand and in float64 NumPy, c = 0 and M = 1 against others, bytes, resume"
    )
    local = VotedDistillation

    tau: float = field(default=0.2, metadata={"gt": 0, "help": "τ, temperature of the votes; 1/M for M = 5"})

    def bind(self, server: Any) -> None:
        """Start with empty buffers."""
        super().bind(server)
        self.losses: dict[str, list[float]] = {arch: [] for arch in self.students}

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the global model, the older ones, and how much each of them counts."""
        by_arch = {}
        for arch, state in self.students.items():
            older = self.history[arch][-2::-1]
            teachers = [Weights(past, arch, kind=f"teacher-{number}") for number, past in enumerate(older, 2)]
            votes = [TeacherWeights(self.votes(arch))] if self.history[arch] else []
            by_arch[arch] = Knowledge.of(Weights(state, arch), *votes, *teachers)
        return {p: by_arch[self.server.federation.archs[p]] for p in selected}

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average, and push what is new and its validation loss into the buffers."""
        before = self.students
        super().fuse(uploads)
        for arch in self.averaged_since(before):
            loss = self.validation_loss(arch, self.students[arch])
            self.losses[arch] = [*self.losses[arch], loss][-self.buffer :]
            self.distilled[arch] = {"validation_loss": loss}

    def validation_loss(self, arch: str, state: State) -> float:
        """Return a model's mean cross-entropy on the server's labelled samples; a huge one if it is not finite."""
        logits, labels = self.server.label_logits(arch, state)
        return float(F.cross_entropy(logits.double(), labels).nan_to_num(HUGE, HUGE).clamp(max=HUGE))

    def votes(self, arch: str) -> Tensor:
        """Return the weights of the teachers, the newest first, float32 [m]."""
        losses = torch.tensor(self.losses[arch][::-1], dtype=torch.float64)
        return (-losses / self.tau).softmax(0).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the validation losses."""
        return {**super().state_dict(), "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the validation losses."""
        super().load_state_dict(state)
        self.losses = {arch: list(past) for arch, past in state["losses"].items()}
