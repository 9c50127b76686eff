"""Weights of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, State, check_finite


@dataclass(frozen=True)
class Weights(Payload):
    """A model's state. Bytes: 4 a float32 scalar, 8 an integer buffer (``num_batches_tracked``).

    Parameters
    ----------
    state : dict of str to Tensor
        State dict, or the part of it that the norm-buffer policy lets travel.
    arch : str
        Name of the architecture.
    kind : str
        ``weights``, or another name where a message carries a second model (FedGKD's ``teacher``).
    """

    state: State
    arch: str
    kind: str = "weights"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.state.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel."""
        return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.state.items()}

    def meta(self) -> dict[str, Any]:
        """Architecture."""
        return {"type": "Weights", "arch": self.arch}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Weights:
        """Rebuild from arrays and meta."""
        return cls({name: torch.from_numpy(a) for name, a in arrays.items()}, str(meta["arch"]), kind)

    def check(self, reference: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit a model.

        Parameters
        ----------
        reference : mapping of str to Tensor
            A state with the right names, shapes and types.

        Raises
        ------
        KnowledgeError
            Other names, shapes or types than the reference, or numbers that are not finite.
        """
        missing, extra = reference.keys() - self.state.keys(), self.state.keys() - reference.keys()
        if missing or extra:
            raise KnowledgeError(f"wrong keys: missing {sorted(missing)[:3]}, unexpected {sorted(extra)[:3]}")
        for name, tensor in self.state.items():
            if tensor.shape != reference[name].shape:
                raise KnowledgeError(
                    f"wrong shape: {name} is {tuple(tensor.shape)}, not {tuple(reference[name].shape)}"
                )
            if tensor.dtype != reference[name].dtype:
                raise KnowledgeError(f"wrong type: {name} is {tensor.dtype}, not {reference[name].dtype}")
            check_finite(tensor, name)
