"""What students are distilled towards: one target for each sample that has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError

Ids = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class Targets:
    """What a student is distilled towards.

    Parameters
    ----------
    values : Tensor
        Targets, float32, shape [n, C].
    space : str
        ``logits`` or ``probs``.
    ids : Tensor
        Ids of the samples in their data, int64, shape [n]. Samples without a target are not among them.

    Raises
    ------
    KnowledgeError
        Shapes that do not fit, an unknown space, or values that are not finite.
    """

    values: Tensor
    space: str
    ids: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.ids.shape != self.values.shape[:1]:
            raise KnowledgeError(
                f"targets of shape {tuple(self.values.shape)} do not fit {tuple(self.ids.shape)} sample ids"
            )
        if self.space not in ("logits", "probs"):
            raise KnowledgeError(f"targets in unknown space {self.space!r}: logits or probs")
        finite = torch.isfinite(self.values).all(1)
        if not bool(finite.all()):
            bad = self.ids[~finite.cpu()]
            raise KnowledgeError(
                f"targets of {len(bad)} of {len(self.ids)} samples are not finite, first {int(bad[0])}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def log_probs(self) -> Tensor:
        """Return log-probabilities, float32, shape [n, C]; a probability of 0 gives -87."""
        if self.space == "logits":
            return self.values.log_softmax(1)
        return self.values.clamp(min=torch.finfo(torch.float32).tiny).log()


def as_ids(ids: Ids) -> Tensor:
    """Return sample ids as an int64 tensor on the CPU, shape [n]."""
    if isinstance(ids, torch.Tensor):
        return ids.cpu().long()
    return torch.tensor(np.asarray(ids), dtype=torch.long)
