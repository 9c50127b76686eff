"""What became of the runs of a sweep: found in their folders, finished or not, and written as tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedkd.errors import ScenarioError
from fedkd.files import write_atomic
from fedkd.listening import Result
from fedkd.report import aggregate, pivot, title_of, to_markdown, write_tables
from fedkd.run_folder import folder_of, read_metrics
from fedkd.sweep import Cell

CONDITIONS = (
    "python", "packages", "platform", "machine", "processor", "cores", "device", "engine", "workers", "git_commit"
)  # fmt: skip
"""What a table says about the machines that computed it, of each run's environment."""

_BESIDE = ("state", "reason", "best_round", "curve", "seconds_by_verb", "attackers", "refused", "folder", "conditions")
"""What a JSON file says about a run beside its row."""

Earlier = Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
"""Runs of earlier tables, by the name of their folder: what their JSON file says about each, and its environment."""


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
        Of a finished run whose folder is there.
    environment : dict
        Contents of its ``environment.json``.
    earlier : dict, optional
        Of a finished run whose folder is not there: what the JSON file of an earlier table says about it.
    """

    cell: Cell
    state: Literal["finished", "failed", "stopped", "missing"]
    reason: str = ""
    result: Result | None = None
    environment: dict[str, Any] = field(default_factory=dict, repr=False)
    earlier: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.state == "finished"

    @property
    def row(self) -> dict[str, Any]:
        """The row of a finished run that tables are made of."""
        if self.result is not None:
            return self.result.row(self.cell.values)
        assert self.earlier is not None
        row = {key: value for key, value in self.earlier.items() if key not in _BESIDE}
        volumes = {key: sum(row[key].values()) for key in ("bytes_up", "bytes_down")}
        return {**row, **volumes, "values": dict(self.cell.values)}


def collect(cells: Sequence[Cell], out: Path, earlier: Earlier | None = None) -> list[Found]:
    """Find the runs of cells.

    Parameters
    ----------
    cells : sequence of Cell
        As `fedkd.sweep.expand` returns them.
    out : Path
        Folder of all runs, as it was given to `fedkd.run.execute`.
    earlier : Earlier, optional
        Runs of earlier tables, as `read_tables` returns them, for cells of which no run below `out` is finished.

    Returns
    -------
    list of Found
        One for each cell, in their order. Of several runs of a cell (``--fresh``) the last that is finished counts.
    """
    return [_find(cell, out, earlier or {}) for cell in cells]


def read_tables(files: Sequence[Path]) -> Earlier:
    """Read the finished runs of earlier tables from the JSON files that `write` wrote.

    Of a run that is in several files, the last one counts.

    Raises
    ------
    ScenarioError
        A file is not there, or is no such file.
    """
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            conditions = content["conditions"]
            for facts in content["runs"]:
                if facts["state"] == "finished":
                    _check_run(facts)
                    mine = conditions[facts["conditions"]] if "conditions" in facts else _any_of(conditions)
                    found[str(facts["folder"])] = facts, {key: mine[key] for key in CONDITIONS if key in mine}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            what = "cannot be read" if isinstance(error, OSError) else "is not the JSON file of a table"
            raise ScenarioError(
                f"{file} {what}: {type(error).__name__}: {error}",
                key="--add",
                hint="name a .json file that fedkd table has written, such as benchmarks/results/poisoned_cpu.json",
            ) from None
    return found


def _check_run(facts: Mapping[str, Any]) -> None:
    """Raise something if these are not the facts of a finished run."""
    sum(facts["bytes_up"].values()) + sum(facts["bytes_down"].values())  # pyright: ignore[reportUnusedExpression]
    {int(rounds): accuracy for rounds, accuracy in (facts.get("accuracy_after") or {}).items()}
    if not isinstance(facts["label"], str) or not isinstance(facts["seed"], int):
        raise TypeError("a run without label or seed")


def _any_of(conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what different surroundings have in common, and what each of them may be where they differ."""
    merged: dict[str, Any] = {}
    for key in CONDITIONS:
        values = {json.dumps(each[key], sort_keys=True): each[key] for each in conditions if key in each}
        if values:
            merged[key] = next(iter(values.values())) if len(values) == 1 else " or ".join(map(str, values.values()))
    return merged


def _find(cell: Cell, out: Path, earlier: Earlier) -> Found:
    first = folder_of(cell.scenario, out, fresh=False)
    found = _in_folders(cell, first)
    if found.finished:
        return found
    matches = [re.fullmatch(rf"{re.escape(first.name)}(?:-(\d+))?", name) for name in earlier]
    known = {int(match[1] or 1): match[0] for match in matches if match is not None}
    if not known:
        return found
    facts, environment = earlier[known[max(known)]]
    return Found(cell, "finished", "", None, environment, facts)


def _in_folders(cell: Cell, first: Path) -> Found:
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
        if not one.finished:
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
        and what it was computed with, so that `read_tables` can add it to a later table.
    """
    rows = [one.row for one in found if one.finished]
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
    conditions = _conditions(found)
    content = {
        "scenario": found[0].cell.scenario.name,
        "about": about,
        "table": json.loads(table),
        "runs": [_facts(one, list(conditions)) for one in found],
        "conditions": [json.loads(text) | {"runs": count} for text, count in conditions.items()],
    }
    files.append(write_atomic(folder / f"{stem}.json", (json.dumps(content, indent=1) + "\n").encode()))
    return files


def _facts(one: Found, conditions: Sequence[str]) -> dict[str, Any]:
    """Return what a JSON file says about a run."""
    facts = {"label": one.cell.label, "seed": one.cell.scenario.run.seed, "values": one.cell.values, "state": one.state}
    if not one.finished:
        return facts | {"reason": one.reason}
    computed = {"conditions": conditions.index(_surroundings(one))}
    if one.result is None:
        assert one.earlier is not None
        return facts | one.earlier | {"values": one.cell.values} | computed
    summary = one.result.summary
    kept = ("whose", "best", "best_round", "curve", "bytes_up", "bytes_down", "seconds_by_verb", "attackers", "refused")
    facts |= one.row | {key: summary[key] for key in kept if key in summary} | {"folder": one.result.folder.name}
    return facts | computed


def _surroundings(one: Found) -> str:
    facts = {key: one.environment[key] for key in CONDITIONS if key in one.environment}
    return json.dumps(facts, sort_keys=True)


def _conditions(found: Sequence[Found]) -> dict[str, int]:
    """Return the different surroundings in which runs were computed, each with the number of its runs."""
    counts: dict[str, int] = {}
    for one in found:
        if one.finished:
            counts[_surroundings(one)] = counts.get(_surroundings(one), 0) + 1
    return counts
