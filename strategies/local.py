"""Training alone: the floor of every table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedkd.client.local import Aux, LocalTraining
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge
from fedkd.server.strategy import DistillationStrategy, Predict
from fedkd.server.uploads import Upload

if TYPE_CHECKING:
    from fedkd.client.student import Student


class Alone(LocalTraining):
    """Cross-entropy on the client's own data, from where its own model was left."""

    keeps_model = True

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in nothing."""
        return {}

    def share(self, student: Student) -> Knowledge:
        """Share nothing but the number of examples, by which the log averages losses."""
        return Knowledge(num_examples=student.num_examples)


@dataclass(kw_only=True)
class Local(DistillationStrategy):
    """Training alone, without any exchange: the floor of every table.

    Clients keep their models from round to round and train them on their own data; those that are not selected rest,
    as in every other method. The accuracy is the mean over all clients of their own models on the global test set,
    with ``run.evaluate_clients`` also on the clients' own test data.
    """

    heterogeneous: ClassVar[bool] = True
    travels_up: ClassVar[str] = "nothing"
    travels_down: ClassVar[str] = "nothing"
    pitfalls: ClassVar[str] = (
        "on the global test set it is held against classes that clients have never seen: compare it on their own test "
        "data, too; clients that were never selected count with their initial model"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = ""
    differences: ClassVar[str] = "A baseline without a paper: the other methods' local training, and nothing else."
    verified: ClassVar[str] = "bits of FD with γ = 0, and with one client of FedAvg; 0 bytes; resume"
    shares_weights: ClassVar[bool] = False
    local = Alone

    def bind(self, server: Any) -> None:
        """Start without a global model."""
        super().bind(server)
        self.students = {}

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send nothing."""
        return dict.fromkeys(selected, Knowledge())

    def check(self, upload: Upload) -> None:
        """Refuse whatever was shared."""
        if upload.knowledge.payloads:
            raise KnowledgeError(f"nobody asked for {', '.join(sorted(upload.knowledge.payloads))}")

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Let the clients train."""
        for _ in uploads:
            pass

    def predictors(self) -> dict[str, Predict]:
        """Return nothing: there is no model on the server."""
        return {}
