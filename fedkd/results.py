"""What became of the runs of a sweep: found in their folders, finished or not, and written as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedkd.files import write_atomic
from fedkd.listening import Result
from fedkd.report import aggregate, pivot, title_of, to_markdown, write_tables
from fedkd.run_folder import folder_of, read_metrics
from fedkd.sweep import Cell

CONDITIONS = ("python", "packages", "platform", "machine", "cores", "device", "engine", "workers", "git_commit")
"""What a table says about the machines that computed it, of each run's environment."""


@dataclass(frozen=True)
class Found:
    """One cell of a sweep and what is left of its run.

    Parameters
    ----------
    cell : Cell
        The cell.
    state : str
        ``finished``; ``failed``, with the error; ``stopped`` before its end; ``missing``: never begun.
    reason : str
        Why there is no result, in words.
    result : Result, optional
        Of a finished run.
    environment : dict
        Contents of its ``environment.json``.
    """

    cell: Cell
    state: Literal["finished", "failed", "stopped", "missing"]
    reason: str = ""
    result: Result | None = None
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def row(self) -> dict[str, Any]:
        """The row of a finished run that tables are made of."""
        assert self.result is not None
        return self.result.row(self.cell.values)


def collect(cells: Sequence[Cell], out: Path) -> list[Found]:
    """Find the runs of cells.

    Parameters
    ----------
    cells : sequence of Cell
        As `fedkd.sweep.expand` returns them.
    out : Path
        Folder of all runs, as it was given to `fedkd.run.execute`.

    Returns
    -------
    list of Found
        One for each cell, in their order. Of several runs of a cell (``--fresh``) the last that is finished counts.
    """
    return [_find(cell, out) for cell in cells]


def _find(cell: Cell, out: Path) -> Found:
    first = folder_of(cell.scenario, out, fresh=False)
    again = [(int(path.name[len(first.name) + 1 :]), path) for path in first.parent.glob(f"{first.name}-[0-9]*")]
    folders = [path for path in (first, *(path for _, path in sorted(again))) if path.is_dir()]
    if not folders:
        return Found(cell, "missing", "not run")
    finished = [path for path in folders if (path / "summary.json").exists()]
    folder = (finished or folders)[-1]
    environment = _json(folder / "environment.json")
    if finished:
        return Found(cell, "finished", "", Result(folder, _json(folder / "summary.json"), skipped=True), environment)
    events = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    rounds = max((event["round"] for event in events if event["event"] == "round"), default=0)
    if events and events[-1]["event"] == "failed":
        return Found(cell, "failed", f"failed after round {rounds}: {events[-1]['error']}", None, environment)
    problem = f"stopped after round {rounds} of {cell.scenario.run.rounds}"
    return Found(cell, "stopped", problem, None, environment)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def gaps(found: Sequence[Found]) -> list[str]:
    """Return a line for every title of cells without result, with the seeds that lack and why.

    Cells of one title that lack for the same reason share a line.
    """
    lines: dict[tuple[str, str], list[int]] = {}
    for one in found:
        if one.result is None:
            lines.setdefault((one.cell.title, one.reason), []).append(one.cell.scenario.run.seed)
    return [
        f"{title}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}: {reason}"
        for (title, reason), seeds in lines.items()
    ]


def write(
    found: Sequence[Found], folder: Path, stem: str, *, across: str = "", metric: str = "final", about: str = ""
) -> list[Path]:
    """Write the table of a sweep as Markdown, CSV, LaTeX and JSON, whatever part of it is finished.

    Parameters
    ----------
    found : sequence of Found
        The runs; at least one is finished.
    folder : Path
        Where to.
    stem : str
        Name of the files without suffix.
    across : str
        A key of the sweep, whose values become the columns of a second table, ``<stem>-<key>.md``.
    metric : str
        What that one shows.
    about : str
        What the scenario shows, for the JSON file.

    Returns
    -------
    list of Path
        The files. The Markdown says below the table which runs are not in it; the JSON also holds every run by itself
        and what it was computed with.
    """
    rows = [one.row for one in found if one.result is not None]
    files = write_tables(rows, folder, stem)
    lines = gaps(found)
    if lines:
        text = files[0].read_text() + f"\n{len(rows)} of {len(found)} runs are finished. Not in the table:\n\n"
        write_atomic(files[0], (text + "".join(f"- {line}\n" for line in lines)).encode())
    if across:
        text = f"{title_of(metric)}, mean ± standard deviation over seeds:\n\n"
        text += to_markdown(pivot(rows, across, metric))
        files.append(write_atomic(folder / f"{stem}-{across.rpartition('.')[2]}.md", text.encode()))
    table: Any = aggregate(rows).to_json(orient="records")
    content = {
        "scenario": found[0].cell.scenario.name,
        "about": about,
        "table": json.loads(table),
        "runs": [_facts(one) for one in found],
        "conditions": _conditions(found),
    }
    files.append(write_atomic(folder / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode()))
    return files


def _facts(one: Found) -> dict[str, Any]:
    """Return what a JSON file says about a run."""
    facts = {"label": one.cell.label, "seed": one.cell.scenario.run.seed, "values": one.cell.values, "state": one.state}
    if one.result is None:
        return facts | {"reason": one.reason}
    summary = one.result.summary
    kept = ("whose", "best", "best_round", "curve", "bytes_up", "bytes_down", "seconds_by_verb", "attackers", "refused")
    return facts | one.row | {key: summary[key] for key in kept if key in summary} | {"folder": one.result.folder.name}


def _conditions(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return the different surroundings in which runs were computed, each with the number of its runs."""
    counts: dict[str, int] = {}
    for one in found:
        if one.result is not None:
            facts = {key: one.environment[key] for key in CONDITIONS if key in one.environment}
            text = json.dumps(facts, sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
    return [json.loads(text) | {"runs": count} for text, count in counts.items()]
