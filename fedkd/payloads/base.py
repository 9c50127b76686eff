"""What every kind of payload can do, and checks that several kinds share."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError

# Received tensors are for reading (see `fedkd.payloads`).
# Of that torch warns once in a process: here, where nobody hears it.
with warnings.catch_warnings(action="ignore"):
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))

State = dict[str, Tensor]

LARGEST = 1e6
"""Largest output or feature that is accepted: larger ones are of a model that has diverged, or of an attacker."""


class Payload(ABC):
    """What every kind of payload can do."""

    kind: str
    """Name of the payload in a message."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays as they travel."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Scalars and strings as they travel."""

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> Payload:
        """Return a twin whose model outputs are changed; without any, by default, the payload itself.

        Parameters
        ----------
        change : callable
            From outputs [n, C] and their space, ``logits`` or ``probs``, to others of the same shape and space.
        """
        return self


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers."""
    # They survive in a sum, which is ten times as fast to look at; it may be infinite without them, too.
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def check_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinite numbers, by raising `KnowledgeError`."""
    if not all_finite(values):
        raise KnowledgeError(f"{what} holds NaN or infinite numbers")


def check_float32(values: Tensor, what: str) -> None:
    """Refuse other types than float32, NaN and infinite numbers, by raising `KnowledgeError`."""
    if values.dtype != torch.float32:
        raise KnowledgeError(f"wrong type: {what} are {values.dtype}, not torch.float32")
    check_finite(values, what)


def check_outputs(values: Tensor, what: str) -> None:
    """Refuse what `check_float32` refuses, and numbers beyond `LARGEST`, by raising `KnowledgeError`."""
    check_float32(values, what)
    if values.numel():
        largest = max(abs(float(bound)) for bound in values.aminmax())
        if largest > LARGEST:
            raise KnowledgeError(
                f"{what} of size {largest:.3g}: beyond {LARGEST:g} they are of a model that has diverged, "
                "or of an attacker"
            )


@dataclass(frozen=True)
class Vector(Payload):
    """One number for each of some things that both sides know. Bytes: 4 for each.

    Parameters
    ----------
    values : Tensor
        Float32, shape [n].
    """

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

    def check_range(self, what: str, most: float = math.inf) -> None:
        """Refuse numbers that are not finite, negative or above `most`, by raising `KnowledgeError`."""
        check_float32(self.values, what)
        if bool((self.values < 0).any()) or bool((self.values > most).any()):
            raise KnowledgeError(f"{what} outside [0, {most:g}]")
