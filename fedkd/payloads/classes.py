"""Small vectors of weights: one for each class, or one for each teacher."""

from __future__ import annotations

from dataclasses import dataclass

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Vector


@dataclass(frozen=True)
class ClassWeights(Vector):
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
        self.check_range("class weights", most=1)


@dataclass(frozen=True)
class TeacherWeights(Vector):
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
        self.check_range("teacher weights", most=1)
        if abs(float(self.values.sum()) - 1) > 1e-3:
            raise KnowledgeError("teacher weights do not sum to 1")
