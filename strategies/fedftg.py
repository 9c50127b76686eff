"""FedFTG: Zhang, Shen, Ding, Tao, Duan, Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID
Federated Learning, CVPR 2022 (2203.09249), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.client.local import LocalTraining
from fedkd.losses.response import kd
from fedkd.models.generators import Generator, build_generator
from fedkd.optimizers import SGD, Adam
from fedkd.payloads import Knowledge, LabelCounts
from fedkd.seeds import Purpose, torch_seed
from fedkd.server.generation import Alternation, Generated, Teachers, diversity
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.totals import LabelTable, Several
from fedkd.server.uploads import Upload, sum_up
from fedkd.server.weighting import by_class

if TYPE_CHECKING:
    from fedkd.client.student import Student


class CountedLabels(LocalTraining):
    """FedAvg's local training; clients also say how many samples of each class they have."""

    def share(self, student: Student) -> Knowledge:
        """Share weights and label counts."""
        labels = np.asarray(student.data.labels)[np.asarray(student.shard.train)]
        counts = torch.from_numpy(np.bincount(labels, minlength=student.num_classes))
        return Knowledge.of(student.weights(copy=False), LabelCounts(counts), num_examples=student.num_examples)


@dataclass(kw_only=True)
class FedFTG(DistillationStrategy):
    """Zhang et al., Fine-tuning Global Model via Data-Free Knowledge Distillation, CVPR 2022.

    No proxy set: a generator G makes samples on which the average and the clients disagree, and the average learns to
    agree. Ten times a round (`iterations`), labels y are drawn like the selected clients' own, and noise from N(0, I).
    With the class-level weights α_{k,y} = n_{k,y} / Σ_j n_{j,y}, G takes a step of Adam for each client k on
    -α_{k,y} · disagreement + λ_cls · α_{k,y} · CE(client k, y) + λ_dis · diversity / K; then the average takes five
    steps (`student_steps`) of SGD on KL(Σ_k α_{k,y} σ(z_k) ‖ σ(student)).

    G lives on between rounds; both learning rates fall by `lr_decay` a round. Teachers and average are in evaluation
    mode for G, the average in training mode for its own steps. Client models are run on the server, as gradients
    go through them: one more forward pass of each client in every step.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2203.09249"
    year: ClassVar[int] = 2022
    travels_up: ClassVar[str] = "weights: 4·|θ|; label-counts: 4·C"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "server"
    server_data: ClassVar[str] = "none: a generator; the clients' label counts"
    differences: ClassVar[str] = (
        "Disagreement is a KL in the paper; assumed: KL(σ(client) ‖ σ(average)), with gradients through both models. "
        "In the released code it is the mean absolute gap of logits, the client's taken as fixed. The code multiplies "
        "a batch's mean CE by its mean α. The defaults are the paper's, preset code has both. The mean of the "
        "average's loss is over samples and classes, 1/C of that over samples, as in the code, with which its learning "
        "rate was chosen. Labels are drawn, where the code takes exact shares in random order. The distances of the "
        "diversity term are the code's means per number: the paper's norms would make it vanish. Local schedules are "
        "the scenario's."
    )
    verified: ClassVar[str] = (
        "terms and weights by hand and in float64 NumPy; two iterations of generator and average step by step; equal "
        "models disagree by 0; label draws by their frequencies; bytes; resume"
    )
    pitfalls: ClassVar[str] = (
        "label counts disclose more than FedAvg does; no text; BatchNorm's statistics move to the generated samples; "
        "server work grows with the number of selected clients"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"code": {"disagreement": "l1", "weighted": "means"}}
    keeps_members: ClassVar[bool] = True
    local = CountedLabels

    iterations: int = field(default=10, metadata={"ge": 0, "help": "alternations of generator and average a round"})
    student_steps: int = field(default=5, metadata={"ge": 1, "help": "steps of the average in each"})
    batch_size: int = field(default=50, metadata={"ge": 2, "help": "samples that are generated at a time"})
    noise: int = field(default=100, metadata={"ge": 1, "help": "numbers a sample is made of; 256 for CIFAR-100"})
    width: int = field(default=64, metadata={"ge": 1, "help": "channels (units) of the generator"})
    generator_lr: float = field(default=0.01, metadata={"gt": 0, "help": "Adam's learning rate of the generator"})
    lr: float = field(default=0.1, metadata={"gt": 0, "help": "SGD's learning rate of the average"})
    weight_decay: float = field(default=1e-3, metadata={"ge": 0, "help": "L2 weight decay of the average"})
    lr_decay: float = field(default=0.998, metadata={"gt": 0, "le": 1, "help": "factor on both rates per round"})
    lambda_cls: float = field(default=1.0, metadata={"ge": 0, "help": "weight of the classification term"})
    lambda_dis: float = field(default=1.0, metadata={"ge": 0, "help": "weight of the diversity term"})
    disagreement: Literal["kl", "l1"] = field(default="kl", metadata={"help": "of average and client"})
    weighted: Literal["samples", "means"] = field(
        default="samples", metadata={"help": "CE weighted sample by sample, or its mean by the mean weight"}
    )
    reduction: Literal["batchmean", "mean_all"] = field(
        default="mean_all", metadata={"help": "mean of the average's loss over samples, or samples and classes"}
    )

    def bind(self, server: Any) -> None:
        """Start with a random generator."""
        super().bind(server)
        dataset = server.federation.dataset
        self.generator: Generator = build_generator(
            dataset.kind,
            dataset.input_shape,
            dataset.num_classes,
            noise=self.noise,
            width=self.width,
            seed=torch_seed(server.seed, Purpose.METHOD_SERVER),
        ).to(server.device)
        self.counts: dict[int, Tensor] = {}

    def total(self) -> Several:
        """Sum weights as FedAvg does, and keep the label counts."""
        return Several(weights=super().total(), labels=LabelTable(self.server.federation.num_classes))

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average the weights; keep the label counts."""
        total = sum_up(uploads, self.total())
        self.students = {**self.students, **total.parts["weights"].result()}
        self.counts = total.parts["labels"].rows

    def distill(self) -> None:
        """Fine-tune the average on generated samples, generator and average in turn."""
        server, decay = self.server, self.lr_decay ** (self.round - 1)
        [(arch, state)] = self.students.items()
        # Before the average is loaded: uploads without running statistics are completed in the same module.
        teachers = Teachers(server, self.members)
        student = server.model(arch, state)
        counts = torch.stack([self.counts[member.partition_id] for member in self.members])
        turns = Alternation(
            generator=self.generator,
            student=student,
            teachers=teachers,
            counts=counts,
            alpha=by_class(counts),
            generator_loss=lambda batch: torch.stack(list(self.terms(batch, len(counts)).values())).sum(),
            student_loss=self.student_loss,
            tune=Adam(self.generator.parameters(), self.generator_lr * decay),
            descend=SGD(student.parameters(), self.lr * decay, weight_decay=self.weight_decay),
        )
        losses = turns.run(self.iterations, self.student_steps, self.batch_size, self.rng(), server.device)
        self.students = {arch: server.state_of(student)}
        self.distilled[arch] = {"steps": len(losses), "loss_first": [*losses, 0.0][0], "loss_last": [0.0, *losses][-1]}

    def terms(self, batch: Generated, clients: int) -> dict[str, Tensor]:
        """Return the terms that the generator minimises for one of the clients."""
        as_paper = self.disagreement == "kl"
        gap = kd(
            batch.student,
            batch.teacher if as_paper else batch.teacher.detach(),
            temperature=1.0,
            t_squared=False,
            kind="kl" if as_paper else "mae",
            reduction="batchmean" if as_paper else "mean_all",
            sample_weight=batch.weight,
        )
        ce = F.cross_entropy(batch.teacher, batch.y, reduction="none")
        fit = (ce * batch.weight).mean() if self.weighted == "samples" else ce.mean() * batch.weight.mean()
        return {
            "disagreement": -gap,
            "classification": self.lambda_cls * fit,
            "diversity": self.lambda_dis * diversity(batch.noise, batch.x) / clients,
        }

    def student_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return KL(target ‖ student), T = 1, for a target of probabilities."""
        options: Any = {"temperature": 1.0, "t_squared": False, "target_space": "probs", "kind": "kl"}
        return kd(logits, target, reduction=self.reduction, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the generator."""
        return {**super().state_dict(), "generator": dict(self.generator.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the generator."""
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
