"""Tensors of several clients as one: the first dimension is the client."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedkd.tapes import same_memory


class CannotVectorise(Exception):
    """Clients cannot be computed together; says why."""


class Places:
    """Where some clients are in a stack.

    Parameters
    ----------
    clients : sequence of int
        Their positions, ascending.
    device : torch.device
        Where the stacks are.
    """

    def __init__(self, clients: Sequence[int], device: torch.device) -> None:
        self.clients, self.device = clients, device
        self.neighbours = clients[-1] - clients[0] == len(clients) - 1
        self._index = slice(clients[0], clients[-1] + 1) if self.neighbours else self._here(torch.tensor(clients))
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, stack: Tensor) -> Tensor:
        """Return the clients' entries: where they are neighbours a view, always the same one, else a copy."""
        if not self.neighbours:
            return stack[self._index]
        if id(stack) not in self._views:
            self._views[id(stack)] = stack, stack[self._index]
        return self._views[id(stack)][1]

    @property
    def stacks(self) -> list[Tensor]:
        """Those stacks of which a view has been taken."""
        return [stack for stack, _ in self._views.values()]

    def put(self, stack: Tensor, entries: Tensor) -> None:
        """Put entries back that `take` gave and that were changed in place."""
        if not self.neighbours:
            stack[self._index] = entries

    def numbers(self, values: Sequence[float], *, change: bool) -> float | Tensor:
        """Return one number for each of the clients, on their device; a plain one where it is the same for all.

        Numbers that `change` from step to step are in a tensor, as what is replayed keeps plain ones as they were.
        """
        if len(set(values)) == 1 and not change:
            return values[0]
        return self._here(torch.tensor(values, dtype=torch.float32))

    def _here(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)


def times(entries: Tensor, numbers: float | Tensor) -> Tensor:
    """Multiply each client's entries [k, ...] by its number [k], or by one number for all."""
    return entries * (numbers.view(-1, *[1] * (entries.dim() - 1)) if isinstance(numbers, Tensor) else numbers)


class Stack:
    """Trees of tensors, one for each client, as one: leaves that all clients share are kept once, others stacked.

    Parameters
    ----------
    trees : sequence
        Nested dicts, lists and tuples of tensors; of other values only what is the same for all.
    what : str
        What it is, for whoever reads why it cannot be stacked.
    device : torch.device
        Where the leaves are wanted.
    share : bool
        Whether leaves may be shared; those that will be changed may not.
    turned : collection of str
        Keys of matrices in trees that are dicts: in memory they lie column by column. Default: none.
    """

    def __init__(
        self,
        trees: Sequence[Any],
        what: str,
        device: torch.device,
        *,
        share: bool = True,
        turned: Collection[str] = (),
    ) -> None:
        if turned:
            trees = [_turn(tree, turned) for tree in trees]
        flat, specs = zip(*(pytree.tree_flatten(tree) for tree in trees))
        if any(spec != specs[0] for spec in specs):
            raise CannotVectorise(f"{what} differs in structure from client to client")
        leaves, dims = [], []
        for values in zip(*flat):
            if not isinstance(values[0], Tensor):
                if not all(type(value) is type(values[0]) and np.array_equal(value, values[0]) for value in values):
                    raise CannotVectorise(f"{what} holds values that are no tensors and differ from client to client")
                leaves.append(values[0])
                dims.append(None)
                continue
            if any(not isinstance(value, Tensor) or value.shape != values[0].shape for value in values):
                raise CannotVectorise(f"{what} holds tensors whose shapes differ from client to client")
            one = values[0].detach().to(device) if _equal(values, compare=share) else None
            if one is None:
                leaves.append(_stacked(values, device))
            else:
                leaves.append(one if share else one.contiguous().expand(len(values), *one.shape).clone())
            dims.append(None if share and one is not None else 0)
        self._dims, self._spec = dims, specs[0]
        self.tree = _turn(pytree.tree_unflatten(leaves, self._spec), turned)
        self.dims = pytree.tree_unflatten(dims, self._spec)
        self.shared = 0 not in dims

    def take(self, places: Places) -> Any:
        """Return the tree of some clients."""
        leaves = zip(pytree.tree_leaves(self.tree), self._dims)
        return pytree.tree_unflatten([leaf if dim is None else places.take(leaf) for leaf, dim in leaves], self._spec)


def _stacked(values: Sequence[Tensor], device: torch.device) -> Tensor:
    if len({value.device for value in values}) == 1:  # one way to the device for all of them
        return torch.stack([value.detach().contiguous() for value in values]).to(device)
    return torch.stack([value.detach().to(device).contiguous() for value in values])


def _turn(tree: Any, names: Collection[str]) -> Any:
    """Return a dict with some of its matrices transposed; what has no names is returned as it is."""
    return {name: leaf.mT if name in names else leaf for name, leaf in tree.items()} if names else tree


def _equal(tensors: Sequence[Tensor], *, compare: bool) -> bool:
    """Whether tensors of one shape hold the same numbers: the same memory or, with `compare`, the same content."""
    first = tensors[0]
    return all(
        same_memory(tensor, first) or (compare and tensor.device == first.device and torch.equal(tensor, first))
        for tensor in tensors
    )


def transposed_weights(module: nn.Module) -> set[str]:
    """Return the names of the weights whose gradients PyTorch computes transposed where clients are batched.

    Weights that lie in memory as their gradients do are changed as one long vector, several times as fast.
    """
    layers = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return {f"{name}.weight".lstrip(".") for name in layers}


PINNED = 1 << 28
"""Most bytes of stacks for which page-locked memory is taken: it is fast, but no other process can have it."""


def brought_home(stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stacks [clients, ...] of one device on the CPU.

    What comes from a GPU is contiguous, since a GPU turns matrices in no time.
    """
    device = next((stack.device for stack in stacks.values()), torch.device("cpu"))
    if device.type != "cuda":
        return {name: stack.cpu() for name, stack in stacks.items()}
    stacks = {name: stack.contiguous() for name, stack in stacks.items()}
    if sum(stack.nbytes for stack in stacks.values()) > PINNED:
        return {name: stack.cpu() for name, stack in stacks.items()}
    # PyTorch keeps such memory and gives it out again: no page of it has to be found anew.
    home = {name: torch.empty(stack.shape, dtype=stack.dtype, pin_memory=True) for name, stack in stacks.items()}
    for name, stack in stacks.items():
        home[name].copy_(stack, non_blocking=True)
    torch.cuda.synchronize(device)
    return home
