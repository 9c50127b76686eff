"""What a run shows in the terminal: the federation, progress bars, the final table, where the results are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedkd.listening import Listener, Result
from fedkd.report import ROUNDS, console_table, learning_curves, partition_table, write_tables
from fedkd.scenario import Scenario

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.preflight import Report
    from fedkd.sweep import Cell

# File -> what accuracy is drawn against: name of the axis, key of the numbers in summary.json; empty = the rounds.
CURVES = {
    "curves": (ROUNDS, ""),
    "curves-bytes": ("bytes sent, up and down", "curve_bytes"),
    "curves-time": ("simulated seconds", "curve_simulated_time"),
}

SIMULATED = ("dropped out", "too late in simulated time")  # reasons that the scenario asks for: no news


def print_federation(console: Console, scenario: Scenario, federation: Federation) -> str:
    """Print the client × class table of a federation and its skew figures, and return their title.

    Parameters
    ----------
    console : Console
        Where to.
    scenario : Scenario
        Says how the data were divided.
    federation : Federation
        The resolved clients.
    """
    spec = scenario.partition
    alpha = "" if spec.alpha is None else f" alpha {spec.alpha:g}"
    title = f"{scenario.data.source}, {spec.name}{alpha}, seed {scenario.run.seed}: samples per client and class"
    console.print(partition_table(federation.counts, federation.dataset.classes, title=title))
    sizes, proxy, skew = federation.sizes, federation.proxy, federation.skew
    empty = federation.num_clients - len(federation.eligible)
    rows = {
        "training samples per client": f"{sizes.min()} to {sizes.max()}"
        + (f"; {empty} of {federation.num_clients} clients have none and are never selected" if empty else ""),
        "Jensen-Shannon divergence": f"{skew.jensen_shannon:.3f} (0 = IID, at most 1)",
        "effective classes per client": f"{skew.effective_classes:.2f} of {federation.num_classes}",
        "proxy set": "none" if proxy is None else f"{len(proxy)} samples, {proxy.source}",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(name, value)
    console.print(grid)
    for note in federation.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print()
    return title


class Screen(Listener):
    """Listens to runs and shows them; used as a context manager around them.

    Parameters
    ----------
    console : Console
        Where to.
    cells : sequence of Cell
        What will be run; one bar each.
    """

    def __init__(self, console: Console, cells: Sequence[Cell] = ()) -> None:
        self.console = console
        self.titles = {_key(cell.scenario): _with_seed(cell, cells) for cell in cells}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self.task: TaskID | None = None
        self.seen: set[bytes] = set()
        self.replies = self.selected = 0
        self.accuracy = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *stopped: object) -> None:
        if self.progress.live.is_started:  # else it would print an empty line
            self.progress.stop()

    def run_started(self, folder: Path, scenario: Scenario, federation: Federation, done: int) -> None:
        """Show the federation, if it is a new one, and a bar."""
        counts = federation.counts.tobytes()
        if counts not in self.seen:
            self.seen.add(counts)
            print_federation(self.console, scenario, federation)
        title = self.titles.get(_key(scenario), scenario.label or scenario.strategy.name)
        self.accuracy = ""
        self.progress.start()  # not before there is something to show
        self.task = self.progress.add_task(title, total=scenario.run.rounds, completed=done, status="starting")

    def preflight(self, report: Report) -> None:
        """Say what clients take and how they are computed."""
        grid = Table.grid(padding=(0, 2))
        for name, value in report.rows.items():
            grid.add_row(escape(name), escape(value))
        self.console.print(grid)
        for note in report.notes:
            self.console.print(f"note: {note}", markup=False, highlight=False)
        self.console.print()

    def event(self, event: dict[str, Any]) -> None:
        """Move the bar."""
        if self.task is None:
            return
        if event["event"] == "started":
            self.replies, self.selected = 0, len(event["clients"])
        elif event["event"] == "reply":
            self.replies += 1
            status = f"client {self.replies}/{self.selected} {self.accuracy}"
            self.progress.update(self.task, status=status)
        elif event["event"] == "refused" and not event["reason"].startswith(SIMULATED):
            problem = f"round {event['round']}: client {event['partition_id']} left out: {event['reason']}"
            self.console.print(problem, markup=False, highlight=False)
        elif event["event"] == "round":
            if event.get("accuracy") is not None:
                self.accuracy = f"accuracy {event['accuracy']:.3f}"
            self.progress.update(self.task, completed=event["round"], status=self.accuracy)

    def run_ended(self, result: Result) -> None:
        """Say so where there was nothing to do."""
        if result.skipped:
            text = f"{result.summary['label']}, seed {result.summary['seed']}: finished before"
            self.console.print(text, markup=False, highlight=False)

    def beside(self) -> Self:
        """Return a screen with a bar of its own, and with everything else of this one."""
        return copy.copy(self)

    def conclude(self, finished: Sequence[tuple[Cell | None, Result]], folder: Path) -> None:
        """Print the final table, and write tables and learning curves of all runs.

        Parameters
        ----------
        finished : sequence of (Cell or None, Result)
            What was run.
        folder : Path
            Where to write.
        """
        if not finished:
            return
        rows = [result.row(cell.values if cell else None) for cell, result in finished]
        self.console.print()
        self.console.print(console_table(rows))
        tables = write_tables(rows, folder, "results")
        pictures = [
            picture
            for stem, (xlabel, cost) in CURVES.items()
            if (curves := _curves(finished, cost))
            for picture in learning_curves(curves, folder / stem, xlabel=xlabel)
        ]
        places = {
            name: ", ".join([str(files[0]), *(path.name for path in files[1:])])
            for name, files in (("tables", tables), ("curves", pictures))
            if files
        }
        places["results"] = str(finished[0][1].folder if len(finished) == 1 else folder)
        for name, place in places.items():
            self.console.print(f"{name:8} {place}", markup=False, highlight=False, soft_wrap=True)


def _curves(finished: Sequence[tuple[Cell | None, Result]], cost: str) -> dict[str, list[list[Any]]]:
    """Return the accuracies of runs by title: (round, value), or (round, value, what it had cost by then)."""
    curves: dict[str, list[list[Any]]] = {}
    for cell, result in finished:
        curve = [(int(round), float(value)) for round, value in result.summary.get("curve", [])]
        if cost:
            curve = [(*point, spent) for point, spent in zip(curve, result.summary.get(cost) or [])]
        if curve:
            curves.setdefault(cell.title if cell else result.summary["label"], []).append(curve)
    return curves


def _key(scenario: Scenario) -> str:
    """Return what identifies a scenario among others."""
    return scenario.model_dump_json()


def _with_seed(cell: Cell, cells: Sequence[Cell]) -> str:
    several = len({other.scenario.run.seed for other in cells}) > 1
    return f"{cell.title}, seed {cell.scenario.run.seed}" if several else cell.title
