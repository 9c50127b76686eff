"""FedBE: Chen, Chao, FedBE: Making Bayesian Model Ensemble Applicable to Federated Learning, ICLR 2021 (2009.01974),
Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fedkd.payloads import State, Weights
from fedkd.server.compute import ComputedMember
from fedkd.server.ensemble import Ensemble
from fedkd.server.posterior import dirichlet_mixtures, fit_gaussian, fit_steps
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.transforms import Power
from fedkd.server.uploads import Upload


@dataclass(kw_only=True)
class FedBE(DistillationStrategy):
    """Chen & Chao, FedBE: Making Bayesian Model Ensemble Applicable to Federated Learning, ICLR 2021.

    Clients train as in FedAvg. The server takes their models for samples of a posterior over global models, fits a
    distribution to them and draws M more. Teachers are the average w̄, the M samples and the clients; their mean
    *probabilities*, sharpened to p² / Σ p², are the labels of the proxy set. The student starts at w̄, descends
    KL(p ‖ σ(student)) by SGD, and the mean of its weights along the way (SWA) is the next global model, its BatchNorm
    statistics estimated afresh on the proxy set.

    ``gaussian``: of every weight, N(Σ_k p_k w_k, Σ_k p_k (w_k - w̄)²) with p_k = n_k / n. ``dirichlet``:
    Σ_k γ_k p_k w_k / Σ_k γ_k p_k with γ ~ Dir(α). ``steps``: the released code's Gaussian, of the directions of the
    clients' steps, tensor by tensor, with a tenth of their standard deviation (see `fedkd.server.posterior`).
    Samples run on the workers, as uploaded models do.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2009.01974"
    year: ClassVar[int] = 2021
    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "server"
    server_data: ClassVar[str] = "unlabelled proxy set"
    differences: ClassVar[str] = (
        "Paper: a cyclical learning rate, 1e-3 → 4e-4, for SWA; code: constant. The code draws from a Gaussian of "
        "normalised steps (sampling = steps); the paper's Gaussian is read as one of the weights themselves. Models of "
        "both Gaussians have the mean running statistics, as a sampled variance might be negative: the code samples "
        "these too. Its Dirichlet mixtures weigh clients by γ alone, without n_k, and its clients are teachers on "
        "request only (--use_client): both are here as in the paper. Its SWA takes snapshots after swa_start, at "
        "multiples of 25, the first one at step 525; here the first is at swa_start, step 500, in preset code as well. "
        "The KL is a mean over samples and classes, as in the code, with which the learning rate was chosen. Assumed: "
        "cycles as long as the distance of snapshots, ending at them; mixtures mix running statistics by γ p_k, too. "
        "Local schedules are the scenario's."
    )
    verified: ClassVar[str] = (
        "samplers by hand, in float64 NumPy and by their moments; targets and SWA by hand; a distillation with both "
        "schedules step by step; clients alone without sharpening have FedDF's targets of probabilities; bytes"
    )
    pitfalls: ClassVar[str] = (
        "ports differ in teachers, samples and reduction, and their results are not comparable; "
        "with fewer steps than swa_start there are no snapshots, and the last student is returned"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"code": {"sampling": "steps", "schedule": "constant"}}
    keeps_members: ClassVar[bool] = True

    weighting: Literal["examples", "uniform"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="examples", metadata={"help": "p_k in average and distribution: n_k / n, or 1 / K"}
    )
    samples: int = field(default=10, metadata={"ge": 0, "help": "M, models drawn from the distribution"})
    sampling: Literal["gaussian", "dirichlet", "steps"] = field(
        default="gaussian", metadata={"help": "the distribution; steps is the released code's Gaussian"}
    )
    alpha: float = field(default=1.0, metadata={"gt": 0, "help": "concentration of the Dirichlet distribution"})
    with_average: bool = field(default=True, metadata={"help": "whether the average is a teacher"})
    with_clients: bool = field(default=True, metadata={"help": "whether the clients' models are teachers"})
    exponent: float = field(default=2.0, metadata={"gt": 0, "help": "sharpening of the mean probabilities; 1 = none"})
    epochs: int = field(default=20, metadata={"ge": 1, "help": "passes over the proxy set"})
    batch_size: int = field(default=128, metadata={"ge": 1, "help": "proxy samples a step"})
    lr: float = field(default=1e-3, metadata={"gt": 0, "help": "SGD's learning rate, with momentum 0.9, decay 1e-5"})
    lr_low: float = field(default=4e-4, metadata={"ge": 0, "help": "learning rate at the end of a cycle"})
    schedule: Literal["cyclic", "constant"] = field(default="cyclic", metadata={"help": "of the learning rate"})
    reduction: Literal["mean_all", "batchmean"] = field(
        default="mean_all", metadata={"help": "mean of the KL over samples and classes, or over samples"}
    )
    swa_start: int = field(default=500, metadata={"ge": 0, "help": "steps before the first snapshot"})
    swa_every: int = field(default=25, metadata={"ge": 1, "help": "steps between snapshots"})

    def validate(self) -> None:
        """Refuse an ensemble of nobody."""
        if not (self.samples or self.with_average or self.with_clients):
            raise ValueError("there are no teachers: set samples, with_average or with_clients")

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average the clients, and add the average and the sampled models to the teachers."""
        [(arch, start)] = self.students.items()
        super().fuse(uploads)
        states = [self.students[arch]] if self.with_average else []
        self.drawn = [self.server.compute.member(Weights(state, arch)) for state in [*states, *self.sample(start)]]

    def sample(self, start: State) -> list[State]:
        """Return M models drawn from a distribution fitted to this round's uploads, which began at `start`."""
        if not self.samples:
            return []
        rng = self.rng()
        states = (upload.state for upload in self.members)
        weights = [upload.num_examples if self.weighting == "examples" else 1 for upload in self.members]
        if self.sampling == "dirichlet":
            return dirichlet_mixtures(states, weights, self.samples, rng, alpha=self.alpha)
        names = {name for name, _ in self.server.model(self.members[0].arch).named_parameters()}
        names &= start.keys()
        fit = fit_gaussian(states, weights, names) if self.sampling == "gaussian" else fit_steps(states, start, names)
        noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return [fit.sample(noise) for _ in range(self.samples)]

    def teachers(self) -> list[ComputedMember]:
        """Return the average, the sampled models and the clients."""
        return [*self.drawn, *(super().teachers() if self.with_clients else [])]

    def ensemble(self) -> Ensemble:
        """Return the sharpened mean of all teachers' probabilities."""
        return Ensemble(self.teachers(), space="probs", reduce="mean", transform=Power(self.exponent))

    def distill(self) -> None:
        """Distil the ensemble into the average, and take the mean of the weights along the way."""
        distiller = self.distiller(
            optimizer="sgd",
            lr=self.lr,
            momentum=0.9,
            weight_decay=1e-5,
            schedule=self.schedule,
            lr_low=self.lr_low,
            cycle=self.swa_every,
            steps=0,
            epochs=self.epochs,
            batch_size=self.batch_size,
            clip=0.0,
            t_squared=False,
            reduction=self.reduction,
            kind="kl",
            patience=0,
            returns="swa",
            swa_start=self.swa_start,
            swa_every=self.swa_every,
            norm_buffers="reestimate",
        )
        self.distill_students(distiller, self.ensemble().targets(self.server.proxy.data))
