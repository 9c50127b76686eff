"""What commands share: the console, arguments that several of them take, and what they do with these."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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


def complain(text: str) -> None:
    """Print a line to standard error as it is, without markup.

    Parameters
    ----------
    text : str
        What to say.
    """
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


def print_path(path: Path) -> None:
    """Print where something is, as it is, in one line.

    Parameters
    ----------
    path : Path
        The file.
    """
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def use_cache(folder: Path | None) -> None:
    """Let decoded data be kept in `folder`, here and in processes that are started from here.

    Parameters
    ----------
    folder : Path, optional
        As given on the command line; None changes nothing.
    """
    if folder is not None:
        os.environ["FEDKD_CACHE"] = os.path.abspath(os.path.expanduser(folder))
