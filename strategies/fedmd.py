"""FedMD: Li, Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019 (1910.03581)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from fedkd.client import trainer
from fedkd.client.exchange import OutputSharing
from fedkd.client.local import Aux
from fedkd.client.stopping import EarlyStop, accuracy
from fedkd.losses.response import cross_entropy, kd
from fedkd.payloads import Knowledge, ProxyOutputs, Request
from fedkd.seeds import Purpose
from fedkd.server.exchange import OutputExchange, stratified
from fedkd.server.uploads import Upload

if TYPE_CHECKING:
    from fedkd.client.student import Student


READY = "pretrained"  # in the memory of clients that are


def absolute_error(logits: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of logits over samples and classes, as Keras has it: the paper's digest."""
    return kd(logits, target, temperature=1.0, reduction="mean_all", t_squared=False, kind="mae")


class Revisiting(OutputSharing):
    """Learns from public labels once; then, in every round, digests the consensus and revisits its own data."""

    method: FedMD
    actions = ("pretrain", "logits")

    def on_pretrain(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Train on the labelled public set, then on own data, each until it stops helping (transfer learning)."""
        method, proxy = self.method, student.proxy
        assert proxy is not None
        stop = partial(EarlyStop, min_delta=method.min_delta)
        order = torch.from_numpy(student.rng(Purpose.METHOD_CLIENT).permutation(len(proxy)))
        watched, taught = order.split([len(proxy) // 10, len(proxy) - len(proxy) // 10])
        watched = watched if len(watched) else taught
        trainer.digest(
            student,
            taught,
            torch.from_numpy(proxy.labels)[taught],
            cross_entropy,
            epochs=method.public_epochs,
            batch_size=method.public_batch_size,
            name="public",
            stop=stop(lambda: accuracy(student, proxy.data, watched), patience=method.public_patience),
        )
        own = student.shard.validation if len(student.shard.validation) else student.shard.train
        trainer.learn(
            student,
            self,
            {},
            epochs=method.transfer_epochs,
            batch_size=method.transfer_batch_size,
            stop=stop(lambda: accuracy(student, student.data, own), patience=method.transfer_patience),
        )
        student.memory[READY] = torch.ones(1)
        return Knowledge(num_examples=student.num_examples)

    def on_logits(self, student: Student, knowledge: Knowledge) -> Knowledge:
        """Communicate: logits on this round's alignment set; of a client that missed its pre-training, after that."""
        if READY not in student.memory:
            self.on_pretrain(student, knowledge)
        return super().share(student)

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Digest: approach the consensus on the alignment set."""
        consensus = self.labels(student, knowledge)
        if consensus is not None:
            trainer.digest(
                student,
                consensus.ids,
                consensus.values,
                absolute_error,
                epochs=self.method.digest_epochs,
                batch_size=self.method.digest_batch_size,
            )
        return {}

    def share(self, student: Student) -> Knowledge:
        """Share nothing: logits are asked for at the beginning of the next round."""
        return Knowledge(num_examples=student.num_examples)


@dataclass(kw_only=True)
class FedMD(OutputExchange):
    """Li & Wang, FedMD: Heterogenous Federated Learning via Model Distillation, 2019.

    Clients with models of their own agree on logits. Before round 1 everybody trains on a labelled public set and then
    on its own data; who cannot be reached then does so when it is first asked for logits. In a round the server draws
    an alignment set, clients *communicate* their logits on it, the server *aggregates* them to the mean and
    *distributes* that, clients *digest* it by the mean absolute error of logits and *revisit* their own data by
    cross-entropy (the scenario's epochs and batches). There is no global model: accuracy is the mean over clients of
    their own models on the *global* test set; in the authors' code, too, all parties have one test set in common.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1910.03581"
    year: ClassVar[int] = 2019
    requires: ClassVar[frozenset[str]] = frozenset({"proxy", "proxy-labels"})
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "clients"
    server_data: ClassVar[str] = "labels of the proxy set, to draw from every class its share"
    client_data: ClassVar[str] = "the proxy set; its labels once, before round 1"
    travels_up: ClassVar[str] = "proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids)"
    travels_down: ClassVar[str] = (
        "request, unless for all samples: 4·|P_r| (ids); proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids)"
    )
    pitfalls: ClassVar[str] = (
        "raw logits let models with large logits dominate the mean; ports replace the absolute error by MSE or KL; "
        "much of the accuracy is the pre-training's"
    )
    differences: ClassVar[str] = (
        "Paper and code agree on the round. Defaults are those of the code's balanced configurations, whose Adam 1e-3 "
        "and, for revisiting, 4 epochs of batches of 5 (FEMNIST: 2) over 20 rounds belong into the scenario. Of the "
        "imbalanced ones FEMNIST has 4 epochs of batches of 5; CIFAR has 10 of batches of 10, a digest in batches of "
        "128, and 13 rounds. min_delta is one for both phases, as in the code on FEMNIST; its public phase on CIFAR "
        "has 0.005, its transfer training always 0.001. The code stops transfer training by the accuracy on *test* "
        "data; here it is that on the client's validation split or, without one, on its training samples, and the "
        "public phase is watched on a tenth of the public set. Its clients' Adams live on between rounds; here they "
        "are fresh in every round. There public and private classes differ and the output layer covers both; here they "
        "are the same task's."
    )
    verified: ClassVar[str] = (
        "loss, consensus, pre-training and order of a round by hand, in several batches and passes; robust consensus "
        "against NumPy and SciPy; stratified draw; early stopping; bytes; resume; three models"
    )
    space: ClassVar[Literal["logits", "probs"]] = "logits"
    local = Revisiting

    align: int = field(
        default=5_000, metadata={"ge": 1, "help": "|P_r|, public samples a round; at most the proxy set"}
    )
    digest_epochs: int = field(default=1, metadata={"ge": 1, "help": "passes over the alignment set"})
    digest_batch_size: int = field(default=256, metadata={"ge": 1, "help": "public samples a step of the digest"})
    public_epochs: int = field(default=20, metadata={"ge": 1, "help": "passes over the public labels, at most"})
    public_batch_size: int = field(default=128, metadata={"ge": 1, "help": "public samples a step before round 1"})
    public_patience: int = field(
        default=3, metadata={"ge": 1, "help": "passes without a better accuracy before the public phase ends"}
    )
    transfer_epochs: int = field(default=25, metadata={"ge": 1, "help": "epochs on own data before round 1, at most"})
    transfer_batch_size: int = field(default=32, metadata={"ge": 1, "help": "own samples a step before round 1"})
    transfer_patience: int = field(
        default=10, metadata={"ge": 1, "help": "epochs without a better accuracy before transfer training ends"}
    )
    min_delta: float = field(
        default=1e-3, metadata={"ge": 0, "help": "rise in accuracy that counts as better, in both phases"}
    )

    def prepare(self) -> None:
        """Let every client train on the public labels and on its own data."""
        everybody = dict.fromkeys(self.server.federation.eligible.tolist(), Knowledge())
        for _ in self.exchange("train.pretrain", everybody, check=self.check):
            pass

    def draw(self) -> Tensor:
        """Return this round's alignment set, with the public set's shares of classes."""
        proxy = self.server.proxy
        return torch.from_numpy(stratified(proxy.labels, self.align, self.rng(Purpose.PROXY_SUBSET)))

    def train(self, selected: list[int], keep: bool) -> None:
        """Communicate and aggregate; then distribute, and let clients digest and revisit."""
        self.asked = self.draw()
        whole = len(self.asked) == len(self.server.proxy)
        request = Knowledge() if whole else Knowledge.of(Request(self.asked))
        consensus = self.collect("query.logits", dict.fromkeys(selected, request))
        self.labels = ProxyOutputs(self.asked, consensus.float(), "logits")
        super().train(selected, keep)

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Distribute the consensus."""
        return dict.fromkeys(selected, Knowledge() if self.labels is None else Knowledge.of(self.labels))

    def check(self, upload: Upload) -> None:
        """Refuse nothing: after training clients only report."""

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Hear from the clients; there is nothing to fuse."""
        for _ in uploads:
            pass
