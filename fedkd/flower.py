"""What Flower's own runtime tells our apps: which scenario to run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedkd.errors import ScenarioError
from fedkd.scenario import Scenario
from fedkd.scenario_file import load
from fedkd.sweep import expand


def scenario_of(run_config: Mapping[str, Any]) -> Scenario:
    """Return the scenario that a Flower run config names.

    Parameters
    ----------
    run_config : mapping
        ``scenario``: name or path; ``overrides``: ``key=value`` settings separated by ``;``;
        ``cell``: which cell of a sweep, from 0.

    Raises
    ------
    ScenarioError
        The scenario does not exist or cannot be run as written.
    """
    overrides = str(run_config.get("overrides", ""))
    return _load(str(run_config.get("scenario", "quickstart")), overrides, int(run_config.get("cell", 0)))


@lru_cache(maxsize=8)
def _load(name: str, overrides: str, cell: int) -> Scenario:
    document = load(name, [item.strip() for item in overrides.split(";") if item.strip()])
    if document.sweep is None:
        return document.scenario
    cells = expand(document)
    if not 0 <= cell < len(cells):
        raise ScenarioError(
            f"there is no cell {cell}", key="cell", file=document.file, hint=f"0 to {len(cells) - 1} are there"
        )
    return cells[cell].scenario
