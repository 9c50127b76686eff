"""Distillation terms that a scenario adds to the client half of any strategy, and their teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkd import losses, plugins
from fedkd.errors import ScenarioError
from fedkd.payloads import State

if TYPE_CHECKING:
    from fedkd.client.student import Student, Teacher
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs
    from fedkd.scenario import Term


def check_teacher(teacher: str, *, shares_weights: bool) -> None:
    """Refuse a teacher that does not exist or that the method cannot provide.

    Parameters
    ----------
    teacher : str
        ``global``, ``last:M``, ``ema:DECAY``, ``own`` or ``module:attribute``.
    shares_weights : bool
        Whether the strategy sends a global model to clients.

    Raises
    ------
    ScenarioError
        With the key ``client.terms``.

    Examples
    --------
    >>> check_teacher("ema:0.99", shares_weights=False)
    >>> check_teacher("global", shares_weights=False)
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: client.terms: teacher 'global' needs ...
    """
    name, _, value = teacher.partition(":")
    if name in ("global", "last") and not shares_weights:
        raise ScenarioError(
            f"teacher {teacher!r} needs a strategy that sends a global model to its clients",
            key="client.terms",
            hint='use teacher = "own" or "ema:0.99", or a strategy that shares weights',
        )
    try:
        valid = (
            teacher in ("global", "own")
            or (name == "last" and int(value) >= 1)
            or (name == "ema" and 0 <= float(value) < 1)
            or (name not in ("global", "own", "last", "ema") and bool(value))
        )
    except ValueError:
        valid = False
    if not valid:
        raise ScenarioError(
            f"unknown teacher {teacher!r}",
            key="client.terms",
            hint="use global | last:M (M >= 1) | ema:DECAY (0 <= DECAY < 1) | own | module:attribute",
        )


@dataclass(frozen=True)
class ActiveTerm:
    """A term with its teacher, ready for a round."""

    name: str
    loss: Callable[..., Tensor]
    weight: float
    temperature: float
    options: dict[str, Any]
    teacher: Teacher
    decay: float | None = None  # of a `Frozen` that is a moving average of the student; None: it stands still

    def __call__(self, out: Outputs, target: Outputs, batch: Batch) -> Tensor:
        """Return the weighted term, a scalar, for the outputs of student and teacher."""
        return self.weight * self.loss(out, target, batch, temperature=self.temperature, **self.options)


def follow(average: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    """Move an exponential moving average of a student towards its state, in place."""
    with torch.no_grad():
        for name, own in average.items():
            if own.is_floating_point():
                own.lerp_(state[name], 1 - decay)
            else:
                own.copy_(state[name])


def activate(terms: Sequence[Term], student: Student) -> list[ActiveTerm]:
    """Give every term its teacher for this round; terms without one yet (``own`` in a first round) are left out.

    Terms of the same setting share one teacher.
    """
    active = []
    teachers = {setting: _teacher(setting, student) for setting in dict.fromkeys(t.teacher for t in terms)}
    for index, term in enumerate(terms):
        teacher, decay = teachers[term.teacher]
        if teacher is not None:
            name = f"{term.loss}[{index}]" if len(terms) > 1 else term.loss
            active.append(
                ActiveTerm(
                    name,
                    losses.term(term.loss),
                    term.weight,
                    term.temperature,
                    dict(term.options),
                    teacher,
                    decay,
                )
            )
    return active


def remember(terms: Sequence[Term], student: Student) -> None:
    """Keep in the client's memory what next round's teachers need."""
    if any(term.teacher == "own" for term in terms):
        student.memory |= {f"own/{k}": v for k, v in student.weights().state.items()}


def _teacher(setting: str, student: Student) -> tuple[Teacher | None, float | None]:
    name, _, value = setting.partition(":")
    if setting == "global":
        return (student.frozen(student.received), None) if student.received is not None else (None, None)
    if setting == "own":
        own = {k.removeprefix("own/"): v for k, v in student.memory.items() if k.startswith("own/")}
        return (student.frozen(own), None) if own else (None, None)
    if name == "ema":
        # A copy of everything, since it is changed in place.
        return student.frozen({k: v.to(student.device, copy=True) for k, v in student.state.items()}), float(value)
    if name == "last":
        return student.frozen(_mean_of_last(int(value), student)), None
    return plugins.load_object(setting, key="client.terms")(student), None


def _mean_of_last(count: int, student: Student) -> State:
    """Uniform average of the last `count` global models that this client received; kept in its memory."""
    assert student.received is not None
    prefix = f"last:{count}/"
    slots = [
        {k.removeprefix(f"{prefix}{i}/"): v for k, v in student.memory.items() if k.startswith(f"{prefix}{i}/")}
        for i in range(count)
    ]
    slots = [student.received, *[slot for slot in slots if slot]][:count]
    student.memory = {k: v for k, v in student.memory.items() if not k.startswith(prefix)}
    for i, slot in enumerate(slots):
        student.memory |= {f"{prefix}{i}/{k}": v for k, v in slot.items()}
    means = {k: torch.stack([slot[k].double() for slot in slots]).mean(0) for k in student.received}
    return {
        k: (mean if student.received[k].is_floating_point() else mean.round()).to(student.received[k].dtype)
        for k, mean in means.items()
    }
