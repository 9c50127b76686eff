"""How a step is run: the loops that train a student on its shard and on targets for the proxy set."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.client import terms
from fedkd.client.local import Aux, LocalTraining
from fedkd.client.student import Student
from fedkd.data.batches import epoch_order, step_order
from fedkd.seeds import Purpose, torch_seed
from fedkd.students import has_batch_norm

if TYPE_CHECKING:
    from fedkd.scenario import Client


def learning_rate(client: Client, round: int, step: int, steps: int) -> float:
    """Learning rate of a step, from the schedules across and within rounds.

    Parameters
    ----------
    client : Client
        Learning rate of round 1, factor per round, schedule within a round.
    round, step, steps : int
        Round from 1, step from 0, steps in the round.

    Examples
    --------
    >>> from fedkd.scenario import Client
    >>> learning_rate(Client(lr=0.1, lr_decay=0.5, schedule="linear"), round=2, step=5, steps=10)
    0.025
    """
    rate = client.lr * client.lr_decay ** (max(round, 1) - 1)
    if client.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    if client.schedule == "linear":
        return rate * (1 - step / steps)
    return rate


def make_optimizer(client: Client, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return a fresh optimiser as the scenario's client section says."""
    if client.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=client.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=client.momentum,
        nesterov=client.nesterov,
        weight_decay=client.weight_decay,
    )


def learn(student: Student, local: LocalTraining, aux: Aux) -> None:
    """Train the student on its shard: the method's loss and the scenario's distillation terms.

    Sets ``student.tally`` from the method's `observe`, and ``student.metrics`` to the mean of the loss and of each
    of its terms over the steps.
    """
    client, model = student.client, student.model
    rng = student.rng(Purpose.BATCHES)
    drop = has_batch_norm(model)
    ids = np.asarray(student.shard.train)
    if client.steps:
        batches = step_order(ids, client.batch_size, client.steps, rng, drop_single=drop)
    else:
        batches = [
            batch for _ in range(client.epochs) for batch in epoch_order(ids, client.batch_size, rng, drop_single=drop)
        ]
    optimizer = make_optimizer(client, model, client.lr)
    extra = terms.activate(client.terms, student)
    augmentation = student.torch_rng(Purpose.AUGMENTATION)
    model.train()
    student.tally = {}
    with torch.random.fork_rng(devices=_cuda(student.device)):
        torch.manual_seed(torch_seed(student.seed, Purpose.DROPOUT, student.round, student.partition_id))

        def losses_of(batch_ids: np.ndarray) -> dict[str, Tensor]:
            batch = student.data.gather(
                batch_ids,
                device=student.device,
                channels_last=student.channels_last,
                augment=student.augment,
                generator=augmentation,
            )
            with _precision(client.precision, student.device):
                with torch.no_grad():
                    taught = tuple(teacher(batch.x) for teacher in student.teachers)
                out = model(batch.x)
                named = local.loss(dict(model.named_parameters()), batch, out, taught, aux)
                named |= {term.name: term(out, batch) for term in extra}
            with torch.no_grad():
                student.tally = local.observe(student.tally, batch, out)
            return named

        def after_step() -> None:
            for term in {id(term.teacher): term for term in extra}.values():  # terms may share a teacher
                term.after_step(model)

        student.metrics |= _descend(student, optimizer, batches, losses_of, after_step)
    terms.remember(client.terms, student)


def digest(
    student: Student,
    ids: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    name: str = "digest",
) -> None:
    """Train the student on targets for proxy samples, with the client's optimiser settings.

    Parameters
    ----------
    student : Student
        Must be allowed to see the proxy set.
    ids : Tensor
        Sample ids in the proxy set, shape [n].
    targets : Tensor
        Targets for these samples, shape [n, C].
    loss : callable
        ``loss(logits [B, C], target [B, C])``, a scalar.
    epochs, batch_size : int
        Passes over the samples, and samples a step.
    name : str
        Name of the loss in the metrics.
    """
    if student.proxy is None:
        raise ValueError("this client may not see the proxy set: set `sees_proxy` on its LocalTraining")
    client, model, proxy = student.client, student.model, student.proxy.data
    rng = student.rng(Purpose.DIGEST)
    rows = np.arange(len(ids))
    drop = has_batch_norm(model)
    batches = [b for _ in range(epochs) for b in epoch_order(rows, batch_size, rng, drop_single=drop)]
    optimizer = make_optimizer(client, model, client.lr)
    targets = targets.to(student.device)
    model.train()

    def losses_of(batch_rows: np.ndarray) -> dict[str, Tensor]:
        at = torch.from_numpy(batch_rows)
        batch = proxy.gather(ids[at].numpy(), device=student.device, channels_last=student.channels_last)
        with _precision(client.precision, student.device):
            return {name: loss(model(batch.x).logits, targets[at.to(targets.device)])}

    with torch.random.fork_rng(devices=_cuda(student.device)):
        torch.manual_seed(torch_seed(student.seed, Purpose.DIGEST, student.round, student.partition_id))
        student.metrics |= {name: _descend(student, optimizer, batches, losses_of).get(name, 0.0)}


def _descend(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batches: list[np.ndarray],
    losses_of: Callable[[np.ndarray], dict[str, Tensor]],
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Take one optimiser step a batch; return the mean of every loss term, read from the device once at the end."""
    totals: dict[str, Tensor] = {}
    for step, ids in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(student.client, student.round, step, len(batches))
        named = losses_of(ids)
        loss = torch.stack(list(named.values())).sum() if len(named) > 1 else next(iter(named.values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if student.client.clip:
            nn.utils.clip_grad_norm_(student.model.parameters(), student.client.clip)
        optimizer.step()
        after_step()
        for key, value in {**named, "loss": loss}.items():
            totals[key] = totals.get(key, 0) + value.detach()
    return {key: float(total) / len(batches) for key, total in totals.items()} or {"loss": 0.0}


def _precision(precision: str, device: torch.device):
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
