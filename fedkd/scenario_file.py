"""Scenario files: found, read with what the command line overrides, and written.

Values are checked one by one on reading; what concerns several of them is left to `fedkd.checks`. Whatever is
wrong becomes a `ScenarioError` that names file, dotted key, value, what is allowed, and the way out.

A file may build on another one and say only what differs, in the scenario and in cases of the sweep by their label::

    extends = "quickstart"  # an installed scenario, or a path from here

    [run]
    rounds = 3

    [[sweep.cases]]
    label = "FedDF + KD"
    strategy.steps = 50
"""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedkd.errors import ScenarioError, errors_in, raise_all
from fedkd.parsing import assign, merge, parse, unusable
from fedkd.scenario import Scenario
from fedkd.wording import did_you_mean


@dataclass(frozen=True)
class Sweep:
    """The ``[sweep]`` table: variants of the scenario that are run side by side (see `fedkd.sweep`).

    Parameters
    ----------
    cases : tuple of dict
        Each a set of changes to the base: nested tables or dotted keys, and perhaps a ``label``.
    grid : dict of str to list
        Values of each dotted key; every combination is run, for every case.
    only : tuple of str
        Labels of the cells that are wanted; empty = all.
    """

    cases: tuple[dict[str, Any], ...] = ()
    grid: dict[str, list[Any]] = field(default_factory=dict)
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """A scenario file, read.

    Parameters
    ----------
    scenario : Scenario
        The base scenario, overrides included.
    sweep : Sweep or None
        Its ``[sweep]`` table.
    file : str
        Where it was read from, for messages.
    overrides : tuple of (str, value)
        What ``--set`` said, by dotted key; in a sweep it also has the last word in every cell.
    """

    scenario: Scenario
    sweep: Sweep | None = None
    file: str = ""
    overrides: tuple[tuple[str, Any], ...] = ()


def shipped() -> dict[str, Path]:
    """Return the installed scenarios: file by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "scenarios").glob("*.toml"))}


def find(path_or_name: str | Path) -> Path:
    """Return the file of a scenario.

    Parameters
    ----------
    path_or_name : str or Path
        A bare name means an installed scenario, or else a file of that name here; anything that ends in
        ``.toml`` or holds a slash is a path.

    Raises
    ------
    ScenarioError
        There is no such scenario.
    """
    text = str(path_or_name)
    path = Path(os.path.expanduser(text))  # pathlib raises where there is no such user
    known = shipped()
    if text in known:
        return known[text]
    if os.path.isfile(path):  # pathlib raises for names that are too long
        return path
    if os.path.isdir(path):
        raise ScenarioError("this is a folder, not a scenario file", file=text, hint="name the .toml file in it")
    if path.suffix == ".toml" or "/" in text:
        raise ScenarioError(
            "there is no such file", file=text, hint=did_you_mean(path.stem, known, "installed scenarios")
        )
    raise ScenarioError(f"no scenario is called {text!r}", hint=did_you_mean(text, known, "installed scenarios"))


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a scenario.

    Parameters
    ----------
    path_or_name : str or Path
        An installed scenario's name or a TOML file (see `find`).
    overrides : sequence of str
        ``key=value`` with a dotted key; the value is read as TOML, or else taken as a string.

    Returns
    -------
    Document
        Values are checked one by one; what concerns several of them is left to `fedkd.checks.check`.

    Raises
    ------
    ScenarioError
        With every mistake that was found.

    Examples
    --------
    >>> load("quickstart", ["run.rounds=3"]).scenario.run.rounds
    3
    """
    path = find(path_or_name)
    raw = _tables(path)
    with errors_in(str(path)):
        return read({"name": path.stem} | raw, overrides, str(path))


def _tables(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of a file and of what it extends; `above` are the files that extend it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot be read: {error}", file=str(path), hint="TOML files are UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # of TOML, of Python's integers, of endless brackets
        raise ScenarioError(f"this is not TOML: {error}", file=str(path), hint="see https://toml.io") from None
    if "extends" not in raw:
        return raw
    with errors_in(str(path)):
        parent = raw.pop("extends")
        if not isinstance(parent, str):
            hint = "an installed scenario, or the path of a file from this one's folder"
            raise ScenarioError(f"must be a string, is {parent!r}", key="extends", hint=hint)
        try:
            below = find(parent if parent in shipped() else path.parent / os.path.expanduser(parent))
        except ScenarioError as error:
            hint = did_you_mean(parent, shipped(), "installed scenarios")
            raise ScenarioError(f"there is no scenario {parent!r}", key="extends", hint=hint) from error
        if below.resolve() in [other.resolve() for other in (*above, path)]:
            raise ScenarioError(f"{parent!r} extends this file", key="extends", hint="one of them must stand alone")
        return _extended(_tables(below, (*above, path)), raw)


def _extended(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay tables over others: settings one by one, axes of the grid as wholes, cases by their label."""
    own, more = _read_sweep(base.pop("sweep", {})), _read_sweep(changes.pop("sweep", {}))
    base = {key: value for key, value in base.items() if key != "name"}
    merge(base, changes)
    cases: list[dict[str, Any]] = [dict(case) for case in own.cases]
    for change in more.cases:
        same = [case for case in cases if "label" in case and case["label"] == change.get("label")]
        if not same:
            cases.append(dict(change))
            continue
        before = dict(same[0])
        same[0].clear()
        merge(same[0], before)  # dotted keys become tables, so that every setting is in one place
        merge(same[0], change)
    sweep = {"cases": cases} | own.grid | more.grid | {"only": list(more.only or own.only)}
    return base | ({"sweep": sweep} if cases or own.grid or more.grid else {})


def read(raw: Mapping[str, Any], overrides: Sequence[str] = (), file: str = "") -> Document:
    """Make a document of a table as `load` does of a file; same parameters, returns and errors."""
    table = copy.deepcopy(dict(raw))
    sweep = _read_sweep(table.pop("sweep", {}))
    pairs = [_parse_override(text) for text in overrides]
    for key, value in pairs:
        if key == "sweep":
            sweep = _read_sweep(value)
        elif key.startswith("sweep."):
            name = key.removeprefix("sweep.")
            sweep = _read_sweep({"cases": list(sweep.cases), "only": list(sweep.only)} | sweep.grid | {name: value})
        else:
            assign(table, key, value)
    pairs = [(key, value) for key, value in pairs if not (key + ".").startswith("sweep.")]
    # A grid over a key that --set fixes is that one value.
    grid = {key: values for key, values in sweep.grid.items() if key not in dict(pairs)}
    scenario = parse(table, said_by_set=[key for key, _ in pairs])
    has_sweep = bool(sweep.cases or grid)
    return Document(scenario, Sweep(sweep.cases, grid, sweep.only) if has_sweep else None, file, tuple(pairs))


def dump(scenario: Scenario) -> str:
    """Return the resolved scenario, defaults included, as TOML that `load` reads back to an equal one."""
    return tomli_w.dumps(scenario.model_dump(exclude_none=True))


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ScenarioError(f"--set wants key=value, got {text!r}", hint="for example --set partition.alpha=0.1")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key, value.strip()
    plain = parsed.keys() == {"value"} and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return key, parsed["value"] if plain else value.strip()


def _read_sweep(raw: Any) -> Sweep:
    if not isinstance(raw, dict):
        raise ScenarioError(f"must be a table, is {raw!r}", key="sweep", hint='such as "run.seed" = [0, 1, 2]')
    bad = unusable(raw, "sweep")
    cases = raw.get("cases", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) and case for case in cases):
        hint = 'cases = [{label = "FedAvg", strategy = "fedavg"}, …]'
        bad.append(ScenarioError(f"must be a list of tables, is {cases!r}", key="sweep.cases", hint=hint))
    only = raw.get("only", [])
    if not isinstance(only, list) or not all(isinstance(label, str) for label in only):
        problem = f"must be a list of labels, is {only!r}"
        bad.append(ScenarioError(problem, key="sweep.only", hint='only = ["FedAvg", "FedDF"]'))
    grid: dict[str, list[Any]] = {}

    def collect(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                collect(f"{name}.", value)
            elif not isinstance(value, list) or not value:
                hint = f'"{name}" = [first, second, …]'
                error = ScenarioError(f"must be a list of values, is {value!r}", key=f"sweep.{name}", hint=hint)
                bad.append(error)
            else:
                grid[name] = value

    collect("", {key: value for key, value in raw.items() if key not in ("cases", "only")})
    raise_all(bad)
    return Sweep(tuple(cases), grid, tuple(only))
