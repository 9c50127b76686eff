"""Feature maps that clients have uploaded, as data for the server's training."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

from fedkd.data.batches import Batch

IN_MEMORY = 2 << 30
"""Bytes of feature maps that are held in memory; what comes beyond is held in temporary files without a name."""


class FeatureStore:
    """Feature maps and labels of many clients, numbered in the order in which they came.

    Clients may have feature maps of different shapes; those of one batch must have the same.

    Parameters
    ----------
    in_memory : int
        Bytes that are held in memory.

    Examples
    --------
    >>> store = FeatureStore()
    >>> store.add(torch.ones(2, 3), torch.tensor([0, 1])), store.add(torch.zeros(1, 4, 4), torch.tensor([1]))
    (array([0, 1]), array([2]))
    >>> store.gather(np.array([2])).x.shape, store.gather(np.array([1, 0])).y.tolist()
    (torch.Size([1, 4, 4]), [1, 0])
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._room = in_memory
        self._maps: list[np.ndarray] = []  # of each client
        self._starts = [0]  # number of each client's first sample, and of the next one's
        self._labels = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._starts[-1]

    def add(self, features: Tensor, labels: Tensor) -> np.ndarray:
        """Copy a client's feature maps [n, ...] and labels [n], and return their numbers."""
        copy = np.empty(features.shape, dtype=np.float32)
        self._room -= copy.nbytes
        if self._room < 0 < copy.nbytes:
            with tempfile.TemporaryFile() as file:  # a mapping outlives the handle
                copy = np.memmap(file, dtype=np.float32, mode="w+", shape=tuple(features.shape))
        copy[...] = features.numpy()
        start = len(self)
        self._maps.append(copy)
        self._starts.append(start + len(copy))
        self._labels = np.concatenate([self._labels, labels.numpy()])
        return np.arange(start, len(self))

    def by_shape(self) -> list[np.ndarray]:
        """Return the numbers of all samples that have the same shape, for each shape."""
        groups: dict[tuple[int, ...], list[np.ndarray]] = {}
        for maps, start in zip(self._maps, self._starts):
            groups.setdefault(maps.shape[1:], []).append(np.arange(start, start + len(maps)))
        return [np.concatenate(rows) for rows in groups.values()]

    def gather(
        self, ids: np.ndarray | Tensor, *, device: str | torch.device = "cpu", channels_last: bool = False
    ) -> Batch:
        """Return samples as a batch; only these are copied to the device."""
        rows = np.asarray(ids, dtype=np.int64)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        x = np.stack([self._maps[owner][row - self._starts[owner]] for owner, row in zip(owners, rows)])
        batch = Batch(torch.from_numpy(x), torch.from_numpy(self._labels[rows]), torch.from_numpy(rows))
        if channels_last and x.ndim == 4:
            batch = batch._replace(x=batch.x.to(memory_format=torch.channels_last))
        return Batch(*(tensor.to(device) for tensor in batch))
