"""Errors that are meant to be read by people: what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FedKDError(Exception):
    """Base of every error that the command line prints as one message, without a traceback."""


class ScenarioError(FedKDError):
    """A scenario cannot be run as written.

    Parameters
    ----------
    problem : str
        What is wrong, naming the value.
    key : str
        Dotted key in the scenario, such as ``partition.alpha``; empty if no single key is to blame.
    hint : str
        The way out.
    file : str
        Scenario file; filled in by the loader where the raiser does not know it.

    Examples
    --------
    >>> print(ScenarioError("must be > 0, is -1", key="partition.alpha", hint="try 0.1", file="a.toml"))
    a.toml: partition.alpha: must be > 0, is -1
      try 0.1
    """

    def __init__(self, problem: str, *, key: str = "", hint: str = "", file: str = "") -> None:
        self.problem, self.key, self.hint, self.file = problem, key, hint, file
        super().__init__(problem)

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.file, self.key) if part)
        return (f"{place}: " if place else "") + self.problem + (f"\n  {self.hint}" if self.hint else "")


class DataError(FedKDError):
    """Data cannot be had or cannot be read; the message says how to get or mend them.

    Parameters
    ----------
    problem : str
        What is wrong, and the way out.
    """

    file = ""
    """Scenario file; filled in where it is known."""

    def __str__(self) -> str:
        return (f"{self.file}: " if self.file else "") + super().__str__()


class KnowledgeError(FedKDError):
    """Knowledge that is refused: not finite, wrong shape, wrong keys, wrong classes, wrong ids."""


class LateError(KnowledgeError):
    """Knowledge that did not arrive while the server waited for it, in simulated time."""


class RunError(FedKDError):
    """A run failed; what it had finished stays on disk and can be resumed."""


class TooFewError(RunError):
    """Fewer usable replies arrived in a round than ``system.min_replies``.

    Parameters
    ----------
    round : int
        Communication round.
    got, needed : int
        Replies.
    what : str
        What they are.
    """

    def __init__(self, round: int, got: int, needed: int, what: str) -> None:
        super().__init__(
            f"round {round}: {got} usable {what}, at least {needed} are needed (system.min_replies); "
            "the reasons are in metrics.jsonl as 'refused' events\n"
            "  what is drawn by the seed ([clock], [faults]) comes again when the run is resumed; it needs a smaller "
            "min_replies in the scenario.toml of the run"
        )


class UncoveredError(KnowledgeError):
    """Nobody knows anything about any of the samples that were asked for."""


class LostError(RunError):
    """What a round needs is gone with the machine that held it; the round can be computed again."""


@contextmanager
def errors_in(file: str) -> Iterator[None]:
    """Put the scenario file's name into errors raised inside that do not know it."""
    try:
        yield
    except (ScenarioError, DataError) as error:
        error.file = error.file or file
        raise


def raise_all(errors: Iterable[ScenarioError]) -> None:
    """Raise errors as one: none raises nothing, one raises itself, several become a list, one per line."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = [
            "  " + (f"{e.key}: " if e.key else "") + e.problem + (f"  [{' '.join(e.hint.split())}]" if e.hint else "")
            for e in found
        ]
        raise ScenarioError("\n".join([f"{len(found)} settings are wrong", *lines]))
