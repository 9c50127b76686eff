"""FedDF: Lin, Kong, Stich, Jaggi, Ensemble Distillation for Robust Model Fusion in Federated Learning,
NeurIPS 2020 (2006.07242), Algorithms 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from fedkd.seeds import Purpose
from fedkd.server.distiller import Distiller
from fedkd.server.ensemble import Ensemble
from fedkd.server.uploads import Upload
from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class FedDF(FedAvg):
    """Lin et al., Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020.

    Clients train as in FedAvg. The server averages within each architecture, then fine-tunes every average on
    unlabelled proxy data towards the ensemble of *all* uploaded models: KL(σ(mean logits / T) ‖ σ(student / T)),
    mean over the batch, no T² factor, T = 1, Adam with cosine annealing, gradient clip 5 as in the released code.

    The paper weights the average by examples, the released code uniformly; the paper's batch is 128, the code's
    commands use 64. ``space = "probs"`` averages probabilities; the code's third scheme, the mean of the members'
    KLs, has the same gradients (the two differ by a constant) and needs no setting of its own. With
    ``proxy.server_labels`` the best student on these is returned and distillation stops early, as in the paper
    (checked every 100 steps, patience 1,000); without them the last student is.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2006.07242"
    year: ClassVar[int] = 2020
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
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
    space: Literal["logits", "probs"] = field(default="logits", metadata={"help": "what the ensemble averages"})
    student_from: Literal["average", "previous"] = field(
        default="average",
        metadata={"help": "where the student starts: this round's average, or last round's student"},
    )
    patience: int = field(
        default=1_000,
        metadata={"ge": 1, "help": "steps without improvement on the server labels before stopping"},
    )
    drop_worst: bool = field(
        default=False,
        metadata={"help": "leave out members below 1.2 × chance on the server labels, in average and ensemble"},
    )

    def needs(self) -> frozenset[str]:
        """Dropping members needs labels on the server."""
        return self.requires | ({"server-labels"} if self.drop_worst else set())

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average within each architecture, and start the students from there."""
        previous = self.students
        if self.drop_worst:
            uploads = self.above_chance(list(uploads))
            if not uploads:  # nobody is better than chance: the round teaches nothing
                return
        super().fuse(uploads)
        if self.student_from == "previous":
            self.students = previous

    def distill(self) -> None:
        """Distil the ensemble of all members into the student of each architecture."""
        if not self.members:
            return
        server = self.server
        targets = self.ensemble().targets(server.proxy.data)
        distiller = Distiller(
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
            returns="best" if server.has_labels else "last",
            device=server.device,
            channels_last=server.channels_last,
            precision=server.scenario.system.server_precision,
        )
        for arch, state in self.students.items():
            student = server.model(arch, state)
            report = distiller.fit(
                student,
                server.proxy.data,
                targets,
                generator=self.rng(Purpose.DISTILLATION),
                validate=server.label_accuracy if server.has_labels else None,
            )
            self.students = {**self.students, arch: server.state_of(student)}
            self.distilled[arch] = asdict(report)

    def ensemble(self) -> Ensemble:
        """Return the mean of all members' logits (or probabilities)."""
        return Ensemble(self.teachers(), space=self.space, reduce="mean", temperature=self.temperature)

    def above_chance(self, uploads: list[Upload]) -> list[Upload]:
        """Return the uploads whose accuracy on the server labels is at least 1.2 / C; forget the others."""
        kept = []
        for upload, accuracy in zip(uploads, self.server.label_accuracies(uploads), strict=True):
            if accuracy >= 1.2 / self.server.federation.num_classes:
                kept.append(upload)
            else:
                self.members.remove(upload)
                self.server.emit("dropped", round=self.round, partition_id=upload.partition_id, accuracy=accuracy)
        return kept
