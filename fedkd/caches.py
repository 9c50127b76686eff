"""What a process keeps for the length of a run: built once, and let go of when the process is to rest."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_forgetting: list[Callable[[], None]] = []


def cached(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that keeps the last results of a function until `forget` is called.

    Parameters
    ----------
    maxsize : int
        How many of them.

    Examples
    --------
    >>> @cached(maxsize=1)
    ... def built(name):
    ...     return [name]
    >>> first = built("cnn")
    >>> built("cnn") is first
    True
    >>> forget()
    >>> built("cnn") is first
    False
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        kept = lru_cache(maxsize)(function)
        _forgetting.append(kept.cache_clear)
        return kept  # pyright: ignore[reportReturnType]

    return decorate


def forget() -> None:
    """Let go of everything that `cached` keeps in this process."""
    for clear in _forgetting:
        clear()
