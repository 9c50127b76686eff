"""Teachers of an ensemble: models that are run on the samples, and outputs that clients have sent.

Models that the workers run are in `fedkd.server.compute`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedkd.errors import KnowledgeError
from fedkd.server.targets import Ids, Targets, as_ids
from fedkd.students import predict

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData


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

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 0) -> Tensor:
        """Return the member's outputs in its space.

        Parameters
        ----------
        data : ArrayData
            Data that the ids refer to; None if all members are stored.
        ids : Tensor
            Ids of samples that the member covers, int64, shape [n].
        batch_size : int
            Samples in a forward pass; 0 = as suits the device.

        Returns
        -------
        Tensor
            Shape [n, C], on the CPU.
        """
        raise NotImplementedError

    @classmethod
    def stream(
        cls, members: Sequence[Any], data: ArrayData | None, ids: Tensor, batch_size: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what `stream` yields, for members of this class. Default: `outputs` of one after the other."""
        for member in members:
            rows = member.covers(ids).nonzero().squeeze(1)
            yield rows, member.outputs(data, ids[rows], batch_size) if len(rows) else torch.empty(0, 0)


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
    precision : str
        ``fp32``, or ``bf16`` for the forward pass.

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
        precision: str = "fp32",
    ) -> None:
        if state is not None:
            check_fit(model, state)
        self.model, self.state, self.weight = model, state, weight
        self.device, self.channels_last, self.precision = device, channels_last, precision

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 0) -> Tensor:
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
            precision=self.precision,
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
        stored = Targets(values.detach().cpu(), space, as_ids(ids))  # the same checks
        self.ids, order = stored.ids.sort()
        if bool((self.ids[1:] == self.ids[:-1]).any()):
            raise KnowledgeError("stored outputs hold a sample id twice")
        self.values, self.space, self.weight = stored.values[order], space, weight

    def covers(self, ids: Tensor) -> Tensor:
        """Return which samples are stored, bool, shape [n]."""
        return torch.isin(ids, self.ids)

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 0) -> Tensor:
        """Return the stored rows of these samples.

        Raises
        ------
        KnowledgeError
            Outputs of a sample are not stored.
        """
        if not bool(self.covers(ids).all()):
            raise KnowledgeError("outputs are not stored for all of these samples")
        return self.values[torch.searchsorted(self.ids, ids)]


def stream(
    members: Sequence[Member], data: ArrayData | None, ids: Tensor, batch_size: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, member after member, the rows of `ids` that it covers [m], and its outputs for them [m, C].

    Members that are computed elsewhere work ahead of whoever reads; all others wait to be asked, so nobody holds more
    than the outputs of a few members.

    Parameters
    ----------
    members : sequence of Member
        In the order in which they are yielded.
    data, ids, batch_size
        As in `Member.outputs`.
    """
    for kind, group in itertools.groupby(members, key=type):
        yield from kind.stream(list(group), data, ids, batch_size)


def check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a state that lacks a parameter of the model, has what the model has not, or other shapes.

    Raises
    ------
    KnowledgeError
        Says what does not fit.
    """
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
