"""The ``fedkd`` command. Heavy libraries are imported by the commands that need them: help is instant."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import click
import typer

from fedkd import __version__, cluster
from fedkd.cli import checking, looking, running, starting
from fedkd.cli.terminal import complain
from fedkd.errors import FedKDError, RunError

app = typer.Typer(
    help="Federated distillation, simulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(running.run)
app.command()(running.resume)
app.command()(looking.table)
app.command()(running.simulate)
app.command()(checking.validate)
app.command()(checking.partition)
app.command("list")(looking.list_)
app.command()(looking.describe)
app.command("methods")(looking.methods_)
new = typer.Typer(help="Write the start of something of your own.", no_args_is_help=True)
new.command()(starting.strategy)
app.add_typer(new, name="new")


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
        complain(f"error: {error}")
        return 1 if isinstance(error, RunError) else 2
    except BrokenPipeError:  # the reader of a pipe has gone: nothing to say, nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


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
