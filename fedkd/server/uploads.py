"""Uploads: what clients sent back, read, checked and counted one by one, before anything is summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedkd.cohorts import Parts
from fedkd.errors import KnowledgeError, LateError
from fedkd.payloads import CONFIG, Knowledge, State, Weights
from fedkd.threads import one_thread

if TYPE_CHECKING:
    from fedkd.server.totals import Total

Check = Callable[["Upload"], None]
T = TypeVar("T", bound="Total")


class Place(NamedTuple):
    """A client's cohort."""

    number: int = 0
    end: float = math.inf  # partition id of its last client


ALONE = Place()
"""The cohort of uploads that have no other."""


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
    message : Message, optional
        The Flower message that brought it, or stands for the one that is where the client ran; None if nobody kept it.
    cohort : Place
        The client's cohort, by which sums are made.
    said : dict of str to int, float or str
        What the client said about its work beside what it shared.
    fetch : callable, optional
        Gets the whole message where `knowledge` is without payloads.
    """

    partition_id: int
    arch: str
    knowledge: Knowledge
    message: Any  # a Message or None: whoever needs it asks for uploads that are kept
    cohort: Place = ALONE
    said: Mapping[str, Any] = field(default_factory=dict)
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
        if self.fetch is not None and self.message is not None and "weights" not in knowledge:
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


def inspect(reply: Message, partition_id: int, arch: str, checks: Iterable[Check], cohort: Place = ALONE) -> Verdict:
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
    cohort : Place
        Of the client.
    """
    if reply.has_error():
        return failed(reply.error)
    nbytes: dict[str, int] = {}
    try:
        knowledge = Knowledge.from_records(reply.content)
        nbytes = knowledge.nbytes
        upload = Upload(partition_id, arch, knowledge, reply, cohort, dict(reply.content.get(CONFIG) or {}))
        for check in checks:
            check(upload)
    except Exception as error:
        if isinstance(error, LateError):
            return Verdict({}, reason=str(error), missed=True)
        reason = str(error) if isinstance(error, KnowledgeError) else f"{type(error).__name__}: {error}"
        return Verdict(nbytes, reason=reason)
    return Verdict(nbytes, upload)


def failed(error: Error) -> Verdict:
    """Return what comes of a reply that is an error."""
    missed = error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    return Verdict({}, reason=error.reason or f"error {error.code}", missed=missed)


class Note(NamedTuple):
    """What the server learns of an upload that was summed where its client ran."""

    nbytes: dict[str, int]
    num_examples: int = 0
    metrics: Mapping[str, float] = {}
    said: Mapping[str, Any] = {}
    reason: str = ""  # why it is refused; empty if it is not
    missed: bool = False

    @classmethod
    def of(cls, verdict: Verdict) -> Note:
        """Take down a verdict."""
        upload = verdict.upload
        if upload is None:
            return cls(verdict.nbytes, reason=verdict.reason or "refused", missed=verdict.missed)
        return cls(verdict.nbytes, upload.num_examples, upload.knowledge.metrics, upload.said)

    def verdict(
        self,
        partition_id: int,
        arch: str,
        cohort: Place,
        message: Message | None,
        fetch: Callable[[Message], Message] | None,
    ) -> Verdict:
        """Return the verdict; of an upload, without its payloads."""
        if self.reason:
            return Verdict(self.nbytes, reason=self.reason, missed=self.missed)
        knowledge = Knowledge(num_examples=self.num_examples, metrics=dict(self.metrics))
        return Verdict(self.nbytes, Upload(partition_id, arch, knowledge, message, cohort, self.said, fetch))


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

    def __call__(self, replies: list[tuple[int, Message]]) -> tuple[list[Note], Total]:
        """Return a note for each reply, and the sum of the uploads that are accepted."""
        part, notes, accepted = self.total.empty(), [], []
        for partition_id, reply in replies:
            verdict = inspect(reply, partition_id, self.archs[partition_id], (*self.checks, part.check))
            notes.append(Note.of(verdict))
            if verdict.upload is not None:
                accepted.append(verdict.upload)
        part.add_all(accepted)
        return notes, part

    def merge(self, part: Total, other: Total) -> Total:
        """Return the sum of both."""
        part.merge(other)
        return part


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
        with one_thread():  # a second one would wait for more to do on a core that a worker needs
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
    """Sum uploads as workers would: each cohort by itself, then cohorts pairwise, so that bits are the same.

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
    parts, empty = Parts(_merged), total.empty()
    unfinished: dict[Place, T] = {}
    for upload in uploads:
        cohort = getattr(upload, "cohort", ALONE)
        # Uploads come in order, so cohorts whose last client is past are complete.
        for complete in [place for place in unfinished if place.end < math.inf and place.end < upload.partition_id]:
            parts.add(complete.number, unfinished.pop(complete))
        if cohort not in unfinished:
            unfinished[cohort] = empty.empty()
        unfinished[cohort].add(upload)
    for place, part in unfinished.items():
        parts.add(place.number, part)
    whole = parts.result()
    if whole is not None:
        total.merge(whole)
    return total


def _merged(part: T, other: T) -> T:
    part.merge(other)
    return part
