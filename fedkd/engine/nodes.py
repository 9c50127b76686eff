"""The clients of a federation as Flower nodes, without an object for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

FIRST_NODE = 1_000_001
"""Node id of partition 0: far from any partition id, so that nobody mistakes one for the other unnoticed."""


@dataclass(frozen=True, eq=False)
class Nodes:
    """The federation as arrays, so that a million clients cost no queries, and no objects.

    Parameters
    ----------
    partition_ids : numpy.ndarray
        Partition id of each client, int64 [n], distinct.
    archs : sequence of str
        Architecture of each client [n]; cohorts never mix two.
    num_examples : numpy.ndarray
        Training samples of each client, int64 [n]; only the order of dispatch depends on them.

    Examples
    --------
    >>> nodes = Nodes(np.array([4, 2]), ("cnn", "mlp"), np.array([10, 20]))
    >>> nodes.partition(nodes.node_id(2)), nodes.index(2), len(nodes)
    (2, 1, 2)
    """

    partition_ids: np.ndarray
    archs: Sequence[str]
    num_examples: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.partition_ids) == len(self.archs) == len(self.num_examples):
            raise ValueError("partition_ids, archs and num_examples have different lengths")
        if self._sorted is not None and (self._sorted[1][:-1] == self._sorted[1][1:]).any():
            raise ValueError("partition ids are not distinct")

    @classmethod
    def alike(cls, count: int) -> Nodes:
        """Return `count` clients of one architecture and the same size, for any Flower app.

        Examples
        --------
        >>> Nodes.alike(3).partition_ids
        array([0, 1, 2])
        """
        same: Any = np.broadcast_to(np.str_(), count)
        return cls(np.arange(count), same, np.broadcast_to(np.int64(1), count))

    def __len__(self) -> int:
        return len(self.partition_ids)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions in the order of the partition ids, and the ids; None where each id is its own position."""
        ids = self.partition_ids
        if np.array_equal(ids, np.arange(len(ids))):
            return None
        order = np.argsort(ids, kind="stable")
        return order, ids[order]

    def index(self, partition: int) -> int:
        """Return the position of a client in the arrays; ValueError if there is no such client."""
        if self._sorted is None:
            if 0 <= partition < len(self):
                return int(partition)
        else:
            order, ids = self._sorted
            place = int(np.searchsorted(ids, partition))
            if place < len(self) and ids[place] == partition:
                return int(order[place])
        raise ValueError(f"no client of this federation has partition id {partition}")

    def node_id(self, partition: int) -> int:
        """Return the Flower node id of a client; the same in every run."""
        return FIRST_NODE + int(partition)

    def partition(self, node_id: int) -> int:
        """Return the partition id of a Flower node; ValueError if there is no such node."""
        partition = int(node_id) - FIRST_NODE
        try:
            self.index(partition)
        except ValueError:
            raise ValueError(f"no client of this federation has node id {node_id}") from None
        return partition

    def node_ids(self) -> list[int]:
        """Return the Flower node ids of all clients, in the order of the arrays."""
        return (self.partition_ids + FIRST_NODE).tolist()
