"""Optimisers as a scenario's client section says: PyTorch's for one model, the same arithmetic for stacked models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fedkd.client.stacks import Places, times

if TYPE_CHECKING:
    from fedkd.scenario import Client


def make_optimizer(client: Client, model: nn.Module) -> torch.optim.Optimizer | SGD:
    """Return a fresh optimiser as the scenario's client section says.

    Fused where it is faster on a CPU (half the time of a small model's step with Adam, no gain without momentum).
    """
    if client.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=client.lr, weight_decay=client.weight_decay, fused=True)
    return SGD(client, model)


class SGD:
    """`torch.optim.SGD`, to the bit, by its functional form.

    The class makes torch import its compiler at the first step: a second or two in every process that starts.

    Parameters
    ----------
    client : Client
        The scenario's client section.
    model : nn.Module
        What is trained.
    """

    def __init__(self, client: Client, model: nn.Module) -> None:
        self.client = client
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._values = [parameter.detach() for parameter in self.parameters]  # which autograd does not look after
        self.param_groups: list[dict[str, Any]] = [{"lr": client.lr}]
        self.state: dict[int, Tensor | None] = {}  # velocity by number of the parameter

    def step(self) -> None:
        """Take a step."""
        if self.client.momentum or self.client.weight_decay:
            return self._general()
        rate = -self.param_groups[0]["lr"]
        for parameter, values in zip(self.parameters, self._values):
            if parameter.grad is not None:
                values.add_(parameter.grad, alpha=rate)

    @torch.no_grad()
    def _general(self) -> None:
        client = self.client
        numbers = [number for number, parameter in enumerate(self.parameters) if parameter.grad is not None]
        velocities = [self.state.get(number) for number in numbers]
        sgd(
            [self.parameters[number] for number in numbers],
            [cast(Tensor, self.parameters[number].grad) for number in numbers],
            velocities,
            foreach=False,  # said, because finding out what is best takes longer than a small model's step
            fused=bool(client.momentum),
            weight_decay=client.weight_decay,
            momentum=client.momentum,
            lr=self.param_groups[0]["lr"],
            dampening=0.0,
            nesterov=client.nesterov,
            maximize=False,
        )
        if client.momentum:
            self.state.update(zip(numbers, velocities))

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


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
        self.steps: Counter[int] = Counter()

    def step(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], places: Places, rates: Sequence[float]
    ) -> None:
        """Take a step with some clients.

        Parameters
        ----------
        weights, gradients : mapping of str to Tensor
            Of these clients, [k, ...]. Weights are changed in place; those without gradients are left alone.
        places : Places
            Who they are.
        rates : sequence of float
            Learning rate of each of them.
        """
        rate = places.numbers(rates)
        self.begin(places)
        for name, gradient in gradients.items():
            if self.client.weight_decay:
                gradient = gradient.add(weights[name], alpha=self.client.weight_decay)
            direction = self.direction(name, gradient, places)
            if isinstance(rate, Tensor):
                weights[name].sub_(times(direction, rate))
            else:
                weights[name].sub_(direction, alpha=rate)

    def begin(self, places: Places) -> None:
        """Get ready for a step: count it for the clients that take it."""
        self.steps.update(places.clients)

    @abstractmethod
    def direction(self, name: str, gradient: Tensor, places: Places) -> Tensor:
        """Return what is subtracted from a parameter, but for the learning rate."""

    def memory(self, wanted: bool = True) -> dict[str, Tensor]:
        """Return zeros for every parameter."""
        return {name: torch.zeros_like(stack) for name, stack in self.parameters.items() if wanted}


class StackedSGD(StackedOptimizer):
    """`torch.optim.SGD`, with momentum and Nesterov's."""

    def __init__(self, client: Client, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(client, parameters)
        self.velocity = self.memory(wanted=client.momentum > 0)

    def direction(self, name: str, gradient: Tensor, places: Places) -> Tensor:
        """Return the gradient, or the velocity."""
        momentum = self.client.momentum
        if not momentum:
            return gradient
        velocity = places.take(self.velocity[name]).mul_(momentum).add_(gradient)
        places.put(self.velocity[name], velocity)
        return gradient.add(velocity, alpha=momentum) if self.client.nesterov else velocity


class StackedAdam(StackedOptimizer):
    """`torch.optim.Adam`, with its default betas and epsilon."""

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, client: Client, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(client, parameters)
        self.mean, self.square = self.memory(), self.memory()

    def begin(self, places: Places) -> None:
        """Get ready to correct for how few steps each client has taken."""
        super().begin(places)
        steps = [self.steps[client] for client in places.clients]
        self.size = places.numbers([1 / (1 - self.BETA1**step) for step in steps])
        self.scale = places.numbers([(1 - self.BETA2**step) ** -0.5 for step in steps])

    def direction(self, name: str, gradient: Tensor, places: Places) -> Tensor:
        """Return the corrected mean over the root of the corrected mean square."""
        mean = places.take(self.mean[name]).lerp_(gradient, 1 - self.BETA1)
        square = places.take(self.square[name]).mul_(self.BETA2).addcmul_(gradient, gradient, value=1 - self.BETA2)
        places.put(self.mean[name], mean)
        places.put(self.square[name], square)
        return times(mean, self.size).div_(times(square.sqrt(), self.scale).add_(self.EPS))


def clip(gradients: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """Return the gradients [k, ...] of each client scaled down to a norm."""
    squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factor = (most / (norms + 1e-6)).clamp(max=1.0)
    return {name: times(gradient, factor) for name, gradient in gradients.items()}
