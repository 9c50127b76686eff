"""MHAT: Hu et al., MHAT: An Efficient Model-Heterogenous Aggregation Training Scheme for Federated Learning,
Information Sciences 560, 2021.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedkd.client.exchange import JointTraining
from fedkd.payloads import ProxyOutputs
from fedkd.server.exchange import JointExchange
from fedkd.server.uploads import Upload


@dataclass(kw_only=True)
class MHAT(JointExchange):
    """Hu et al., MHAT: An Efficient Model-Heterogenous Aggregation Training Scheme for FL, Information Sciences 2021.

    The server does not return the mean of the clients' outputs on the public set, but what an auxiliary model makes of
    it: that model is trained on the public samples towards the mean probabilities, goes on from round to round, and
    its own probabilities are the soft labels that clients get. Clients train on their own labelled samples and on the
    public ones with soft labels together. The accuracy is the auxiliary model's.
    """

    paper: ClassVar[str] = "https://doi.org/10.1016/j.ins.2021.01.046"
    year: ClassVar[int] = 2021
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "both"
    server_data: ClassVar[str] = "the proxy set, unlabelled"
    travels_up: ClassVar[str] = "proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids)"
    travels_down: ClassVar[str] = (
        "request, unless for all samples: 4·|P_r| (ids); from round 2 on proxy-outputs: 4·|P_r|·C + 4·|P_r| (ids)"
    )
    pitfalls: ClassVar[str] = "without quantisation or entropy reduction, flat means make flat labels on skewed data"
    differences: ClassVar[str] = (
        "No code, and the paper's formulas were not available; it is known from descriptions alone. Assumed: means of "
        "probabilities, soft cross-entropy at T = 1 on both sides, own and public samples shuffled into one set with "
        "equal weights, all public samples in every round, an auxiliary model that goes on from round to round (Adam "
        "1e-3, one pass), and rounds that begin with the last round's labels."
    )
    verified: ClassVar[str] = (
        "joint loss and, over several passes, server labels by hand; bytes; resume; clients of two architectures, a "
        "third on the server"
    )
    owns_model: ClassVar[bool] = True
    local = JointTraining

    server_epochs: int = field(default=1, metadata={"ge": 1, "help": "passes of the server model over public samples"})
    server_batch_size: int = field(default=128, metadata={"ge": 1, "help": "public samples a step on the server"})
    server_lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam learning rate of the server model"})

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average the clients' probabilities."""
        self.consensus = self.reduced(uploads)

    def distill(self) -> None:
        """Train the server model on the mean; its outputs are the next labels."""
        self.teach_server(
            self.consensus,
            optimizer="adam",
            lr=self.server_lr,
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
        )
        self.labels = ProxyOutputs(self.asked, self.server_outputs().softmax(1), "probs")
