"""Early stopping: a training that ends when it does not help any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import ArrayData


class EarlyStop:
    """Says after every pass over the samples whether to go on; the weights stay as they are then, not the best.

    Parameters
    ----------
    score : callable
        Score of the student as it is, larger is better; a score of NaN is never better.
    patience : int
        Passes without a better score before it ends.
    min_delta : float
        What a score must exceed the best one by in order to be better.

    Examples
    --------
    >>> scores = iter([0.5, 0.6, 0.6005, 0.6, 0.9])
    >>> stop = EarlyStop(lambda: next(scores), patience=2, min_delta=1e-3)
    >>> [stop() for _ in range(4)]
    [False, False, False, True]
    """

    def __init__(self, score: Callable[[], float], *, patience: int, min_delta: float = 0.0) -> None:
        self.score, self.patience, self.min_delta = score, patience, min_delta
        self.best, self.waited = -math.inf, 0

    def __call__(self) -> bool:
        """Look at the score once; return whether to stop."""
        score = self.score()
        if score > self.best + self.min_delta:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


def accuracy(student: Student, data: ArrayData, ids: Tensor | np.ndarray) -> float:
    """Return the student's accuracy on labelled samples, in evaluation mode."""
    labels = torch.tensor(np.asarray(data.labels)[np.asarray(ids)], dtype=torch.int64)
    return float((student.predict(data, ids).argmax(1) == labels).double().mean())
