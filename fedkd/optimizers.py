"""PyTorch's optimisers, to the bit, by their functional forms.

The first object of a class in ``torch.optim`` makes PyTorch import its compiler, in every process that trains. Here are
those classes that clients and the server use, with as much of their interface as is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer(ABC):
    """Changes parameters along their gradients; those without one are left alone.

    Parameters
    ----------
    parameters : iterable of nn.Parameter
        What is trained.
    lr : float
        Learning rate; may be changed from step to step, as ``param_groups[0]["lr"]``.
    weight_decay : float
        Share of the parameter that is added to its gradient. Default: 0.
    fused : bool
        One call for all tensors instead of a dozen for each, where PyTorch can; rounds differently. Default: no.

    Attributes
    ----------
    param_groups : list of dict
        One, with the learning rate.
    state : dict
        What is remembered of each parameter, under PyTorch's names.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 0.0, fused: bool = False
    ) -> None:
        self.parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.weight_decay = weight_decay
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.parameters)
        # On CPUs said, because finding out what is best takes longer than a small model's step.
        foreach = False if fused or on_cpu else None
        self.how: dict[str, Any] = {"fused": fused or None, "foreach": foreach}

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.param_groups[0]["lr"]

    @abstractmethod
    def step(self) -> None:
        """Take a step."""

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _learning(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the parameters that have gradients, and those."""
        learning = cast("list[Tensor]", [parameter for parameter in self.parameters if parameter.grad is not None])
        return learning, [cast(Tensor, parameter.grad) for parameter in learning]


class SGD(Optimizer):
    """`torch.optim.SGD`.

    Parameters
    ----------
    momentum : float
        Share of the velocity that stays. Default: 0.
    nesterov : bool
        Whether to look ahead. Default: no.
    **common
        See `Optimizer`.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([2.0])
    >>> SGD([weight], lr=0.25).step()
    >>> weight.item()
    0.5
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(parameters, lr, **common)
        self.momentum, self.nesterov = momentum, nesterov
        self._values = [parameter.detach() for parameter in self.parameters]  # which autograd does not look after

    def step(self) -> None:
        """Take a step."""
        if self.momentum or self.weight_decay or self.how["foreach"] is None:
            return self._general()
        rate = -self.lr
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if self._values[number].data_ptr() != parameter.data_ptr():  # the model was elsewhere, or of another type
                self._values[number] = parameter.detach()
            self._values[number].add_(parameter.grad, alpha=rate)

    @torch.no_grad()
    def _general(self) -> None:
        learning, gradients = self._learning()
        velocities = [self.state.get(parameter, {}).get("momentum_buffer") for parameter in learning]
        sgd(
            learning,
            gradients,
            velocities,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            **self.how,
        )
        if self.momentum:
            for parameter, velocity in zip(learning, velocities):
                self.state[parameter] = {"momentum_buffer": cast(Tensor, velocity)}


class Adam(Optimizer):
    """`torch.optim.Adam`, with its default betas and epsilon.

    Parameters
    ----------
    amsgrad : bool
        Whether to keep the largest second moment (Reddi et al. 2018). Default: no.
    **common
        See `Optimizer`.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([2.0])
    >>> Adam([weight], lr=0.25).step()  # the first step is as long as the learning rate
    >>> round(weight.item(), 4)
    0.75
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, *, amsgrad: bool = False, **common: Any) -> None:
        super().__init__(parameters, lr, **common)
        self.amsgrad = amsgrad

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        learning, gradients = self._learning()
        memories = [self.state.get(parameter) or self._begin(parameter) for parameter in learning]
        adam(
            learning,
            gradients,
            [memory["exp_avg"] for memory in memories],
            [memory["exp_avg_sq"] for memory in memories],
            [memory["max_exp_avg_sq"] for memory in memories] if self.amsgrad else [],
            [memory["step"] for memory in memories],
            amsgrad=self.amsgrad,
            beta1=self.BETA1,
            beta2=self.BETA2,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=self.EPS,
            maximize=False,
            **self.how,
        )

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """Remember nothing of a parameter yet."""
        # The fused form counts where the parameter is, others on the CPU.
        counted = parameter.device if self.how["fused"] else torch.device("cpu")
        averages = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg", "exp_avg_sq")
        memory = {"step": torch.zeros((), dtype=torch.float32, device=counted)}
        memory |= {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in averages}
        self.state[parameter] = memory
        return memory
