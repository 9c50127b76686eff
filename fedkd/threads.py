"""Threads and cores: how many there are, and how many compute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_limit: int | None = None


def cores() -> int:
    """Return the number of cores that this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return available if _limit is None else min(available, _limit)


def limit_cores(number: int) -> None:
    """Let `cores` return no more than this from now on: other processes compute on the rest."""
    global _limit
    _limit = number


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one torch thread: two change the bits of every convolution. Restored afterwards."""
    import torch  # here: who counts cores does not wait for it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
