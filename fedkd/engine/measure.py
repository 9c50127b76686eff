"""What a piece of work takes: seconds, and memory of this process and of its GPU at the peak."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

_STATUS = Path("/proc/self/status")
_BYTES = ("host_bytes", "gpu_bytes", "held_host_bytes", "held_gpu_bytes")
_PEAK_FROM_NOW = "5"  # what proc(5) wants in clear_refs


@dataclass(frozen=True)
class Measured:
    """What a piece of work took.

    Parameters
    ----------
    seconds : float
        From start to end, what a GPU was still busy with included.
    host_bytes, gpu_bytes : int
        Memory at the peak, beyond what was held before.
    held_host_bytes, held_gpu_bytes : int
        Memory that the process held before.
    errors : tuple of str
        Why parts of the work failed.
    """

    seconds: float
    host_bytes: int = 0
    gpu_bytes: int = 0
    held_host_bytes: int = 0
    held_gpu_bytes: int = 0
    errors: tuple[str, ...] = ()


def measure(work: Callable[[], tuple[str, ...]], *, memory: bool) -> Measured:
    """Do some work and say what it took. The global random generators are left as they were.

    Parameters
    ----------
    work : callable
        Returns why parts of it failed.
    memory : bool
        Whether freed memory is given back to the system before: what the allocator keeps would hide what the work
        takes, but spares time that the work then needs to get it anew.
    """
    if memory:
        _give_back_freed_memory()
    held = _resident("RssAnon")
    before = _reset_peak()
    on_gpu = _reset_gpu_peak()
    with _same_random_state():
        start = time.perf_counter()
        errors = work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Measured(
        seconds=seconds,
        host_bytes=max(0, _resident("VmHWM") - before),
        gpu_bytes=max(0, torch.cuda.max_memory_allocated() - on_gpu) if torch.cuda.is_initialized() else 0,
        held_host_bytes=held,
        held_gpu_bytes=on_gpu,
        errors=errors,
    )


def median(runs: Sequence[Measured]) -> Measured:
    """Return what the same work took in several processes at once: the median of the seconds, the most of the rest."""
    return Measured(
        statistics.median(run.seconds for run in runs),
        *(max(getattr(run, name) for run in runs) for name in _BYTES),
        errors=next((run.errors for run in runs if run.errors), ()),
    )


def _resident(kind: str) -> int:
    """Return a figure of this process's memory: VmHWM (peak), RssAnon (its own, now); 0 where it is not known."""
    if not _STATUS.exists():  # only Linux tells
        return 0
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == kind:
            return int(value.split()[0]) * 1024
    return 0


def _reset_peak() -> int:
    """Let the peak of this process's memory count from now on, and return where it starts."""
    with suppress(OSError):  # not Linux, or not allowed: only growth beyond the earlier peak is seen
        Path("/proc/self/clear_refs").write_text(_PEAK_FROM_NOW)
    return _resident("VmHWM")


def _reset_gpu_peak() -> int:
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _give_back_freed_memory() -> None:
    """Return freed memory to the system."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _same_random_state() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    drawn, drawn_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(drawn_numpy)
