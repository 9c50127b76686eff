"""The student: a client's model with everything that its local training may touch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.client.shared import Frozen, SharedModel
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, State, Weights
from fedkd.seeds import Purpose, rng, torch_rng
from fedkd.students import collect, predict, snapshot

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.data.partition import Split
    from fedkd.data.proxy import ProxySet
    from fedkd.models import Outputs
    from fedkd.scenario import Client

Teacher = Callable[[Tensor], "Outputs"]
"""What gives targets for a batch: a `Frozen` state of the student's own model, or any other frozen module."""


@dataclass
class Student:
    """One client during one message.

    Parameters
    ----------
    partition_id : int
        The client's number in the federation.
    round : int
        Communication round, from 1; 0 before the first.
    arch : str
        Name of the architecture.
    shared : SharedModel
        The model that the clients of this architecture share in a process.
    away : dict of str to Tensor, optional
        The student's state while it is not in the shared model; None while it is. Maybe read-only memory: replaced as
        a whole, never written to.
    data : ArrayData
        All training data of the federation; the client's own are ``data`` at ``shard.train``. One that flips labels
        sees wrong ones.
    shard : Split
        Ids of the client's samples for training, validation and test.
    test : ArrayData
        The global test set, for evaluation alone.
    client : Client
        The scenario's client section.
    seed : int
        The run's seed.
    num_classes : int
        Classes of the task.
    device : torch.device
        Where the model is.
    augment : str
        Augmentation of private training images.
    proxy : ProxySet, optional
        The proxy set, if the method lets clients see it.
    build : callable, optional
        Returns a module of another architecture of the scenario by its name, for methods in which a client runs more
        than its own model. Every client of the process gets the same one: load weights before use.
    trainer : str
        ``sequential``, or ``vectorised`` to be trained together with the other clients of a cohort where that is
        possible.
    graphs : bool
        Whether a GPU may replay its steps from a graph.
    max_steps : int
        Most optimiser steps of one call of the trainer, for measuring; 0 = as many as the scenario says.
    memory : dict of str to Tensor
        What the client keeps from round to round.
    knowledge : Knowledge
        What the server sent in this message.
    received : dict of str to Tensor, optional
        The weights that were loaded from it.
    teachers : list of callable
        Frozen teachers of this round: from a batch to its outputs.
    public : Tensor, optional
        Samples of the proxy set that are learnt together with the client's own in this round, int64 [n].
    beside : int
        Public samples that are added to the private batch of each step, whose samples are those without them; 0 = all
        of them are shuffled among the private ones.
    tally : dict of str to Tensor
        Sums over the steps of this round, from the method's `observe`.
    metrics : dict of str to float
        Scalars for the log.
    samples : int
        Samples in the batches that it was trained on in this message.
    """

    partition_id: int
    round: int
    arch: str
    shared: SharedModel
    away: State | None
    data: ArrayData
    shard: Split
    test: ArrayData
    client: Client
    seed: int
    num_classes: int
    device: torch.device
    augment: str = "none"
    proxy: ProxySet | None = None
    build: Callable[[str], nn.Module] | None = None
    trainer: str = "sequential"
    graphs: bool = False
    max_steps: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    knowledge: Knowledge = field(default_factory=Knowledge)
    received: State | None = None
    teachers: list[Teacher] = field(default_factory=list)
    public: Tensor | None = None
    beside: int = 0
    tally: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_: object) -> None:
        self.shared.leave(self)

    @property
    def model(self) -> nn.Module:
        """The student's model, with its state in it. Other clients use the same one when this message is answered."""
        return self.shared.enter(self)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The student's state as it is now; for reading."""
        return self.shared.tensors if self.away is None else self.away

    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the student's state, or a part of it, by tensors that nobody will change."""
        if self.away is None:
            self.shared.fill(state)
        else:
            self.away = {**self.away, **state}

    def reset(self) -> None:
        """Go back to the weights with which every client of the architecture starts."""
        self.set_state(self.shared.initial)

    @property
    def num_examples(self) -> int:
        """Training samples of the client."""
        return len(self.shard.train)

    @property
    def channels_last(self) -> bool:
        """Whether image batches use the channels-last layout."""
        return self.client.channels_last

    def rng(self, purpose: Purpose = Purpose.METHOD_CLIENT) -> np.random.Generator:
        """Return this client's NumPy generator for a purpose in this round."""
        return rng(self.seed, purpose, self.round, self.partition_id)

    def torch_rng(self, purpose: Purpose = Purpose.METHOD_CLIENT) -> torch.Generator:
        """Return this client's PyTorch generator for a purpose in this round, on the student's device."""
        return torch_rng(self.seed, purpose, self.round, self.partition_id, self.device)

    def load(self, weights: Weights) -> None:
        """Load received weights into the student.

        Raises
        ------
        KnowledgeError
            The weights are of another architecture, do not fit, or are not finite.
        """
        self._check(weights)
        self.set_state(weights.state)
        self.received = weights.state

    def teach(self, weights: Weights) -> Frozen:
        """Freeze other weights and add them to the teachers.

        Raises
        ------
        KnowledgeError
            As in `load`.
        """
        self._check(weights)
        teacher = self.frozen(weights.state)
        self.teachers.append(teacher)
        return teacher

    def frozen(self, state: Mapping[str, Tensor]) -> Frozen:
        """Return a teacher with the given state; what is missing in it, buffers at home, is as the student has it."""
        rest = {name: tensor.clone() for name, tensor in self.state.items() if name not in state}
        return Frozen(self.shared, {**rest, **state})

    def weights(self, *, copy: bool = True) -> Weights:
        """Return the student's weights as they travel.

        Parameters
        ----------
        copy : bool
            False: they may be memory that others read too, and must not be changed. Default: the caller's own.
        """
        state = {name: self.state[name] for name in self.shared.travelling}
        if copy or self.away is None:
            return Weights(snapshot(state), self.arch)
        return Weights({name: tensor.cpu().contiguous() for name, tensor in state.items()}, self.arch)

    def predict(self, data: ArrayData, ids: Tensor | np.ndarray) -> Tensor:
        """Return logits in evaluation mode.

        Parameters
        ----------
        data : ArrayData
            Data to predict on.
        ids : Tensor or ndarray
            Sample ids in `data`, shape [n].

        Returns
        -------
        Tensor
            Float32 on the CPU, shape [n, C].
        """
        if not len(ids):
            return torch.empty(0, self.num_classes)
        return predict(self.model, data, ids, device=self.device, channels_last=self.channels_last)

    def collect(
        self, data: ArrayData, ids: Tensor | np.ndarray, pick: Callable[[Outputs], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return what `pick` takes of the outputs in evaluation mode, for at least one sample; see `predict`."""
        return collect(self.model, data, ids, pick, device=self.device, channels_last=self.channels_last)

    def _check(self, weights: Weights) -> None:
        if weights.arch != self.arch:
            raise KnowledgeError(f"weights of {weights.arch} for a {self.arch}")
        self.shared.check(weights, self.round)
