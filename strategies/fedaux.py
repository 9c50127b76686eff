"""FedAUX: Sattler, Korjakow, Rischke, Samek, FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning,
IEEE TNNLS 2021 (2102.02514), Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.client.local import LocalTraining
from fedkd.payloads import Knowledge, Request, SampleScores, Weights
from fedkd.privacy.certainty import fit_scorer
from fedkd.seeds import Purpose
from fedkd.server.ensemble import Ensemble
from fedkd.server.pretraining import SimCLR
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.uploads import Upload
from fedkd.students import reestimate_norms

if TYPE_CHECKING:
    from fedkd.client.student import Student

MARGIN = 1e-8  # added to every probability, so that no sample is left without a weight


class CertaintyScoring(LocalTraining):
    """FedAvg's local training; and, once, how certain it is that public samples are of the client's kind."""

    method: FedAUX
    sees_proxy = True
    actions = ("score",)

    def on_score(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Tell own samples from public negatives by a private logistic regression; score the rest of the proxy set."""
        assert student.proxy is not None
        public, method = student.proxy.data, self.method
        negatives = knowledge.get(Request)
        negatives.check(len(public))
        student.load(knowledge.get(Weights))
        if len(student.shared.travelling) < len(student.shared.initial):  # running statistics have not come along
            everything = torch.arange(len(public))
            reestimate_norms(
                student.model, public, everything, device=student.device, channels_last=student.channels_last
            )

        def features(data: Any, ids: np.ndarray) -> np.ndarray:
            return student.collect(data, ids, lambda out: (out.features,))[0].numpy()

        scorer = fit_scorer(
            features(student.data, np.asarray(student.shard.train)),
            features(public, negatives.ids.numpy()),
            penalty=method.penalty,
            epsilon=method.epsilon,
            delta=method.delta,
            objective=method.objective,
            generator=student.rng(),
        )
        rest = np.setdiff1d(np.arange(len(public)), negatives.ids.numpy())
        scores = torch.from_numpy(scorer(features(public, rest)) + MARGIN).float()
        return Knowledge.of(SampleScores(scores), num_examples=student.num_examples)


@dataclass(kw_only=True)
class FedAUX(DistillationStrategy):
    """Sattler et al., FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning, IEEE TNNLS 2021.

    Before round 1 the server pre-trains every model's body on the auxiliary (proxy) set by contrasting views of its
    samples (SimCLR). A fifth of the set are *negatives*: each client fits a logistic regression, with differential
    privacy, that tells its own samples from them by the features of the pre-trained body, and sends the probability
    s_k(x) of being of its own kind for each of the other samples. Then, in every round, clients train as in FedAvg,
    and the server distils the average towards σ(Σ_k s_k(x) z_k(x) / Σ_k s_k(x)): KL, mean over the batch, no T², one
    pass by an Adam that goes on from round to round.

    Equal scores give FedDF's mean of logits. On test data there are no scores: the ensemble in the tables is
    unweighted. A client without valid scores has no say in the ensemble, unless nobody in the round has any.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2102.02514"
    year: ClassVar[int] = 2021
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    heterogeneous: ClassVar[bool] = True
    travels_up: ClassVar[str] = "weights: 4·|θ|; once sample-scores: 4·0.8·|proxy|"
    travels_down: ClassVar[str] = "weights: 4·|θ|; once more with request: 4·0.2·|proxy| (ids of the negatives)"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "server"
    server_data: ClassVar[str] = "unlabelled proxy set"
    client_data: ClassVar[str] = "the same proxy set, once"
    differences: ClassVar[str] = (
        "The released code fits the scores to the *sum* of the losses (C = 1 / λ) with the noise that belongs to their "
        "*mean*, n times too little for its claim: the default fits the mean (C = 1 / (n λ)), preset code the sum. Its "
        "intercept is free, which the bound does not cover: here it is penalised. Features and constant are divided by "
        "√2, so that their norm is 1 at most: λ counts double against paper and code, and at the same λ, n and ε the "
        "noise in a score's logit is 1/√2 of the code's. Its two parts of the proxy set are drawn independently and "
        "may overlap: here they do not. It loads bodies pre-trained elsewhere: the settings of pre-training are "
        "assumed. Its clients keep an Adam from round to round: that is the scenario's matter, whose client.optimizer "
        "= adam starts afresh in every round, as is the average of parameters alone (models.buffers = params_only). "
        "Its teachers and evaluation run in training mode; here they do not."
    )
    verified: ClassVar[str] = (
        "scores against scikit-learn and SciPy, noise by its moments, sensitivity by replacing samples; targets in "
        "float64 NumPy; equal scores are FedDF; Adam carried = one long run; two rounds' distillation step by step; "
        "bytes; resume"
    )
    pitfalls: ClassVar[str] = (
        "most of the gain is the pre-training: report scoring = false beside it; with few samples a client the noise "
        "drowns the scores; flips in the views hurt digits; scores are spent once, at (epsilon, delta) for each client"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"code": {"objective": "sum"}}
    keeps_members: ClassVar[bool] = True
    local = CertaintyScoring

    weighting: Literal["examples", "uniform"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="uniform", metadata={"help": "weights of the average: 1 / K, or n_k / n"}
    )
    pretraining: bool = field(default=True, metadata={"help": "whether bodies are pre-trained (the variants +P)"})
    pretrain_epochs: int = field(default=100, metadata={"ge": 1, "help": "passes over the proxy set"})
    pretrain_batch_size: int = field(default=512, metadata={"ge": 2, "help": "samples a step, each in two views"})
    pretrain_lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam's learning rate of the pre-training"})
    scoring: bool = field(default=True, metadata={"help": "whether clients send scores; else all count the same"})
    negatives: float = field(
        default=0.2, metadata={"gt": 0, "lt": 1, "help": "share of the proxy set that is told from clients' samples"}
    )
    penalty: float = field(default=0.01, metadata={"gt": 0, "help": "λ of the logistic regression"})
    epsilon: float = field(default=0.1, metadata={"ge": 0, "le": 1, "help": "ε of the scores; 0 = not private"})
    delta: float = field(default=1e-5, metadata={"gt": 0, "lt": 1, "help": "δ of the scores"})
    objective: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "of the logistic regression; sum is not as private as epsilon says"}
    )
    epochs: int = field(default=1, metadata={"ge": 1, "help": "distillation passes over the proxy set a round"})
    batch_size: int = field(default=128, metadata={"ge": 1, "help": "proxy samples a step"})
    lr: float = field(default=5e-5, metadata={"gt": 0, "help": "Adam's learning rate of the distillation"})

    def bind(self, server: Any) -> None:
        """Divide the proxy set; start without scores."""
        super().bind(server)
        size = len(server.proxy)
        order = torch.from_numpy(self.rng().permutation(size))
        count = min(max(round(self.negatives * size), 1), size - 1)
        self.public, self.asked = order[:count].sort().values, order[count:].sort().values
        self.scores: dict[int, Tensor] = {}
        self.moments: dict[str, dict[str, dict[str, Tensor]]] = {}

    def prepare(self) -> None:
        """Pre-train the bodies, and ask every client for its scores."""
        server = self.server
        if self.pretraining:
            self.pretrain()
        if not self.scoring:
            return
        clients = [int(p) for p in server.federation.eligible]
        asked = {
            arch: Knowledge.of(Weights(state, arch), Request(self.public)) for arch, state in self.students.items()
        }
        replies = self.exchange(
            "query.score", {p: asked[server.federation.archs[p]] for p in clients}, check=self.check_scores
        )
        self.scores = {upload.partition_id: upload.knowledge.get(SampleScores).values.clone() for upload in replies}
        privacy = {"epsilon": self.epsilon, "delta": self.delta, "objective": self.objective}
        server.emit("scores", round=0, clients=len(self.scores), **privacy)

    def pretrain(self) -> None:
        """Pre-train the body of every architecture; heads stay as they were."""
        server = self.server
        trainer = SimCLR(
            epochs=self.pretrain_epochs,
            batch_size=self.pretrain_batch_size,
            lr=self.pretrain_lr,
            device=server.device,
            channels_last=server.channels_last,
            precision=server.scenario.system.server_precision,
        )
        for arch, state in self.students.items():
            model = server.model(arch, state)
            report = trainer.fit(model, server.proxy.data, generator=self.rng(Purpose.DISTILLATION))
            self.students = {**self.students, arch: server.state_of(model)}
            server.emit("pretrained", round=0, arch=arch, **asdict(report))

    def check_scores(self, upload: Upload) -> None:
        """Refuse scores for other samples than asked for, and such as are no probabilities."""
        upload.knowledge.get(SampleScores).check(len(self.asked), most=1 + 1e-6)

    def weighted_ensemble(self) -> Ensemble:
        """Return the ensemble for the distillation: every member weighs on every sample what its client has scored."""
        size, nobody = len(self.server.proxy), torch.zeros(len(self.asked))
        table = torch.zeros(len(self.members), size)
        for row, upload in zip(table, self.members, strict=True):
            row[self.asked] = self.scores.get(upload.partition_id, nobody)
        weights = table if self.scoring and bool(table.any()) else None
        return Ensemble(self.teachers(), space="logits", reduce="mean", weights=weights, per="sample")

    def distill(self) -> None:
        """Distil the weighted ensemble into the average of each architecture."""
        targets = self.weighted_ensemble().targets(self.server.proxy.data, ids=self.asked)
        distiller = self.distiller(
            optimizer="adam",
            lr=self.lr,
            schedule="constant",
            steps=0,
            epochs=self.epochs,
            batch_size=self.batch_size,
            clip=0.0,
            t_squared=False,
            reduction="batchmean",
            kind="kl",
            patience=0,
            returns="last",
        )
        self.distill_students(distiller, targets, self.moments)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the scores and the optimisers' moments."""
        scores = {str(p): values for p, values in self.scores.items()}
        return {**super().state_dict(), "scores": scores, "moments": self.moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state, the scores and the optimisers' moments."""
        super().load_state_dict(state)
        self.scores = {int(p): values for p, values in state["scores"].items()}
        self.moments = {arch: {k: dict(v) for k, v in names.items()} for arch, names in state["moments"].items()}
