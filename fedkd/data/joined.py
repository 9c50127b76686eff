"""Two sets of samples as one, without copies of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fedkd.data.batches import ArrayData


@lru_cache(maxsize=4)
def joined(first: ArrayData, second: ArrayData) -> ArrayData:
    """Return the samples of two sets as one; those of the second come after the first's.

    They have no labels, and are public: never augmented.

    Parameters
    ----------
    first, second : ArrayData
        Of one kind, shape and normalisation, as a task's data and its proxy set are. Called again with the same two,
        the same object is returned.

    Examples
    --------
    >>> own = ArrayData(np.array([[1.0], [2.0]]), np.array([0, 1]), kind="vector")
    >>> other = ArrayData(np.array([[3.0], [4.0]]), kind="vector")
    >>> batch = joined(own, other).gather(np.array([1, 3]))
    >>> batch.x.flatten().tolist(), batch.y.tolist(), batch.ids.tolist()
    ([2.0, 4.0], [1, -1], [1, 3])
    """
    labels = np.full(len(first) + len(second), -1, dtype=np.int64)
    if first.labels is not None:
        labels[: len(first)] = first.labels
    rows: Any = _Rows(first, second)
    return ArrayData(rows, labels, kind=first.kind, mean=first.mean, std=first.std, private=len(first))


class _Rows:
    """As much of an array as `ArrayData` asks of one; rows are taken from the two arrays when they are wanted."""

    def __init__(self, first: ArrayData, second: ArrayData) -> None:
        self.parts, self.split = (first, second), len(first)
        self.shape = (len(first) + len(second), *first.x.shape[1:])
        self.dtype = np.result_type(first.x, second.x)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        taken = np.empty((len(index), *self.shape[1:]), self.dtype)
        for part, mine, start in zip(self.parts, (index < self.split, index >= self.split), (0, self.split)):
            at = index[mine] - start
            rows = part.x[at if part.rows is None else part.rows[at]]
            taken[mine] = rows.reshape(-1, *self.shape[1:])
        return taken

    def take(self, index: np.ndarray, axis: int = 0, **_: Any) -> np.ndarray:
        """Return rows; what `np.take` calls."""
        return self[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or self.dtype, copy=False)
