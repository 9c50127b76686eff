"""The student: a client's model with everything that its local training may touch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, State, Weights
from fedkd.seeds import Purpose, rng, torch_rng
from fedkd.students import predict, snapshot, travelling

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.data.partition import Split
    from fedkd.data.proxy import ProxySet
    from fedkd.scenario import Client


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
    model : nn.Module
        The student's model; shared by the clients of a process, so its state is set for every message.
    data : ArrayData
        All training data of the federation; the client's own are ``data`` at ``shard.train``.
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
    buffers : str
        Norm-buffer policy, ``all`` or ``params_only``.
    device : torch.device
        Where the model is.
    augment : str
        Augmentation of private training images.
    proxy : ProxySet, optional
        The proxy set, if the method lets clients see it.
    memory : dict of str to Tensor
        What the client keeps from round to round.
    knowledge : Knowledge
        What the server sent in this message.
    received : dict of str to Tensor, optional
        The weights that were loaded from it.
    teachers : list of nn.Module
        Frozen teachers of this round.
    tally : dict of str to Tensor
        Sums over the steps of this round, from the method's `observe`.
    metrics : dict of str to float
        Scalars for the log.
    """

    partition_id: int
    round: int
    arch: str
    model: nn.Module
    data: ArrayData
    shard: Split
    test: ArrayData
    client: Client
    seed: int
    num_classes: int
    buffers: str
    device: torch.device
    augment: str = "none"
    proxy: ProxySet | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    knowledge: Knowledge = field(default_factory=Knowledge)
    received: State | None = None
    teachers: list[nn.Module] = field(default_factory=list)
    tally: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

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
        self.model.load_state_dict(weights.state, strict=False)
        self.received = weights.state

    def teach(self, weights: Weights) -> nn.Module:
        """Freeze a copy of the model with other weights and add it to the teachers.

        Raises
        ------
        KnowledgeError
            As in `load`.
        """
        self._check(weights)
        teacher = self.frozen(weights.state)
        self.teachers.append(teacher)
        return teacher

    def frozen(self, state: State) -> nn.Module:
        """Return a copy of the model with the given state, in evaluation mode and without gradients."""
        teacher = copy.deepcopy(self.model)
        teacher.load_state_dict(state, strict=False)
        return teacher.eval().requires_grad_(False)

    def weights(self) -> Weights:
        """Return the student's weights as they travel."""
        return Weights(snapshot(travelling(self.model, self.buffers)), self.arch)

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

    def _check(self, weights: Weights) -> None:
        if weights.arch != self.arch:
            raise KnowledgeError(f"weights of {weights.arch} for a {self.arch}")
        weights.check(travelling(self.model, self.buffers))
