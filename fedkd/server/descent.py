"""The steps of a distillation: gradient descent, which a GPU can replay from a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedkd.data.batches import Batch
from fedkd.graphs import Recorder
from fedkd.optimizers import Adam, Optimizer
from fedkd.students import autocast

Loss = Callable[[Tensor, Tensor, Batch], Tensor]
"""From logits [B, C], targets [B, C] and the batch to a scalar."""


class Descent:
    """Takes one step after the other.

    Parameters
    ----------
    model : nn.Module
        On the device, in the mode that it is to be trained in.
    optimizer : Optimizer
        Of its parameters.
    loss : callable
        See `Loss`.
    sizes : sequence of int
        Samples of each step.
    rates : sequence of float
        Learning rate of each step.
    clip : float
        Largest norm of the gradient; 0 = off.
    precision : str
        See `fedkd.students.autocast`.
    device : str or torch.device
        Where the model is.
    graphs : bool
        Whether a GPU may replay the steps from a graph (see `fedkd.graphs`): only if the loss does nothing but compute.

    Attributes
    ----------
    last, total : Tensor
        Loss of the last step, before it, and the sum over all steps so far; scalars, changed by every step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Loss,
        *,
        sizes: Sequence[int],
        rates: Sequence[float],
        clip: float,
        precision: str,
        device: str | torch.device,
        graphs: bool,
    ) -> None:
        device = torch.device(device)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.clip, self.precision, self.device = clip, precision, device
        self.parameters = list(model.parameters())
        self.last, self.total = torch.zeros((), device=device), torch.zeros((), device=device)
        self._recorder = Recorder(device, graphs)
        self._rates: Sequence[float] | Tensor = rates
        if device.type == "cuda" and isinstance(optimizer, Adam) and len(set(rates)) > 1:
            # A graph would keep plain numbers as they were recorded; without graphs they are as many bits long.
            self._rates = torch.tensor(rates, device=device) if graphs else torch.tensor(rates).tolist()
        self._keys = [(size, None if isinstance(self._rates, Tensor) else rate) for size, rate in zip(sizes, rates)]
        self._to_come = Counter(self._keys)
        self._taken = 0

    def step(self, batch: Batch, target: Tensor) -> None:
        """Take the next step."""
        key, rate = self._keys[self._taken], self._rates[self._taken]
        changing = [rate] if isinstance(rate, Tensor) else []

        def work(x: Tensor, y: Tensor, ids: Tensor, target: Tensor, *given: Tensor) -> None:
            self._step(Batch(x, y, ids), target, given[0] if given else rate)

        self._recorder.do((*key, batch.x.shape), work, [*batch, target, *changing], self._to_come[key])
        self._to_come[key] -= 1
        self._taken += 1

    def _step(self, batch: Batch, target: Tensor, rate: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.precision, self.device):
            logits = self.model(batch.x).logits
        loss = self.loss(logits, target, batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        self.last.copy_(loss.detach())
        self.total.add_(self.last)
