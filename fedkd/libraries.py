"""PyTorch, Flower and all else that a run needs: a few seconds of imports, for which only those wait who need them."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedkd.garbage import paused


def import_libraries() -> None:
    """Import all that a run needs, without looking for garbage meanwhile; Ctrl-C and SIGTERM wait until it is done."""
    with _undisturbed(), paused():
        importlib.import_module("fedkd.run")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold signals back: an exception in the middle of an import of C++ code would abort the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears them
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}  # others raise nothing
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
