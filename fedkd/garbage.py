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
