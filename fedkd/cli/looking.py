"""Commands that show what there is: results of runs, and strategies, models, losses, ... to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fedkd.cli.terminal import OutOption, ScenarioArgument, SetOption, console, print_path
from fedkd.errors import ScenarioError
from fedkd.scenario_file import find, load, shipped
from fedkd.wording import did_you_mean


def table(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    out: OutOption = Path("runs"),
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where tables go; beside the runs if empty.")
    ] = None,
    across: Annotated[
        str, typer.Option(metavar="KEY", help="A key of the sweep whose values are the columns of a second table.")
    ] = "",
    metric: Annotated[str, typer.Option(help="What that one shows, such as best or own_worst_accuracy.")] = "final",
    add: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSON file of an earlier table, for runs whose folders are not here."),
    ] = None,
) -> None:
    """Make the table of a scenario's sweep from the runs there are, and say which are missing or failed."""
    document = load(scenario, set_ or [])
    from fedkd.report import console_table
    from fedkd.results import collect, gaps, read_tables, write
    from fedkd.sweep import expand

    found = collect(expand(document), out, read_tables(add or []))
    rows = [one.row for one in found if one.finished]
    for line in gaps(found):
        console.print(f"no result: {line}", markup=False, highlight=False, soft_wrap=True)
    if not rows:
        hint = f"fedkd run {scenario} computes them; --out and --set must be those of the runs"
        raise ScenarioError(f"no run of {document.scenario.name} is finished below {out}", key="table", hint=hint)
    console.print(console_table(rows, f"{len(rows)} of {len(found)} runs"))
    about, name = document.scenario.description, document.scenario.name
    try:
        files = write(found, to or out / name, name, across=across, metric=metric, about=about)
    except ValueError as error:
        raise ScenarioError(str(error), key="table", hint="see --across and --metric in fedkd table --help") from None
    for file in files:
        print_path(file)


def _strategies() -> dict[str, str]:
    from fedkd import plugins

    return plugins.summaries()


def _models() -> dict[str, str]:
    from fedkd import models

    return {name: models.describe(name) for name in models.names()} | models.PATTERNS


def _datasets() -> dict[str, str]:
    from fedkd.data import sources

    return sources.names()


def _partitioners() -> dict[str, str]:
    from fedkd.data.partition import names

    return names()


def _scenarios() -> dict[str, str]:
    return {name: load(name).scenario.description for name in shipped()}


def _losses() -> dict[str, str]:
    from fedkd import losses

    return losses.names()


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "strategies": _strategies,
    "scenarios": _scenarios,
    "models": _models,
    "datasets": _datasets,
    "partitioners": _partitioners,
    "losses": _losses,
}


def list_(
    kind: Annotated[str, typer.Argument(metavar="[" + "|".join(KINDS) + "]", help="What to list; all if empty.")] = "",
) -> None:
    """List strategies, scenarios, models, data sets, partitioners or losses."""
    if kind and kind not in KINDS:
        raise ScenarioError(f"cannot list {kind!r}", hint=did_you_mean(kind, KINDS))
    for title in [kind] if kind else ["strategies", "scenarios"]:
        names = Table(title=None if kind else title, title_justify="left", box=None, show_header=False, pad_edge=False)
        names.add_column(no_wrap=True, style="bold")
        names.add_column(overflow="fold")
        for name, line in KINDS[title]().items():
            names.add_row(escape(name), escape(line))
        console.print(names)
    if not kind:
        console.print("\nfedkd list models | datasets | partitioners | losses; fedkd describe NAME", markup=False)
    elif kind == "strategies":
        console.print("\nand flwr:NAME for Flower's own, module:attribute for yours", markup=False)


def describe(
    name: Annotated[str, typer.Argument(help="A strategy, scenario, model, data set, partitioner or loss.")],
) -> None:
    """Tell what a strategy does, sends, requires and can be set to; or what a model, loss, … is."""
    from fedkd import plugins

    if name in plugins.strategy_names() or (":" in name and not name.startswith(("npz:", "torchvision:", "hub:"))):
        _describe_strategy(name, plugins.strategy_class(name))
        return
    if name in shipped():
        for line in find(name).read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            console.print(line.removeprefix("#").strip(), markup=False, highlight=False)
        console.print(f"\n{find(name)}", markup=False, highlight=False, soft_wrap=True)
        return
    known = [*plugins.strategy_names(), *shipped()]
    found = False
    for kind in ("models", "datasets", "partitioners", "losses"):
        entries = KINDS[kind]()
        known += entries
        for entry, line in entries.items():
            if name == entry or (":" in entry and name.partition(":")[0] == entry.partition(":")[0]):
                console.print(f"{entry} ({kind}): {line}", markup=False, highlight=False)
                found = True
    if not found:
        hint = f"{did_you_mean(name, known, '')} see fedkd list".strip()
        raise ScenarioError(f"nothing is called {name!r}", hint=hint)


def _describe_strategy(name: str, cls: Any) -> None:
    from fedkd import methods, plugins

    console.print(name, style="bold", markup=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for topic, text in methods.facts(cls).items():
        grid.add_row(topic, escape(text))
    console.print(grid)
    for paragraph in methods.paragraphs(cls)[1:2]:
        console.print(f"\n{paragraph}", markup=False, highlight=False)
    hyper = plugins.hyper_parameters(cls)
    if hyper:
        settings = Table(box=None, pad_edge=False)
        for column in ("hyper-parameter", "default", "may be", ""):
            settings.add_column(column, no_wrap=column in ("hyper-parameter", "default"))
        for item in hyper.values():
            default = "(needed)" if item.default is MISSING else str(item.default)
            settings.add_row(*map(escape, (item.name, default, item.allowed, item.help)))
        console.print()
        console.print(settings)


def methods_(
    short: Annotated[bool, typer.Option("--short", help="Print the README's table instead.")] = False,
    write: Annotated[
        Path | None,
        typer.Option("--write", metavar="FOLDER", help="Write docs/methods.md and the README's table in this tree."),
    ] = None,
) -> None:
    """Print docs/methods.md, which is made from the built-in methods' classes."""
    from fedkd import methods

    found = methods.built_in()
    if write is not None:
        for path in methods.write(write, found):
            print_path(path)
        return
    typer.echo(methods.short_table(found) if short else methods.page(found), nl=False)
