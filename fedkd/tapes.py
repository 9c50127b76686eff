"""Tapes: work on a CPU recorded once as the operations that it consists of, and done again without anything else.

PyTorch takes about as long to find out what a training step of a small model computes (modules, `vmap`, autograd) as to
compute it. A tape keeps the operations that arrive at the kernels and calls them again with other inputs. It leaves out
what computes nothing (views that change nothing) or always the same, and goes along a gradient while that is computed,
so that it need not be written to memory and read again. There rounding differs from that of the work itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], object]
"""Does nothing but compute with tensors; all that it changes in place is among the inputs that are named with it.

What it computes with anything else, such as Python's numbers, must be the same every time. In `vmap` there is hardly
another way: tensors do not tell their numbers there.
"""

REPLAYS = 3
"""Fewest replays for which recording, which takes as long as a few steps, is worth it."""

HELD = 64 << 20
"""Most bytes of results that are kept while work is recorded; of larger work Python takes a small part anyway."""

aten = torch.ops.aten

_OF_SHAPES = {
    getattr(aten, name).default
    for name in ("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full")
}
"""Operations whose results depend on the shapes of tensors alone."""

_STRANGE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
"""Tags of operations after which Python may decide by numbers what comes next, or which change more than numbers."""


class Tapes:
    """Does work again and again, and from tapes what comes often."""

    def __init__(self) -> None:
        self._tapes: dict[Hashable, Tape | None] = {}

    def do(self, key: Hashable, work: Work, inputs: Sequence[Tensor], to_come: int) -> None:
        """Do some work.

        Parameters
        ----------
        key : hashable
            Work of the same key is the same but for its inputs, which have the same shapes.
        work : callable
            Does it. Not called again once it is recorded.
        inputs : sequence of Tensor
            All that is not the same in all work of this key: what is read, and what is changed in place.
        to_come : int
            How often work of this key is still to be done, this time included.
        """
        if (tape := self._tapes.get(key)) is not None:
            tape.replay(inputs)
        elif key not in self._tapes and to_come > REPLAYS:
            self._tapes[key] = record(work, inputs)
        else:
            work()


def record(work: Work, inputs: Sequence[Tensor]) -> Tape | None:
    """Do some work, and record it.

    Parameters
    ----------
    work : callable
        See `Work`.
    inputs : sequence of Tensor
        All that will be others when it is replayed.

    Returns
    -------
    Tape or None
        None if it cannot be replayed, because an operation gives what depends on the numbers in tensors, say, because
        Python or NumPy draws numbers or because it gets at an input in another way; or if it is so large that nothing
        would be gained.

    Examples
    --------
    >>> total, more = torch.zeros(2), torch.ones(2)
    >>> tape = record(lambda: total.add_(more * 2), [total, more])
    >>> tape.replay([total, torch.full((2,), 10.0)])
    >>> total.tolist()
    [22.0, 22.0]
    """
    drawn = _drawn()
    with _Listener() as listener:
        work()
    calls = listener.calls
    if listener.held > HELD or any(call.strange for call in calls) or drawn != _drawn():
        return None
    written = {_memory(call.args[0]) for call in calls if call.writes}
    kept, changing = _without_constants(calls, inputs, written)
    reached = written | {_memory(tensor) for tensor in changing.values()}
    others = [tensor for call in calls for tensor in call.tensors() if id(tensor) not in changing]
    if len(set(map(id, inputs))) < len(inputs) or any(_memory(tensor) in reached for tensor in others):
        return None
    return Tape(_without_unused(_along_gradients(_without_copies(kept, written))), inputs)


class Tape:
    """Operations, to be done in order.

    Parameters
    ----------
    calls : sequence of _Call
        Tensors among their arguments are inputs, results of earlier calls, or always the same.
    inputs : sequence of Tensor
        Those that will be others when it is replayed.
    """

    def __init__(self, calls: Sequence[_Call], inputs: Sequence[Tensor]) -> None:
        self._slots: list[Any] = [None] * len(inputs)  # of inputs, results, and whatever else is an argument
        self._inputs = len(inputs)
        number = {id(tensor): place for place, tensor in enumerate(inputs)}
        passing: set[int] = set()  # slots that are emptied when nobody needs them any more

        def slot(value: Any = None) -> int:
            self._slots.append(value)
            return len(self._slots) - 1

        def result() -> int:
            passing.add(place := slot())
            return place

        def argument(value: Any) -> int:
            if isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
                steps.append((_listed, [argument(one) for one in value], {}, place := result()))
                return place
            if not isinstance(value, Tensor):
                return slot(value)
            if id(value) not in number:
                number[id(value)] = slot(value)
            return number[id(value)]

        steps: list[tuple[Callable[..., Any], list[int], dict[str, Any], int | list[int] | None]] = []
        for call in calls:
            places = [argument(value) for value in call.args]
            results = [] if call.writes else [result() for _ in call.out]
            number.update(zip(map(id, call.out), results))
            steps.append(
                (call.func, places, call.kwargs, (results[0] if call.single else results) if results else None)
            )
        self._steps = []
        needed: set[int] = set()
        for func, places, kwargs, out in reversed(steps):
            mine = {*places, *(out if isinstance(out, list) else [] if out is None else [out])}
            self._steps.append((func, _picking(places), kwargs, out, sorted((mine & passing) - needed)))
            needed |= mine
        self._steps.reverse()

    def __len__(self) -> int:
        """Number of operations."""
        return len(self._steps)

    def replay(self, inputs: Sequence[Tensor]) -> None:
        """Do the work with other inputs of the same shapes."""
        slots = self._slots
        slots[: self._inputs] = inputs
        with torch.no_grad():
            for func, picking, kwargs, out, last in self._steps:
                result = func(*picking(slots), **kwargs)
                if out.__class__ is int:
                    slots[out] = result
                elif out is not None:
                    for place, one in zip(out, result):
                        slots[place] = one
                for place in last:
                    slots[place] = None
        slots[: self._inputs] = [None] * self._inputs


@dataclass(frozen=True)
class _Call:
    """An operation that arrived at the kernels."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: list[Tensor]
    single: bool  # whether it returns a tensor, or several results
    writes: bool  # whether it changes its first argument in place
    drawn: bool = False  # whether its results are random
    strange: bool = False  # whether it cannot be recorded

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Call:
        """Return the call of one of PyTorch's operations, and what came of it."""
        several = isinstance(result, list | tuple)
        out = [torch.empty(0) if each is None else each for each in (result if several else [result])]
        changed = [
            place for place, each in enumerate(func._schema.arguments) if each.alias_info and each.alias_info.is_write
        ]
        by_place = func is aten.index.Tensor and not any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        strange = (
            (not _STRANGE.isdisjoint(func.tags) and not by_place)
            or any(not isinstance(each, Tensor) or each.layout != torch.strided for each in out)
            or any(isinstance(value, Tensor | torch.Generator) for value in kwargs.values())
            or (bool(changed) and (changed != [0] or out[0] is not args[0]))
        )
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        return cls(func, args, kwargs, out, not several, bool(changed), drawn, strange)

    def tensors(self) -> Iterator[Tensor]:
        """Yield its arguments that are tensors."""
        for value in self.args:
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, Tensor):
                    yield one

    def touches(self, memory: int) -> bool:
        """Whether one of its arguments lies there."""
        return any(_memory(tensor) == memory for tensor in self.tensors())

    def with_args(self, change: Callable[[Any], Any]) -> _Call:
        """Return the call with every argument, also those in lists, changed."""
        args = [[change(one) for one in each] if isinstance(each, list | tuple) else change(each) for each in self.args]
        return replace(self, args=tuple(args))


class _Listener(TorchDispatchMode):
    """Writes down the operations that arrive at the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.held = 0  # bytes

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to skip it PyTorch would import its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation, and remember it."""
        result = func(*args, **(kwargs or {}))
        call = _Call.of(func, tuple(args), kwargs or {}, result)
        if not call.strange and not any(argument.alias_info for argument in func._schema.arguments):
            self.held += sum(each.nbytes for each in call.out)
        self.calls.append(call)
        if self.held > HELD:
            self.calls.clear()
        return result


def _without_constants(
    calls: Sequence[_Call], inputs: Sequence[Tensor], written: set[int]
) -> tuple[list[_Call], dict[int, Tensor]]:
    """Return the calls but those whose results are always the same, and all tensors that are not, by id."""
    changing = {id(tensor): tensor for tensor in inputs}
    kept = []
    for call in calls:
        same = call.func in _OF_SHAPES or not any(id(tensor) in changing for tensor in call.tensors())
        if same and not call.drawn and not call.writes and not any(_memory(tensor) in written for tensor in call.out):
            continue
        if not call.writes:
            changing |= {id(tensor): tensor for tensor in call.out}
        kept.append(call)
    return kept, changing


def _without_copies(calls: Sequence[_Call], written: set[int]) -> list[_Call]:
    """Return the calls but those that give an argument once more; whoever takes their results takes that."""
    before: dict[int, Tensor] = {}
    kept = []
    for call in calls:
        call = call.with_args(lambda value: before.get(id(value), value))
        same = None
        if call.single and not call.writes:
            same = next((one for one in call.tensors() if same_memory(one, call.out[0])), None)
            if _times_one(call) and written.isdisjoint(map(_memory, (call.args[0], call.out[0]))):
                same = call.args[0]
        if same is None:
            kept.append(call)
        else:
            before[id(call.out[0])] = same
    return kept


def _times_one(call: _Call) -> bool:
    """Whether a call multiplies by 1, and gives a tensor that is in its memory as the argument is."""
    if call.func not in (aten.mul.Scalar, aten.mul.Tensor) or isinstance(call.args[1], Tensor):
        return False
    one, other = call.args[0], call.out[0]
    return call.args[1] == 1 and (one.dtype, one.stride()) == (other.dtype, other.stride())


def _along_gradients(calls: Sequence[_Call]) -> list[_Call]:
    """Return the calls with products that are only computed to be subtracted subtracted at once."""
    kept = dict(enumerate(calls))
    products = {_memory(call.out[0]): place for place, call in enumerate(calls) if call.func is aten.bmm.default}
    for place, call in enumerate(calls):
        gradient = call.args[1] if call.func is aten.sub_.Tensor else None
        begin = products.get(_memory(gradient)) if isinstance(gradient, Tensor) else None
        if gradient is None or begin is None:
            continue
        weight, product, factors = call.args[0], calls[begin].out[0], calls[begin].args
        users = [number for number, user in enumerate(calls) if user.touches(_memory(product))]
        views = [calls[user] for user in users if user != place]
        between = [each for each in calls[begin : place + 1] if each.writes]
        turned = same_memory(gradient, product.mT)
        if (
            (turned or same_memory(gradient, product))
            and (weight.shape, weight.dtype) == (gradient.shape, gradient.dtype)
            and users[-1] == place
            and not any(view.writes or _memory(view.out[0]) != _memory(product) for view in views)
            and not any(_memory(each.args[0]) == _memory(factor) for each in between for factor in factors)
        ):
            for number in (begin, *users):
                del kept[number]
            how = {"turned": turned, "rate": call.kwargs.get("alpha", 1)}
            kept[place] = replace(call, func=_subtract_product, args=(weight, *factors), kwargs=how)
    return [kept[place] for place in sorted(kept)]


def _without_unused(calls: Sequence[_Call]) -> list[_Call]:
    """Return the calls but those whose results nobody takes; random numbers are drawn all the same."""
    used: set[int] = set()
    kept = []
    for call in reversed(calls):
        if call.writes or call.drawn or any(id(tensor) in used for tensor in call.out):
            kept.append(call)
            used.update(id(tensor) for tensor in call.tensors())
    return kept[::-1]


def _subtract_product(weight: Tensor, one: Tensor, other: Tensor, *, turned: bool, rate: float) -> None:
    (weight.mT if turned else weight).baddbmm_(one, other, alpha=-rate)


def _listed(*values: Any) -> list[Any]:
    return list(values)


def _picking(places: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Return a function that picks these places from a list."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda slots: tuple(slots[place] for place in places)


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
        and one.numel() > 0
    )


def _memory(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; where there is none, a number that no other tensor has."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _drawn() -> tuple[Any, ...]:
    """Return where the random generators of Python and NumPy are."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest
