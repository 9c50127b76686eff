"""Several teachers reduced to one target for each sample: members × weights × space × reduce × transform.

Two kinds of members: `ModelMember`, a state that is run on the samples, and `StoredMember`, outputs that a
client has sent. Means are streamed: beyond the accumulator, an ensemble holds the outputs of one member at a
time, so memory does not grow with the number of teachers. Everything is accumulated in float64, in the order
of the members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.scenario import did_you_mean
from fedkd.server.weighting import Score, entropy_score, normalise_log

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData

Ids = Tensor | np.ndarray | Sequence[int]

JOINT_ROWS = (
    2**18
)  # members × samples that a reduce which needs all members at once may hold; bounds its memory
TINY = 1e-12  # distances below this count as zero in the geometric median


# --- targets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What a student is distilled towards.

    Parameters
    ----------
    values : Tensor
        Targets, float32, shape [n, C].
    space : str
        ``logits`` or ``probs``.
    ids : Tensor
        Ids of the samples in their data, int64, shape [n]. Samples without a target are not among them.

    Raises
    ------
    KnowledgeError
        Shapes that do not fit, an unknown space, or values that are not finite.
    """

    values: Tensor
    space: str
    ids: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.ids.shape != self.values.shape[:1]:
            raise KnowledgeError(
                f"targets of shape {tuple(self.values.shape)} do not fit {tuple(self.ids.shape)} sample ids"
            )
        if self.space not in ("logits", "probs"):
            raise KnowledgeError(f"targets in unknown space {self.space!r}: logits or probs")
        finite = torch.isfinite(self.values).all(1)
        if not bool(finite.all()):
            bad = self.ids[~finite.cpu()]
            raise KnowledgeError(
                f"targets of {len(bad)} of {len(self.ids)} samples are not finite, first {int(bad[0])}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def log_probs(self) -> Tensor:
        """Return log-probabilities, float32, shape [n, C]; a probability of 0 gives -87."""
        if self.space == "logits":
            return self.values.log_softmax(1)
        return self.values.clamp(min=torch.finfo(torch.float32).tiny).log()


# --- members ------------------------------------------------------------------------------------------------


class Member:
    """A teacher: something that has outputs for samples. Subclasses define `outputs`.

    Parameters
    ----------
    weight : float
        Weight in the ensemble where it is given no others, >= 0.
    """

    weight: float = 1.0
    space: str = "logits"
    """``logits``, or ``probs`` for members that only know their probabilities."""

    def covers(self, ids: Tensor) -> Tensor:
        """Return which samples the member has outputs for, bool, shape [n]. Default: all."""
        return torch.ones(len(ids), dtype=torch.bool)

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 512) -> Tensor:
        """Return the member's outputs in its space.

        Parameters
        ----------
        data : ArrayData
            Data that the ids refer to; None if all members are stored.
        ids : Tensor
            Ids of samples that the member covers, int64, shape [n].
        batch_size : int
            Samples in a forward pass.

        Returns
        -------
        Tensor
            Shape [n, C], on the CPU.
        """
        raise NotImplementedError


class ModelMember(Member):
    """A model that is run on the samples, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Module of the architecture; ``forward(x)`` returns `fedkd.models.Outputs`. Members of one architecture
        share it: its own weights stay untouched.
    state : mapping of str to Tensor, optional
        The member's weights; None takes the module's own. Buffers that it lacks are the module's.
    weight : float
        Weight in the ensemble.
    device : str or torch.device
        Where the model runs; the module returns to where it was.
    channels_last : bool
        Memory layout of image batches.

    Raises
    ------
    KnowledgeError
        The state does not fit the module.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor] | None = None,
        weight: float = 1.0,
        *,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
    ) -> None:
        if state is not None:
            _check_fit(model, state)
        self.model, self.state, self.weight = model, state, weight
        self.device, self.channels_last = device, channels_last

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 512) -> Tensor:
        """Return logits, float32."""
        if data is None:
            raise KnowledgeError("a model cannot give targets without data")
        return predict(
            self.model,
            data,
            ids,
            state=self.state,
            device=self.device,
            batch_size=batch_size,
            channels_last=self.channels_last,
        )


class StoredMember(Member):
    """Outputs that are already there, such as a client's upload. It may cover only some of the samples.

    Parameters
    ----------
    ids : Tensor
        Sample ids, each once, shape [n].
    values : Tensor
        Outputs, finite, shape [n, C].
    space : str
        ``logits`` or ``probs``.
    weight : float
        Weight in the ensemble.

    Raises
    ------
    KnowledgeError
        Shapes that do not fit, repeated ids, an unknown space, or values that are not finite.
    """

    def __init__(self, ids: Ids, values: Tensor, space: str = "logits", weight: float = 1.0) -> None:
        stored = Targets(values.detach().cpu(), space, _as_ids(ids))  # the same checks
        self.ids, order = stored.ids.sort()
        if bool((self.ids[1:] == self.ids[:-1]).any()):
            raise KnowledgeError("stored outputs hold a sample id twice")
        self.values, self.space, self.weight = stored.values[order], space, weight

    def covers(self, ids: Tensor) -> Tensor:
        """Return which samples are stored, bool, shape [n]."""
        return torch.isin(ids, self.ids)

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 512) -> Tensor:
        """Return the stored rows of these samples.

        Raises
        ------
        KnowledgeError
            Outputs of a sample are not stored.
        """
        if not bool(self.covers(ids).all()):
            raise KnowledgeError("outputs are not stored for all of these samples")
        return self.values[torch.searchsorted(self.ids, ids)]


def predict(
    model: nn.Module,
    data: ArrayData,
    ids: Ids,
    *,
    state: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 512,
    channels_last: bool = False,
) -> Tensor:
    """Return a model's logits in evaluation mode; the model comes back with its weights, modes and device.

    Parameters
    ----------
    model : nn.Module
        ``forward(x)`` returns `fedkd.models.Outputs`.
    data : ArrayData
        Where the samples are.
    ids : Tensor
        Which samples, shape [n].
    state : mapping of str to Tensor, optional
        Weights to use instead of the model's own.
    device, batch_size, channels_last
        Where it runs, samples in a forward pass, memory layout of image batches.

    Returns
    -------
    Tensor
        float32 on the CPU, shape [n, C].
    """
    chunks = []
    with borrowed(model, device), torch.inference_mode():
        model.eval()
        moved = None if state is None else {name: tensor.to(device) for name, tensor in state.items()}
        for rows in _as_ids(ids).split(batch_size):
            x = data.gather(rows, device=device, channels_last=channels_last).x
            out = model(x) if moved is None else torch.func.functional_call(model, moved, (x,))
            chunks.append(out.logits.float())
        logits = torch.cat(chunks).cpu()
    return logits.clone()  # outside of inference mode: autograd refuses inference tensors


@contextmanager
def borrowed(model: nn.Module, device: str | torch.device) -> Iterator[None]:
    """Move a model to a device; afterwards it is back where it was, and every module in its mode."""
    home = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.to(device)
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.to(home)


# --- transforms ---------------------------------------------------------------------------------------------


def era(mean_probs: Tensor, temperature: float = 0.1) -> Tensor:
    """Sharpen mean probabilities by entropy-reduction aggregation (DS-FL: Itahara et al. 2021).

    Parameters
    ----------
    mean_probs : Tensor
        Mean *probabilities* (not logits), shape [..., C].
    temperature : float
        T > 0; 0.1 in the paper.

    Returns
    -------
    Tensor
        softmax(mean_probs / T), shape [..., C].

    Notes
    -----
    A softmax of probabilities depends on their differences: it sharpens only where (p_i - p_j)/T >
    ln(p_i/p_j), and flattens where many classes share the mass. `sharpen` has no such change of regime.

    Examples
    --------
    The ratio 0.4 : 0.1 = 4 becomes e³ ≈ 20:

    >>> p = era(torch.tensor([0.4, 0.1, 0.5]))
    >>> round(float(p[0] / p[1]), 1)
    20.1
    """
    return torch.softmax(mean_probs / temperature, dim=-1)


def sharpen(probs: Tensor, beta: float) -> Tensor:
    """Raise probabilities to a power and renormalise (FedBE: beta = 2; SCARLET's enhanced ERA).

    Parameters
    ----------
    probs : Tensor
        Probabilities, shape [..., C].
    beta : float
        Exponent > 0; 1 changes nothing, below 1 flattens.

    Examples
    --------
    >>> sharpen(torch.tensor([0.8, 0.2]), 2.0)
    tensor([0.9412, 0.0588])
    """
    powers = (probs / probs.amax(-1, keepdim=True)).pow(
        beta
    )  # the largest is 1: no underflow of the whole row
    return powers / powers.sum(-1, keepdim=True)


class Transform(Protocol):
    """Last step from reduced outputs to targets; gives probabilities."""

    takes: ClassVar[frozenset[str]]
    """Spaces that it makes sense in."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return probabilities [n, C] from values [n, C]."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Softmax at a temperature: logits → probabilities."""

    temperature: float = 1.0
    takes: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, values: Tensor) -> Tensor:
        """Return softmax(values / T)."""
        return torch.softmax(values / self.temperature, dim=-1)


@dataclass(frozen=True)
class Era:
    """Entropy-reduction aggregation of probabilities; see `era`."""

    temperature: float = 0.1
    takes: ClassVar[frozenset[str]] = frozenset({"probs"})

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, values: Tensor) -> Tensor:
        """Return softmax(probabilities / T)."""
        return era(values, self.temperature)


@dataclass(frozen=True)
class Power:
    """Power and renormalisation of probabilities; see `sharpen`."""

    beta: float
    takes: ClassVar[frozenset[str]] = frozenset({"probs"})

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)

    def __call__(self, values: Tensor) -> Tensor:
        """Return probabilities^beta, normalised."""
        return sharpen(values, self.beta)


@dataclass(frozen=True)
class Argmax:
    """One-hot vector of the largest class; ties go to the lowest."""

    takes: ClassVar[frozenset[str]] = frozenset({"logits", "probs"})

    def __call__(self, values: Tensor) -> Tensor:
        """Return the one-hot vectors."""
        return F.one_hot(values.argmax(-1), values.shape[-1]).to(values.dtype)


# --- reduces that need all members at once ------------------------------------------------------------------

Reduce = Callable[[Tensor, Tensor], Tensor]
"""From values [K, n, C] and weights [K, n] (0: no output of this member), both float64, to [n, C]."""


def median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the median of every coordinate over the members present; of two in the middle, their mean.

    Examples
    --------
    >>> median(torch.tensor([[[1.0]], [[9.0]], [[2.0]]]).double(), torch.ones(3, 1))
    tensor([[2.]], dtype=torch.float64)
    """
    present = (weights > 0).sum(0)
    return _mean_of_ranks(values, weights, (present - 1) // 2, present // 2)


def trimmed(share: float = 0.2) -> Reduce:
    """Return the trimmed mean of every coordinate.

    Parameters
    ----------
    share : float
        Share of the members that is left out at each end, in [0, 0.5), rounded down; 0 is the mean.
    """
    if not 0 <= share < 0.5:
        raise ScenarioError(f"the trimmed share must be at least 0 and below 0.5, is {share}")

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        present = (weights > 0).sum(0)
        cut = (present * share + 1e-9).long()
        return _mean_of_ranks(values, weights, cut, present - 1 - cut)

    return reduce


def _mean_of_ranks(values: Tensor, weights: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean over members of the sorted values from rank `low` to rank `high` [n]; those absent sort last."""
    ordered = values.masked_fill((weights <= 0).unsqueeze(2), torch.inf).sort(0).values
    rank = torch.arange(len(values)).view(-1, 1)
    keep = ((rank >= low) & (rank <= high)).unsqueeze(2)
    return torch.where(keep, ordered, 0.0).sum(0) / (high - low + 1).unsqueeze(1)


def geometric(iterations: int = 200, tolerance: float = 1e-9) -> Reduce:
    """Return the weighted geometric median of each sample's outputs: Weiszfeld's iteration from their mean.

    Parameters
    ----------
    iterations : int
        Most iterations.
    tolerance : float
        A sample stops when a step is shorter than this, relative to 1 + the norm of the estimate.

    Notes
    -----
    Vardi and Zhang's form (PNAS 2000), which does not stick where an estimate meets a member that is not the
    median.
    """

    def reduce(values: Tensor, weights: Tensor) -> Tensor:
        w = weights.unsqueeze(2)
        estimate = (w * values).sum(0) / w.sum(0)
        moving = torch.ones(len(estimate), 1, dtype=torch.bool)
        for _ in range(iterations):
            offset = values - estimate
            distance = offset.norm(dim=2, keepdim=True)
            apart = distance > TINY
            pull = torch.where(apart, w / distance.clamp(min=TINY), 0.0)
            target = (pull * values).sum(0) / pull.sum(0).clamp(min=TINY)
            force = (pull * offset).sum(0).norm(dim=1, keepdim=True)
            stay = (torch.where(apart, 0.0, w).sum(0) / force.clamp(min=TINY)).clamp(max=1.0)
            step = (1 - stay) * (target - estimate)
            # Samples stop one by one, so that a result does not depend on which samples share its chunk.
            estimate = torch.where(moving, estimate + step, estimate)
            length, scale = step.norm(dim=1, keepdim=True), 1 + estimate.norm(dim=1, keepdim=True)
            moving &= length > tolerance * scale
            if not bool(moving.any()):
                break
        return estimate

    return reduce


REDUCES: dict[str, Reduce] = {"median": median, "trimmed": trimmed(), "geometric": geometric()}
"""Reduces by name, beside ``mean``, which is streamed. They are recomputed for chunks of samples."""


# --- the ensemble -------------------------------------------------------------------------------------------


class Ensemble:
    """Teachers and how they become one target.

    Parameters
    ----------
    members : sequence of Member
        The teachers, at least one. Their order changes targets by rounding alone.
    space : str
        What is reduced: ``logits``, ``probs`` (softmax of logits at T = 1), or ``votes`` (one-hot argmax).
    reduce : str or callable
        ``mean``, ``median`` and ``trimmed`` (of every coordinate; a fifth of the members off at each end),
        ``geometric`` (median), or any `Reduce`, such as ``trimmed(0.1)``. Medians of probabilities are
        renormalised.
    weights : optional
        None for the members' own ``weight``; shape [K]; [K, C] for each class; [K, N] for each sample of the
        data, in the order of sample ids; ``entropy`` (softmax over members of 1/H, FedGEMS) or
        ``inverse-entropy``; or a `Score`, the logarithm of a member's weight from its probabilities. They
        need not sum to one. Median and trimmed mean count every member once: they take no weights, and leave
        out members of own weight 0.
    per : str, optional
        ``class`` or ``sample``: what the second dimension of weights is. Needed without data, or
        if there are as many samples as classes.
    transform : Transform or sequence of Transform, optional
        Applied to the reduced outputs, in order: `Softmax`, `Era`, `Power`, `Argmax`.

    Raises
    ------
    KnowledgeError
        No members.
    ScenarioError
        Options that are unknown or contradict each other.

    Examples
    --------
    Two clients sent probabilities for samples 0, 1 and 1, 2; nobody knows sample 3:

    >>> a = StoredMember([0, 1], torch.tensor([[1.0, 0.0], [0.5, 0.5]]), "probs")
    >>> b = StoredMember([1, 2], torch.tensor([[0.9, 0.1], [0.0, 1.0]]), "probs")
    >>> targets = Ensemble([a, b], space="probs").targets(ids=range(4))
    >>> targets.ids, targets.values
    (tensor([0, 1, 2]), tensor([[1.0000, 0.0000],
            [0.7000, 0.3000],
            [0.0000, 1.0000]]))
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        space: Literal["logits", "probs", "votes"] = "logits",
        reduce: Literal["mean", "median", "trimmed", "geometric"] | Reduce = "mean",
        weights: str | Sequence[float] | np.ndarray | Tensor | Score | None = None,
        per: Literal["class", "sample"] | None = None,
        transform: Transform | Sequence[Transform] | None = None,
    ) -> None:
        self.members = list(members)
        self.space: str = space
        self.reduce = reduce
        self.per = per
        steps: Any = () if transform is None else transform
        self.transform: list[Transform] = list(steps) if isinstance(steps, Sequence) else [steps]
        self.score: Score | None = None
        self.weights: Tensor | None = None
        self._check_options()
        self._take_weights(weights)

    def targets(
        self, data: ArrayData | ProxySet | None = None, batch_size: int = 512, *, ids: Ids | None = None
    ) -> Targets:
        """Compute the targets; nothing is cached, so call it once a round and keep the result.

        Parameters
        ----------
        data : ArrayData or ProxySet, optional
            The samples; not needed if all members are stored.
        batch_size : int
            Samples in a forward pass.
        ids : Tensor, optional
            Sample ids, shape [N]; default: all of `data`, or all that a stored member covers.

        Returns
        -------
        Targets
            For the samples that at least one member covers with a positive weight, in the order of `ids`; the
            others are left out, never averaged in as zeros. Space ``logits`` if the ensemble's is and no
            transform follows, else ``probs``.

        Raises
        ------
        KnowledgeError
            No sample is covered, members disagree about the number of classes, or outputs are not finite.
        ScenarioError
            Weights of the wrong shape for these data.
        """
        array = data.data if isinstance(data, ProxySet) else data
        wanted = self._ids(array) if ids is None else _as_ids(ids)
        size = None if array is None else len(array)
        if self.reduce == "mean":
            kept, values = self._mean(array, wanted, batch_size, size)
        else:
            reduce = REDUCES[self.reduce] if isinstance(self.reduce, str) else self.reduce
            kept, values = self._jointly(reduce, array, wanted, batch_size, size)
        if not len(kept):
            raise KnowledgeError("no member of the ensemble covers any of the samples")
        for transform in self.transform:
            values = transform(values)
        space = "logits" if self.space == "logits" and not self.transform else "probs"
        return Targets(values.float(), space, wanted[kept])

    # --- reducing -------------------------------------------------------------------------------------------

    def _mean(
        self, data: ArrayData | None, ids: Tensor, batch_size: int, size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean, one member after the other: covered rows of `ids` [n], and values [n, C]."""
        sums = total = top = torch.empty(0)
        by_class = False
        for k in range(len(self.members)):
            rows, values = self._view(k, data, ids, batch_size)
            if not len(rows):
                continue
            if not sums.numel():
                sums = torch.zeros(len(ids), values.shape[1], dtype=torch.float64)
                total = torch.zeros(len(ids), values.shape[1], dtype=torch.float64)
                top = torch.full((len(ids), 1), -torch.inf, dtype=torch.float64)
            self._same_classes(k, values, sums)
            if self.score is None:
                weight = self._weight(k, ids[rows], values.shape[1], size)
                by_class |= weight.shape[1] > 1
            else:
                # Scores are logarithms that may be large: sums are kept relative to the largest score so far.
                score = self._score(k, values).unsqueeze(1)
                highest = torch.maximum(top[rows], score)
                shrink = torch.exp(top[rows] - highest)
                sums[rows] *= shrink
                total[rows] *= shrink
                top[rows] = highest
                weight = torch.exp(score - highest)
            sums.index_add_(0, rows, values * weight)
            total.index_add_(0, rows, weight.expand_as(values))
            del values  # before the next member computes its own
        kept = (total > 0).all(1).nonzero().squeeze(1) if sums.numel() else torch.empty(0, dtype=torch.long)
        mean = sums[kept] / total[kept]
        # Weights for each class take a mean of distributions off the simplex; others only by rounding.
        return kept, _distribution(mean) if by_class and self.space != "logits" else mean

    def _jointly(
        self, reduce: Reduce, data: ArrayData | None, ids: Tensor, batch_size: int, size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Any reduce, a chunk of samples after the other; returns as `_mean` does."""
        chunk = max(1, JOINT_ROWS // len(self.members) // batch_size) * batch_size
        kept, reduced = [torch.empty(0, dtype=torch.long)], []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            stack = log_weights = torch.empty(0)
            for k in range(len(self.members)):
                rows, values = self._view(k, data, part, batch_size)
                if not len(rows):
                    continue
                if not stack.numel():
                    stack = torch.zeros(len(self.members), len(part), values.shape[1], dtype=torch.float64)
                    log_weights = torch.full(stack.shape[:2], -torch.inf, dtype=torch.float64)
                self._same_classes(k, values, stack[0])
                stack[k, rows] = values
                if self.score is None:
                    log_weights[k, rows] = self._weight(k, part[rows], values.shape[1], size).squeeze(1).log()
                else:
                    log_weights[k, rows] = self._score(k, values)
            if not stack.numel():
                continue
            weights = normalise_log(log_weights) if self.score is not None else log_weights.exp()
            some = (weights > 0).any(0).nonzero().squeeze(1)
            values = reduce(stack[:, some], weights[:, some])
            kept.append(start + some)
            reduced.append(values if self.space == "logits" else _distribution(values))
        return torch.cat(kept), torch.cat(reduced) if reduced else torch.empty(0, 0)

    def _view(self, k: int, data: ArrayData | None, ids: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Rows of `ids` that member k covers [m], and its outputs in the ensemble's space, float64 [m, C]."""
        member = self.members[k]
        rows = member.covers(ids).nonzero().squeeze(1)
        if not len(rows):
            return rows, torch.empty(0, 0)
        values = member.outputs(data, ids[rows], batch_size).double()
        if values.ndim != 2 or len(values) != len(rows):
            raise KnowledgeError(
                f"ensemble member {k} gave outputs of shape {tuple(values.shape)} for {len(rows)} samples"
            )
        if not bool(torch.isfinite(values).all()):
            raise KnowledgeError(f"outputs of ensemble member {k} hold NaN or infinite numbers")
        if self.space == "votes":
            values = Argmax()(values)
        elif self.space == "probs" and member.space == "logits":
            values = values.softmax(1)
        return rows, values

    def _weight(self, k: int, ids: Tensor, classes: int, size: int | None) -> Tensor:
        """Weights of member k, of shape [1, 1], [1, C] or [n, 1]."""
        if self.weights is None:
            return torch.full((1, 1), float(self.members[k].weight), dtype=torch.float64)
        if self.weights.ndim == 1:
            return self.weights[k].view(1, 1)
        row = self.weights[k]
        if self._per(len(row), classes, size) == "class":
            return row.unsqueeze(0)
        if int(ids.max()) >= len(row):
            raise ScenarioError(
                f"ensemble: weights for {len(row)} samples, but sample {int(ids.max())} is asked for"
            )
        return row[ids].unsqueeze(1)

    def _per(self, length: int, classes: int, size: int | None) -> str:
        """Whether 2-D weights are for classes or for samples."""
        fits = {"class": length == classes, "sample": size is None or length == size}
        possible = [per for per in ([self.per] if self.per else fits) if fits[per]]
        if len(possible) == 1:
            if possible == ["class"] and self.reduce != "mean":
                raise ScenarioError("ensemble: weights for each class go with reduce = 'mean' only")
            return possible[0]
        samples = "any number of" if size is None else size
        raise ScenarioError(
            f"ensemble: weights of {length} columns for {classes} classes and {samples} samples",
            hint="say per='class' or per='sample'"
            if possible
            else "give one column for each class or each sample",
        )

    def _score(self, k: int, values: Tensor) -> Tensor:
        """Logarithm of the weight of member k on each sample [m]."""
        assert self.score is not None
        score = self.score(values.softmax(1) if self.space == "logits" else values).double()
        if not bool(torch.isfinite(score).all()):
            raise KnowledgeError(f"scores of ensemble member {k} are not finite")
        return score

    def _same_classes(self, k: int, values: Tensor, others: Tensor) -> None:
        if values.shape[1] != others.shape[1]:
            raise KnowledgeError(
                f"ensemble member {k} has {values.shape[1]} classes, the members before it {others.shape[1]}"
            )

    def _ids(self, data: ArrayData | None) -> Tensor:
        if data is not None:
            return torch.arange(len(data))
        stored = [member.ids for member in self.members if isinstance(member, StoredMember)]
        if len(stored) < len(self.members):
            raise KnowledgeError("an ensemble of models needs data for its targets")
        return torch.cat(stored).unique()

    # --- options --------------------------------------------------------------------------------------------

    def _check_options(self) -> None:
        if not self.members:
            raise KnowledgeError("an ensemble needs at least one member")
        if self.space not in ("logits", "probs", "votes"):
            raise ScenarioError(f"ensemble: space {self.space!r} is unknown", hint="logits, probs or votes")
        if not callable(self.reduce) and self.reduce != "mean" and self.reduce not in REDUCES:
            raise ScenarioError(
                f"ensemble: reduce {self.reduce!r} is unknown",
                hint=did_you_mean(self.reduce, ["mean", *REDUCES]),
            )
        if self.per not in (None, "class", "sample"):
            raise ScenarioError(f"ensemble: per {self.per!r} is unknown", hint="class or sample")
        if self.space == "logits" and any(member.space != "logits" for member in self.members):
            raise ScenarioError(
                "ensemble: a member has probabilities, which cannot be averaged with logits",
                hint="use space = 'probs' or 'votes'",
            )
        for member in self.members:
            if not 0 <= member.weight < float("inf"):
                raise ScenarioError(f"ensemble: a member has weight {member.weight}")
        space = "logits" if self.space == "logits" else "probs"
        for transform in self.transform:
            if space not in transform.takes:
                raise ScenarioError(
                    f"ensemble: {type(transform).__name__} cannot be applied to {space}",
                    hint=f"it takes {' or '.join(sorted(transform.takes))}",
                )
            space = "probs"

    def _take_weights(self, weights: Any) -> None:
        if weights is None:
            if not any(member.weight for member in self.members):
                raise ScenarioError("ensemble: the weights of all members are 0")
            return
        if self.reduce in ("median", "trimmed"):
            raise ScenarioError(
                f"ensemble: reduce {self.reduce!r} takes no weights: it counts every member once"
            )
        if isinstance(weights, str):
            rules = {"entropy": "softmax", "inverse-entropy": "inverse"}
            if weights not in rules:
                raise ScenarioError(
                    f"ensemble: weights {weights!r} are unknown", hint=did_you_mean(weights, rules)
                )
            weights = entropy_score(rules[weights])
        if callable(weights) and not isinstance(weights, Tensor):
            if self.space == "votes":
                raise ScenarioError(
                    "ensemble: votes have no entropy to weigh them by", hint="use space = 'probs'"
                )
            self.score = cast(Score, weights)
            return
        table = torch.as_tensor(weights).double()
        if table.ndim not in (1, 2) or len(table) != len(self.members):
            raise ScenarioError(
                f"ensemble: weights of shape {tuple(table.shape)} for {len(self.members)} members",
                hint="[K], [K, C] or [K, N]",
            )
        if not bool(torch.isfinite(table).all()) or bool((table < 0).any()) or not bool((table > 0).any()):
            raise ScenarioError("ensemble: weights must be finite, not negative, and not all 0")
        self.weights = table


def _distribution(values: Tensor) -> Tensor:
    """Rescale rows to sum to one; a row of zeros (members that have no class in common) becomes uniform."""
    total = values.sum(1, keepdim=True)
    return torch.where(total > 0, values / total.clamp(min=TINY), 1.0 / values.shape[1])


def _as_ids(ids: Ids) -> Tensor:
    if isinstance(ids, torch.Tensor):
        return ids.cpu().long()
    return torch.tensor(np.asarray(ids), dtype=torch.long)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ScenarioError(f"{name} must be > 0, is {value}")


def _check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    missing = {name for name, _ in model.named_parameters()} - state.keys()
    extra = state.keys() - own.keys()
    if missing or extra:
        raise KnowledgeError(
            f"weights do not fit the model: missing {sorted(missing)[:3]}, unexpected {sorted(extra)[:3]}"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise KnowledgeError(
                f"weights do not fit the model: {name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
            )
