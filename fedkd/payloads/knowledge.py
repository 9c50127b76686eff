"""What one message carries, and its form as Flower records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.arrays import array_record, view
from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload
from fedkd.payloads.classes import ClassWeights, TeacherWeights
from fedkd.payloads.codes import QuantizedOutputs
from fedkd.payloads.outputs import ClassOutputs, ProxyOutputs, Request
from fedkd.payloads.peers import PeerOutputs
from fedkd.payloads.samples import LabelCounts, SampleScores
from fedkd.payloads.samples_own import FeatureMaps, SampleKnowledge
from fedkd.payloads.weights import Weights

METRICS = "metrics"
CONFIG = "config"
NUM_EXAMPLES = "num-examples"
MAX_METRIC = 1e300  # sums over clients stay finite

P = TypeVar("P", bound=Payload)

KINDS: dict[str, Any] = {
    "Weights": Weights,
    "ProxyOutputs": ProxyOutputs,
    "ClassOutputs": ClassOutputs,
    "Request": Request,
    "QuantizedOutputs": QuantizedOutputs,
    "FeatureMaps": FeatureMaps,
    "PeerOutputs": PeerOutputs,
    "SampleKnowledge": SampleKnowledge,
    "SampleScores": SampleScores,
    "LabelCounts": LabelCounts,
    "ClassWeights": ClassWeights,
    "TeacherWeights": TeacherWeights,
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
    >>> import torch
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
        >>> import torch
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
        for kind, arrays in records.items():
            if not isinstance(arrays, ArrayRecord):
                continue
            meta = records.get(f"{kind}.meta")
            meta = meta if isinstance(meta, ConfigRecord) else ConfigRecord()
            name = str(meta.get("type", ""))
            if name not in KINDS:
                raise KnowledgeError(f"payload {kind!r} is of unknown type {name!r}")
            try:
                payloads[kind] = KINDS[name].read(kind, {k: view(v) for k, v in arrays.items()}, meta)
            except Exception as error:  # whatever a stranger's bytes may cause
                reason = f"payload {kind!r} cannot be read: {type(error).__name__}: {error}"
                raise KnowledgeError(reason) from error
        told = records.get(METRICS)
        metrics = dict(told) if isinstance(told, MetricRecord) else {}
        count = metrics.pop(NUM_EXAMPLES, 0)
        if not isinstance(count, int) or not 0 <= count < 2**53:
            raise KnowledgeError("num-examples is not a count")
        for name, value in metrics.items():
            if isinstance(value, list) or not -MAX_METRIC <= value <= MAX_METRIC:
                raise KnowledgeError(f"metric {name!r} is not a finite number")
        return cls(payloads, count, {name: float(cast(float, value)) for name, value in metrics.items()})
