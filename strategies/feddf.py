"""FedDF: Lin, Kong, Stich, Jaggi, Ensemble Distillation for Robust Model Fusion in Federated Learning,
NeurIPS 2020 (2006.07242), Algorithms 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fedkd.server.ensemble import Ensemble
from fedkd.server.uploads import Upload
from fedkd.server.weighting import above_outliers
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedDF(FedAvg):
    """Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020.

    Clients train as in FedAvg. The server averages within each architecture, then fine-tunes every average on
    unlabelled proxy data towards the ensemble of *all* uploaded models: KL(σ(mean logits / T) ‖ σ(student / T)),
    mean over the batch, no T² factor, T = 1, Adam with cosine annealing, gradient clip 5 as in the released code.

    ``space = "probs"`` averages probabilities. The code's third scheme, the mean of the members' own KLs, is
    ``space = "losses"``: Σ_k KL(p_k ‖ q) / K = KL(p̄ ‖ q) + (H(p̄) - Σ_k H(p_k) / K), whose bracket does not depend on
    the student, so it trains the very students of ``probs``; the losses reported are without the bracket.

    With ``proxy.server_labels`` the best student on these is returned and distillation stops early, as in the paper
    (checked every 100 steps, patience 1,000); without them the last student is.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2006.07242"
    year: ClassVar[int] = 2020
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "server"
    server_data: ClassVar[str] = "unlabelled proxy set; a few labels for early stopping and dropping members"
    differences: ClassVar[str] = (
        "The paper weights the average by examples and takes batches of 128, the released code 1 / K and 64: the "
        "defaults are the paper's. The code's default scheme is the mean of KLs; its commands and the paper take mean "
        "logits. Dropping members, and the un-distilled average where it is better, are options of the code that are "
        "off there as here; the code drops outliers among teachers alone, here they are left out of the average too."
    )
    verified: ClassVar[str] = (
        "targets, loss, filters and the average of those who pass them by hand and in float64 NumPy; a distillation "
        "step by step; K = 1 has loss 0; bytes; resume"
    )
    pitfalls: ClassVar[str] = (
        "start the student from the average; without norm layers drop the worst members; "
        "expect the gap to FedAvg to shrink in late rounds"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"code": {"weighting": "uniform", "batch_size": 64}}
    keeps_members: ClassVar[bool] = True

    steps: int = field(default=10_000, metadata={"ge": 1, "help": "distillation steps a round, at most"})
    batch_size: int = field(default=128, metadata={"ge": 1, "help": "proxy samples a step"})
    lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam's learning rate, annealed by a cosine"})
    temperature: float = field(default=1.0, metadata={"gt": 0, "help": "softmax temperature"})
    space: Literal["logits", "probs", "losses"] = field(
        default="logits", metadata={"help": "what is averaged over members; losses trains the students of probs"}
    )
    reduce: Literal["mean", "median", "trimmed", "geometric"] = field(
        default="mean", metadata={"help": "how members become one teacher; beside the mean, robust against attackers"}
    )
    student_from: Literal["average", "previous"] = field(
        default="average",
        metadata={"help": "where the student starts: this round's average, or last round's student"},
    )
    patience: int = field(
        default=1_000,
        metadata={"ge": 1, "help": "steps without improvement on the server labels before stopping"},
    )
    compare_start: bool = field(
        default=False,
        metadata={"help": "keep the student as it started where no later one is as good on the server labels"},
    )
    drop_worst: bool = field(
        default=False,
        metadata={"help": "leave out members below 1.2 × chance on the server labels, in average and ensemble"},
    )
    drop_outliers: bool = field(
        default=False,
        metadata={"help": "the same for accuracies below mean - 1.5 sd of all but the best, if none is below chance"},
    )

    def needs(self) -> frozenset[str]:
        """Judging members or the average needs labels on the server."""
        judges = self.drop_worst or self.drop_outliers or self.compare_start
        return self.requires | ({"server-labels"} if judges else set())

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average within each architecture, and start the students from there."""
        previous = self.students
        if self.drop_worst or self.drop_outliers:
            uploads = self.good_enough(list(uploads))
            if not uploads:  # nobody is better than chance: the round teaches nothing
                return
        super().fuse(uploads)
        if self.student_from == "previous":
            self.students = previous

    def distill(self) -> None:
        """Distil the ensemble of all members into the student of each architecture."""
        if not self.members:
            return
        distiller = self.distiller(
            optimizer="adam",
            lr=self.lr,
            schedule="cosine",
            steps=self.steps,
            batch_size=self.batch_size,
            clip=5.0,
            temperature=self.temperature,
            t_squared=False,
            reduction="batchmean",
            kind="kl",
            check_every=100,
            patience=self.patience,
            returns="best" if self.server.has_labels else "last",
            compare_start=self.compare_start,
        )
        self.distill_students(distiller, self.ensemble().targets(self.server.proxy.data))

    def ensemble(self) -> Ensemble:
        """Return the mean (or another reduce) of all members' logits (or probabilities)."""
        space = "logits" if self.space == "logits" else "probs"
        return Ensemble(self.teachers(), space=space, reduce=self.reduce, temperature=self.temperature)

    def good_enough(self, uploads: list[Upload]) -> list[Upload]:
        """Return the uploads that are good enough on the server labels; forget the others.

        At least 1.2 / C must be right; or, of a round in which all are, mean - 1.5 standard deviations.
        """
        accuracies = list(self.server.label_accuracies(uploads))
        chance = 1.2 / self.server.federation.num_classes
        kept = [not self.drop_worst or accuracy >= chance for accuracy in accuracies]
        if self.drop_outliers and min(accuracies, default=0.0) >= chance:
            kept = above_outliers(accuracies)
        for upload, accuracy, keep in zip(uploads, accuracies, kept, strict=True):
            if not keep:
                self.members.remove(upload)
                self.server.emit("dropped", round=self.round, partition_id=upload.partition_id, accuracy=accuracy)
        return [upload for upload, keep in zip(uploads, kept, strict=True) if keep]
