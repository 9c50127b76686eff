"""What a student has to learn in one go, apart from how it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedkd.client.local import Aux
from fedkd.client.student import Student, Teacher
from fedkd.client.terms import ActiveTerm
from fedkd.data.batches import ArrayData, Batch
from fedkd.seeds import Purpose, torch_rng

if TYPE_CHECKING:
    from fedkd.client.stopping import EarlyStop
    from fedkd.models import Outputs
    from fedkd.scenario import Client

GATHERED = 4 << 20
"""Bytes of samples that are gathered at once."""

Loss = Callable[[Mapping[str, Tensor], Batch, "Outputs", "tuple[Outputs, ...]", Aux], dict[str, Tensor]]
Observe = Callable[[dict[str, Tensor], Batch, "Outputs"], dict[str, Tensor]]


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


@dataclass(kw_only=True, eq=False)
class Task:
    """What one student has to descend: batches, and the loss on them.

    Parameters
    ----------
    student : Student
        Who learns.
    data : ArrayData
        Where the samples are.
    batches : list of np.ndarray
        Rows of each step: sample ids, or positions in `ids`.
    loss, observe : callable
        As the methods of `LocalTraining`; without `observe` nothing is tallied.
    aux : dict
        What the loss needs beside the batch.
    teachers : sequence of callable
        Whose outputs the loss is given.
    terms : sequence of ActiveTerm
        Further terms of the loss, with teachers of their own.
    ids : np.ndarray, optional
        Sample id of each row; the batch's ``ids`` are then rows.
    augment : str
        Augmentation of images.
    purpose : Purpose
        Seeds what the model draws itself (dropout).
    stop : EarlyStop, optional
        Asked after every pass whether to go on.
    every : int
        Steps in a pass.
    tally : dict of str to Tensor
        What came of `observe`.
    means : dict of str to float
        Mean of the loss and of each of its terms over the steps.
    """

    student: Student
    data: ArrayData
    batches: list[np.ndarray]
    loss: Loss
    aux: Aux
    purpose: Purpose
    observe: Observe | None = None
    teachers: Sequence[Teacher] = ()
    terms: Sequence[ActiveTerm] = ()
    ids: np.ndarray | None = None
    augment: str = "none"
    stop: EarlyStop | None = None
    every: int = 0
    tally: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.student.max_steps:
            self.batches = self.batches[: self.student.max_steps]
        everybody = [*self.teachers, *(term.teacher for term in self.terms)]
        self.distinct = list(dict.fromkeys(everybody))  # terms may share a teacher
        self.moving = {term.teacher: term.decay for term in self.terms if term.decay is not None}
        self._places = [self.distinct.index(teacher) for teacher in everybody]

    def alike(self, other: Task) -> bool:
        """Whether two tasks differ in nothing but what each client has: weights, samples, teachers, aux."""
        return (
            self.student.shared is other.student.shared
            and self.student.client is other.student.client
            and self.data is other.data
            and (self.loss, self.observe, self.augment) == (other.loss, other.observe, other.augment)
            and (self.ids is None) == (other.ids is None)
            and (self.stop is None) == (other.stop is None)
            and [term.name for term in self.terms] == [term.name for term in other.terms]
            and (self._places, len(self.teachers)) == (other._places, len(other.teachers))
        )

    @property
    def rates(self) -> list[float]:
        """Learning rate of each step."""
        student, steps = self.student, len(self.batches)
        return [learning_rate(student.client, student.round, step, steps) for step in range(steps)]

    def cast(self, *, cache: bool = True) -> AbstractContextManager:
        """Return the context of forward passes, in which they have the arithmetic that the scenario asks for."""
        if self.student.client.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.student.device.type, dtype=torch.bfloat16, cache_enabled=cache)

    def generator(self) -> torch.Generator | None:
        """Return the generator of the augmentation; on the CPU, so that every device augments alike."""
        if self.augment == "none":
            return None
        student = self.student
        return torch_rng(student.seed, Purpose.AUGMENTATION, student.round, student.partition_id)

    def stream(self) -> Iterator[Batch]:
        """Yield the batches; without augmentation many are gathered at once, which is faster."""
        generator = self.generator()
        width = max(1, GATHERED // (self.data.sample_bytes * max(map(len, self.batches), default=1)))
        if generator is not None:
            width = 1
        for start in range(0, len(self.batches), width):
            some = self.batches[start : start + width]
            rows = np.concatenate(some)
            whole = self.gather(rows, self.named(rows), generator, channels_last=self.student.channels_last)
            yield from map(Batch, *(tensor.split([len(rows) for rows in some]) for tensor in whole))

    def named(self, rows: np.ndarray) -> np.ndarray:
        """Return the sample ids of rows."""
        return rows if self.ids is None else self.ids[rows]

    def gather(
        self,
        rows: np.ndarray,
        ids: np.ndarray | Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        *,
        channels_last: bool = False,
    ) -> Batch:
        """Return the samples of some rows, whose ids are given."""
        device = self.student.device
        batch = self.data.gather(
            ids, device=device, channels_last=channels_last, augment=self.augment, generator=generator
        )
        if self.ids is None:
            return batch
        return batch._replace(ids=torch.from_numpy(rows).to(device, non_blocking=True))

    def losses(
        self, params: Mapping[str, Tensor], batch: Batch, out: Outputs, taught: Sequence[Outputs], aux: Aux
    ) -> dict[str, Tensor]:
        """Return all named terms of the loss; `taught` are the outputs of the `distinct` teachers."""
        if not self._places:
            return self.loss(params, batch, out, (), aux)
        targets = [taught[place] for place in self._places]
        own = len(self.teachers)
        named = self.loss(params, batch, out, tuple(targets[:own]), aux)
        return {**named, **{term.name: term(out, at, batch) for term, at in zip(self.terms, targets[own:])}}
