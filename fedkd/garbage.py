"""The garbage collector, kept from what is there to stay: where PyTorch is imported, that is a lot to look at."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def spared() -> Iterator[None]:
    """Keep the collector from everything that there is now; afterwards it is looked at again.

    Examples
    --------
    >>> with spared():
    ...     gc.get_freeze_count() > 0
    True
    >>> gc.get_freeze_count()
    0
    """
    ours = not gc.get_freeze_count()  # else somebody has done so, and wants it to stay
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


@contextmanager
def paused() -> Iterator[None]:
    """Do without the collector, as imports can: what they make stays, and looking at it again and again takes time.

    Afterwards it counts as old, so it is not looked at soon.

    Examples
    --------
    >>> with paused():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    ours = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ours:
            if not gc.get_freeze_count():  # else this would bring back what somebody has frozen
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()
