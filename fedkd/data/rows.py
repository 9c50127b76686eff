"""A label column that the partitioners of flwr-datasets accept as a data set; imports `datasets`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from datasets.table import InMemoryTable


class Rows(Dataset):
    """A data set of a few columns that selects row numbers instead of copying rows.

    Partitioners read whole columns and select rows by index. A plain `datasets.Dataset` builds a Python
    object per value and a table per selection, which takes seconds where this takes milliseconds.

    Attributes
    ----------
    rows : np.ndarray
        Row numbers in the original order.
    """

    rows: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, columns: dict[str, np.ndarray], rows: np.ndarray | None = None) -> Rows:
        """Return rows of columns of equal length."""
        # A real table below, so that whatever is not overridden works too.
        self = cls(InMemoryTable(pyarrow.table(columns)), fingerprint="rows")
        self.columns = columns
        self.rows = np.arange(len(next(iter(columns.values())))) if rows is None else rows
        return self

    def __getitem__(self, key: Any) -> Any:
        """Return a column as an array."""
        return self.columns[key] if isinstance(key, str) else super().__getitem__(key)

    def unique(self, column: str) -> list:
        """Return the values of a column in order of appearance."""
        values, first = np.unique(self.columns[column], return_index=True)
        return values[np.argsort(first)].tolist()

    def select(self, indices: Iterable, *args: Any, **kwargs: Any) -> Any:
        """Return the chosen rows; only their `rows` are of use."""
        return _Chosen(self.rows[np.asarray(indices, dtype=np.int64)])

    def shard(self, num_shards: int, index: int, contiguous: bool = True, **kwargs: Any) -> Any:
        """Return one of `num_shards` equal parts (up to one row), neighbouring rows or every n-th."""
        if not contiguous:
            return _Chosen(self.rows[index::num_shards])
        size, longer = divmod(len(self.rows), num_shards)  # the first `longer` parts have one row more
        start = index * size + min(index, longer)
        return _Chosen(self.rows[start : start + size + (index < longer)])

    def sort(self, column_names: Any, *args: Any, **kwargs: Any) -> Rows:
        """Return all rows, stably sorted by a column."""
        order = np.argsort(self.columns[column_names], kind="stable")
        return Rows.of({name: values[order] for name, values in self.columns.items()}, self.rows[order])


class _Chosen:
    """The result of a selection."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
