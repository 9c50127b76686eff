"""Totals: what a method needs of a round's uploads when that is a sum, so that workers can make it in parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads import ProxyOutputs
from fedkd.server.uploads import Upload


class Total(ABC):
    """A sum over uploads that can be made in parts and merged; starts empty, can be copied and pickled.

    Parts are made cohort by cohort and merged pairwise (see `fedkd.cohorts.Parts`), on every engine; accumulate in
    float64, and the bits depend neither on the number of workers nor on which of them died.
    """

    def empty(self) -> Self:
        """Return another sum with the same settings; called on an empty one. Default: a deep copy."""
        return copy.deepcopy(self)

    @abstractmethod
    def check(self, upload: Upload) -> None:
        """Refuse an upload that cannot be added; runs before `add`, on the worker.

        Raises
        ------
        KnowledgeError
            With the reason; the upload is counted as refused and the round goes on.
        """

    @abstractmethod
    def add(self, upload: Upload) -> None:
        """Add an upload that `check` has accepted."""

    def add_all(self, uploads: Sequence[Upload]) -> None:
        """Add uploads in order, with the bits of `add`. Default: one by one."""
        for upload in uploads:
            self.add(upload)

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add what another part has summed; `other` is not used afterwards, and may become a part of this."""


class OutputMeans(Total):
    """Mean of the clients' outputs on samples of the proxy set, each client counting once.

    Parameters
    ----------
    ids : Tensor
        Samples that every client was asked for, int64 [n].
    num_classes : int
        Columns of the outputs.
    space : str
        ``logits`` or ``probs``.
    """

    def __init__(self, ids: Tensor, num_classes: int, space: str) -> None:
        self.ids, self.num_classes, self.space = ids, num_classes, space
        self.sums = torch.zeros(len(ids), num_classes, dtype=torch.float64)
        self.count = 0

    def check(self, upload: Upload) -> None:
        """Refuse outputs for other samples, of another size or space, or that are not finite."""
        upload.knowledge.get(ProxyOutputs).check(self.num_classes, self.ids, self.space)

    def add(self, upload: Upload) -> None:
        """Add an upload's outputs."""
        self.sums += upload.knowledge.get(ProxyOutputs).values.double()
        self.count += 1

    def merge(self, other: Self) -> None:
        """Add the sums of other clients."""
        self.sums = self.sums + other.sums
        self.count += other.count

    def result(self) -> Tensor:
        """Return the mean, float64 [n, C].

        Raises
        ------
        KnowledgeError
            There were no uploads.
        """
        if not self.count:
            raise KnowledgeError("nothing to average: no uploads")
        return self.sums / self.count
