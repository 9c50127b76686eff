"""Cronus: Chang, Shejwalkar, Shokri, Houmansadr, Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box
Knowledge Transfer, 2019 (1912.11279).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fedkd.client import trainer
from fedkd.client.exchange import JointTraining
from fedkd.client.local import Aux
from fedkd.payloads import Knowledge, ProxyOutputs
from fedkd.server.exchange import JointExchange

if TYPE_CHECKING:
    from fedkd.client.student import Student


READY = "started"  # in the memory of clients that have trained alone


class CollaborativeTraining(JointTraining):
    """Trains alone before round 1; then on its own samples and the public ones with the robust mean's labels."""

    method: Cronus
    actions = ("initial",)

    def on_initial(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Train on own data alone; share outputs on the public samples of the first collaboration."""
        self.start(student)
        return self.share(student)

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in the server's labels; a client that missed the initial phase trains alone before."""
        if READY not in student.memory and not student.max_steps:  # what is measured is a round like all others
            self.start(student)
        return super().absorb(student, knowledge)

    def start(self, student: Student) -> None:
        """Train on own data alone."""
        trainer.learn(student, self, {}, epochs=self.method.initial_epochs)
        student.memory[READY] = torch.ones(1)


@dataclass(kw_only=True)
class Cronus(JointExchange):
    """Chang et al., Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge Transfer, 2019.

    Clients with models of their own first train alone (before round 1, or when they first can). Then, again and again,
    they share probabilities on an unlabelled public set, the server makes a robust mean of them for each sample, and
    clients train on their own samples and the public ones with these soft labels, shuffled into one set. As outputs
    have few dimensions, a robust mean can be close to that of the honest clients. There is no global model: the
    accuracy is the mean over clients.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1912.11279"
    year: ClassVar[int] = 2019
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    travels_up: ClassVar[str] = "proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids), and once before round 1"
    travels_down: ClassVar[str] = (
        "proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids); request, unless for all samples: 4·|P_r| (ids), and once before "
        "round 1"
    )
    pitfalls: ClassVar[str] = "a robust mean needs 20 to 30 clients; on skewed data it also leaves out honest experts"
    differences: ClassVar[str] = (
        "No code, and the paper's filter and epochs were not available. Assumed: the spectral filter of Diakonikolas "
        "et al. by sample in its deterministic form, which stops when 2 ε of the weight is gone (their threshold needs "
        "the variance of honest outputs); soft cross-entropy at T = 1; own and public samples with equal weights; all "
        "public samples in every round; 10 initial epochs. A round begins with labels and ends with new outputs; the "
        "first outputs are shared at the end of the initial phase, so the order is the paper's."
    )
    verified: ClassVar[str] = (
        "filter against a slow one and on outliers; trimmed share 0 = mean; joint loss by hand; bytes; resume; attacks"
    )
    local = CollaborativeTraining

    reduce: Literal["mean", "median", "trimmed", "geometric", "spectral"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="spectral", metadata={"help": "robust mean of the clients' outputs"}
    )
    initial_epochs: int = field(default=10, metadata={"ge": 1, "help": "epochs on own data before round 1"})

    def prepare(self) -> None:
        """Let every client train alone, and make the first labels of what they share."""
        everybody = self.broadcast(self.server.federation.eligible.tolist())
        labels = self.collect("train.initial", everybody)
        self.labels = ProxyOutputs(self.asked, labels.float(), self.space)
