"""Models that the clients of a process use in turn, each with its own weights, and teachers frozen from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedkd.client.optimizers import make_optimizer
from fedkd.models.base import bare_forward, has_hooks
from fedkd.optimizers import Optimizer
from fedkd.payloads import State, Weights
from fedkd.students import has_batch_norm, travelling
from fedkd.tapes import same_memory

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.models import Outputs
    from fedkd.scenario import Client


class SharedModel:
    """The model of one architecture in a process; it holds the state of one student at a time.

    Building a model and an optimiser for every message would cost more than loading weights into them.

    Parameters
    ----------
    model : nn.Module
        As every client starts from it, on its device.
    buffers : str
        Norm-buffer policy, see `fedkd.students.travelling`.
    """

    def __init__(self, model: nn.Module, buffers: str) -> None:
        self.module = model
        owned: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self.tensors: State = {name: owned[name].detach() for name in model.state_dict()}
        self.initial: State = {name: tensor.cpu().clone() for name, tensor in self.tensors.items()}
        self.travelling: State = {name: self.tensors[name] for name in travelling(model, buffers)}
        self.batch_norm = has_batch_norm(model)
        self._sound: tuple[int, State] = -1, {}  # round and state of the last weights that were found to fit
        self._optimizer: Optimizer | None = None
        self._tenant: Student | None = None

    @property
    def forward(self) -> Callable[[Tensor], Outputs]:
        """The model's forward pass, as fast as it can be had."""
        return self.module if has_hooks(self.module) else self._bare

    @cached_property
    def _bare(self) -> Callable[[Tensor], Outputs]:
        return bare_forward(self.module)

    @cached_property
    def frozen(self) -> nn.Module:
        """A copy in evaluation mode and without gradients, to be called with other states."""
        return copy.deepcopy(self.module).eval().requires_grad_(False)

    def enter(self, student: Student) -> nn.Module:
        """Return the model with a student's state in it; whoever was in it takes its own away."""
        if self._tenant is not student:
            if self._tenant is not None:
                self._tenant.away = {name: tensor.clone() for name, tensor in self.tensors.items()}
            assert student.away is not None
            self.fill(student.away)
            self._tenant, student.away = student, None
        return self.module

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Write a state, or a part of one, into the model."""
        with torch.no_grad():
            for name, tensor in state.items():
                self.tensors[name].copy_(tensor)

    def check(self, weights: Weights, round: int) -> None:
        """Refuse received weights that do not fit, see `Weights.check`; those that all clients get are read once."""
        before, sound = self._sound
        state = weights.state
        if before == round and sound.keys() == state.keys() and all(same_memory(state[k], sound[k]) for k in state):
            return
        weights.check(self.travelling)
        self._sound = round, dict(state)

    def predict(self, state: State, x: Tensor) -> Outputs:
        """Return the outputs of a model with a whole state, in evaluation mode."""
        # The state has every name, also those of parameters that are one: nothing to tie.
        return torch.func.functional_call(self.frozen, state, (x,), tie_weights=False)

    def leave(self, student: Student) -> None:
        """Let go of a student whose message is answered, and of gradients."""
        if self._tenant is student:
            self._tenant = None
        if self._optimizer is not None:
            self._optimizer.zero_grad()
            self._optimizer.state.clear()

    def optimizer(self, client: Client) -> Optimizer:
        """Return the model's optimiser as the scenario's client section says, with the bits of a fresh one."""
        if self._optimizer is None:
            self._optimizer = make_optimizer(client, self.module)
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            group["lr"] = client.lr
        return self._optimizer


class Frozen:
    """A teacher: the state of a model at one moment, in evaluation mode and without gradients.

    Parameters
    ----------
    shared : SharedModel
        The model that the state belongs to.
    state : dict of str to Tensor
        A whole state; may be memory that others read too.
    """

    def __init__(self, shared: SharedModel, state: State) -> None:
        self.shared, self.state = shared, state

    @cached_property
    def _here(self) -> State:
        device = next(iter(self.shared.tensors.values())).device
        return {name: tensor.to(device) for name, tensor in self.state.items()}

    def __call__(self, x: Tensor) -> Outputs:
        """Return the outputs for a batch."""
        return self.shared.predict(self._here, x)
