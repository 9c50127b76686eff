"""Scenarios and the nested tables that a file holds: parsed, changed, and what is wrong with them in our words."""

from __future__ import annotations

import copy
import datetime
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fedkd.errors import ScenarioError, raise_all
from fedkd.scenario import Scenario, Section
from fedkd.wording import allowed, bounds_of, did_you_mean


def parse(raw: Mapping[str, Any], said_by_set: Sequence[str] = ()) -> Scenario:
    """Make a scenario of nested tables.

    Parameters
    ----------
    raw : mapping
        Sections by name.
    said_by_set : sequence of str
        Dotted keys that came from the command line, so that a message can say so.

    Raises
    ------
    ScenarioError
        With every mistake that was found, in one message.

    Examples
    --------
    >>> parse({"run": {"participation": 1.5}})
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: run.participation: must be a number in (0, 1], is 1.5
      Share of the clients that take part in a round. Default: 1.0.
    """
    errors = {error.key: error for error in unusable(raw)}
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            translated = _translate(detail, raw)
            errors[translated.key] = translated
        scenario = None
    if scenario is not None and (scenario.name in ("", ".", "..") or set(scenario.name) & set("/\\\0")):
        hint = "a name that a folder can have; --out says where results go"
        errors["name"] = ScenarioError(f"must be the name of one folder, is {scenario.name!r}", key="name", hint=hint)
    for key, error in errors.items():
        if any(key == said or key.startswith((f"{said}.", f"{said}[")) for said in said_by_set):
            error.problem += " (from --set)"
    raise_all(errors.values())
    assert scenario is not None  # whatever pydantic refused is among the errors
    return scenario


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables, in place.

    ``strategy = "feddf"`` is short for ``strategy.name``; another ``strategy.name`` drops the
    hyper-parameters that were meant for the old one. A number in the key picks an element of a list:
    ``client.terms.0.weight``.

    Raises
    ------
    ScenarioError
        The path runs through something that is no table.

    Examples
    --------
    >>> raw = {"strategy": {"name": "feddf", "steps": 10}}
    >>> assign(raw, "strategy.name", "fedavg"); raw
    {'strategy': {'name': 'fedavg'}}
    """
    if key == "strategy" and isinstance(value, str):
        key = "strategy.name"
    strategy = raw.get("strategy")
    if key == "strategy.name" and isinstance(strategy, dict) and strategy.get("name", "fedavg") != value:
        raw["strategy"] = {}
    parts = key.split(".")
    node: Any = raw
    for position, part in enumerate(parts[:-1]):
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            place = ".".join(parts[: position + 1])
            raise ScenarioError(f"{place} is a value, not a table", key=key, hint=f"set {place} itself")
    last = parts[-1]
    if isinstance(node, dict):
        node[last] = copy.deepcopy(value)
    else:
        node[_index(node, last, key)] = copy.deepcopy(value)


def _index(elements: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(elements):
        raise ScenarioError(f"no {part!r}: the list has {len(elements)} elements, numbered from 0", key=key)
    return int(part)


def merge(raw: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay changes over nested tables, in place: section by section, values inside a section are replaced.

    Parameters
    ----------
    raw : dict
        Sections by name.
    changes : mapping
        Sections by name, dotted keys, or both.
    """
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping) and key in Scenario.model_fields:
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    # The strategy's name first: another one drops the old hyper-parameters.
    for key in sorted(flat, key=lambda key: key not in ("strategy", "strategy.name")):
        assign(raw, key, flat[key])


def as_tables(scenario: Scenario) -> dict[str, Any]:
    """Return nested tables of what the scenario sets, without defaults, to be changed and parsed."""
    return scenario.model_dump(exclude_unset=True)


# --- what is wrong -------------------------------------------------------------------------------------


def unusable(table: Any, prefix: str = "") -> list[ScenarioError]:
    """Return an error for every NaN, infinity and date in nested tables, whose dotted keys begin with `prefix`."""
    errors = []
    for key, value in _leaves(table, prefix):
        if isinstance(value, float) and not math.isfinite(value):
            hint = "NaN and infinity are never settings"
            errors.append(ScenarioError(f"must be a finite number, is {value}", key=key, hint=hint))
        elif isinstance(value, datetime.date | datetime.time):
            hint = f'no setting is a date or a time; as a string: "{value}"'
            errors.append(ScenarioError(f"must not be a date, is {value}", key=key, hint=hint))
    return errors


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value of nested tables and lists with its dotted key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for position, value in enumerate(node):
            yield from _leaves(value, f"{prefix}[{position}]")
    else:
        yield prefix, node


def _section_of(annotation: Any) -> type[Section] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _translate(detail: Mapping[str, Any], raw: Any) -> ScenarioError:
    """Turn one of pydantic's findings into our own words."""
    key, node, info = "", raw, None
    section: type[Section] | None = Scenario
    for part in detail["loc"]:
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            key, node = f"{key}[{part}]", node[part]
        elif section is not None and isinstance(node, Mapping) and part in node:
            key, node = f"{key}.{part}" if key else str(part), node[part]
            info = section.model_fields.get(str(part))
            if info is None:
                return _unknown(key, str(part), section)
            section = _section_of(info.annotation)
        else:  # a branch of a union
            break
    if info is None:
        return ScenarioError(f"must be a table, is {node!r}", key=key)
    default = info.get_default(call_default_factory=True, validated_data={})
    hint = info.description or ""
    if default is not None and not isinstance(default, Section) and default not in ("", [], {}):
        hint += f" Default: {default}."
    return ScenarioError(f"must be {allowed(info.annotation, bounds_of(info))}, is {node!r}", key=key, hint=hint)


def _unknown(key: str, name: str, section: type[Section]) -> ScenarioError:
    known = [*section.model_fields, *(["sweep", "extends"] if section is Scenario else [])]
    hint = did_you_mean(name, known)
    elsewhere = _way_to(name)
    if not hint.startswith("did") and elsewhere:
        hint = elsewhere
    return ScenarioError("unknown key", key=key, hint=hint)


def _way_to(name: str) -> str:
    """Return a hint to the sections that have a key of this name."""
    places = [
        f"{title}.{name}"
        for title, info in Scenario.model_fields.items()
        if (section := _section_of(info.annotation)) and name in section.model_fields
    ]
    return f"did you mean {' or '.join(places)}?" if places else did_you_mean(name, Scenario.model_fields)
