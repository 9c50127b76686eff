"""The ``fedkd`` command. Heavy libraries are imported by the commands that need them: help is instant."""

from __future__ import annotations

import keyword
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedkd import __version__, cluster
from fedkd.errors import FedKDError, RunError, ScenarioError, errors_in
from fedkd.libraries import import_libraries
from fedkd.scenario_file import find, load, shipped
from fedkd.wording import did_you_mean

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.scenario_file import Document
    from fedkd.sweep import Cell

app = typer.Typer(
    help="Federated distillation, simulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
new = typer.Typer(help="Write the start of something of your own.", no_args_is_help=True)
app.add_typer(new, name="new")
console = Console()

ScenarioArgument = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="Name of an installed scenario, or a TOML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set strategy.temperature=3"),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="Where decoded data are kept; also $FEDKD_CACHE."),
]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster to join: auto, or HOST:PORT.")]
EngineOption = Annotated[str | None, typer.Option(help="ray, or inline: everything in this process.")]
WorkersOption = Annotated[int | None, typer.Option(help="Worker processes; 0 = one per core.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where results go.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0; 2 for a wrong command line, scenario or data; 1 for a run that failed; 130 after Ctrl-C.
    """
    if argv is not None:
        return _obey(argv)
    cluster.wait_for_starts = False
    try:
        with _interrupted_by_sigterm():
            code = _obey(None)
    except Exception:  # a mistake of ours, or of a plugin
        traceback.print_exc()
        code = 1
    if cluster.is_there():
        cluster.exit_now(code)
    return code


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, do what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _obey(argv: Sequence[str] | None) -> int:
    """Run a command, tell of errors that are meant for people, and return the exit code."""
    try:
        code = app(args=None if argv is None else list(argv), prog_name="fedkd", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except FedKDError as error:
        _complain(f"error: {error}")
        return 1 if isinstance(error, RunError) else 2
    except BrokenPipeError:  # the reader of a pipe has gone: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


@contextmanager
def _resumable(how: str = "the same command") -> Iterator[None]:
    """Turn Ctrl-C into a line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        folder = getattr(interrupt, "folder", None)
        _complain(f"interrupted; go on with: {f'fedkd resume {folder}' if folder else how}")
        raise typer.Exit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedkd {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- running -------------------------------------------------------------------------------------------


@app.command()
def run(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    out: OutOption = Path("runs"),
    cache: CacheOption = None,
    address: AddressOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs of a sweep at once, each inline with its share of the cores.")
    ] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is already finished.")] = False,
) -> None:
    """Run a scenario; where it has a sweep, all of its cells that are not finished."""
    system = {"address": address, "engine": engine, "workers": workers}
    given = [f"system.{key}={value}" for key, value in system.items() if value is not None]
    _use_cache(cache)
    document = load(scenario, [*(set_ or []), *given])
    from fedkd.jobs import execute_sweep
    from fedkd.screen import Screen
    from fedkd.sweep import expand

    cells = expand(document, checked=False)  # what needs the libraries is checked while Ray starts

    with (
        _resumable("fedkd resume, for each run that is not finished" if fresh else "the same command"),
        Screen(console, cells) as screen,
    ):
        finished, failed = execute_sweep(cells, out=out, file=document.file, fresh=fresh, jobs=jobs, listener=screen)
    screen.conclude(finished, out / document.scenario.name)
    for cell, error in failed:
        _complain(f"error: {cell.title}: {error}")
    if failed:
        raise typer.Exit(1)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of an interrupted run, such as runs/quickstart/1a2b3c4d.")],
    cache: CacheOption = None,
) -> None:
    """Go on with an interrupted run, to the same results as without the interruption."""
    _use_cache(cache)
    import_libraries()
    from fedkd import run as runs
    from fedkd.screen import Screen

    with _resumable(), Screen(console) as screen:
        result = runs.resume(folder, listener=screen)
    screen.conclude([(None, result)], folder)


@app.command()
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
        console.print(str(file), markup=False, highlight=False, soft_wrap=True)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the app's pyproject.toml is.")] = Path("."),
    clients: Annotated[int, typer.Option(min=1, help="Nodes of the federation.")] = 10,
    run_config: Annotated[
        str, typer.Option("--run-config", "-c", metavar="'KEY=VALUE …'", help="Settings of the app, as in flwr run.")
    ] = "",
    address: AddressOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
) -> None:
    """Run any Flower app on this engine: `flwr run` without a SuperLink."""
    engines = ("ray", "inline")
    if engine not in (None, *engines):
        raise ScenarioError(f"there is no engine {engine!r}", key="--engine", hint=did_you_mean(engine, engines))
    from fedkd.engine import simulation

    server_app, client_app, config = simulation.load_app(folder, run_config)
    simulation.simulate(
        server_app,
        client_app,
        clients,
        run_config=config,
        engine="inline" if engine == "inline" else "ray",
        workers=workers or 0,
        address=address or "",
    )


@app.command()
def validate(scenario: ScenarioArgument, set_: SetOption = None, cache: CacheOption = None) -> None:
    """Check a scenario and its data without running it."""
    document, cells = _checked(scenario, set_ or [], cache)
    names = "; ".join(dict.fromkeys(cell.title for cell in cells))
    count = "one cell" if len(cells) == 1 else f"{len(cells)} cells"
    console.print(f"{escape(document.file)}: valid, {count}: {escape(names)}", highlight=False, soft_wrap=True)


@app.command()
def partition(
    scenario: ScenarioArgument,
    set_: SetOption = None,
    out: OutOption = Path("runs"),
    cache: CacheOption = None,
) -> None:
    """Show how a scenario divides its data among clients: table, skew figures and picture, no training."""
    document, cells = _checked(scenario, set_ or [], cache)
    from fedkd.report import partition_figure
    from fedkd.screen import print_federation

    shown: dict[bytes, str] = {}
    for cell in cells:
        federation = _federation(document, cell)
        if shown.setdefault(federation.counts.tobytes(), cell.title) != cell.title:
            continue
        title = print_federation(console, cell.scenario, federation)
        stem = "partition" if len(shown) == 1 else f"partition-{len(shown)}"
        path = out / cell.scenario.name / stem
        for file in partition_figure(federation.counts, federation.dataset.classes, path, title=title):
            console.print(str(file), markup=False, highlight=False, soft_wrap=True)


def _use_cache(cache: Path | None) -> None:
    if cache is not None:
        os.environ["FEDKD_CACHE"] = os.path.abspath(os.path.expanduser(cache))


def _checked(scenario: str, overrides: Sequence[str], cache: Path | None) -> tuple[Document, list[Cell]]:
    """Read a scenario and check all that can be checked, data included, before anything is written."""
    _use_cache(cache)
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


# --- looking -------------------------------------------------------------------------------------------


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


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="[" + "|".join(KINDS) + "]", help="What to list; all if empty.")] = "",
) -> None:
    """List strategies, scenarios, models, data sets, partitioners or losses."""
    if kind and kind not in KINDS:
        raise ScenarioError(f"cannot list {kind!r}", hint=did_you_mean(kind, KINDS))
    for title in [kind] if kind else ["strategies", "scenarios"]:
        table = Table(title=None if kind else title, title_justify="left", box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, line in KINDS[title]().items():
            table.add_row(escape(name), escape(line))
        console.print(table)
    if not kind:
        console.print("\nfedkd list models | datasets | partitioners | losses; fedkd describe NAME", markup=False)
    elif kind == "strategies":
        console.print("\nand flwr:NAME for Flower's own, module:attribute for yours", markup=False)


@app.command()
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
        table = Table(box=None, pad_edge=False)
        for column in ("hyper-parameter", "default", "may be", ""):
            table.add_column(column, no_wrap=column in ("hyper-parameter", "default"))
        for item in hyper.values():
            default = "(needed)" if item.default is MISSING else str(item.default)
            table.add_row(*map(escape, (item.name, default, item.allowed, item.help)))
        console.print()
        console.print(table)


@app.command("methods")
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
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
        return
    typer.echo(methods.short_table(found) if short else methods.page(found), nl=False)


# --- writing -------------------------------------------------------------------------------------------


@new.command("strategy")
def new_strategy(
    name: Annotated[str, typer.Argument(help="Name of the strategy, such as my_method.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of the new package; the name, here, if empty.")] = None,
) -> None:
    """Write a package with a working strategy (both halves), a scenario, and a test that passes."""
    taken = {"test", "tests", "strategies", "scenarios", "fedkd", *sys.stdlib_module_names}
    if not name.isidentifier() or not name.isascii() or name != name.lower() or keyword.iskeyword(name):
        hint = "use small letters, digits and underscores, a letter first: my_method"
        raise ScenarioError(f"{name!r} cannot be the name of a Python module", hint=hint)
    if name in taken:
        raise ScenarioError(f"{name!r} is the name of another module", hint=f"such as {name}_method")
    target = folder or Path(name)
    names = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_") if part) or "Method"}
    templates = Path(__file__).parent / "templates"
    files = {
        target / Template(path.name.removesuffix(".template")).substitute(names): Template(
            path.read_text(encoding="utf-8")
        ).substitute(names)
        for path in sorted(templates.glob("*.template"))
    }
    for path in files:
        if path.exists():
            raise ScenarioError(f"{path} is there already", hint="choose another name, or another --folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"cannot write to {target}: {error.strerror}", hint="choose another --folder") from None
    for path in files:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    steps = {
        f"cd {target}": "",
        f"fedkd run {name}.toml": "# runs it, by module:attribute",
        "pytest": "# its test",
        "pip install -e .": f'# then strategy = "{name}" works in any scenario',
    }
    width = max(map(len, steps))
    lines = [f"  {step:{width}}  {note}".rstrip() for step, note in steps.items()]
    console.print("\n" + "\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
