"""How a student is trained on its shard and on targets for the proxy set: by itself, or together with a cohort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedkd import meeting
from fedkd.client import sequential, terms, vectorised
from fedkd.client.local import Aux, LocalTraining
from fedkd.client.student import Student
from fedkd.client.task import Task, learning_rate
from fedkd.data.batches import Batch, epoch_order, step_order
from fedkd.data.joined import joined
from fedkd.seeds import Purpose

if TYPE_CHECKING:
    from fedkd.client.stopping import EarlyStop
    from fedkd.models import Outputs

__all__ = ["Fit", "digest", "learn", "learning_rate"]


def learn(
    student: Student,
    local: LocalTraining,
    aux: Aux,
    *,
    epochs: int = 0,
    batch_size: int = 0,
    stop: EarlyStop | None = None,
) -> None:
    """Train the student on its shard: the method's loss and the scenario's distillation terms.

    Sets ``student.tally`` from the method's `observe`, and ``student.metrics`` to the mean of the loss and of each
    of its terms over the steps.

    Parameters
    ----------
    student : Student
        If it has `public` samples, they are shuffled among its own, or some of them follow the private samples of
        every step (`beside`). Batches then hold, in the place of sample ids, positions in `public` and, beyond those,
        meaningless ones; public samples have the label -1.
    local : LocalTraining
        The method's client half.
    aux : dict
        What its `absorb` returned.
    epochs, batch_size : int
        Instead of the scenario's epochs (or steps) and batch size; 0 = as the scenario says.
    stop : EarlyStop, optional
        Asked after every epoch whether to go on.
    """
    client, public = student.client, student.public
    rng = student.rng(Purpose.BATCHES)
    drop = student.shared.batch_norm
    own, data, ids = np.asarray(student.shard.train), student.data, None
    if public is not None and student.proxy is not None:
        data = joined(student.data, student.proxy.data)
        ids = np.concatenate([public.numpy() + len(student.data), own])
    samples = own if ids is None else np.arange(len(ids))
    if ids is not None and student.beside:
        samples = samples[-len(own) :]
    size = batch_size or client.batch_size
    if client.steps and not epochs:
        batches = step_order(samples, size, client.steps, rng, drop_single=drop)
    else:
        passes = epochs or client.epochs
        batches = [batch for _ in range(passes) for batch in epoch_order(samples, size, rng, drop_single=drop)]
    if ids is not None and student.beside:
        rows = np.arange(len(ids) - len(own))
        more = step_order(rows, student.beside, len(batches), student.rng(Purpose.METHOD_CLIENT))
        batches = [np.concatenate(both) for both in zip(batches, more)]
    observes = type(local).observe is not LocalTraining.observe
    task = Task(
        student=student,
        data=data,
        batches=batches,
        loss=local.loss,
        observe=local.observe if observes else None,
        aux=aux,
        teachers=student.teachers,
        terms=terms.activate(client.terms, student),
        ids=ids,
        augment=student.augment,
        purpose=Purpose.DROPOUT,
        stop=stop,
        every=len(batches) // epochs if epochs else 0,
    )
    descend(task)
    student.tally = task.tally
    student.metrics |= task.means or {"loss": 0.0}
    terms.remember(client.terms, student)


def digest(
    student: Student,
    ids: Tensor,
    targets: Tensor,
    loss: Callable[..., Tensor],
    *,
    epochs: int,
    batch_size: int,
    name: str = "digest",
    labelled: bool = False,
    stop: EarlyStop | None = None,
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
        ``loss(logits [B, C], target [B, C])``, a scalar. Clients whose loss is the same function can be trained
        together.
    epochs, batch_size : int
        Passes over the samples, and samples a step.
    name : str
        Name of the loss in the metrics.
    labelled : bool
        Whether the loss has the samples' labels [B] as a third argument; the proxy set must be labelled.
    stop : EarlyStop, optional
        Asked after every pass whether to go on.
    """
    if student.proxy is None:
        raise ValueError("this client may not see the proxy set: set `sees_proxy` on its LocalTraining")
    rng = student.rng(Purpose.DIGEST)
    rows = np.arange(len(ids))
    drop = student.shared.batch_norm
    batches = [b for _ in range(epochs) for b in epoch_order(rows, batch_size, rng, drop_single=drop)]
    task = Task(
        student=student,
        data=student.proxy.data,
        batches=batches,
        loss=Fit(loss, name, labelled),
        aux={"targets": targets.to(student.device)},
        ids=ids.cpu().numpy(),
        purpose=Purpose.DIGEST,
        stop=stop,
        every=len(batches) // max(epochs, 1),
    )
    descend(task)
    student.metrics |= {name: task.means.get(name, 0.0)}


@dataclass(frozen=True)
class Fit:
    """Loss of a digest: the distance of the logits from the targets of the batch's rows."""

    distance: Callable[..., Tensor]
    name: str
    labelled: bool = False

    def __call__(
        self, params: Mapping[str, Tensor], batch: Batch, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux
    ) -> dict[str, Tensor]:
        """Return the one term."""
        labels = (batch.y,) if self.labelled else ()
        return {self.name: self.distance(out.logits, aux["targets"][batch.ids], *labels)}


def descend(task: Task) -> None:
    """Take one optimiser step a batch; fills the task's tally and means, and leaves the student trained."""
    seat = meeting.current()
    if seat is not None and task.student.trainer == "vectorised":
        seat.join(task, vectorised.train)
    else:
        sequential.train(task)
    task.student.samples += sum(map(len, task.batches))  # of which early stopping leaves those that were taken
