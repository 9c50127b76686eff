"""FedAvg: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, Communication-Efficient Learning of Deep Networks
from Decentralized Data, AISTATS 2017 (1602.05629), Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fedkd.server.strategy import DistillationStrategy


@dataclass(kw_only=True)
class FedAvg(DistillationStrategy):
    """McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.

    Clients train on cross-entropy; the server averages their weights, w ← Σ_k (n_k / n) w_k. With several
    architectures the average is taken within each.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1602.05629"
    year: ClassVar[int] = 2017
    heterogeneous: ClassVar[bool] = True
    pitfalls: ClassVar[str] = "architectures learn nothing from each other"
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = ""
    differences: ClassVar[str] = (
        "No code came with the paper. As in its corrected version, n is the number of examples of the clients that "
        "replied, not of all."
    )
    verified: ClassVar[str] = "averages by hand, bytes, same bits on every engine and when resumed"

    weighting: Literal["examples", "uniform"] = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="examples", metadata={"help": "weights of the average: n_k / n (paper), or 1 / K"}
    )
