"""Commands that check a scenario and its data without running it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from fedkd.cli.terminal import CacheOption, OutOption, ScenarioArgument, SetOption, console, print_path, use_cache
from fedkd.errors import errors_in
from fedkd.libraries import import_libraries
from fedkd.scenario_file import load

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.scenario_file import Document
    from fedkd.sweep import Cell


def validate(scenario: ScenarioArgument, set_: SetOption = None, cache: CacheOption = None) -> None:
    """Check a scenario and its data without running it."""
    document, cells = _checked(scenario, set_ or [], cache)
    names = "; ".join(dict.fromkeys(cell.title for cell in cells))
    count = "one cell" if len(cells) == 1 else f"{len(cells)} cells"
    console.print(f"{escape(document.file)}: valid, {count}: {escape(names)}", highlight=False, soft_wrap=True)


def partition(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    out: OutOption = Path("runs"),
    cache: CacheOption = None,
) -> None:
    """Show how a scenario divides its data among clients: table, skew figures and picture, no training."""
    document, cells = _checked(scenario, set_ or [], cache)
    from fedkd.cli.screen import print_federation
    from fedkd.report import partition_figure

    shown: dict[bytes, str] = {}
    for cell in cells:
        federation = _federation(document, cell)
        if shown.setdefault(federation.counts.tobytes(), cell.title) != cell.title:
            continue
        title = print_federation(console, cell.scenario, federation)
        stem = "partition" if len(shown) == 1 else f"partition-{len(shown)}"
        path = out / cell.scenario.name / stem
        for file in partition_figure(federation.counts, federation.dataset.classes, path, title=title):
            print_path(file)


def _checked(scenario: str, overrides: Sequence[str], cache: Path | None) -> tuple[Document, list[Cell]]:
    """Read a scenario and check all that can be checked, data included, before anything is written."""
    use_cache(cache)
    document = load(scenario, overrides)
    import_libraries()
    from fedkd.sweep import expand

    cells = expand(document)
    for cell in cells:
        _federation(document, cell)
    return document, cells


def _federation(document: Document, cell: Cell) -> Federation:
    from fedkd.checks import check_data
    from fedkd.data.federation import build_federation

    with errors_in(document.file):
        federation = build_federation(cell.scenario)
        check_data(cell.scenario, federation)
    return federation
