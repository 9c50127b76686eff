"""Several teachers reduced to one target for each sample: members × weights × space × reduce × transform.

Kinds of members: `ModelMember`, a state that is run on the samples here, `ComputedMember`, one that is run on the
workers, and `StoredMember`, outputs that a client has sent. Means are streamed: beyond the accumulator, an ensemble
holds the outputs of one member at a time, and workers are at most a few ahead, so memory does not grow with the number
of teachers. Everything is accumulated in float64, in the order of the members.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, ScenarioError, UncoveredError
from fedkd.server.members import Member, StoredMember, stream
from fedkd.server.reduces import REDUCES, Reduce
from fedkd.server.targets import Ids, Targets, as_ids
from fedkd.server.transforms import Argmax, Transform
from fedkd.server.weighting import Score, entropy_score, normalise_log
from fedkd.students import SHARD
from fedkd.wording import did_you_mean

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData

log = logging.getLogger(__name__)

JOINT_ROWS = 2**18  # members × samples that a reduce which needs all members at once may hold; bounds its memory


class Ensemble:
    """Teachers and how they become one target.

    Parameters
    ----------
    members : sequence of Member
        The teachers, at least one. Their order changes targets by rounding alone.
    space : str
        What is reduced: ``logits``, ``probs`` (softmax of logits at `temperature`), or ``votes`` (one-hot argmax).
    reduce : str or callable
        ``mean``, ``median`` and ``trimmed`` (of every coordinate; a fifth of the weight off at each end),
        ``geometric`` (median), ``spectral`` (filter), or any `Reduce`, such as ``trimmed(0.1)``. Medians of
        probabilities are renormalised.
    weights : optional
        None for the members' own ``weight``; shape [K]; [K, C] for each class; [K, N] for each sample of the
        data, in the order of sample ids; ``entropy`` (softmax over members of 1/H, FedGEMS) or
        ``inverse-entropy``; or a `Score`, the logarithm of a member's weight from its probabilities. They
        need not sum to one.
    per : str, optional
        ``class`` or ``sample``: what the second dimension of weights is. Needed without data, or
        if there are as many samples as classes.
    temperature : float
        Temperature of the softmax of members' logits in the space ``probs``.
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
        reduce: Literal["mean", "median", "trimmed", "geometric", "spectral"] | Reduce = "mean",
        weights: str | Sequence[float] | np.ndarray | Tensor | Score | None = None,
        per: Literal["class", "sample"] | None = None,
        temperature: float = 1.0,
        transform: Transform | Sequence[Transform] | None = None,
    ) -> None:
        self.members = list(members)
        self.space: str = space
        self.reduce = reduce
        self.per = per
        self.temperature = temperature
        steps: Any = () if transform is None else transform
        self.transform: list[Transform] = list(steps) if isinstance(steps, Sequence) else [steps]
        self.score: Score | None = None
        self.weights: Tensor | None = None
        self._check_options()
        self._take_weights(weights)

    def targets(
        self, data: ArrayData | ProxySet | None = None, batch_size: int = 0, *, ids: Ids | None = None
    ) -> Targets:
        """Compute the targets; keep them, as only members that the workers run remember their outputs.

        Parameters
        ----------
        data : ArrayData or ProxySet, optional
            The samples; not needed if all members are stored.
        batch_size : int
            Samples in a forward pass; 0 = as suits the device.
        ids : Tensor, optional
            Sample ids, shape [N]; default: all of `data`, or all that a stored member covers.

        Returns
        -------
        Targets
            For the samples that at least one member covers with a positive weight, in the order of `ids`; the
            others are left out, never averaged in as zeros. A sample for which a member's outputs are not finite
            is not covered by it. Space ``logits`` if the ensemble's is and no transform follows, else ``probs``.

        Raises
        ------
        UncoveredError
            No sample is covered.
        KnowledgeError
            Members disagree about the number of classes, or outputs have the wrong shape.
        ScenarioError
            Weights of the wrong shape for these data.
        """
        array = data.data if isinstance(data, ProxySet) else data
        wanted = self._ids(array) if ids is None else as_ids(ids)
        size = None if array is None else len(array)
        if self.reduce == "mean":
            kept, values = self._mean(array, wanted, batch_size, size)
        else:
            reduce = REDUCES[self.reduce] if isinstance(self.reduce, str) else self.reduce
            kept, values = self._jointly(reduce, array, wanted, batch_size, size)
        if not len(kept):
            raise UncoveredError("no member of the ensemble covers any of the samples with finite outputs")
        for transform in self.transform:
            values = transform(values)
        space = "logits" if self.space == "logits" and not self.transform else "probs"
        return Targets(values.float(), space, wanted[kept])

    # --- reducing -------------------------------------------------------------------------------------------

    def _mean(self, data: ArrayData | None, ids: Tensor, batch_size: int, size: int | None) -> tuple[Tensor, Tensor]:
        """Weighted mean, one member after the other: covered rows of `ids` [n], and values [n, C]."""
        sums = total = top = torch.empty(0)
        by_class = False
        for k, rows, values in self._views(data, ids, batch_size):
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
            del values  # before the next member has its own
        kept = (total > 0).all(1).nonzero().squeeze(1) if sums.numel() else torch.empty(0, dtype=torch.long)
        mean = sums[kept] / total[kept]
        # Weights for each class take a mean of distributions off the simplex; others only by rounding.
        return kept, _distribution(mean) if by_class and self.space != "logits" else mean

    def _jointly(
        self, reduce: Reduce, data: ArrayData | None, ids: Tensor, batch_size: int, size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Any reduce, a chunk of samples after the other; returns as `_mean` does."""
        batch = batch_size or SHARD
        chunk = max(1, JOINT_ROWS // len(self.members) // batch) * batch
        kept, reduced = [torch.empty(0, dtype=torch.long)], []
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            stack = log_weights = torch.empty(0)
            for k, rows, values in self._views(data, part, batch_size):
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

    def _views(self, data: ArrayData | None, ids: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield, for every member that covers any of `ids`, its number, the rows [m], and its view of them."""
        outputs = stream(self.members, data, ids, batch_size)
        for k, member in enumerate(self.members):
            rows, values = next(outputs)
            if len(rows):
                rows, values = self._finite(k, rows, values)
            if len(rows):
                values = self._view(member, values)
                yield k, rows, values
            del values

    def _finite(self, k: int, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return what of a member's outputs is finite: weights that are may give outputs that are not."""
        if values.ndim != 2 or len(values) != len(rows):
            raise KnowledgeError(
                f"ensemble member {k} gave outputs of shape {tuple(values.shape)} for {len(rows)} samples"
            )
        finite = torch.isfinite(values).all(1)
        if bool(finite.all()):
            return rows, values
        log.warning(
            "outputs of ensemble member %d are not finite for %d of %d samples and are left out there",
            *(k, int((~finite).sum()), len(finite)),
        )
        return rows[finite], values[finite]

    def _view(self, member: Member, values: Tensor) -> Tensor:
        """Return a member's outputs in the ensemble's space, float64 [m, C]."""
        values = values.double()
        if self.space == "votes":
            return Argmax()(values)
        if self.space == "probs" and member.space == "logits":
            return (values / self.temperature).softmax(1)
        return values

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
            raise ScenarioError(f"ensemble: weights for {len(row)} samples, but sample {int(ids.max())} is asked for")
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
            hint="say per='class' or per='sample'" if possible else "give one column for each class or each sample",
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
        if not 0 < self.temperature < float("inf"):
            raise ScenarioError(f"ensemble: temperature must be > 0, is {self.temperature}")
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
        if isinstance(weights, str):
            rules = {"entropy": "softmax", "inverse-entropy": "inverse"}
            if weights not in rules:
                raise ScenarioError(f"ensemble: weights {weights!r} are unknown", hint=did_you_mean(weights, rules))
            weights = entropy_score(rules[weights])
        if callable(weights) and not isinstance(weights, Tensor):
            if self.space == "votes":
                raise ScenarioError("ensemble: votes have no entropy to weigh them by", hint="use space = 'probs'")
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
    return torch.where(total > 0, values / total.clamp(min=1e-12), 1.0 / values.shape[1])
