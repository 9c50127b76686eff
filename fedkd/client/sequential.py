"""One student trained by itself: a plain PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedkd.client import terms
from fedkd.client.task import Task
from fedkd.seeds import torch_seed


def train(task: Task) -> None:
    """Take one optimiser step a batch; fills the task's tally and means, and leaves the student trained."""
    student, client, shared = task.student, task.student.client, task.student.shared
    model, forward, optimizer = student.model, shared.forward, shared.optimizer(client)
    params = dict(model.named_parameters())
    history: list[dict[str, Tensor]] = []
    cast = task.cast()
    model.train()
    with torch.random.fork_rng(devices=[student.device] if student.device.type == "cuda" else []):
        _seed(torch_seed(student.seed, task.purpose, student.round, student.partition_id), student.device)
        for step, (batch, rate) in enumerate(zip(task.stream(), task.rates), 1):
            with cast:
                taught = []
                if task.distinct:
                    with torch.no_grad():
                        taught = [teacher(batch.x) for teacher in task.distinct]
                out = forward(batch.x)
                named = task.losses(params, batch, out, taught, task.aux)
            loss = torch.stack(list(named.values())).sum() if len(named) > 1 else next(iter(named.values()))
            backward(loss)
            if client.clip:
                nn.utils.clip_grad_norm_(model.parameters(), client.clip)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            for parameter in params.values():
                parameter.grad = None  # as zero_grad does, which takes ten times as long
            for teacher, decay in task.moving.items():
                terms.follow(teacher.state, shared.tensors, decay)
            if task.observe is not None:
                with torch.no_grad():
                    task.tally = task.observe(task.tally, batch, out)
            history.append({name: value.detach() for name, value in named.items()})
            if len(named) > 1:
                history.append({"loss": loss.detach()})
            if task.stop is not None and step % task.every == 0 and task.stop():
                task.batches = task.batches[:step]
                break
    task.means = _means(history, len(task.batches))


def backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does for a scalar, without what it looks at before, which small models feel.

    Raises
    ------
    RuntimeError
        The loss depends on nothing that is trained.
    """
    if _ENGINE is None or loss.ndim:
        return loss.backward()
    # A fresh one: a gradient may share its memory.
    _ENGINE.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


_ENGINE = getattr(torch.autograd.Variable, "_execution_engine", None)
"""What `torch.autograd.backward` calls; internal to PyTorch, so it may be missing one day."""


def _means(history: Sequence[Mapping[str, Tensor]], steps: int) -> dict[str, float]:
    """Return the mean over the steps of each term and of the loss, which is the only term where nothing else is."""
    values: dict[str, list[Tensor]] = {}
    for entry in history:
        for name, value in entry.items():
            values.setdefault(name, []).append(value)
    if not values:
        return {}
    if next(iter(values.values()))[0].device.type == "cpu":
        sums = [math.fsum(map(float, each)) for each in values.values()]
    else:  # all read from the device at once
        sums = torch.stack([torch.stack(each).double().sum() for each in values.values()]).tolist()
    means = {name: total / steps for name, total in zip(values, sums)}
    return means if "loss" in means else {**means, "loss": sum(means.values())}


def _seed(seed: int, device: torch.device) -> None:
    # torch.manual_seed would seed every kind of device, and take longer than a step of a small model.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
