"""CUDA graphs: work on a GPU recorded once and replayed, where asking for it takes longer than doing it.

A training step of a small model is dozens of kernels of microseconds each, and Python needs milliseconds to launch
them. A graph launches all of them at once; the kernels, and so the bits, stay what they are.

A scenario has to ask for it (``system.graphs``), as it has hardly been measured where it pays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Work = Callable[..., None]
"""Reads the tensors that it is given, and changes others in place, always the same ones."""

REPLAYS = 6
"""Fewest replays for which recording, which takes as long as a few steps, is worth it."""


class Recorder:
    """Does work again and again, and on a GPU replays it from a graph where that is faster.

    Parameters
    ----------
    device : torch.device
        Where the work is done.
    on : bool
        Whether anything is to be recorded.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self.device, self.able = device, on and device.type == "cuda" and not _given_up
        self._graphs: dict[Hashable, Graph] = {}
        self._seen: set[Hashable] = set()
        self._done: torch.cuda.Event | None = None

    def do(self, key: Hashable, work: Work, inputs: Sequence[Tensor], to_come: int) -> None:
        """Do some work.

        Parameters
        ----------
        key : hashable
            Work of the same key is the same but for the numbers in its inputs: same shapes, same memory changed.
        work : callable
            Called with the inputs. Not called again once it is recorded.
        inputs : sequence of Tensor
            On the device.
        to_come : int
            How often work of this key is still to be done, this time included.
        """
        worth = self.able and key in self._seen and to_come >= REPLAYS
        if key not in self._graphs and worth and self._waits():
            self._record(key, work, inputs)
        if key in self._graphs:
            self._graphs[key].replay(inputs)
        else:
            work(*inputs)
            self._seen.add(key)
        self._mark()

    def _mark(self) -> None:
        """Remember where the work that has been asked for ends."""
        if self.able:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(self.device))

    def _waits(self) -> bool:
        """Whether the GPU has nothing left to do: then it is Python that takes its time."""
        return self._done is not None and self._done.query()

    def _record(self, key: Hashable, work: Work, inputs: Sequence[Tensor]) -> None:
        try:
            with torch.cuda.device(self.device):
                self._graphs[key] = Graph(work, inputs)
        except RuntimeError as error:  # nothing has been done yet
            self.able = False
            with torch.cuda.device(self.device):
                _give_up(f"{type(error).__name__}: {error}".split("\n")[0])


class Graph:
    """Recorded work of the current device.

    Parameters
    ----------
    work : callable
        Recorded, not done: what it changes stays as it is until the first replay.
    inputs : sequence of Tensor
        Inputs like those that it will be replayed with.

    Raises
    ------
    RuntimeError
        The work needs something that cannot be recorded, such as waiting for the GPU, or more memory than there is.
    """

    def __init__(self, work: Work, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        stream, first = _place(torch.cuda.current_device())
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Other threads, Ray's for example, may do as they like meanwhile.
            self._graph.capture_begin(first.pool(), "thread_local")
            try:
                work(*self._inputs)
            except BaseException:
                with suppress(RuntimeError):  # which would say less
                    self._end()
                raise
            self._end()

    def _end(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            _failed.append(self._graph)
            raise

    def replay(self, inputs: Sequence[Tensor]) -> None:
        """Do the work with other inputs."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()


def let_go() -> None:
    """Let go of the memory that graphs have used; nobody may replay one any more."""
    _place.cache_clear()


@cache
def _place(device: int) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    """Return where graphs of a device are recorded, and one whose memory the others use and which keeps it for them.

    They can share it: they replay one after the other, and leave nothing in it that is read later.
    """
    stream, first = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        number = torch.zeros(1, device=f"cuda:{device}")
        torch.cuda.synchronize()
        first.capture_begin(capture_error_mode="thread_local")
        number.add_(1)
        first.capture_end()
    return stream, first


_failed: list[torch.cuda.CUDAGraph] = []
"""Recordings that could not be ended: PyTorch's allocator may ask them until the process ends."""

_given_up: list[str] = []
"""Why this process records nothing any more."""


def _give_up(reason: str) -> None:
    """Record nothing any more in this process: not every version of PyTorch can after a recording that has failed."""
    if not _given_up:
        log.warning("work on the GPU is no longer recorded as graphs: %s", reason)
    _given_up.append(reason)
    let_go()
    with suppress(RuntimeError):  # one that succeeds gives PyTorch's random generator back, which dropout needs
        _place(torch.cuda.current_device())
    let_go()
