"""The runs of a sweep: one after another, or several at once, each in a process of its own.

Clients of one run keep a few cores busy at best while eight of them are active; small federations, which are most
of a paper's tables, use a machine better when every core has a run of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedkd.cluster import shared_engine
from fedkd.errors import FedKDError, RunError, ScenarioError, errors_in
from fedkd.libraries import import_libraries
from fedkd.listening import Listener, Result
from fedkd.run_folder import folder_of, is_finished
from fedkd.sweep import check_cells
from fedkd.threads import cores, limit_cores

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.preflight import Report
    from fedkd.scenario import Scenario
    from fedkd.server.runtime import Event
    from fedkd.sweep import Cell

GRACE = 10.0
"""Seconds that runs have to end after Ctrl-C."""

Outcomes = tuple[list[tuple["Cell", Result]], list[tuple["Cell", FedKDError]]]


def execute_sweep(
    cells: Sequence[Cell],
    *,
    out: Path,
    file: str = "",
    fresh: bool = False,
    jobs: int = 1,
    listener: Listener | None = None,
) -> Outcomes:
    """Run the cells of a sweep; one that fails does not stop the others.

    Parameters
    ----------
    cells : sequence of Cell
        The cells; all are checked, data included, before the first one runs.
    jobs : int
        Runs at once. 1 (default) = one after another, in this process. More need ``system.engine = "inline"``, and a
        GPU each where GPUs are used. Every run has an equal share of the cores; where ``system.server_threads`` is not
        set that is its number of threads, on which the last bits of a result depend.
    out, file, fresh, listener
        As in `fedkd.run.execute`.

    Returns
    -------
    list of (Cell, Result), list of (Cell, FedKDError)
        What finished, and what failed, each in the order of the cells.

    Raises
    ------
    ScenarioError, DataError
        A cell cannot be run as written, or not beside others; nothing was run or written.
    KeyboardInterrupt
        Ctrl-C. What was finished is kept, and the same call goes on with the rest.
    """
    listener = listener or Listener()
    if jobs > 1:
        with errors_in(file):
            _check_beside(cells, jobs)
        _check(cells, file)
        return _side_by_side(cells, _Order(out, file, fresh), min(jobs, len(cells)), listener)
    finished, failed = [], []
    pending = [each.scenario for each in cells if fresh or not is_finished(folder_of(each.scenario, out, False))]
    largest = max(
        pending, key=lambda scenario: (scenario.system.engine != "inline", scenario.system.workers), default=None
    )
    check = partial(_check, cells, file)
    with shared_engine(largest, meanwhile=check) if largest else nullcontext(check(data=False)):
        from fedkd.run import execute

        for cell in cells:
            try:
                result = execute(cell.scenario, out=out, file=file, fresh=fresh, listener=listener)
                finished.append((cell, result))
            except RunError as error:
                failed.append((cell, error))
    return finished, failed


def _check(cells: Sequence[Cell], file: str, data: bool = True) -> None:
    """Check all cells, as far as possible without writing anything."""
    import_libraries()
    from fedkd.checks import check
    from fedkd.run import prepare

    with errors_in(file):
        check_cells(cells, check)
        if data:
            check_cells(cells, prepare)


def _check_beside(cells: Sequence[Cell], jobs: int) -> None:
    """Refuse runs that would be in each other's way."""
    if any(cell.scenario.system.engine != "inline" for cell in cells):
        hint = "add --engine inline, or leave out --jobs: on Ray, one run uses all cores"
        raise ScenarioError("several runs at once need the inline engine", key="--jobs", hint=hint)
    import_libraries()
    import torch

    gpus = torch.cuda.device_count()
    if 0 < gpus < jobs and any(cell.scenario.system.device != "cpu" for cell in cells):
        hint = f"ask for at most {gpus}, or add --set system.device=cpu"
        raise ScenarioError("every run needs a GPU of its own", key="--jobs", hint=hint)


class _Order(NamedTuple):
    """What `execute` is called with."""

    out: Path
    file: str
    fresh: bool


class _Job:
    """A process that runs one cell after another, as the parent sees it."""

    def __init__(self, place: int, jobs: int, order: _Order) -> None:
        context = multiprocessing.get_context("spawn")  # threads and CUDA do not survive a fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, jobs, order), daemon=True)
        with _one_gpu(place):
            self.process.start()
        theirs.close()  # else its end would go unnoticed
        self.cell: int | None = None
        self.begun = False  # whether it has said anything about its cell
        self.new = True  # whether it has said nothing at all
        self.listener = Listener()


@contextmanager
def _one_gpu(place: int) -> Iterator[None]:
    """Let a process that is started here see one of the GPUs alone: as its first one, in all of its threads."""
    import torch

    before, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = (before.split(",") if before else [str(n) for n in range(count)])[
            place % count
        ]
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif count > 1:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _side_by_side(cells: Sequence[Cell], order: _Order, jobs: int, listener: Listener) -> Outcomes:
    waiting = deque(range(len(cells)))
    results: dict[int, Result] = {}
    errors: dict[int, FedKDError] = {}

    def give(job: _Job) -> None:
        """Hand the next cell to a job, or let it end."""
        job.cell = waiting.popleft() if waiting else None
        job.listener = listener.beside()
        with suppress(OSError):  # a process that is dead already is found out below
            job.connection.send(None if job.cell is None else cells[job.cell].scenario)
        job.begun = False

    with _running(jobs, order) as working:
        for job in working:
            give(job)
        while busy := [job for job in working if job.cell is not None]:
            ready = wait([job.connection for job in busy])
            for job in (job for job in busy if job.connection in ready):
                assert job.cell is not None
                try:
                    what, *said = job.connection.recv()
                except (EOFError, OSError):  # both mean that it is dead, maybe in the middle of a word
                    job.process.join()
                    if job.begun or job.new:
                        errors[job.cell] = RunError(
                            f"its process ended with exit code {job.process.exitcode}\n"
                            "  what was finished is kept: the same command goes on with it"
                        )
                    else:  # between two runs
                        waiting.appendleft(job.cell)
                    place = working.index(job)
                    working[place] = _Job(place, jobs, order)
                    give(working[place])
                    continue
                job.begun, job.new = True, False
                if what == "run_started":
                    folder, done = said
                    from fedkd.run import prepare

                    scenario = cells[job.cell].scenario
                    job.listener.run_started(folder, scenario, prepare(scenario)[0], done)
                elif what == "refused":  # bad input, of which nobody has said so before
                    raise said[0]
                elif what == "failed":
                    errors[job.cell] = RunError(*said)
                    give(job)
                elif what == "finished":
                    results[job.cell] = said[0]
                    give(job)
                else:
                    getattr(job.listener, what)(*said)
    return [(cells[n], results[n]) for n in sorted(results)], [(cells[n], errors[n]) for n in sorted(errors)]


@contextmanager
def _running(jobs: int, order: _Order) -> Iterator[list[_Job]]:
    """Keep so many processes; whatever happens, none outlives the context."""
    working: list[_Job] = []
    try:
        for place in range(jobs):
            working.append(_Job(place, jobs, order))
        yield working
    except BaseException:
        for job in working:
            if job.process.pid is not None and job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)
        raise
    finally:
        until = time.monotonic() + GRACE
        for job in working:
            job.connection.close()
        for job in working:
            job.process.join(max(0.0, until - time.monotonic()))
            job.process.kill()


# --- in the process of a job ---------------------------------------------------------------------------


class _Reporter(Listener):
    """Tells the parent what happens."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def run_started(self, folder: Path, scenario: Scenario, federation: Federation, done: int) -> None:
        self.connection.send(("run_started", folder, done))  # the parent can build the federation itself

    def preflight(self, report: Report) -> None:
        self.connection.send(("preflight", report))

    def event(self, event: Event) -> None:
        self.connection.send(("event", event))

    def run_ended(self, result: Result) -> None:
        self.connection.send(("run_ended", result))


def _serve(connection: Connection, jobs: int, order: _Order) -> None:
    """Run what the parent sends, until it sends None."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the parent, which passes it on once
    limit_cores(max(1, cores() // jobs))
    listener = _Reporter(connection)
    try:
        import_libraries()
        import torch

        from fedkd.run import execute

        torch.set_num_threads(cores())
        while (scenario := connection.recv()) is not None:
            try:
                result = execute(scenario, **order._asdict(), listener=listener)
            except RunError as error:
                connection.send(("failed", str(error)))
            except FedKDError as error:
                connection.send(("refused", error))
            else:
                connection.send(("finished", result))
    except (KeyboardInterrupt, EOFError, ConnectionError):
        pass  # the parent has gone, or goes
