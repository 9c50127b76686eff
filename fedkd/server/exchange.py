"""Server half of methods whose clients own their models and exchange outputs on the proxy set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.payloads import Knowledge, ProxyOutputs, Request, Weights
from fedkd.seeds import Purpose
from fedkd.server.ensemble import Ensemble
from fedkd.server.members import StoredMember
from fedkd.server.reduces import Reduce, spectral, trimmed
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.targets import Targets
from fedkd.server.totals import OutputMeans, Total
from fedkd.server.uploads import Upload, Uploads, sum_up


@dataclass(kw_only=True)
class OutputExchange(DistillationStrategy):
    """Base of methods that exchange outputs on the proxy set; reduces the clients' outputs to one for each sample.

    In a round the server sends its labels of the last one, ``self.labels``, and asks for outputs on the proxy samples
    `draw`; clients learn and answer (`fedkd.client.exchange`); `fuse` makes the next labels of the answers.
    """

    reduce: Literal["mean", "median", "trimmed", "geometric", "spectral"] = field(
        default="mean", metadata={"help": "how clients' outputs become one: the mean, or a robust middle of them"}
    )
    corrupted: float = field(
        default=0.2,
        metadata={
            "ge": 0,
            "lt": 0.5,
            "help": "share of the clients that trimmed leaves out at each end, and that spectral holds for corrupted",
        },
    )

    requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
    heterogeneous: ClassVar[bool] = True
    client_data: ClassVar[str] = "the proxy set, unlabelled"
    shares_weights: ClassVar[bool] = False

    space: ClassVar[Literal["logits", "probs"]] = "probs"
    """Space of the outputs that clients share, and of the server's labels."""

    owns_model: ClassVar[bool] = False
    """Whether the server has a model of its own, of the architecture ``models.server``."""

    def bind(self, server: Any) -> None:
        """Start without labels."""
        super().bind(server)
        if not self.owns_model:
            self.students = {}
        self.labels: ProxyOutputs | None = None
        self.asked = torch.empty(0, dtype=torch.int64)

    def draw(self) -> Tensor:
        """Return the proxy samples of this round, int64 [n], ascending. Default: all."""
        return torch.arange(len(self.server.proxy))

    def subset(self, size: int) -> Tensor:
        """Return so many proxy samples at random, or all if there are fewer, int64 [n], ascending."""
        everything = len(self.server.proxy)
        chosen = self.rng(Purpose.PROXY_SUBSET).choice(everything, min(size, everything), replace=False)
        return torch.from_numpy(np.sort(chosen))

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the labels, if there are any yet, and ask for outputs; of samples that are not all of them, by id."""
        self.asked = self.draw()
        payloads: list[Any] = [Request(self.asked)] if len(self.asked) < len(self.server.proxy) else []
        if self.labels is not None:
            payloads.append(self.labels)
        return dict.fromkeys(selected, Knowledge.of(*payloads))

    def total(self) -> Total:
        """Sum outputs; refuse those for other samples, of another size or space, and what is not finite."""
        return OutputMeans(self.asked, self.server.federation.num_classes, self.space)

    def reduced(self, uploads: Iterable[Upload]) -> Tensor:
        """Return one output for each of this round's samples, [n, C]: of a mean, workers make the sums."""
        if self.reduce != "mean":
            return self.reduced_outputs([upload.knowledge.get(ProxyOutputs).values for upload in uploads])
        total = sum_up(uploads, self.total())
        assert isinstance(total, OutputMeans)
        return total.result()

    def reduced_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return one output for each of this round's samples, float32 [n, C], of those of each client."""
        robust: dict[str, Reduce] = {"trimmed": trimmed(self.corrupted), "spectral": spectral(self.corrupted)}
        members = [StoredMember(self.asked, values, self.space) for values in outputs]
        ensemble = Ensemble(members, space=self.space, reduce=robust.get(self.reduce, self.reduce))
        return ensemble.targets(ids=self.asked).values

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Make what the outputs are reduced to the next labels."""
        self.labels = ProxyOutputs(self.asked, self.reduced(uploads).float(), self.space)

    def collect(self, action: str, knowledge: Mapping[int, Knowledge]) -> Tensor:
        """Return the reduced outputs that clients answer with in a further exchange of the round, [n, C].

        Parameters
        ----------
        action : str
            Flower message type, see `exchange`.
        knowledge : mapping of int to Knowledge
            What each client gets, by partition id.

        Raises
        ------
        TooFewError
            Fewer than ``system.min_replies`` usable answers.
        """
        answers = 0

        def seen(upload: Upload) -> None:
            nonlocal answers
            answers += 1

        def ended() -> None:
            self.enough(answers, f"answers to {action}")

        sums = self.server.sums_on_workers
        uploads = Uploads(
            lambda: self.exchange(action, knowledge, check=self.total().check),
            (lambda total: self.exchange_sums(action, knowledge, total, keep=False)) if sums else None,
            seen,
            ended,
        )
        return self.reduced(uploads)

    def teach_server(self, values: Tensor, *, lr: float, optimizer: str, epochs: int, batch_size: int) -> None:
        """Train the server's model on targets for this round's samples, float [n, C] in the method's space.

        Soft cross-entropy at T = 1, sum over classes and mean over the batch.
        """
        distiller = self.distiller(
            optimizer=optimizer,
            lr=lr,
            schedule="constant",
            steps=0,
            epochs=epochs,
            batch_size=batch_size,
            clip=0.0,
            patience=0,
            returns="last",
            temperature=1.0,
            t_squared=False,
            reduction="batchmean",
            kind="soft_ce",
        )
        self.distill_students(distiller, Targets(values.float(), self.space, self.asked))

    def server_outputs(self) -> Tensor:
        """Return the server model's logits on this round's samples, float32 [n, C]; the workers run it."""
        [(arch, state)] = self.students.items()
        return self.server.compute.member(Weights(state, arch)).outputs(self.server.proxy.data, self.asked)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the labels."""
        labels = {"ids": self.labels.ids, "values": self.labels.values} if self.labels else {}
        return {**super().state_dict(), "labels": labels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the base's state and the labels."""
        super().load_state_dict(state)
        labels = state["labels"]
        self.labels = ProxyOutputs(labels["ids"], labels["values"], self.space) if labels else None


@dataclass(kw_only=True)
class JointExchange(OutputExchange):
    """Base of methods whose clients train on their own samples and on the public ones with the server's labels."""

    public_size: int = field(
        default=0, metadata={"ge": 0, "help": "|P_r|, public samples a round; 0 = all of the proxy set"}
    )
    public_weight: float = field(
        default=1.0, metadata={"gt": 0, "help": "weight of a public sample against one of the client's own"}
    )

    def draw(self) -> Tensor:
        """Return this round's public samples."""
        return self.subset(self.public_size) if self.public_size else super().draw()


def stratified(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random subset with the classes' shares of the whole, rounded by largest remainder.

    Parameters
    ----------
    labels : np.ndarray
        Labels of all samples, int [N].
    size : int
        Samples wanted; at most all are returned.
    rng : np.random.Generator
        Draws within the classes, and breaks no ties: of equal remainders the lowest class gets the sample.

    Returns
    -------
    np.ndarray
        Positions in `labels`, int64, ascending.

    Examples
    --------
    >>> labels = np.array([0] * 60 + [1] * 30 + [7] * 10)
    >>> np.bincount(labels[stratified(labels, 20, np.random.default_rng(0))])
    array([12,  6,  0,  0,  0,  0,  0,  2])
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * min(size, len(labels)) / max(len(labels), 1)
    wanted = np.floor(exact + 1e-9).astype(int)
    short = min(size, len(labels)) - wanted.sum()
    wanted[np.argsort(-(exact - wanted).round(9), kind="stable")[:short]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, wanted)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
