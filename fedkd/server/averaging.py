"""Streamed weighted averages of model states, in groups, accumulated in float64 in the order given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fedkd.errors import KnowledgeError, ScenarioError


class HasWeights(Protocol):
    """What `average` reads from an upload."""

    @property
    def arch(self) -> str:
        """Architecture of the model."""
        ...

    @property
    def num_examples(self) -> int:
        """Training samples behind the upload."""
        ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The model's state."""
        ...


U = TypeVar("U", bound=HasWeights)


def average(
    uploads: Iterable[U],
    *,
    by: str = "arch",
    weights: Literal["examples", "uniform"] | Callable[[U], float] = "examples",
) -> dict[str, dict[str, Tensor]]:
    """Average model states within groups, as FedAvg does.

    Uploads are consumed once, in the order given, and dropped: the memory is one float64 copy of a state for
    each group, however many uploads there are. Equal uploads in equal order give equal bits.

    Parameters
    ----------
    uploads : iterable
        Objects with ``arch``, ``num_examples`` and ``state``; may be a generator.
    by : str
        Attribute of an upload that names its group.
    weights : str or callable
        ``examples`` (McMahan et al. 2017), ``uniform``, or a function from an upload to a weight >= 0. An
        upload of weight 0 is left out.

    Returns
    -------
    dict of str to dict of str to Tensor
        Average of each group, in the order in which groups appeared; every tensor has the type of the first
        upload's. Integer and boolean entries are means rounded to the nearest, ties to even. A group of one
        upload gives that upload's own bits.

    Raises
    ------
    KnowledgeError
        No uploads; a group whose weights sum to 0; a weight that is negative or not finite; uploads of one
        group that do not fit each other; an average that is not finite.
    ScenarioError
        Unknown weights.

    Notes
    -----
    What is averaged is what travelled: under ``models.buffers = "params_only"`` uploads hold no running statistics
    (`fedkd.students.travelling`).

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> a = SimpleNamespace(arch="mlp", num_examples=1, state={"w": torch.tensor([0.0])})
    >>> b = SimpleNamespace(arch="mlp", num_examples=3, state={"w": torch.tensor([4.0])})
    >>> average([a, b])
    {'mlp': {'w': tensor([3.])}}
    """
    weight_of = _weight_function(weights)
    groups: dict[str, StateMean] = {}
    for upload in uploads:
        name = str(getattr(upload, by))
        weight = float(weight_of(upload))
        if not math.isfinite(weight) or weight < 0:
            raise KnowledgeError(f"an upload of {name} has weight {weight}")
        groups.setdefault(name, StateMean(name)).add(upload.state, weight)
    if not groups:
        raise KnowledgeError("nothing to average: no uploads")
    return {name: mean.result() for name, mean in groups.items()}


def mean_state(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the plain mean of states that fit each other, in float64 and back; rules as in `average`.

    Parameters
    ----------
    states : iterable of mapping of str to Tensor
        At least one; consumed one by one.

    Raises
    ------
    KnowledgeError
        No states, states that do not fit each other, or a mean that is not finite.

    Examples
    --------
    >>> mean_state([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}])
    {'w': tensor([2.5000])}
    """
    mean = StateMean("a model")
    for state in states:
        mean.add(state)
    return mean.result()


def _weight_function(weights: Any) -> Callable[[Any], float]:
    if callable(weights):
        return cast(Callable[[Any], float], weights)
    if weights == "examples":
        return lambda upload: upload.num_examples
    if weights == "uniform":
        return lambda upload: 1.0
    raise ScenarioError(f"weights of the average {weights!r} are unknown", hint="examples or uniform")


class StateMean:
    """Weighted mean of states, fed one after the other.

    Parameters
    ----------
    name : str
        What the states are of, for messages.

    Attributes
    ----------
    count : int
        States of positive weight so far.
    weight : float
        Sum of their weights.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.weight = 0.0
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add a state with a weight >= 0.

        Raises
        ------
        KnowledgeError
            The state does not fit the ones before.
        """
        if not self.dtypes:
            self.dtypes = {key: tensor.dtype for key, tensor in state.items()}
        elif state.keys() != self.dtypes.keys():
            odd = sorted(state.keys() ^ self.dtypes.keys())
            raise KnowledgeError(f"uploads of {self.name} have different entries: {odd[:3]}")
        if weight == 0:
            return
        if self.count == 0:
            # Multiplied by its weight only when a second one arrives: a mean of one must keep its bits, which
            # (w·x)/w does not do in float64.
            self.sums = {k: t.detach().to(torch.float64, copy=True) for k, t in state.items()}
        else:
            for key, tensor in state.items():
                total = self.sums[key]
                if tensor.shape != total.shape:
                    raise KnowledgeError(
                        f"uploads of {self.name} differ in shape: {key} is {tuple(tensor.shape)} "
                        f"and {tuple(total.shape)}"
                    )
                if self.count == 1:
                    total.mul_(self.weight)
                total.add_(tensor.detach().to(total.device), alpha=weight)
        self.weight += weight
        self.count += 1

    def result(self) -> dict[str, Tensor]:
        """Return the mean, in the types of the first state; ends the accumulation.

        Raises
        ------
        KnowledgeError
            The weights sum to 0, or the mean is not finite.
        """
        if self.count == 0:
            raise KnowledgeError(f"cannot average {self.name}: no uploads, or their weights sum to 0")
        averaged = {}
        for key, total in self.sums.items():
            mean = total if self.count == 1 else total.div_(self.weight)
            dtype = self.dtypes[key]
            if not dtype.is_floating_point:
                mean = mean.round()
            averaged[key] = mean.to(dtype)
            if not bool(torch.isfinite(averaged[key]).all()):
                raise KnowledgeError(f"the average of {self.name} is not finite: {key} holds NaN or infinite numbers")
        return averaged
