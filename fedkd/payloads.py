"""Knowledge that travels: typed payloads, their bytes, their checks, and their form as Flower records.

A message carries one `Knowledge`: at most one payload of each kind, the number of examples behind it, and
scalar metrics. On the wire every payload is one ``ArrayRecord`` named after its kind, and a ``ConfigRecord``
``<kind>.meta`` for what is not an array; so stock Flower strategies can average a reply that holds weights.

Tensors of received knowledge share the memory of the message, which other clients of the process may be reading too:
clone them before changing them in place.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkd.arrays import array_record, view
from fedkd.errors import KnowledgeError

# Received tensors are for reading (see above). Of that torch warns once in a process: here, where nobody hears it.
with warnings.catch_warnings(action="ignore"):
    torch.from_numpy(np.frombuffer(b"\0", np.uint8))

METRICS = "metrics"
CONFIG = "config"
NUM_EXAMPLES = "num-examples"
MAX_METRIC = 1e300  # sums over clients stay finite
State = dict[str, Tensor]


P = TypeVar("P", bound="Payload")


class Payload(ABC):
    """What every kind of payload can do."""

    kind: str
    """Name of the payload in a message."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays as they travel."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Scalars and strings as they travel."""


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers."""
    # They survive in a sum, which is ten times as fast to look at; it may be infinite without them, too.
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def _finite(values: Tensor, what: str) -> None:
    if not all_finite(values):
        raise KnowledgeError(f"{what} holds NaN or infinite numbers")


def _float32(values: Tensor, what: str) -> None:
    if values.dtype != torch.float32:
        raise KnowledgeError(f"wrong type: {what} are {values.dtype}, not torch.float32")
    _finite(values, what)


@dataclass(frozen=True)
class Weights(Payload):
    """A model's state. Bytes: 4 a float32 scalar, 8 an integer buffer (``num_batches_tracked``).

    Parameters
    ----------
    state : dict of str to Tensor
        State dict, or the part of it that the norm-buffer policy lets travel.
    arch : str
        Name of the architecture.
    kind : str
        ``weights``, or another name where a message carries a second model (FedGKD's ``teacher``).
    """

    state: State
    arch: str
    kind: str = "weights"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.state.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays as they travel."""
        return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.state.items()}

    def meta(self) -> dict[str, Any]:
        """Architecture."""
        return {"type": "Weights", "arch": self.arch}

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Weights:
        """Rebuild from arrays and meta."""
        return cls({name: torch.from_numpy(a) for name, a in arrays.items()}, str(meta["arch"]), kind)

    def check(self, reference: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit a model.

        Parameters
        ----------
        reference : mapping of str to Tensor
            A state with the right names, shapes and types.

        Raises
        ------
        KnowledgeError
            Other names, shapes or types than the reference, or numbers that are not finite.
        """
        missing, extra = reference.keys() - self.state.keys(), self.state.keys() - reference.keys()
        if missing or extra:
            raise KnowledgeError(f"wrong keys: missing {sorted(missing)[:3]}, unexpected {sorted(extra)[:3]}")
        for name, tensor in self.state.items():
            if tensor.shape != reference[name].shape:
                raise KnowledgeError(
                    f"wrong shape: {name} is {tuple(tensor.shape)}, not {tuple(reference[name].shape)}"
                )
            if tensor.dtype != reference[name].dtype:
                raise KnowledgeError(f"wrong type: {name} is {tensor.dtype}, not {reference[name].dtype}")
            _finite(tensor, name)


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
            Other ids, shape or space, numbers that are not finite, or rows that are no distributions.
        """
        if self.space != space:
            raise KnowledgeError(f"wrong space: {self.space}, not {space}")
        if not torch.equal(self.ids, ids):
            raise KnowledgeError("wrong sample ids: not the ones that were asked for")
        if self.values.shape != (len(ids), num_classes):
            raise KnowledgeError(f"wrong shape: {tuple(self.values.shape)}, not {(len(ids), num_classes)}")
        _float32(self.values, "outputs")
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

    def check(self, num_classes: int, space: str) -> None:
        """Refuse a table of another size or space, with negative counts or with numbers that are not finite.

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
        _float32(self.means, "class means")
        _float32(self.counts, "class counts")
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


KINDS: dict[str, Any] = {
    "Weights": Weights,
    "ProxyOutputs": ProxyOutputs,
    "ClassOutputs": ClassOutputs,
    "Request": Request,
}


@dataclass
class Knowledge:
    """What one message carries.

    Parameters
    ----------
    payloads : dict of str to Payload
        Payloads by kind.
    num_examples : int
        Training samples behind an upload.
    metrics : dict of str to float
        Scalars for the log, such as the loss terms.

    Examples
    --------
    >>> up = Knowledge.of(Request(torch.arange(5)), num_examples=3)
    >>> up.nbytes, "weights" in up
    ({'request': 20}, False)
    """

    payloads: dict[str, Any] = field(default_factory=dict)
    num_examples: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, *payloads: Payload, num_examples: int = 0, metrics: Mapping[str, float] | None = None) -> Knowledge:
        """Collect payloads under their kinds."""
        return cls({p.kind: p for p in payloads}, num_examples, dict(metrics or {}))

    def __contains__(self, kind: str) -> bool:
        return kind in self.payloads

    def __iter__(self) -> Iterator[Any]:
        return iter(self.payloads.values())

    def get(self, payload: type[P], kind: str = "") -> P:
        """Return a payload.

        Parameters
        ----------
        payload : type
            Its class.
        kind : str
            Its kind; empty = the usual one of the class.

        Raises
        ------
        KnowledgeError
            The message does not carry it, or carries something else under this name.

        Examples
        --------
        >>> Knowledge.of(Request(torch.arange(5))).get(Request).nbytes
        20
        """
        kind = kind or payload.kind
        if kind not in self.payloads:
            raise KnowledgeError(f"no {kind} in the message, only {sorted(self.payloads) or 'nothing'}")
        found = self.payloads[kind]
        if not isinstance(found, payload):
            raise KnowledgeError(f"{kind} is a {type(found).__name__}, not a {payload.__name__}")
        return found

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of every payload, by kind."""
        return {kind: payload.nbytes for kind, payload in self.payloads.items()}

    def to_records(self, config: Mapping[str, Any] | None = None) -> RecordDict:
        """Write as Flower records; `config` travels beside the knowledge, under ``config``."""
        records = RecordDict()
        for kind, payload in self.payloads.items():
            records[kind] = array_record(payload.arrays())
            records[f"{kind}.meta"] = ConfigRecord(payload.meta())
        metrics: dict[str, Any] = {NUM_EXAMPLES: int(self.num_examples)}
        metrics |= {name: float(value) for name, value in self.metrics.items()}
        records[METRICS] = MetricRecord(metrics)
        records[CONFIG] = ConfigRecord(dict(config or {}))
        return records

    @classmethod
    def from_records(cls, records: RecordDict) -> Knowledge:
        """Read Flower records.

        Raises
        ------
        KnowledgeError
            A payload of unknown type or one that cannot be read, a count that is none, a metric that is not finite.
        """
        payloads: dict[str, Any] = {}
        for kind, arrays in records.array_records.items():
            meta = records.config_records.get(f"{kind}.meta", ConfigRecord())
            name = str(meta.get("type", ""))
            if name not in KINDS:
                raise KnowledgeError(f"payload {kind!r} is of unknown type {name!r}")
            try:
                payloads[kind] = KINDS[name].read(kind, {k: view(v) for k, v in arrays.items()}, meta)
            except Exception as error:  # whatever a stranger's bytes may cause
                reason = f"payload {kind!r} cannot be read: {type(error).__name__}: {error}"
                raise KnowledgeError(reason) from error
        metrics = dict(records.metric_records.get(METRICS, MetricRecord()))
        count = metrics.pop(NUM_EXAMPLES, 0)
        if not isinstance(count, int) or not 0 <= count < 2**53:
            raise KnowledgeError("num-examples is not a count")
        for name, value in metrics.items():
            if isinstance(value, list) or not -MAX_METRIC <= value <= MAX_METRIC:
                raise KnowledgeError(f"metric {name!r} is not a finite number")
        return cls(payloads, count, {name: float(cast(float, value)) for name, value in metrics.items()})
