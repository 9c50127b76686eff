"""Transforms: the last step of an ensemble, from reduced outputs to targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.errors import ScenarioError


def era(mean_probs: Tensor, temperature: float = 0.1) -> Tensor:
    """Sharpen mean probabilities by entropy-reduction aggregation (DS-FL: Itahara et al. 2021).

    Parameters
    ----------
    mean_probs : Tensor
        Mean *probabilities* (not logits), shape [..., C].
    temperature : float
        T > 0; 0.1 in the paper.

    Returns
    -------
    Tensor
        softmax(mean_probs / T), shape [..., C].

    Notes
    -----
    A softmax of probabilities depends on their differences: it sharpens only where (p_i - p_j)/T >
    ln(p_i/p_j), and flattens where many classes share the mass. `sharpen` has no such change of regime.

    Examples
    --------
    The ratio 0.4 : 0.1 = 4 becomes e³ ≈ 20:

    >>> p = era(torch.tensor([0.4, 0.1, 0.5]))
    >>> round(float(p[0] / p[1]), 1)
    20.1
    """
    return torch.softmax(mean_probs / temperature, dim=-1)


def sharpen(probs: Tensor, beta: float) -> Tensor:
    """Raise probabilities to a power and renormalise (FedBE: beta = 2; SCARLET's enhanced ERA).

    Parameters
    ----------
    probs : Tensor
        Probabilities, shape [..., C].
    beta : float
        Exponent > 0; 1 changes nothing, below 1 flattens.

    Examples
    --------
    >>> sharpen(torch.tensor([0.8, 0.2]), 2.0)
    tensor([0.9412, 0.0588])
    """
    powers = (probs / probs.amax(-1, keepdim=True)).pow(beta)  # the largest is 1: no underflow of the whole row
    return powers / powers.sum(-1, keepdim=True)


class Transform(Protocol):
    """Last step from reduced outputs to targets; gives probabilities."""

    takes: ClassVar[frozenset[str]]
    """Spaces that it makes sense in."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return probabilities [n, C] from values [n, C]."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Softmax at a temperature: logits → probabilities."""

    temperature: float = 1.0
    takes: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, values: Tensor) -> Tensor:
        """Return softmax(values / T)."""
        return torch.softmax(values / self.temperature, dim=-1)


@dataclass(frozen=True)
class Era:
    """Entropy-reduction aggregation of probabilities; see `era`."""

    temperature: float = 0.1
    takes: ClassVar[frozenset[str]] = frozenset({"probs"})

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, values: Tensor) -> Tensor:
        """Return softmax(probabilities / T)."""
        return era(values, self.temperature)


@dataclass(frozen=True)
class Power:
    """Power and renormalisation of probabilities; see `sharpen`."""

    beta: float
    takes: ClassVar[frozenset[str]] = frozenset({"probs"})

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)

    def __call__(self, values: Tensor) -> Tensor:
        """Return probabilities^beta, normalised."""
        return sharpen(values, self.beta)


@dataclass(frozen=True)
class Argmax:
    """One-hot vector of the largest class; ties go to the lowest."""

    takes: ClassVar[frozenset[str]] = frozenset({"logits", "probs"})

    def __call__(self, values: Tensor) -> Tensor:
        """Return the one-hot vectors."""
        return F.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ScenarioError(f"{name} must be > 0, is {value}")
