"""Sweeps: the ``[sweep]`` table of a scenario, spanned into cells that are run side by side.

Cases are variants that differ in several settings at once; every other key is an axis of a grid::

    [sweep]
    cases = [
        {label = "FedAvg", strategy = "fedavg"},
        {label = "FedDF", strategy = {name = "feddf", steps = 500}, client = {epochs = 2}},
    ]
    "partition.alpha" = [0.1, 1.0]
    "run.seed" = [0, 1, 2]

spans 2 × 2 × 3 cells. Keys may be dotted or nested. Settings inside a section are replaced one by one; a
strategy of another name starts from its own defaults, not from the base's hyper-parameters. ``--set`` has the
last word in every cell. An axis may also run over tables, which differ in several settings of one section and are
called by their ``label``, if they have one::

    attacks = [{label = "none"}, {label = "sign flip, 10 %", kind = "sign-flip", share = 0.1}]

``only = ["FedDF"]`` keeps the cells of these labels: for a part of a large sweep, ``--set 'sweep.only=["FedDF"]'``.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedkd.errors import ScenarioError, errors_in
from fedkd.parsing import as_tables, assign, merge, parse
from fedkd.scenario import Scenario, digest
from fedkd.scenario_file import Document
from fedkd.wording import did_you_mean


@dataclass(frozen=True)
class Cell:
    """One scenario of a sweep.

    Parameters
    ----------
    label : str
        Its case or strategy, as tables show it; cells that differ only in grid values share it.
    values : dict
        What the sweep set, by dotted key, in the order of the axes; ``case`` is the label of a case.
    scenario : Scenario
        The resolved scenario; its `label` is this cell's.
    """

    label: str
    values: dict[str, Any]
    scenario: Scenario

    @property
    def title(self) -> str:
        """Label and grid values but the seed: one name for each line of a table or a figure."""
        rest = {key: value for key, value in self.values.items() if key not in ("case", "strategy", "run.seed")}
        return ", ".join([self.label, *(f"{key.rpartition('.')[2]} {_text(value)}" for key, value in rest.items())])


def expand(document: Document, *, checked: bool = True) -> list[Cell]:
    """Return the cells of a document: those of its sweep, or its one scenario.

    Parameters
    ----------
    document : Document
        As `fedkd.scenario_file.load` returns it.
    checked : bool
        Whether the cells go through `fedkd.checks.check`.

    Returns
    -------
    list of Cell
        Cases outermost, then the axes of the grid in the order in which they are written.

    Raises
    ------
    ScenarioError
        The first cell that cannot be run, two cells that are the same, two cases of one label, or a label in ``only``
        that no cell has.

    Examples
    --------
    >>> from fedkd.scenario_file import read
    >>> raw = {"sweep": {"strategy": ["fedavg", {"name": "feddf", "steps": 5}], "run.seed": [0, 1]}}
    >>> [(c.label, c.scenario.run.seed) for c in expand(read(raw), checked=False)]
    [('fedavg', 0), ('fedavg', 1), ('feddf steps 5', 0), ('feddf steps 5', 1)]
    """
    sweep = document.sweep
    cases: list[dict[str, Any]] = list(sweep.cases) if sweep and sweep.cases else [{}]
    grid = sweep.grid if sweep else {}
    cells: list[Cell] = []
    seen: dict[str, Cell] = {}
    by_label: dict[str, int] = {}
    labels: dict[str, None] = {}
    with errors_in(document.file):
        for number, case in enumerate(cases):
            for combination in itertools.product(*grid.values()):
                cell = _cell(document, case, dict(zip(grid, combination, strict=True)))
                labels[cell.label] = None
                if sweep and sweep.only and cell.label not in sweep.only:
                    continue
                if case and by_label.setdefault(cell.label, number) != number:
                    hint = 'give each its own label, such as {label = "FedDF", …}'
                    raise ScenarioError(f"two cases are called {cell.label!r}", key="sweep.cases", hint=hint)
                mark = digest(cell.scenario)
                if mark in seen:
                    problem = f"{_text(seen[mark].values)!r} and {_text(cell.values)!r} are the same scenario"
                    raise ScenarioError(problem, key="sweep", hint="leave one of them out")
                seen[mark] = cell
                cells.append(cell)
        for label in sweep.only if sweep else ():
            if label not in labels:
                hint = did_you_mean(label, labels, "labels")
                raise ScenarioError(f"no cell is called {label!r}", key="sweep.only", hint=hint)
        if checked:
            # By name, as the checks stand above this module; they import torch, for which only who checks should wait.
            check_cells(cells, importlib.import_module("fedkd.checks").check)
    return cells


def check_cells(cells: Sequence[Cell], check: Callable[[Scenario], Any]) -> None:
    """Check each cell, and say of the first wrong one where it is in the sweep.

    Parameters
    ----------
    cells : sequence of Cell
        The cells.
    check : callable
        Raises a `ScenarioError` for a scenario that cannot be run.
    """
    for cell in cells:
        with _errors_at(repr(cell.title) if cell.values else ""):
            check(cell.scenario)


def _cell(document: Document, case: Mapping[str, Any], point: dict[str, Any]) -> Cell:
    table = as_tables(document.scenario)
    changes = {key: value for key, value in case.items() if key != "label"}
    values: dict[str, Any] = {}
    label = document.scenario.label
    named = {key: _named(value) for key, value in point.items()}
    with _errors_at(_text(dict(case) | point)):
        merge(table, changes)
        merge(table, {key: settings for key, (_, settings) in named.items()})
        for key, value in document.overrides:
            assign(table, key, value)
        scenario = parse(table, said_by_set=[key for key, _ in document.overrides])
    if case:
        label = str(case.get("label", "")) or _name(scenario, changes)
        values["case"] = label
    elif "strategy" in point or "strategy.name" in point:
        own, settings = named.get("strategy", ("", scenario.strategy.name))
        label = own or _name(scenario, {"strategy": settings})
    label = label or scenario.strategy.name
    values |= {key: label if key == "strategy" else own or settings for key, (own, settings) in named.items()}
    return Cell(label, values, parse(table | {"label": label}))


def _named(value: Any) -> tuple[str, Any]:
    """Return the label of a value of an axis, empty if it has none, and the value without it."""
    if not isinstance(value, Mapping):
        return "", value
    return str(value.get("label", "")), {key: inner for key, inner in value.items() if key != "label"}


def _name(scenario: Scenario, changes: Mapping[str, Any]) -> str:
    """Return a label from the strategy's name and whatever else a case changes."""
    parts = [scenario.strategy.name]
    for key, value in changes.items():
        inner = value if isinstance(value, Mapping) else {key: value}
        parts += [
            f"{name.rpartition('.')[2]} {_text(setting)}"
            for name, setting in inner.items()
            if name not in ("name", "strategy", "strategy.name")
        ]
    return " ".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)


@contextmanager
def _errors_at(place: str) -> Iterator[None]:
    """Say in which cell an error is."""
    try:
        yield
    except ScenarioError as error:
        error.problem += f" (in the sweep, at {place})" if place else ""
        raise
