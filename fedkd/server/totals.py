"""Totals: what a method needs of a round's uploads when that is a sum, so that workers can make it in parts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads import ClassOutputs, LabelCounts, ProxyOutputs
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


class Several(Total):
    """Several sums of the same uploads.

    Parameters
    ----------
    **parts : Total
        Empty sums, found again in ``parts`` by name. An upload that one of them refuses is added to none.
    """

    def __init__(self, **parts: Any) -> None:
        self.parts: dict[str, Any] = parts

    def empty(self) -> Self:
        """Return another one with the same settings."""
        return type(self)(**{name: part.empty() for name, part in self.parts.items()})

    def check(self, upload: Upload) -> None:
        """Refuse what any of the sums refuses."""
        for part in self.parts.values():
            part.check(upload)

    def add(self, upload: Upload) -> None:
        """Add an upload to all of them."""
        for part in self.parts.values():
            part.add(upload)

    def add_all(self, uploads: Sequence[Upload]) -> None:
        """Add uploads to all of them."""
        for part in self.parts.values():
            part.add_all(uploads)

    def merge(self, other: Self) -> None:
        """Merge sum by sum."""
        for name, part in self.parts.items():
            part.merge(other.parts[name])


class Table(Total):
    """An item of every client, by partition id, in ``rows``."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}

    @abstractmethod
    def item(self, upload: Upload) -> Any:
        """Return what is kept of an upload."""

    def add(self, upload: Upload) -> None:
        """Keep an upload's item."""
        self.rows[upload.partition_id] = self.item(upload)

    def merge(self, other: Self) -> None:
        """Keep those of other clients."""
        self.rows = {**self.rows, **other.rows}


class LabelTable(Table):
    """Label counts of every client.

    Parameters
    ----------
    num_classes : int
        Classes of the task.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def check(self, upload: Upload) -> None:
        """Refuse counts of other classes, negative ones, and such as do not sum to the examples behind the upload."""
        upload.knowledge.get(LabelCounts).check(self.num_classes, upload.num_examples)

    def item(self, upload: Upload) -> Tensor:
        """Return the counts, int64 [C]."""
        return upload.knowledge.get(LabelCounts).counts


class ClassTable(Table):
    """Mean outputs by class of every client.

    Parameters
    ----------
    num_classes : int
        Classes of the task.
    space : str
        ``logits`` or ``probs``.
    """

    def __init__(self, num_classes: int, space: str) -> None:
        super().__init__()
        self.num_classes, self.space = num_classes, space

    def check(self, upload: Upload) -> None:
        """Refuse tables of another size, space, or with numbers that are not finite."""
        upload.knowledge.get(ClassOutputs).check(self.num_classes, self.space)

    def item(self, upload: Upload) -> ClassOutputs:
        """Return the table."""
        return upload.knowledge.get(ClassOutputs)
