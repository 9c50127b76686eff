"""Optimisers as a scenario's client section says: PyTorch's for one model, the same arithmetic for stacked models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.client.stacks import Places, times
from fedkd.optimizers import SGD, Adam, Optimizer

if TYPE_CHECKING:
    from fedkd.scenario import Client


def make_optimizer(client: Client, model: nn.Module) -> Optimizer:
    """Return a fresh optimiser as the scenario's client section says.

    Fused where that is faster on a CPU: there is no gain without momentum.
    """
    if client.optimizer == "adam":
        return Adam(model.parameters(), client.lr, weight_decay=client.weight_decay, fused=True)
    return SGD(
        model.parameters(),
        client.lr,
        weight_decay=client.weight_decay,
        momentum=client.momentum,
        nesterov=client.nesterov,
        fused=client.momentum > 0,
    )


def stacked_optimizer(client: Client, parameters: Mapping[str, Tensor]) -> StackedOptimizer:
    """Return a fresh optimiser for the parameters of several clients, [clients, ...] by name."""
    return (StackedAdam if client.optimizer == "adam" else StackedSGD)(client, parameters)


class StackedOptimizer(ABC):
    """An optimiser of several clients, each with its own learning rate and its own memory.

    Parameters
    ----------
    client : Client
        The scenario's client section.
    parameters : mapping of str to Tensor
        Shape [clients, ...], on one device.
    """

    def __init__(self, client: Client, parameters: Mapping[str, Tensor]) -> None:
        self.client, self.parameters = client, parameters

    def begin(self, places: Places, rates: Sequence[float]) -> list[float | Tensor]:
        """Get ready for a step.

        Parameters
        ----------
        places : Places
            Who takes it.
        rates : sequence of float
            Learning rate of each of them.

        Returns
        -------
        list of float or Tensor
            Numbers for `step`, each [k] or one for all; the first is the learning rate.
        """
        return [places.numbers(rates, change=self.client.schedule != "constant")]

    def step(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Places,
        numbers: Sequence[float | Tensor],
    ) -> None:
        """Take a step with some clients.

        Parameters
        ----------
        weights, gradients : mapping of str to Tensor
            Of these clients, [k, ...]. Weights are changed in place; those without gradients are left alone.
        places : Places
            Who they are.
        numbers : sequence of float or Tensor
            What `begin` returned.
        """
        rate, *corrections = numbers
        for name, gradient in gradients.items():
            if self.client.weight_decay:
                gradient = gradient.add(weights[name], alpha=self.client.weight_decay)
            direction = self.direction(name, gradient, places, *corrections)
            if isinstance(rate, Tensor):
                weights[name].sub_(times(direction, rate))
            else:
                weights[name].sub_(direction, alpha=rate)

    @abstractmethod
    def direction(self, name: str, gradient: Tensor, places: Places, *corrections: float | Tensor) -> Tensor:
        """Return what is subtracted from a parameter, but for the learning rate."""

    def memory(self, wanted: bool = True) -> dict[str, Tensor]:
        """Return zeros for every parameter."""
        return {name: torch.zeros_like(stack) for name, stack in self.parameters.items() if wanted}


class StackedSGD(StackedOptimizer):
    """`torch.optim.SGD`, with momentum and Nesterov's."""

    def __init__(self, client: Client, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(client, parameters)
        self.velocity = self.memory(wanted=client.momentum > 0)

    def direction(self, name: str, gradient: Tensor, places: Places, *corrections: float | Tensor) -> Tensor:
        """Return the gradient, or the velocity."""
        momentum = self.client.momentum
        if not momentum:
            return gradient
        velocity = places.take(self.velocity[name]).mul_(momentum).add_(gradient)
        places.put(self.velocity[name], velocity)
        return gradient.add(velocity, alpha=momentum) if self.client.nesterov else velocity


class StackedAdam(StackedOptimizer):
    """`torch.optim.Adam`, with its default betas and epsilon."""

    BETA1, BETA2, EPS = Adam.BETA1, Adam.BETA2, Adam.EPS

    def __init__(self, client: Client, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(client, parameters)
        self.mean, self.square = self.memory(), self.memory()
        self.steps: Counter[int] = Counter()

    def begin(self, places: Places, rates: Sequence[float]) -> list[float | Tensor]:
        """Get ready for a step, and to correct the means for how few steps each client has taken."""
        self.steps.update(places.clients)
        steps = [self.steps[client] for client in places.clients]
        size = places.numbers([1 / (1 - self.BETA1**step) for step in steps], change=True)
        scale = places.numbers([(1 - self.BETA2**step) ** -0.5 for step in steps], change=True)
        return [*super().begin(places, rates), size, scale]

    def direction(self, name: str, gradient: Tensor, places: Places, *corrections: float | Tensor) -> Tensor:
        """Return the corrected mean over the root of the corrected mean square."""
        mean = places.take(self.mean[name]).lerp_(gradient, 1 - self.BETA1)
        square = places.take(self.square[name]).mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
        places.put(self.mean[name], mean)
        places.put(self.square[name], square)
        size, scale = corrections
        return times(mean, size).div_(times(square.sqrt(), scale).add_(self.EPS))


def clip(gradients: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """Return the gradients [k, ...] of each client scaled down to a norm."""
    squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    return {name: times(gradient, factor) for name, gradient in gradients.items()}
