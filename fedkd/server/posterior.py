"""Distributions over global models, fitted to the clients' models, and samples from them (FedBE).

States are read once, one after the other, and never held together; moments are accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads import State
from fedkd.server.averaging import StateMean


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian with a diagonal covariance over the entries of a state.

    Parameters
    ----------
    mean : dict of str to Tensor
        Float64.
    variance : dict of str to Tensor
        Float64, >= 0. Entries that are not in it do not vary.
    dtypes : dict of str to torch.dtype
        Types of the samples; means of integers are rounded.
    """

    mean: Mapping[str, Tensor]
    variance: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]

    def sample(self, generator: torch.Generator) -> State:
        """Return a state drawn from it."""
        drawn = {}
        for name, mean in self.mean.items():
            if name in self.variance:
                noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
                mean = mean + self.variance[name].sqrt() * noise
            dtype = self.dtypes[name]
            drawn[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
        return drawn


def fit_gaussian(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float], names: Collection[str]) -> Gaussian:
    """Fit mean and variance of every number over the clients: μ = Σ_k p_k w_k, σ² = Σ_k p_k (w_k - μ)².

    Parameters
    ----------
    states : iterable of mapping of str to Tensor
        The clients' models, at least one.
    weights : sequence of float
        As many numbers > 0; p_k is the share of each.
    names : collection of str
        Entries that vary: parameters. Others (a sampled running variance might be negative) stay at their mean.

    Examples
    --------
    >>> fit = fit_gaussian([{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}], [3, 1], ["w"])
    >>> fit.mean["w"].item(), fit.variance["w"].item()
    (2.0, 3.0)
    """
    moments = _Moments(names)
    for state, weight in zip(states, weights, strict=True):
        moments.add(state, weight)
    return Gaussian(moments.mean, moments.variance(), moments.dtypes)


def fit_steps(
    states: Iterable[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    names: Collection[str],
    *,
    scale: float = 0.1,
    floor: float = 1e-5,
) -> Gaussian:
    """Fit a Gaussian to the directions of the clients' steps, as the released code of FedBE does.

    For every tensor, with the steps d_k = w_k - start, their mean length r and their directions u_k = d_k / ‖d_k‖:
    start + r (ū + scale · √v · ε), where v is the variance of the u_k over clients, at least `floor`. The code draws
    running statistics like that as well.

    Parameters
    ----------
    states : iterable of mapping of str to Tensor
        The clients' models, at least one.
    start : mapping of str to Tensor
        The model that they started from.
    names : collection of str
        Entries that vary; others are at their mean.
    scale : float
        Factor on the standard deviations.
    floor : float
        Least variance of a direction.
    """
    moments, lengths = _Moments(names), dict.fromkeys(names, 0.0)
    for state in states:
        directions = {}
        for name in names:
            step = state[name].double() - start[name].double()
            length = float(step.norm())
            directions[name] = step / length if length else step
            lengths[name] += length
        moments.add(state, 1.0, directions)
    mean, variance = moments.mean, moments.variance()
    for name in names:
        radius = lengths[name] / moments.total
        mean[name] = start[name].double() + radius * mean[name]
        variance[name] = (radius * scale) ** 2 * variance[name].clamp(min=floor)
    return Gaussian(mean, variance, moments.dtypes)


def dirichlet_mixtures(
    states: Iterable[Mapping[str, Tensor]],
    weights: Sequence[float],
    samples: int,
    generator: np.random.Generator,
    *,
    alpha: float = 1.0,
) -> list[State]:
    """Return random averages of models: Σ_k γ_k p_k w_k / Σ_k γ_k p_k with γ ~ Dirichlet(alpha, …, alpha).

    So FedBE's paper has it; its released code leaves out p_k.

    Parameters
    ----------
    states : iterable of mapping of str to Tensor
        The clients' models.
    weights : sequence of float
        As many numbers > 0, proportional to p_k.
    samples : int
        How many to draw.
    generator : np.random.Generator
        Draws γ.
    alpha : float
        Concentration > 0; the larger, the nearer are all of them to the weighted mean.
    """
    gammas = generator.dirichlet(np.full(len(weights), alpha), size=samples)
    means = [StateMean("a sampled model") for _ in range(samples)]
    for number, (state, weight) in enumerate(zip(states, weights, strict=True)):
        for mean, gamma in zip(means, gammas):
            mean.add(state, float(gamma[number]) * weight)
    return [mean.result() for mean in means]


class _Moments:
    """Weighted mean of states, and variance of some of their entries, as they stream by (West 1979)."""

    def __init__(self, names: Collection[str]) -> None:
        self.names, self.total = set(names), 0.0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float, instead: Mapping[str, Tensor] | None = None) -> None:
        """Add a state, some entries of which are replaced."""
        if not self.total:
            self.dtypes = {name: tensor.dtype for name, tensor in state.items()}
            self.mean = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.items()}
            self.squares = {name: mean.clone() for name, mean in self.mean.items() if name in self.names}
        self.total += weight
        for name, values in {**state, **(instead or {})}.items():
            away = values.detach().double() - self.mean[name]
            self.mean[name] += away * (weight / self.total)
            if name in self.squares:
                self.squares[name] += weight * away * (values.detach().double() - self.mean[name])

    def variance(self) -> dict[str, Tensor]:
        if not self.total:
            raise KnowledgeError("no models to fit a distribution to")
        return {name: (squares / self.total).clamp(min=0) for name, squares in self.squares.items()}
