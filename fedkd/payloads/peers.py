"""What neighbours in a communication graph tell each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, check_float32, check_outputs


@dataclass(frozen=True)
class PeerOutputs(Payload):
    """Outputs of a client's neighbours on samples of the proxy set. Bytes: 4·m·n·C + 4·n (sample ids) + 8·m.

    Parameters
    ----------
    ids : Tensor
        Sample ids in the proxy set, int64, shape [n].
    peers : Tensor
        Partition ids of the neighbours, int64, shape [m].
    weights : Tensor
        Weight of each neighbour in the client's mean, float32, shape [m]; what is left to 1 is the client's own.
    values : Tensor
        Their outputs, float32, shape [m, n, C].
    more : bool
        Whether the neighbours wait for the client's new mean.
    """

    ids: Tensor
    peers: Tensor
    weights: Tensor
    values: Tensor
    more: bool = False
    kind: str = "peer-outputs"

    @property
    def nbytes(self) -> int:
        """4·m·n·C + 4·n + 8·m."""
        return 4 * (self.values.numel() + self.ids.numel() + self.peers.numel() + self.weights.numel())

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel; ids as 32-bit integers."""
        return {
            "ids": self.ids.cpu().numpy().astype(np.int32),
            "peers": self.peers.cpu().numpy().astype(np.int32),
            "weights": self.weights.cpu().float().numpy(),
            "values": self.values.detach().float().cpu().contiguous().numpy(),
        }

    def meta(self) -> dict[str, Any]:
        """Whether an answer is waited for."""
        return {"type": "PeerOutputs", "more": self.more}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> PeerOutputs:
        """Rebuild from arrays and meta."""
        return cls(
            torch.from_numpy(arrays["ids"].astype(np.int64)),
            torch.from_numpy(arrays["peers"].astype(np.int64)),
            torch.from_numpy(arrays["weights"]),
            torch.from_numpy(arrays["values"]),
            bool(meta["more"]),
        )

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> PeerOutputs:
        """Return other outputs for the same samples and neighbours."""
        flat = change(self.values.flatten(0, 1), "logits")
        return replace(self, values=flat.view_as(self.values))

    def check(self, num_classes: int, size: int) -> None:
        """Refuse outputs of another size, for samples that there are not, with weights that are none, or not finite.

        Parameters
        ----------
        num_classes : int
            C.
        size : int
            Samples of the proxy set.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.ids.ndim != 1 or bool(((self.ids < 0) | (self.ids >= size)).any()):
            raise KnowledgeError(f"wrong sample ids: outside the proxy set of {size}")
        expected = (len(self.peers), len(self.ids), num_classes)
        if self.values.shape != expected or self.weights.shape != self.peers.shape:
            raise KnowledgeError(
                f"wrong shape: {tuple(self.values.shape)} with {tuple(self.weights.shape)} weights, not {expected}"
            )
        check_outputs(self.values, "outputs of neighbours")
        check_float32(self.weights, "weights of neighbours")
        if bool((self.weights < 0).any()) or float(self.weights.sum()) > 1 + 1e-6:
            raise KnowledgeError("weights of neighbours that are negative or sum to more than 1")
