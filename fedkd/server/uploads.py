"""Uploads: what clients sent back, read, checked and counted one by one, before anything is summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode

from fedkd.errors import KnowledgeError, LateError
from fedkd.payloads import CONFIG, Knowledge, State, Weights

if TYPE_CHECKING:
    from fedkd.server.totals import Total

BYTES = "fedkd.bytes"  # record of a slim reply: bytes of each kind of payload
REFUSED = "fedkd.refused"  # record of a slim reply: why the upload was left out
Check = Callable[["Upload"], None]
T = TypeVar("T", bound="Total")


@dataclass(frozen=True, eq=False)
class Upload:
    """What one client sent back, read and checked.

    Parameters
    ----------
    partition_id : int
        The client.
    arch : str
        Its architecture.
    knowledge : Knowledge
        What it shared; without payloads where they were summed on a worker.
    message : Message
        The Flower message that brought it.
    cohort : int
        Partition id of the last client of its cohort, by which sums are made.
    fetch : callable, optional
        Gets the whole message where `knowledge` is without payloads.
    """

    partition_id: int
    arch: str
    knowledge: Knowledge
    message: Message
    cohort: int = 0
    fetch: Callable[[Message], Message] | None = field(default=None, repr=False)

    @property
    def num_examples(self) -> int:
        """Training samples behind the upload."""
        return self.knowledge.num_examples

    @property
    def state(self) -> State:
        """The uploaded weights, for reading alone; fetched from where they are stored if they are not here.

        Raises
        ------
        KnowledgeError
            The upload holds none.
        """
        knowledge = self.knowledge
        if self.fetch is not None and "weights" not in knowledge:
            knowledge = Knowledge.from_records(self.fetch(self.message).content)
        return knowledge.get(Weights).state


@dataclass(frozen=True)
class Verdict:
    """What came of reading one reply.

    Parameters
    ----------
    nbytes : dict of str to int
        Bytes that arrived, by kind of payload.
    upload : Upload, optional
        The upload; None if it is refused.
    reason : str
        Why it is refused.
    missed : bool
        Whether the server has waited for it in vain.
    """

    nbytes: dict[str, int]
    upload: Upload | None = None
    reason: str = ""
    missed: bool = False


def inspect(reply: Message, partition_id: int, arch: str, checks: Iterable[Check], cohort: int = 0) -> Verdict:
    """Read and check one reply; whatever it may cause, it costs its sender alone.

    Parameters
    ----------
    reply : Message
        From a client.
    partition_id : int
        Which client.
    arch : str
        Its architecture.
    checks : iterable of callable
        Raise `KnowledgeError` for an upload to be refused.
    cohort : int
        Of the client.
    """
    nbytes: dict[str, int] = {}
    try:
        if reply.has_error():
            lost = reply.error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
            raise (LateError if lost else KnowledgeError)(reply.error.reason or f"error {reply.error.code}")
        knowledge = Knowledge.from_records(reply.content)
        nbytes = knowledge.nbytes
        upload = Upload(partition_id, arch, knowledge, reply, cohort)
        for check in checks:
            check(upload)
    except Exception as error:
        if isinstance(error, LateError):
            return Verdict({}, reason=str(error), missed=True)
        reason = str(error) if isinstance(error, KnowledgeError) else f"{type(error).__name__}: {error}"
        return Verdict(nbytes, reason=reason)
    return Verdict(nbytes, upload)


@dataclass(frozen=True)
class FoldUploads:
    """Sums the uploads of a cohort where its clients ran; see `SimulationGrid.send_and_fold`.

    Parameters
    ----------
    total : Total
        An empty sum.
    archs : dict of int to str
        Architecture of each client that was asked, by partition id.
    checks : tuple of callable
        Checks beside the total's own; can be pickled.
    """

    total: Total
    archs: Mapping[int, str]
    checks: tuple[Check, ...] = ()

    def __call__(self, replies: list[tuple[int, Message]]) -> tuple[list[Message], Total]:
        """Return the slim replies and the sum of the uploads that are accepted."""
        part, slim = self.total.empty(), []
        for partition_id, reply in replies:
            verdict = inspect(reply, partition_id, self.archs[partition_id], (*self.checks, part.check))
            if verdict.upload is not None:
                try:
                    part.add(verdict.upload)
                except KnowledgeError as error:
                    verdict = Verdict(verdict.nbytes, reason=str(error))
            slim.append(_slim(reply, verdict))
        return slim, part


def _slim(reply: Message, verdict: Verdict) -> Message:
    """Return a reply that holds what the server needs to know of an upload, and nothing of what was shared."""
    if reply.has_error():
        return reply
    shared = verdict.upload.knowledge if verdict.upload is not None else Knowledge()
    config = reply.content.config_records.get(CONFIG, ConfigRecord())
    records = Knowledge(num_examples=shared.num_examples, metrics=shared.metrics).to_records(config)
    records[BYTES] = MetricRecord(dict(verdict.nbytes))
    if verdict.upload is None:
        records[REFUSED] = ConfigRecord({"reason": verdict.reason, "missed": verdict.missed})
    return make_message(reply.metadata, records)


def read_slim(
    reply: Message, partition_id: int, arch: str, cohort: int, fetch: Callable[[Message], Message] | None
) -> Verdict:
    """Read a reply that `FoldUploads` has made; `fetch` gets the whole one, where it is kept."""
    if reply.has_error():
        return inspect(reply, partition_id, arch, ())
    nbytes: Any = dict(reply.content.metric_records[BYTES])
    if REFUSED in reply.content:
        refused = reply.content.config_records[REFUSED]
        return Verdict(nbytes, reason=str(refused["reason"]), missed=bool(refused["missed"]))
    return Verdict(nbytes, Upload(partition_id, arch, Knowledge.from_records(reply.content), reply, cohort, fetch))


@dataclass(frozen=True)
class Held:
    """Refuses a number of examples that a client cannot have.

    Parameters
    ----------
    sizes : dict of int to int
        Training samples of each client that was asked, by partition id.
    """

    sizes: Mapping[int, int]

    def __call__(self, upload: Upload) -> None:
        """Raise `KnowledgeError` if the upload claims more."""
        held = self.sizes[upload.partition_id]
        if upload.num_examples > held:
            raise KnowledgeError(f"{upload.num_examples} examples from a client that has {held}")


class Uploads(Iterator[Upload]):
    """The uploads of an exchange: read one by one, or summed where the clients ran. Until then nobody trains.

    Parameters
    ----------
    one_by_one : callable
        Begins the exchange and returns its checked uploads, in partition order.
    on_workers : callable, optional
        Begins the exchange and returns, for each cohort, its accepted uploads (without payloads) and their sum, or
        None if the cohort failed. None: somebody needs every upload.
    seen : callable
        Hears of every accepted upload.
    ended : callable
        Called when all are read.
    """

    def __init__(
        self,
        one_by_one: Callable[[], Iterator[Upload]],
        on_workers: Callable[[Total], Iterator[tuple[list[Upload], Total | None]]] | None,
        seen: Callable[[Upload], None],
        ended: Callable[[], None],
    ) -> None:
        self._one_by_one, self._on_workers, self._seen, self._ended = one_by_one, on_workers, seen, ended
        self._stream: Iterator[Upload] | None = None

    def __next__(self) -> Upload:
        if self._stream is None:
            self._stream = self._one_by_one()
        upload = next(self._stream, None)
        if upload is None:
            self._end()
            raise StopIteration
        self._seen(upload)
        return upload

    def sum(self, total: Total) -> Total:
        """Return the sum of all uploads; `total` is an empty one, and is changed."""
        if self._stream is not None or self._on_workers is None:
            return sum_up((upload for upload in self), total)
        self._stream = iter(())
        for accepted, part in self._on_workers(total):
            for upload in accepted:
                self._seen(upload)
            if part is not None:
                total.merge(part)
        self._end()
        return total

    def _end(self) -> None:
        ended, self._ended = self._ended, lambda: None
        ended()


def sum_up(uploads: Iterable[Any], total: T) -> T:
    """Sum uploads as workers would: each cohort by itself, then the cohorts in order, so that bits are the same.

    Parameters
    ----------
    uploads : iterable
        In partition order; those that have no ``cohort`` are one cohort.
    total : Total
        An empty sum; it is changed.

    Returns
    -------
    Total
        The same object.
    """
    if isinstance(uploads, Uploads):
        return cast(T, uploads.sum(total))
    empty = total.empty()
    parts: dict[int, T] = {}
    for upload in uploads:
        cohort = getattr(upload, "cohort", -1)
        # A cohort is named after its last client: uploads come in order, so those before this one are complete.
        for complete in sorted(name for name in parts if -1 < name < upload.partition_id):
            total.merge(parts.pop(complete))
        if cohort not in parts:
            parts[cohort] = empty.empty()
        parts[cohort].add(upload)
    for cohort in sorted(parts):
        total.merge(parts.pop(cohort))
    return total
