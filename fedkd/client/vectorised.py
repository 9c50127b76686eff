"""Students of one architecture trained together: one batched computation instead of one loop for each.

The weights of all clients are stacked, and `torch.func.vmap` runs forward pass, loss and tally of every client at once;
the losses are summed, so that one ordinary backward pass gives each client its own gradients. Batches, learning rates
and draws of the augmentation are those of `fedkd.client.sequential`, and weights are the same but for rounding. (Where
a loss has a kink, rounding decides: the mean absolute error of a student that still equals its teacher, say.)

Clients are independent, so nobody has to be at the same step as the others: those who wait for batches of the same
size take them together (see `schedule`). On a CPU they do so while the weights of all of them fit into its cache; who
comes later follows. Steps that come again and again are replayed: on a CPU from a tape (see `fedkd.tapes`), on a GPU
from a graph if a scenario asks for it (see `fedkd.graphs`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from fedkd import graphs
from fedkd.client import sequential
from fedkd.client.optimizers import clip, stacked_optimizer
from fedkd.client.shared import Frozen
from fedkd.client.stacks import CannotVectorise, Places, Stack, brought_home, transposed_weights
from fedkd.client.task import GATHERED, Task
from fedkd.data.batches import Batch
from fedkd.graphs import Recorder
from fedkd.tapes import Tapes

if TYPE_CHECKING:
    from fedkd.models import Outputs

log = logging.getLogger(__name__)

CACHED = 4 << 20
"""Bytes of weights that clients who are trained together on a CPU may have: about as much as a core keeps close."""


def train(tasks: Sequence[Task]) -> list[Exception | None]:
    """Train students together as far as possible, else one by one; returns what went wrong for each of them.

    Whether it is possible depends on the model, the method and what the clients received, never on time or machine; but
    for a GPU without memory for all of them at once, because others use it. Those clients say so in the metric
    ``out_of_memory``, since rounding, and so the bits of a result, depends on it.
    """
    failures: dict[int, Exception] = {}
    for group in _groups(tasks):
        try:
            if len(group) > 1:
                _check(group)
                _Cohort(group).train()
                continue
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                graphs.let_go()
                torch.cuda.empty_cache()
                for task in group:
                    task.student.metrics["out_of_memory"] = 1.0
            known = isinstance(error, CannotVectorise)
            _say(group[0].student.arch, str(error) if known else f"{type(error).__name__}: {error}".split("\n")[0])
        for task in group:
            try:
                sequential.train(task)
            except Exception as error:
                failures[id(task)] = error
    return [failures.get(id(task)) for task in tasks]


def schedule(sizes: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield which clients take their next batch together; all batches of a step have the same size.

    Parameters
    ----------
    sizes : sequence of sequence of int
        Size of each batch of each client.

    Yields
    ------
    list of int
        Clients, ascending. A client's first step is never together with later ones of others, because it is the one
        that begins a tally.

    Examples
    --------
    >>> list(schedule([[4, 4, 1], [4, 1], [4, 4]]))
    [[0, 1, 2], [0, 2], [0, 1]]
    """
    keys = [[(step == 0, size) for step, size in enumerate(each)] for each in sizes]
    last = [{key: step for step, key in enumerate(each)} for each in keys]
    to_come = Counter(key for each in last for key in each)  # clients that still need such a batch
    at = [0] * len(sizes)
    waiting: dict[tuple[bool, int], list[int]] = {}
    for client, each in enumerate(keys):
        if each:
            waiting.setdefault(each[0], []).append(client)
    while waiting:
        # First what nobody else will need later, then what most are waiting for.
        now = min(waiting, key=lambda key: (to_come[key] > len(waiting[key]), -len(waiting[key]), key))
        group = sorted(waiting.pop(now))
        for client in group:
            at[client] += 1
            to_come[now] -= last[client][now] < at[client]
            if at[client] < len(keys[client]):
                waiting.setdefault(keys[client][at[client]], []).append(client)
        yield group


def schedule_in_parts(sizes: Sequence[Sequence[int]], weight_bytes: int) -> Iterator[list[int]]:
    """Yield which clients take their next batch together, as `schedule` does, but for parts of them in turn.

    Parameters
    ----------
    sizes : sequence of sequence of int
        Size of each batch of each client.
    weight_bytes : int
        Bytes of a client's weights where only as many clients are trained together as have `CACHED` of them; 0: all.
        Parts are of one size where not many more are needed for that: then all of them can be replayed from one tape.

    Examples
    --------
    >>> list(schedule_in_parts([[4, 4]] * 3, CACHED))
    [[0], [0], [1], [1], [2], [2]]
    """
    number = len(sizes)
    least = min(number, -(-number * weight_bytes // CACHED)) or 1
    parts = next((count for count in range(least, int(1.5 * least) + 1) if number % count == 0), least)
    for part in np.array_split(np.arange(number), parts):
        for clients in schedule([sizes[client] for client in part]):
            yield [int(part[client]) for client in clients]


class _Cohort:
    """Some students while they are trained together.

    Parameters
    ----------
    tasks : sequence of Task
        Alike, see `Task.alike`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        # Who has most batches comes first, so that those who go on longer than others are neighbours.
        self.tasks = tasks = sorted(tasks, key=lambda task: -len(task.batches))
        first = tasks[0]
        self.client, self.shared, self.device = first.student.client, first.student.shared, first.student.device
        parameters = dict(self.shared.module.named_parameters())
        states = [{name: task.student.state[name] for name in parameters} for task in tasks]
        turned = transposed_weights(self.shared.module)
        self.state: dict[str, Tensor] = Stack(states, "the state", self.device, share=False, turned=turned).tree
        self.weight_bytes = sum(stack[0].nbytes for stack in self.state.values()) if self.device.type == "cpu" else 0
        self.learning = [name for name, parameter in parameters.items() if parameter.requires_grad]
        self.aux = Stack([task.aux for task in tasks], "what `absorb` returns", self.device)
        self.teachers = [
            Stack(
                [one.state for one in each], "a teacher", self.device, share=each[0] not in first.moving, turned=turned
            )
            for each in zip(*(task.distinct for task in tasks))
        ]
        if self.teachers:
            _ = self.shared.frozen  # inside of vmap it could not be built
        self.moving = [(self.teachers[first.distinct.index(one)], decay) for one, decay in first.moving.items()]
        self.optimizer = stacked_optimizer(self.client, {name: self.state[name] for name in self.learning})
        self.rates = [task.rates for task in tasks]
        self.steps = [0] * len(tasks)
        self.tally: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.stacks: list[Tensor] = []  # those of which a step needs its clients' entries
        self.recorder, self.tapes = Recorder(self.device, first.student.graphs), Tapes()

    def train(self) -> None:
        """Take all steps, and only then change the students."""
        self.shared.module.train()
        places: dict[tuple[int, ...], Places] = {}
        for clients, batch, to_come in self._batches():
            who = tuple(clients)
            if who not in places:
                places[who] = Places(clients, self.device)
            self._step(places[who], batch, to_come)
        # On the CPU: from there weights travel, or go into a model.
        state = brought_home(self.state)
        sums = {name: stack.tolist() for name, stack in self.sums.items()}
        for client, task in enumerate(self.tasks):
            task.student.set_state({name: stack[client].contiguous() for name, stack in state.items()})
            if task.batches:
                task.tally = {name: stack[client] for name, stack in self.tally.items()}
                task.means = {name: values[client] / len(task.batches) for name, values in sums.items()}
                task.means.setdefault("loss", sum(task.means.values()))

    def _batches(self) -> Iterator[tuple[list[int], Batch, int]]:
        """Yield the clients of each step, their batches, stacked, and how many steps like it are left with this one.

        Like it are steps of the same clients, on a CPU of as many, with batches of the same size.
        """
        sizes = [[len(rows) for rows in task.batches] for task in self.tasks]
        order = [iter(task.batches) for task in self.tasks]
        steps = [
            (clients, [next(order[client]) for client in clients])
            for clients in schedule_in_parts(sizes, self.weight_bytes)
        ]
        kinds = [
            (len(clients) if self.device.type == "cpu" else tuple(clients), len(batches[0]))
            for clients, batches in steps
        ]
        to_come = Counter(kinds)
        for (clients, _), kind, batch in zip(steps, kinds, self._gathered(steps)):
            yield clients, batch, to_come[kind]
            to_come[kind] -= 1

    def _gathered(self, steps: Sequence[tuple[list[int], list[np.ndarray]]]) -> Iterator[Batch]:
        """Yield the stacked batches of steps. All ids go to the device at once."""
        if not steps:
            return
        first = self.tasks[0]
        rows = np.concatenate([one for _, batches in steps for one in batches])
        named = [self.tasks[client].named(one) for clients, batches in steps for client, one in zip(clients, batches)]
        ids = first.data.ids_on(np.concatenate(named), self.device)
        generators = [task.generator() for task in self.tasks]
        ends = np.cumsum([len(clients) * len(batches[0]) for clients, batches in steps])
        # On the CPU many batches are gathered at once, which is faster, unless each of them draws its augmentation.
        several = self.device.type == "cpu" and generators[0] is None
        most = GATHERED // first.data.sample_bytes if several else 0
        step = start = 0
        while step < len(steps):
            last = max(step + 1, int(np.searchsorted(ends, start + most, "right")))
            some, part, lengths = (
                steps[step:last],
                slice(start, ends[last - 1]),
                np.diff(ends[step:last], prepend=start),
            )
            drawing = [draws for clients, _ in some for client in clients if (draws := generators[client]) is not None]
            gathered = first.gather(rows[part], ids[part], drawing)
            for (clients, _), *batch in zip(some, *(tensor.split(lengths.tolist()) for tensor in gathered)):
                yield Batch(*(tensor.unflatten(0, (len(clients), -1)) for tensor in batch))
            step, start = last, part.stop

    def _step(self, places: Places, batch: Batch, to_come: int) -> None:
        """Take a step with some clients."""
        numbers = self.optimizer.begin(places, [self.rates[client][self.steps[client]] for client in places.clients])
        # Who begins a tally does so for all of them, see `schedule`.
        begins = self.tasks[0].observe is not None and not self.steps[places.clients[0]]
        fixed = [None if isinstance(number, Tensor) else number for number in numbers]

        def work(x: Tensor, y: Tensor, ids: Tensor, *changing: Tensor) -> None:
            rest = iter(changing)
            self._descend(places, Batch(x, y, ids), [next(rest) if one is None else one for one in fixed], begins)

        inputs = [*batch, *(number for number in numbers if isinstance(number, Tensor))]
        if self.recorder.able:
            self.recorder.do((tuple(places.clients), batch.x.shape, tuple(fixed), begins), work, inputs, to_come)
        elif self.device.type == "cpu" and places.neighbours:
            entries = [places.take(stack) for stack in self.stacks]
            key = (batch.x.shape, tuple(fixed), begins)
            self.tapes.do(key, lambda: work(*inputs), [*inputs, *entries], to_come if entries else 0)
            self.stacks = self.stacks or places.stacks
        else:
            work(*inputs)
        for client in places.clients:
            self.steps[client] += 1

    def _descend(self, places: Places, batch: Batch, numbers: list[float | Tensor], begins: bool) -> None:
        """Compute a step, with nothing that the CPU would have to wait for."""
        params = {name: places.take(stack).detach() for name, stack in self.state.items()}
        for name in self.learning:
            params[name].requires_grad_()
        named, out = self._forward(params, places, batch)
        loss = torch.stack(list(named.values())).sum()
        found = torch.autograd.grad(loss, [params[name] for name in self.learning], allow_unused=True)
        with torch.no_grad():
            gradients = {name: gradient for name, gradient in zip(self.learning, found) if gradient is not None}
            if self.client.clip:
                gradients = clip(gradients, self.client.clip)
            weights = {name: params[name].detach() for name in gradients}
            self.optimizer.step(weights, gradients, places, numbers)
            for name, weight in weights.items():
                places.put(self.state[name], weight)
            for teacher, decay in self.moving:
                for name, average in teacher.tree.items():
                    moved = places.take(average).lerp_(places.take(self.state[name]), 1 - decay)
                    places.put(average, moved)
            self._note(named, out, batch, places, begins)

    def _forward(self, params: dict[str, Tensor], places: Places, batch: Batch) -> tuple[dict[str, Tensor], Outputs]:
        task, module = self.tasks[0], self.shared.module

        def one(params: dict[str, Tensor], batch: Batch, taught: list[Outputs], aux: Any) -> Any:
            out = functional_call(module, params, (batch.x,), tie_weights=False)
            return task.losses(params, batch, out, taught, aux), out

        # Autocast keeps casts of weights, which would outlive the level of vmap that they were made at.
        with task.cast(cache=False):
            with torch.no_grad():
                taught = [self._outputs(teacher, places, batch.x) for teacher in self.teachers]
            return vmap(one, in_dims=(0, 0, 0, self.aux.dims))(params, batch, taught, self.aux.take(places))

    def _outputs(self, teacher: Stack, places: Places, x: Tensor) -> Outputs:
        if teacher.shared:  # one for all: an ordinary forward pass over all batches
            out = self.shared.predict(teacher.tree, x.flatten(0, 1))
            return pytree.tree_map(lambda values: values.unflatten(0, x.shape[:2]), out)
        return vmap(self.shared.predict, in_dims=(teacher.dims, 0))(teacher.take(places), x)

    def _note(self, named: dict[str, Tensor], out: Outputs, batch: Batch, places: Places, begins: bool) -> None:
        """Add to the sums of the loss terms, and to the tally."""
        for name, value in named.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
            places.put(self.sums[name], places.take(self.sums[name]).add_(value))
        observe = self.tasks[0].observe
        if observe is None:
            return
        tally = {} if begins else {name: places.take(stack) for name, stack in self.tally.items()}
        for name, value in vmap(observe)(tally, batch, out).items():
            if name not in self.tally:
                self.tally[name] = value.new_zeros(len(self.tasks), *value.shape[1:])
            places.put(self.tally[name], places.take(self.tally[name]).copy_(value))


def _groups(tasks: Sequence[Task]) -> list[list[Task]]:
    groups: list[list[Task]] = []
    for task in tasks:
        mates = next((group for group in groups if group[0].alike(task)), None)
        if mates is None:
            groups.append([task])
        else:
            mates.append(task)
    return groups


def obstacle(model: nn.Module) -> str:
    """Return why students with a model can never be trained together; empty if nothing is known against it."""
    if model.state_dict().keys() - dict(model.named_parameters()).keys():
        return "the model has buffers, such as BatchNorm's statistics, or shared parameters"
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p for module in model.modules()):
        return "the model has dropout"
    return ""


def _check(tasks: Sequence[Task]) -> None:
    """Raise `CannotVectorise` for what would not even fail, but give something else than training alone."""
    shared = tasks[0].student.shared
    if reason := obstacle(shared.module):
        raise CannotVectorise(reason)
    if any(not isinstance(one, Frozen) or one.shared is not shared for task in tasks for one in task.distinct):
        raise CannotVectorise("a teacher is no state of the student's own model")
    if tasks[0].stop is not None:
        raise CannotVectorise("each may stop early")


@lru_cache(maxsize=256)
def _say(arch: str, reason: str) -> None:
    """Log a reason once in a process."""
    log.warning("clients with the model %s are trained one by one: %s", arch, reason)
