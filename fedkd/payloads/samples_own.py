"""Knowledge about a client's own samples, which leave it as feature maps and logits but never as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, check_outputs


@dataclass(frozen=True)
class FeatureMaps(Payload):
    """Feature maps, logits and labels of a client's samples. Bytes: 4·n·F + 4·n·C, and 4·n each for labels and ids.

    Labels travel as they are, and from feature maps of early layers much of an image can be reconstructed.

    Parameters
    ----------
    ids : Tensor
        Sample ids, int64, shape [n]; the same for a sample in every round.
    features : Tensor
        Outputs of a layer, float32, shape [n, ...] with F numbers a sample.
    logits : Tensor
        The client's own outputs, float32, shape [n, C].
    labels : Tensor
        True classes, int64, shape [n].
    """

    ids: Tensor
    features: Tensor
    logits: Tensor
    labels: Tensor
    kind: str = "feature-maps"

    @property
    def nbytes(self) -> int:
        """4·n·F + 4·n·C + 8·n."""
        return 4 * (self.features.numel() + self.logits.numel() + self.labels.numel() + self.ids.numel())

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel; ids and labels as 32-bit integers."""
        return {
            "ids": _int32(self.ids),
            "features": _float32(self.features),
            "logits": _float32(self.logits),
            "labels": _int32(self.labels),
        }

    def meta(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": "FeatureMaps"}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> FeatureMaps:
        """Rebuild from arrays and meta."""
        return cls(
            _int64(arrays["ids"]),
            torch.from_numpy(arrays["features"]),
            torch.from_numpy(arrays["logits"]),
            _int64(arrays["labels"]),
        )

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> FeatureMaps:
        """Return other logits for the same samples."""
        return replace(self, logits=change(self.logits, "logits"))

    def check(self, num_classes: int, shape: tuple[int, ...], samples: int) -> None:
        """Refuse maps of another shape, labels that are none, repeated ids, or numbers not finite or too large.

        Parameters
        ----------
        num_classes : int
            C.
        shape : tuple of int
            Of one sample's feature map.
        samples : int
            Samples that there must be.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        _check_ids(self.ids)
        if len(self.ids) != samples:
            raise KnowledgeError(f"feature maps of {len(self.ids)} samples from a client that counts {samples}")
        if self.features.shape != (samples, *shape):
            raise KnowledgeError(f"wrong shape: feature maps {tuple(self.features.shape)}, not {(samples, *shape)}")
        _check_logits(self.logits, samples, num_classes)
        check_outputs(self.features, "feature maps")
        if self.labels.shape != (samples,) or bool(((self.labels < 0) | (self.labels >= num_classes)).any()):
            raise KnowledgeError(f"labels that are no classes from 0 to {num_classes - 1}, one for each sample")


@dataclass(frozen=True)
class SampleKnowledge(Payload):
    """Logits for samples that the receiver owns, by sample id. Bytes: 4·n·C, and 4·n for the ids.

    Parameters
    ----------
    ids : Tensor
        Sample ids, int64, shape [n], as their owner calls them.
    logits : Tensor
        Outputs of somebody else's model, float32, shape [n, C].
    """

    ids: Tensor
    logits: Tensor
    kind: str = "sample-knowledge"

    @property
    def nbytes(self) -> int:
        """4·n·C + 4·n."""
        return 4 * self.logits.numel() + 4 * self.ids.numel()

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel; ids as 32-bit integers."""
        return {"ids": _int32(self.ids), "logits": _float32(self.logits)}

    def meta(self) -> dict[str, Any]:
        """Nothing but the type."""
        return {"type": "SampleKnowledge"}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> SampleKnowledge:
        """Rebuild from arrays and meta."""
        return cls(_int64(arrays["ids"]), torch.from_numpy(arrays["logits"]))

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> SampleKnowledge:
        """Return other logits for the same samples."""
        return replace(self, logits=change(self.logits, "logits"))

    def check(self, num_classes: int, own: Tensor) -> None:
        """Refuse logits for samples of others, of another size, not finite or absurdly large.

        Parameters
        ----------
        num_classes : int
            C.
        own : Tensor
            Ids of the samples that the logits may be about.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        _check_ids(self.ids)
        if not bool(torch.isin(self.ids, own).all()):
            raise KnowledgeError("logits for samples that the client does not have")
        _check_logits(self.logits, len(self.ids), num_classes)


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 1 or len(ids.unique()) != len(ids):
        raise KnowledgeError("wrong sample ids: each sample must be named once")


def _check_logits(logits: Tensor, samples: int, num_classes: int) -> None:
    if logits.shape != (samples, num_classes):
        raise KnowledgeError(f"wrong shape: logits {tuple(logits.shape)}, not {(samples, num_classes)}")
    check_outputs(logits, "logits")


def _int32(values: Tensor) -> np.ndarray:
    return values.cpu().numpy().astype(np.int32)


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float32(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().contiguous().numpy()
