"""FD: Jeong, Oh, Kim, Park, Bennis, Kim, Communication-Efficient On-Device Machine Learning: Federated Distillation
and Augmentation under Non-IID Private Data, 2018 (1811.11479), Algorithm 1.
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
from fedkd.payloads import ClassOutputs, Knowledge
from fedkd.server.strategy import DistillationStrategy, Predict
from fedkd.server.totals import ClassTable
from fedkd.server.uploads import Upload, sum_up

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs


class ClassMeans(LocalTraining):
    """Cross-entropy and a regulariser towards the others' mean output for the sample's label."""

    method: FD
    keeps_model = True

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in the table of the others' means; classes that nobody else has are masked."""
        classes = student.num_classes
        if "class-outputs" not in knowledge:  # round 1, or nobody has shared yet
            return {
                "means": torch.zeros(classes, classes, device=student.device),
                "present": torch.zeros(classes, device=student.device),
            }
        table = knowledge.get(ClassOutputs)
        table.check(classes, self.method.space)
        return {
            "means": table.means.to(student.device),
            "present": table.present.float().to(student.device),
        }

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy + γ·d(mean of the others for the label, output), mean over the batch, T = 1, no T²."""
        regulariser = kd(
            out.logits,
            aux["means"][batch.y],
            temperature=1.0,
            reduction="batchmean",
            t_squared=False,
            kind=self.method.distance,
            target_space=self.method.space,
            sample_weight=aux["present"][batch.y],
        )
        return {**super().loss(params, batch, out, teachers, aux), "fd": self.method.gamma * regulariser}

    def observe(self, tally: dict[str, Tensor], batch: Batch, out: Outputs) -> dict[str, Tensor]:
        """Add the outputs of a training step to the sums of their true classes."""
        values = out.logits.float().softmax(-1) if self.method.space == "probs" else out.logits.float()
        one_hot = F.one_hot(batch.y, values.shape[-1]).to(values.dtype)
        return {
            "sums": tally.get("sums", 0) + one_hot.T @ values,
            "counts": tally.get("counts", 0) + one_hot.sum(0),
        }

    def share(self, student: Student) -> Knowledge:
        """Share the mean output of each true class over the steps of this round."""
        classes = student.num_classes
        counts = student.tally.get("counts", torch.zeros(classes)).cpu()
        sums = student.tally.get("sums", torch.zeros(classes, classes)).cpu()
        means = sums / counts.clamp(min=1).unsqueeze(1)
        return Knowledge.of(ClassOutputs(means, counts, self.method.space), num_examples=student.num_examples)


@dataclass(kw_only=True)
class FD(DistillationStrategy):
    """Jeong et al., Communication-Efficient On-Device Machine Learning: Federated Distillation and Augmentation
    under Non-IID Private Data, 2018.

    Clients exchange only the mean output of each true class, C × C numbers, and regularise towards the mean of
    the *others*: F̂_{∖k,c} = Σ_{j≠k} F_{j,c} / (number of others with class c). There is no global model: the
    accuracy is the mean over clients of their own models.

    The paper's sum runs over all devices and divides by N − 1; here only clients that have the class count, so a
    missing class is masked and never averaged in as zero. A client that sits out keeps its last table on the server.
    FAug, the paper's augmentation by a GAN, is left out: it is a method of its own.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1811.11479"
    year: ClassVar[int] = 2018
    heterogeneous: ClassVar[bool] = True
    travels_up: ClassVar[str] = "class-outputs: 4·C² + 4·C (counts)"
    travels_down: ClassVar[str] = "class-outputs: 4·C² + 4·C (counts), from round 2 on"
    pitfalls: ClassVar[str] = "much weaker than FedAvg on its own; ports count from 1 or use raw logits as targets"
    shares_weights: ClassVar[bool] = False
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    differences: ClassVar[str] = (
        "No code was released. Re-implementations average logits, start counts at 1, never reset them, or keep a "
        "client's own table in its mean; the defaults follow the paper. Preset code takes FedGen's repository's "
        "logits, KL and own table in the mean, not its counts, its tracker, its averaging of absent classes, or its "
        "mean over the round's clients alone: here a client that sits out stays in the mean with its last table, under "
        "every preset. The paper divides by the number of other devices, here it is by those that have the class. "
        "γ = 1 is assumed."
    )
    verified: ClassVar[str] = (
        "loss, tables and means by hand, preset code too; γ = 0 equals local training bit for bit; bytes; resume"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "code": {
            "space": "logits",
            "distance": "kl",
            "leave_one_out": False,
        }  # of the FedGen repository's version; see `differences`
    }
    local = ClassMeans

    gamma: float = field(default=1.0, metadata={"ge": 0, "help": "γ, weight of the regulariser"})
    distance: Literal["soft_ce", "kl", "mse"] = field(
        default="soft_ce", metadata={"help": "distance of outputs; the paper's is cross-entropy"}
    )
    space: Literal["probs", "logits"] = field(default="probs", metadata={"help": "what is averaged by class"})
    leave_one_out: bool = field(default=True, metadata={"help": "whether a client's own table is left out of its mean"})

    def bind(self, server: Any) -> None:
        """Start without tables, and without a global model."""
        super().bind(server)
        self.students = {}
        self.tables: dict[int, ClassOutputs] = {}

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send each client the mean of the others' tables."""
        if not self.tables:
            return dict.fromkeys(selected, Knowledge())
        everybody = self.sums(self.tables[p] for p in sorted(self.tables))
        return {p: Knowledge.of(self.table_for(p, *everybody)) for p in selected}

    def total(self) -> ClassTable:
        """Return an empty collection of tables."""
        return ClassTable(self.server.federation.num_classes, self.space)

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Keep the latest table of every client."""
        self.tables |= sum_up(uploads, self.total()).rows

    def sums(self, tables: Iterable[ClassOutputs]) -> tuple[Tensor, Tensor]:
        """Return the sum of tables [C, C] and the number of clients that have each class [C], in float64."""
        classes = self.server.federation.num_classes
        total, owners = torch.zeros(classes, classes).double(), torch.zeros(classes).double()
        for table in tables:
            total += table.means.double() * table.present.double().unsqueeze(1)
            owners += table.present.double()
        return total, owners

    def table_for(self, partition_id: int, total: Tensor, owners: Tensor) -> ClassOutputs:
        """Return the mean table for a client, without its own contribution unless `leave_one_out` is off."""
        if self.leave_one_out and partition_id in self.tables:
            own_total, own = self.sums([self.tables[partition_id]])
            total, owners = total - own_total, owners - own
        means = total / owners.clamp(min=1).unsqueeze(1)
        means[owners == 0] = 0.0  # taking one out may leave rounding noise where nobody is left
        if self.space == "probs":
            means = means.clamp(min=0)
        return ClassOutputs(means.float(), owners.float(), self.space)

    def predictors(self) -> dict[str, Predict]:
        """Return nothing: there is no model on the server."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the clients' tables."""
        tables = {str(p): {"means": t.means, "counts": t.counts} for p, t in self.tables.items()}
        return {**super().state_dict(), "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the clients' tables."""
        super().load_state_dict(state)
        self.tables = {int(p): ClassOutputs(t["means"], t["counts"], self.space) for p, t in state["tables"].items()}
