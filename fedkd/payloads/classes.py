"""Small vectors of weights: one for each class, or one for each teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, check_float32


@dataclass(frozen=True)
class _Vector(Payload):
    """A few numbers between 0 and 1."""

    values: Tensor
    kind: str = ""

    @property
    def nbytes(self) -> int:
        """4 for each number."""
        return 4 * self.values.numel()

    def arrays(self) -> dict[str, np.ndarray]:
        """The numbers as float32."""
        return {"values": self.values.detach().float().cpu().contiguous().numpy()}

    def meta(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": type(self).__name__}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Self:
        """Rebuild from arrays and meta."""
        return cls(torch.from_numpy(arrays["values"]))

    def _check(self, what: str) -> None:
        check_float32(self.values, what)
        if bool((self.values < 0).any()) or bool((self.values > 1).any()):
            raise KnowledgeError(f"{what} outside [0, 1]")


@dataclass(frozen=True)
class ClassWeights(_Vector):
    """How much a model's outputs for each class count. Bytes: 4·C.

    Parameters
    ----------
    values : Tensor
        Between 0 and 1, float32, shape [C].
    """

    kind: str = "class-weights"

    def check(self, num_classes: int) -> None:
        """Refuse weights for another number of classes, outside [0, 1], or that are not finite.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.values.shape != (num_classes,):
            raise KnowledgeError(f"wrong classes: weights {tuple(self.values.shape)} for {num_classes} classes")
        self._check("class weights")


@dataclass(frozen=True)
class TeacherWeights(_Vector):
    """How much each of several teachers counts. Bytes: 4 for each teacher.

    Parameters
    ----------
    values : Tensor
        Positive or 0, of sum 1, float32, shape [M].
    """

    kind: str = "teacher-weights"

    def check(self) -> None:
        """Refuse weights of nobody, that do not sum to 1, or that are not finite.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.values.ndim != 1 or not len(self.values):
            raise KnowledgeError(f"wrong shape: teacher weights are {tuple(self.values.shape)}, not one for each")
        self._check("teacher weights")
        if abs(float(self.values.sum()) - 1) > 1e-3:
            raise KnowledgeError("teacher weights do not sum to 1")
