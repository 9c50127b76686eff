"""Numbers for each sample of the proxy set, and for each class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, Vector


@dataclass(frozen=True)
class SampleScores(Vector):
    """One score for each of the samples that were agreed upon. Bytes: 4·n.

    Parameters
    ----------
    values : Tensor
        Scores, float32, shape [n].
    """

    kind: str = "sample-scores"

    def check(self, size: int, most: float = math.inf) -> None:
        """Refuse scores of another number, negative ones, and such as are not finite or above `most`.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.values.shape != (size,):
            raise KnowledgeError(f"wrong shape: scores {tuple(self.values.shape)} for {size} samples")
        self.check_range("scores", most)


@dataclass(frozen=True)
class LabelCounts(Payload):
    """How many training samples of each class a client has. Bytes: 4·C.

    Parameters
    ----------
    counts : Tensor
        Int64, shape [C].
    """

    counts: Tensor
    kind: str = "label-counts"

    @property
    def nbytes(self) -> int:
        """4·C."""
        return 4 * self.counts.numel()

    def arrays(self) -> dict[str, np.ndarray]:
        """Counts as 32-bit integers."""
        return {"counts": self.counts.cpu().numpy().astype(np.int32)}

    def meta(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": "LabelCounts"}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> LabelCounts:
        """Rebuild from arrays and meta.

        Raises
        ------
        KnowledgeError
            They are no integers.
        """
        counts = arrays["counts"]
        if not np.issubdtype(counts.dtype, np.integer):
            raise KnowledgeError(f"wrong type: label counts are {counts.dtype}, no integers")
        return cls(torch.from_numpy(counts.astype(np.int64)))

    def check(self, num_classes: int, num_examples: int) -> None:
        """Refuse counts of other classes, negative ones, and such as are not those of `num_examples` samples.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.counts.shape != (num_classes,):
            raise KnowledgeError(f"wrong classes: label counts {tuple(self.counts.shape)} for {num_classes} classes")
        if bool((self.counts < 0).any()):
            raise KnowledgeError("negative label counts")
        total = sum(self.counts.tolist())  # which cannot overflow
        if total != num_examples:
            raise KnowledgeError(f"label counts of {total} samples, but {num_examples} examples")
