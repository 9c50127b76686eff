"""A pool of logits: for some samples of a set, the latest outputs that are worth to be remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LogitPool:
    """Logits by sample id.

    Parameters
    ----------
    size : int
        Samples of the set.
    num_classes : int
        C.

    Examples
    --------
    >>> pool = LogitPool(3, 2)
    >>> pool.put(torch.tensor([2]), torch.tensor([[1.0, -1.0]]))
    >>> pool.known, pool.values[2]
    (tensor([False, False,  True]), tensor([ 1., -1.]))
    """

    def __init__(self, size: int, num_classes: int) -> None:
        self.values = torch.zeros(size, num_classes)
        """Logits, float32, shape [size, C]; zero where nothing is known."""
        self.known = torch.zeros(size, dtype=torch.bool)
        """Samples that have logits, bool, shape [size]."""

    def put(self, ids: Tensor, logits: Tensor) -> None:
        """Remember logits [n, C] of some samples, ids [n], in place of older ones."""
        self.values[ids] = logits.to(self.values)
        self.known[ids] = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        ids = self.known.nonzero().squeeze(1)
        return {"ids": ids, "values": self.values[ids]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.values.zero_()
        self.known.zero_()
        self.put(state["ids"], state["values"])
