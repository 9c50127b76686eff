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
from fedkd.seeds import Purpose

if TYPE_CHECKING:
    from fedkd.models import Outputs

__all__ = ["Fit", "digest", "learn", "learning_rate"]


def learn(student: Student, local: LocalTraining, aux: Aux) -> None:
    """Train the student on its shard: the method's loss and the scenario's distillation terms.

    Sets ``student.tally`` from the method's `observe`, and ``student.metrics`` to the mean of the loss and of each
    of its terms over the steps.
    """
    client = student.client
    rng = student.rng(Purpose.BATCHES)
    drop = student.shared.batch_norm
    ids = np.asarray(student.shard.train)
    if client.steps:
        batches = step_order(ids, client.batch_size, client.steps, rng, drop_single=drop)
    else:
        batches = [
            batch for _ in range(client.epochs) for batch in epoch_order(ids, client.batch_size, rng, drop_single=drop)
        ]
    observes = type(local).observe is not LocalTraining.observe
    task = Task(
        student=student,
        data=student.data,
        batches=batches,
        loss=local.loss,
        observe=local.observe if observes else None,
        aux=aux,
        teachers=student.teachers,
        terms=terms.activate(client.terms, student),
        augment=student.augment,
        purpose=Purpose.DROPOUT,
    )
    descend(task)
    student.tally = task.tally
    student.metrics |= task.means or {"loss": 0.0}
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
        ``loss(logits [B, C], target [B, C])``, a scalar. Clients whose loss is the same function can be trained
        together.
    epochs, batch_size : int
        Passes over the samples, and samples a step.
    name : str
        Name of the loss in the metrics.
    """
    if student.proxy is None:
        raise ValueError("this client may not see the proxy set: set `sees_proxy` on its LocalTraining")
    rng = student.rng(Purpose.DIGEST)
    rows = np.arange(len(ids))
    drop = student.shared.batch_norm
    task = Task(
        student=student,
        data=student.proxy.data,
        batches=[b for _ in range(epochs) for b in epoch_order(rows, batch_size, rng, drop_single=drop)],
        loss=Fit(loss, name),
        aux={"targets": targets.to(student.device)},
        ids=ids.cpu().numpy(),
        purpose=Purpose.DIGEST,
    )
    descend(task)
    student.metrics |= {name: task.means.get(name, 0.0)}


@dataclass(frozen=True)
class Fit:
    """Loss of a digest: the distance of the logits from the targets of the batch's rows."""

    distance: Callable[[Tensor, Tensor], Tensor]
    name: str

    def __call__(
        self, params: Mapping[str, Tensor], batch: Batch, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux
    ) -> dict[str, Tensor]:
        """Return the one term."""
        return {self.name: self.distance(out.logits, aux["targets"][batch.ids])}


def descend(task: Task) -> None:
    """Take one optimiser step a batch; fills the task's tally and means, and leaves the student trained."""
    task.student.samples += sum(map(len, task.batches))
    seat = meeting.current()
    if seat is not None and task.student.trainer == "vectorised":
        seat.join(task, vectorised.train)
    else:
        sequential.train(task)
