"""Meetings: calls that take turns, and do together what each of them would otherwise do alone.

Flower's mods wrap one message, so every message of a cohort passes the ClientApp by itself. What can be computed for
all of them at once is computed where they meet: each call runs as a greenlet, one at a time, until it joins with a job
or ends. When nobody is left on the way, the jobs are done together, and the calls go on in order.

Greenlets, because threads that take turns have to wake each other up: for a hundred clients that alone takes longer
than training them does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from typing import Any

from greenlet import getcurrent, greenlet

Work = Callable[[list[Any]], Sequence[Any]]
"""Jobs → as many results; one that is an exception is raised where its job was handed in."""


class Dismissed(BaseException):
    """The meeting is over: raised in calls that still wait, so that they clean up and end."""


class Seat:
    """One call of a meeting.

    Parameters
    ----------
    call : callable
        What runs here.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.job: tuple[Work, Any] | None = None  # while the call waits
        self.outcome: Any = None  # of the job; at the end, of the call
        self._call, self._dismissed = call, False
        self._greenlet = greenlet(self._run)  # its parent is whoever holds the meeting, maybe a call of another one
        self._greenlet.gr_context = copy_context()

    def join(self, job: Any, work: Work) -> Any:
        """Hand in a job, and wait until it has been worked off together with those of the others.

        Parameters
        ----------
        job : object
            What there is to do for this call.
        work : callable
            Does several jobs; jobs that come with an equal `work` are done together, in the order of the calls.

        Returns
        -------
        object
            What `work` returned for this job, or raises what it raised.
        """
        if not self._dismissed:
            if getcurrent() is self._greenlet:
                self.job = work, job
                self._leave()
                self.job = None
            else:  # in a thread that the call has started, say, where nobody can take turns: alone
                self.outcome = _outcomes(work, [job])[0]
        if self._dismissed:
            raise Dismissed
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    @property
    def ended(self) -> bool:
        """Whether the call has ended."""
        return self._greenlet.dead

    def advance(self) -> None:
        """Let the call run until it joins or ends."""
        self._greenlet.switch()

    def dismiss(self) -> None:
        """End the call, wherever it is, and wait until it has ended."""
        self._dismissed = True
        if self._greenlet:  # has begun, and not ended
            self._greenlet.switch()

    def _leave(self) -> None:
        parent = self._greenlet.parent
        assert parent is not None
        parent.switch()

    def _run(self) -> None:
        _seat.set(self)
        try:
            self.outcome = self._call()
        except BaseException as error:
            self.outcome = error
        finally:
            self.job = None
            _seat.set(None)  # a greenlet keeps its context, which would keep the seat, and that the greenlet


_seat: ContextVar[Seat | None] = ContextVar("fedkd-seat", default=None)


def current() -> Seat | None:
    """Return the seat of the call that is running here, or None outside of a meeting."""
    return _seat.get()


def meet(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run calls that may meet.

    Parameters
    ----------
    calls : sequence of callable
        Run in this order, one at a time; work on jobs is done in the caller's thread.

    Returns
    -------
    list
        What each call returned or, in its place, the exception that it raised.

    Raises
    ------
    BaseException
        Whatever a call or `work` raised that is no `Exception`; all other calls are ended first.

    Examples
    --------
    >>> def add_all(numbers):
    ...     return [sum(numbers)] * len(numbers)
    >>> def call(number):
    ...     return f"{number} of {current().join(number, add_all)}"
    >>> meet([lambda: call(1), lambda: call(2), lambda: "late"])
    ['1 of 3', '2 of 3', 'late']
    """
    seats = [Seat(call) for call in calls]
    try:
        running = seats
        while running:
            for seat in running:
                seat.advance()
                error = seat.outcome
                if seat.ended and isinstance(error, BaseException) and not isinstance(error, Exception):
                    raise error
            running = [seat for seat in running if not seat.ended]
            _work(running)
    finally:
        for seat in seats:
            seat.dismiss()
    return [seat.outcome for seat in seats]


def _work(seats: list[Seat]) -> None:
    together: dict[Work, list[Seat]] = {}
    for seat in seats:
        assert seat.job is not None
        together.setdefault(seat.job[0], []).append(seat)
    for work, members in together.items():
        outcomes = _outcomes(work, [seat.job[1] for seat in members if seat.job is not None])
        for seat, outcome in zip(members, outcomes):
            seat.outcome = outcome


def _outcomes(work: Work, jobs: list[Any]) -> list[Any]:
    """Return what comes of each job: a result, or an exception."""
    try:
        outcomes = list(work(jobs))
        if len(outcomes) != len(jobs):
            raise RuntimeError(f"{len(outcomes)} results for {len(jobs)} jobs")
    except Exception as error:
        return [error] * len(jobs)
    return outcomes
