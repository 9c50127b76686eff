"""Outputs of models: for samples of the proxy set, and for classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, check_float32, check_outputs


@dataclass(frozen=True)
class ProxyOutputs(Payload):
    """Outputs of a model on samples of the proxy set. Bytes: 4·n·C, and 4·n for the sample ids.

    Parameters
    ----------
    ids : Tensor
        Sample ids in the proxy set, int64, shape [n].
    values : Tensor
        Outputs, float32, shape [n, C].
    space : str
        ``logits`` or ``probs``.
    """

    ids: Tensor
    values: Tensor
    space: str
    kind: str = "proxy-outputs"

    @property
    def nbytes(self) -> int:
        """4·n·C + 4·n."""
        return 4 * self.values.numel() + 4 * self.ids.numel()

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel; ids as 32-bit integers."""
        return {
            "ids": self.ids.cpu().numpy().astype(np.int32),
            "values": self.values.detach().float().cpu().contiguous().numpy(),
        }

    def meta(self) -> dict[str, Any]:
        """Space of the values."""
        return {"type": "ProxyOutputs", "space": self.space}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> ProxyOutputs:
        """Rebuild from arrays and meta."""
        ids = torch.from_numpy(arrays["ids"].astype(np.int64))
        return cls(ids, torch.from_numpy(arrays["values"]), str(meta["space"]))

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> ProxyOutputs:
        """Return other outputs for the same samples."""
        return replace(self, values=change(self.values, self.space))

    def check(self, num_classes: int, ids: Tensor, space: str) -> None:
        """Refuse outputs that were not asked for.

        Parameters
        ----------
        num_classes : int
            Columns that the values must have.
        ids : Tensor
            The sample ids that were asked for, in order, shape [n].
        space : str
            The space that was asked for.

        Raises
        ------
        KnowledgeError
            Other ids, shape or space, numbers that are not finite or absurdly large, or rows that are no distributions.
        """
        if self.space != space:
            raise KnowledgeError(f"wrong space: {self.space}, not {space}")
        if not torch.equal(self.ids, ids):
            raise KnowledgeError("wrong sample ids: not the ones that were asked for")
        if self.values.shape != (len(ids), num_classes):
            raise KnowledgeError(f"wrong shape: {tuple(self.values.shape)}, not {(len(ids), num_classes)}")
        check_outputs(self.values, "outputs")
        if space == "probs":
            total = self.values.sum(dim=1)
            if bool((self.values < 0).any()) or bool(((total - 1).abs() > 1e-3).any()):
                raise KnowledgeError("rows are no probability distributions")


@dataclass(frozen=True)
class ClassOutputs(Payload):
    """Mean output for each true class. Bytes: 4·C² and 4·C for the counts.

    Parameters
    ----------
    means : Tensor
        Row c is the mean output over samples of class c, float32, shape [C, C]; zero where the count is 0.
    counts : Tensor
        Samples behind each row, float32, shape [C]; 0 marks a class that is missing.
    space : str
        ``logits`` or ``probs``.
    """

    means: Tensor
    counts: Tensor
    space: str
    kind: str = "class-outputs"

    @property
    def nbytes(self) -> int:
        """4·C² + 4·C."""
        return 4 * self.means.numel() + 4 * self.counts.numel()

    @property
    def present(self) -> Tensor:
        """Classes with at least one sample, bool, shape [C]."""
        return self.counts > 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel."""
        return {
            "means": self.means.detach().float().cpu().contiguous().numpy(),
            "counts": self.counts.detach().float().cpu().contiguous().numpy(),
        }

    def meta(self) -> dict[str, Any]:
        """Space of the means."""
        return {"type": "ClassOutputs", "space": self.space}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> ClassOutputs:
        """Rebuild from arrays and meta."""
        return cls(torch.from_numpy(arrays["means"]), torch.from_numpy(arrays["counts"]), str(meta["space"]))

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> ClassOutputs:
        """Return other means for the classes that are present."""
        means = torch.where(self.present.unsqueeze(1), change(self.means, self.space), self.means)
        return replace(self, means=means)

    def check(self, num_classes: int, space: str) -> None:
        """Refuse a table of another size or space, with negative counts, or numbers not finite or absurdly large.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.space != space:
            raise KnowledgeError(f"wrong space: {self.space}, not {space}")
        if self.means.shape != (num_classes, num_classes) or self.counts.shape != (num_classes,):
            raise KnowledgeError(
                f"wrong classes: table {tuple(self.means.shape)} and counts {tuple(self.counts.shape)} "
                f"for {num_classes} classes"
            )
        check_outputs(self.means, "class means")
        check_float32(self.counts, "class counts")
        if bool((self.counts < 0).any()):
            raise KnowledgeError("negative class counts")
        if space == "probs":
            rows = self.means[self.present]
            if bool((rows < 0).any()) or bool(((rows.sum(1) - 1).abs() > 1e-3).any()):
                raise KnowledgeError("rows are no probability distributions")


@dataclass(frozen=True)
class Request(Payload):
    """Samples of the proxy set that the server asks outputs for. Bytes: 4·n.

    Parameters
    ----------
    ids : Tensor
        Sample ids in the proxy set, int64, shape [n].
    """

    ids: Tensor
    kind: str = "request"

    @property
    def nbytes(self) -> int:
        """4·n."""
        return 4 * self.ids.numel()

    def arrays(self) -> dict[str, np.ndarray]:
        """Ids as 32-bit integers."""
        return {"ids": self.ids.cpu().numpy().astype(np.int32)}

    def meta(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": "Request"}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Request:
        """Rebuild from arrays and meta."""
        return cls(torch.from_numpy(arrays["ids"].astype(np.int64)))

    def check(self, size: int) -> None:
        """Refuse ids outside a proxy set of `size` samples.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.ids.numel() and (int(self.ids.min()) < 0 or int(self.ids.max()) >= size):
            raise KnowledgeError(f"requested sample ids outside the proxy set of {size}")
