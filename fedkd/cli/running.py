"""Commands that run something: a scenario, the rest of a run, any Flower app."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedkd.cli.terminal import (
    AddressOption,
    CacheOption,
    EngineOption,
    OutOption,
    ScenarioArgument,
    SetOption,
    WorkersOption,
    complain,
    console,
    use_cache,
)
from fedkd.errors import ScenarioError
from fedkd.libraries import import_libraries
from fedkd.scenario_file import load
from fedkd.wording import did_you_mean


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
    use_cache(cache)
    document = load(scenario, [*(set_ or []), *given])
    from fedkd.cli.screen import Screen
    from fedkd.jobs import execute_sweep
    from fedkd.sweep import expand

    cells = expand(document, checked=False)  # what needs the libraries is checked while Ray starts

    with (
        _resumable("fedkd resume, for each run that is not finished" if fresh else "the same command"),
        Screen(console, cells) as screen,
    ):
        finished, failed = execute_sweep(cells, out=out, file=document.file, fresh=fresh, jobs=jobs, listener=screen)
    screen.conclude(finished, out / document.scenario.name)
    for cell, error in failed:
        complain(f"error: {cell.title}: {error}")
    if failed:
        raise typer.Exit(1)


def resume(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an interrupted run, such as runs/quickstart/feddf-seed0-1a2b3c4d.")
    ],
    cache: CacheOption = None,
) -> None:
    """Go on with an interrupted run, to the same results as without the interruption."""
    use_cache(cache)
    import_libraries()
    from fedkd import run as runs
    from fedkd.cli.screen import Screen

    with _resumable(), Screen(console) as screen:
        result = runs.resume(folder, listener=screen)
    screen.conclude([(None, result)], folder)


def simulate(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the app's pyproject.toml is.")] = Path("."),
    clients: Annotated[int, typer.Option(min=1, help="Nodes of the federation.")] = 10,
    run_config: Annotated[
        str, typer.Option("--run-config", "-c", metavar="'KEY=VALUE …'", help="Settings of the app, as in flwr run.")
    ] = "",
    address: AddressOption = None,
    engine: EngineOption = None,
    workers: WorkersOption = None,
    gpus: Annotated[float, typer.Option(min=0.0, metavar="SHARE", help="Share of a GPU for each worker.")] = 0.0,
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
        gpus_per_worker=gpus,
        address=address or "",
    )


@contextmanager
def _resumable(how: str = "the same command") -> Iterator[None]:
    """Turn Ctrl-C into a line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        folder = getattr(interrupt, "folder", None)
        complain(f"interrupted; go on with: {f'fedkd resume {folder}' if folder else how}")
        raise typer.Exit(130) from None
