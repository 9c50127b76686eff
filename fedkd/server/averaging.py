"""Weighted averages of model states, in groups, streamed and accumulated in float64, cohort by cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.payloads import State, Weights, all_finite
from fedkd.server.totals import Total
from fedkd.server.uploads import Upload, sum_up
from fedkd.threads import one_thread

CHUNK = 1 << 18  # numbers that are added at a time: their sums stay in the cache


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

    Uploads are consumed once, in the order given, and dropped: the memory is a few float64 copies of a state for
    each group, however many uploads there are. Equal uploads in equal order give equal bits. A strategy that only
    averages need not read uploads at all: see `DistillationStrategy.total`.

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
    return sum_up(uploads, Averages(weights=weights, by=by)).result()


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


class Averages(Total):
    """Weighted means of the uploaded weights, in groups: federated averaging.

    Parameters
    ----------
    expected : mapping of str to mapping of str to Tensor, optional
        A state of each architecture, or tensors on the device ``meta`` with its names, shapes and types, which uploads
        must have. None: uploads were checked.
    weights : str or callable
        ``examples`` (McMahan et al. 2017), ``uniform``, or a function from an upload to a weight >= 0. An upload of
        weight 0 is left out.
    by : str
        Attribute of an upload that names its group.

    Raises
    ------
    ScenarioError
        Unknown weights.
    """

    def __init__(
        self,
        expected: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        weights: str | Callable[[Any], float] = "examples",
        by: str = "arch",
    ) -> None:
        if not callable(weights) and weights not in ("examples", "uniform"):
            raise ScenarioError(f"weights of the average {weights!r} are unknown", hint="examples or uniform")
        self.expected = expected or {}
        self.weights, self.by = weights, by
        self.means: dict[str, StateMean] = {}

    def empty(self) -> Self:
        """Return another one with the same settings."""
        return type(self)(self.expected, weights=self.weights, by=self.by)

    def check(self, upload: Upload) -> None:
        """Refuse weights that do not fit the client's architecture, and uploads without examples."""
        weights = upload.knowledge.get(Weights)
        if weights.arch != upload.arch:
            raise KnowledgeError(f"weights of {weights.arch} from a client with {upload.arch}")
        weights.check(self.expected[upload.arch])
        if upload.num_examples < 1:
            raise KnowledgeError("no examples behind the upload")
        self._weight(upload)

    def add(self, upload: Any) -> None:
        """Add an upload's state with its weight."""
        self.add_all([upload])

    def add_all(self, uploads: Sequence[Any]) -> None:
        """Add uploads of which those of one group are read together."""
        groups: dict[str, list[Any]] = {}
        for upload in uploads:
            groups.setdefault(str(getattr(upload, self.by)), []).append(upload)
        for name, members in groups.items():
            states = [(upload.state, self._weight(upload)) for upload in members]
            self.means.setdefault(name, StateMean(name)).add_all(states)

    def merge(self, other: Self) -> None:
        """Merge group by group."""
        for name, mean in other.means.items():
            self.means.setdefault(name, StateMean(name)).merge(mean)

    def result(self) -> dict[str, State]:
        """Return the mean of each group, in the order in which groups appeared.

        Raises
        ------
        KnowledgeError
            There were no uploads, a group's weights sum to 0, or a mean is not finite.
        """
        if not self.means:
            raise KnowledgeError("nothing to average: no uploads")
        return {name: mean.result() for name, mean in self.means.items()}

    def _weight(self, upload: Any) -> float:
        if callable(self.weights):
            weight = float(self.weights(upload))
        else:
            weight = float(upload.num_examples) if self.weights == "examples" else 1.0
        if not math.isfinite(weight) or weight < 0:
            raise KnowledgeError(f"an upload of {getattr(upload, self.by)} has weight {weight}")
        return weight


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
        self._borrowed = False  # whether the sums are somebody else's, maybe in read-only memory

    def add(self, state: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add a state with a weight >= 0.

        Raises
        ------
        KnowledgeError
            The state does not fit the ones before.
        """
        self.add_all([(state, weight)])

    def add_all(self, states: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        """Add states with their weights: the bits are those of adding one by one, and large sums are read once.

        Raises
        ------
        KnowledgeError
            A state does not fit the ones before; nothing is added then.
        """
        reference = self.sums or next((state for state, weight in states if weight), {})
        for state, weight in states:
            self.dtypes = self.dtypes or {key: tensor.dtype for key, tensor in state.items()}
            if state.keys() != self.dtypes.keys():
                odd = sorted(state.keys() ^ self.dtypes.keys())
                raise KnowledgeError(f"uploads of {self.name} have different entries: {odd[:3]}")
            for key, tensor in state.items() if weight else ():
                if tensor.shape != reference[key].shape:
                    raise KnowledgeError(
                        f"uploads of {self.name} differ in shape: {key} is {tuple(tensor.shape)} "
                        f"and {tuple(reference[key].shape)}"
                    )
        counted = [(state, weight) for state, weight in states if weight]
        if not counted:
            return
        self._own()
        alone = self.count + len(counted) == 1
        if self.count == 1:
            self._weigh()
        for key in self.dtypes:
            if self.count == 0:
                self.sums[key] = _room(reference[key])
            # The weight of a single state comes in with the second one: a mean of one must keep its bits, which
            # (w·x)/w does not do in float64.
            weighted = [(state[key], 1.0 if alone else weight) for state, weight in counted]
            _accumulate(self.sums[key], weighted, fresh=self.count == 0)
        self.weight += sum(weight for _, weight in counted)
        self.count += len(counted)

    def merge(self, other: StateMean) -> None:
        """Add the states that another mean was fed.

        Raises
        ------
        KnowledgeError
            They do not fit the ones before.
        """
        self.dtypes = self.dtypes or other.dtypes
        if other.dtypes and other.dtypes.keys() != self.dtypes.keys():
            odd = sorted(other.dtypes.keys() ^ self.dtypes.keys())
            raise KnowledgeError(f"uploads of {self.name} have different entries: {odd[:3]}")
        if other.count == 0:
            return
        if self.count == 0:
            self.sums, self._borrowed = dict(other.sums), True
        else:
            factor = other.weight if other.count == 1 else 1.0
            if self._borrowed and self.count > 1:
                sums, self._borrowed = self.sums, False
                self.sums = {k: torch.add(t, other.sums[k], alpha=factor, out=_room(t)) for k, t in sums.items()}
            else:
                self._own()
                if self.count == 1:
                    self._weigh()
                for key, total in other.sums.items():
                    _accumulate(self.sums[key], [(total, factor)])
        self.weight += other.weight
        self.count += other.count

    def _own(self) -> None:
        """Make sure that the sums may be changed."""
        if self._borrowed:
            self.sums, self._borrowed = {key: _room(t).copy_(t) for key, t in self.sums.items()}, False

    def _weigh(self) -> None:
        """Multiply the only state so far by its weight."""
        for total in self.sums.values():
            total.mul_(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        # As arrays they travel between processes without being copied; tensors would not.
        return self.__dict__ | {"sums": {key: total.cpu().numpy() for key, total in self.sums.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state["sums"]
        self.__dict__.update(state | {"sums": {key: torch.from_numpy(array) for key, array in arrays.items()}})
        self._borrowed = not all(array.flags.writeable for array in arrays.values())

    def result(self) -> dict[str, Tensor]:
        """Return the mean, in the types of the first state; ends the accumulation.

        Raises
        ------
        KnowledgeError
            The weights sum to 0, or the mean is not finite.
        """
        if self.count == 0:
            raise KnowledgeError(f"cannot average {self.name}: no uploads, or their weights sum to 0")
        with one_thread():  # memory is what this waits for
            return {key: self._mean(key, total) for key, total in self.sums.items()}

    def _mean(self, key: str, total: Tensor) -> Tensor:
        mean = torch.empty(total.shape, dtype=self.dtypes[key], device=total.device)
        for into, piece in zip(mean.view(-1).split(CHUNK), total.contiguous().view(-1).split(CHUNK)):
            piece = piece if self.count == 1 else piece / self.weight
            into.copy_(piece if mean.dtype.is_floating_point else piece.round())
        if not all_finite(mean):
            raise KnowledgeError(f"the average of {self.name} is not finite: {key} holds NaN or infinite numbers")
        return mean


def _room(like: Tensor) -> Tensor:
    """Return an uninitialised float64 tensor of the same shape."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.float64, device=like.device)
    # NumPy asks the system for large pages, PyTorch does not: fresh memory is then ready in a third of the time.
    return torch.from_numpy(np.empty(tuple(like.shape)))


@torch.no_grad()  # states may be of models that are still trained
def _accumulate(total: Tensor, weighted: Sequence[tuple[Tensor, float]], *, fresh: bool = False) -> None:
    """Add tensors times weights to a contiguous float64 tensor; if it is fresh, it holds nothing yet.

    Of a large one, all of them are added to a piece of it before the next piece is read.
    """
    # A state with channels last, say, is not contiguous.
    weighted = [(values.to(total.device).contiguous(), weight) for values, weight in weighted]
    if total.numel() <= CHUNK:
        return _add(total, weighted, fresh)
    split = [(values.view(-1).split(CHUNK), weight) for values, weight in weighted]
    for number, piece in enumerate(total.view(-1).split(CHUNK)):
        _add(piece, [(pieces[number], weight) for pieces, weight in split], fresh)


def _add(total: Tensor, weighted: Sequence[tuple[Tensor, float]], fresh: bool) -> None:
    for values, weight in weighted:
        if fresh:
            total.copy_(values)
            if weight != 1:
                total.mul_(weight)
            fresh = False
        else:
            total.add_(values, alpha=weight)
