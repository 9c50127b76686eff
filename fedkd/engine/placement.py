"""Placement: how many workers, which share of a GPU each gets, how wide cohorts are. Pure functions of measured costs.

On CPUs there is one worker for each CPU, at most what memory holds, and the width of cohorts depends on the selection
alone. On GPUs cohorts that are computed as one are as wide as the workers' shares of the smallest GPU hold.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.cohorts import COHORTS
from fedkd.errors import RunError

GPU_SHARE = 0.9
"""Share of a GPU's memory that is planned for: the allocator needs room between the blocks."""

PER_GPU = 4
"""Workers that share a GPU where clients are computed one after another: small kernels leave it idle mostly."""

BATCHED_PER_GPU = 2
"""Workers that share a GPU where cohorts are computed as one: one prepares while the other computes."""

SMALLER = "use a smaller client.batch_size, a smaller model, or client.precision = bf16"


@dataclass(frozen=True)
class Node:
    """What one machine offers.

    Parameters
    ----------
    cpus : float
        CPUs.
    gpus : float
        GPUs; a worker's share is of one of them, so only whole ones count.
    gpu_bytes : int
        Memory of each GPU; 0 = not known.
    memory : int
        Memory that workers may use, in bytes; 0 = not known.
    """

    cpus: float
    gpus: float = 0.0
    gpu_bytes: int = 0
    memory: int = 0

    @property
    def whole_gpus(self) -> int:
        """GPUs that can be shared out."""
        return int(self.gpus)

    def room(self, per_gpu: int) -> int:
        """Return how many workers there is room for, with a CPU each and so many on each GPU."""
        return min(int(self.cpus), self.whole_gpus * per_gpu)


@dataclass(frozen=True)
class Cost:
    """What one client of an architecture takes, on top of what a worker holds anyway.

    Parameters
    ----------
    arch : str
        The architecture.
    clients : int
        Clients of it that a round has.
    seconds : float
        Of one client.
    host_bytes, gpu_bytes : int
        Peak memory of one client.
    """

    arch: str
    clients: int
    seconds: float
    host_bytes: int = 0
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """Where a run computes.

    Parameters
    ----------
    workers : int
        Worker processes, one CPU each.
    gpu_fraction : float
        Share of a GPU for each; 0 = none.
    cohort : int
        Most clients in a cohort; 0 = a sixteenth of the selection.
    per_gpu : int
        Workers on each GPU.
    together : int
        Clients that a worker computes at once.
    worker_bytes : int
        Memory that a worker takes, its clients included.
    seconds : float
        What the clients of a round take, roughly.
    """

    workers: int
    gpu_fraction: float
    cohort: int
    per_gpu: int
    together: int
    worker_bytes: int
    seconds: float

    def __str__(self) -> str:
        if self.per_gpu:
            place = f"fits {_count(self.per_gpu * self.together, 'client')} per GPU, "
            place += f"{_count(self.per_gpu, 'worker')} per GPU"
        else:
            place = f"fits {_count(self.together, 'client')} per CPU, {_count(self.workers, 'worker')}"
        return f"{place}; round ≈ {span(self.seconds)}" if self.seconds else place


def place(
    nodes: Sequence[Node],
    costs: Sequence[Cost],
    *,
    batched: bool = False,
    workers: int = 0,
    gpu_fraction: float = 0.0,
    cohort: int = 0,
    host_bytes: int = 0,
    gpu_bytes: int = 0,
) -> Placement:
    """Choose workers, GPU share and width of cohorts.

    Parameters
    ----------
    nodes : sequence of Node
        The machines. If one of them has a GPU, machines without one get no workers.
    costs : sequence of Cost
        What clients take, by architecture; may be empty where nothing could be measured.
    batched : bool
        Whether the clients of a cohort are computed as one, and need their memory at the same time.
    workers, gpu_fraction, cohort
        What the user asks for; 0 = choose.
    host_bytes, gpu_bytes : int
        Memory of a worker, and its memory on a GPU, before the first client comes.

    Raises
    ------
    RunError
        Something does not fit; the message says what, by how much, and what to change.

    Examples
    --------
    >>> GB = 10**9
    >>> str(place([Node(8, 1, 80 * GB)], [Cost("resnet18", 40, 0.7, gpu_bytes=11 * GB)], batched=True))
    'fits 6 clients per GPU, 2 workers per GPU; round ≈ 28 s'
    >>> str(place([Node(2)], [Cost("cnn", 8, 0.1)]))
    'fits 1 client per CPU, 2 workers; round ≈ 0.4 s'
    """
    nodes = [node for node in nodes if node.whole_gpus] or list(nodes)
    gpus = sum(node.whole_gpus for node in nodes)
    selected = sum(cost.clients for cost in costs)
    widest = max((cost.clients for cost in costs), default=1)
    usual = max(1, -(-selected // COHORTS))
    # Clients of which a worker holds the memory at once, as far as it is known before the workers are counted.
    together = min(cohort or (1 if gpus else usual), widest) if batched else 1

    per_gpu = fits = 0
    if gpus:
        smallest = min((node.gpu_bytes for node in nodes if node.gpu_bytes), default=0)  # bounds all
        gpu = _Gpu(smallest, gpu_bytes, max(costs, key=lambda cost: cost.gpu_bytes, default=Cost("", 1, 0.0)))
        busiest = max(1, *(int(node.cpus) // node.whole_gpus for node in nodes))
        preferred = min(BATCHED_PER_GPU if batched else PER_GPU, busiest)
        per_gpu = _workers_per_gpu(nodes, gpu, together, preferred, workers, gpu_fraction)
        fits = gpu.clients(per_gpu)
    room = [node.room(per_gpu) if gpus else int(node.cpus) for node in nodes]
    if batched and gpus and not cohort:
        together = max(1, min(fits, widest, -(-selected // max(1, workers or sum(room)))))
    held = host_bytes + together * max((cost.host_bytes for cost in costs), default=0)
    chosen = _number_of_workers(nodes, room, workers, held, costs, together)

    width = cohort or (together if batched and gpus else 0)
    parallel = min(chosen, gpus) if batched and gpus else chosen  # cohorts that fill a GPU take turns on it
    return Placement(
        workers=chosen,
        gpu_fraction=(gpu_fraction or int(10_000 / per_gpu) / 10_000) if gpus else 0.0,  # Ray counts ten-thousandths
        cohort=width,
        per_gpu=per_gpu,
        together=together,
        worker_bytes=held,
        seconds=_seconds(costs, parallel, width or usual),
    )


@dataclass(frozen=True)
class _Gpu:
    """A GPU of `memory` bytes (0 = not known), of which a worker takes `base`, and as much again for each client."""

    memory: int
    base: int
    client: Cost

    @property
    def usable(self) -> int:
        return int(GPU_SHARE * self.memory)

    def clients(self, workers: int) -> int:
        """Return how many clients at once each of so many workers can hold."""
        left = self.usable // workers - self.base
        if not self.memory or (left >= 0 and not self.client.gpu_bytes):
            return sys.maxsize
        return max(0, left) // max(1, self.client.gpu_bytes)


def _workers_per_gpu(
    nodes: Sequence[Node], gpu: _Gpu, together: int, preferred: int, workers: int, gpu_fraction: float
) -> int:
    """Return how many workers share a GPU: as the user wants it, else as many as memory allows; or refuse."""
    arch = gpu.client.arch
    gpus = sum(node.whole_gpus for node in nodes)
    if gpu.clients(1) < 1:
        raise RunError(
            f"a client of {arch} does not fit on a GPU: it needs {size(gpu.base + gpu.client.gpu_bytes)}, "
            f'of {size(gpu.memory)} {size(gpu.usable)} can be planned for\n  {SMALLER}; or system.device = "cpu"'
        )
    asked = int(1 / gpu_fraction + 1e-9) if gpu_fraction else 0
    if asked and workers > gpus * asked:
        raise RunError(
            f"{workers} workers with {gpu_fraction:g} of a GPU each do not fit: {asked} can share a GPU, and there "
            f"{'is' if gpus == 1 else 'are'} {_count(gpus, 'GPU')}\n"
            f"  set system.workers to {asked * gpus} or less, or a smaller system.gpu_fraction"
        )
    if asked:
        asked = min(asked, workers or asked, max(1, *(int(node.cpus) for node in nodes)))
    elif workers:  # as few on each GPU as the CPUs beside them allow
        enough = (number for number in range(1, workers) if sum(node.room(number) for node in nodes) >= workers)
        asked = next(enough, workers)
    possible = [number for number in range(asked or preferred, 0, -1) if gpu.clients(number) >= together]
    if possible and (not asked or possible[0] == asked):
        return possible[0]
    per_gpu = asked or 1
    fits = gpu.clients(per_gpu)
    ways = [f"set system.workers to {possible[0] * gpus} or less, and system.gpu_fraction to 0"] if possible else []
    ways += [f"set system.cohort to {fits} or less"] if fits and together > 1 else []
    raise RunError(
        f"{_count(together, 'client')} of {arch} at once need {size(gpu.base + together * gpu.client.gpu_bytes)} on a "
        f"GPU, and a worker has {size(gpu.usable // per_gpu)}: {_count(per_gpu, 'worker')} on {size(gpu.memory)}\n  "
        + "; or ".join([*ways, SMALLER])
    )


def _number_of_workers(
    nodes: Sequence[Node], room: Sequence[int], workers: int, held: int, costs: Sequence[Cost], together: int
) -> int:
    """Return how many workers that hold so many bytes fit where CPUs and GPUs leave `room` on each node; or refuse."""
    wanted = max(workers, 1)
    if sum(room) < wanted:
        raise RunError(
            f"{_count(wanted, 'worker')} need a CPU each, and there is room for {sum(room)}\n  ask for fewer workers"
        )
    fitting = sum(
        min(most, node.memory // held) if node.memory and held else most for node, most in zip(nodes, room, strict=True)
    )
    if fitting >= wanted:
        return workers or fitting
    arch = max(costs, key=lambda cost: cost.host_bytes, default=Cost("clients", 1, 0.0)).arch
    ways = [f"set system.workers to {fitting}"] if fitting else []
    ways += ["set a smaller system.cohort"] if together > 1 else []
    raise RunError(
        f"{_count(wanted, 'worker')} with {_count(together, 'client')} of {arch} at once do not fit into memory: a "
        f"worker needs {size(held)}, and {size(max(node.memory for node in nodes))} can be had\n  "
        + "; or ".join([*ways, SMALLER])
    )


def _seconds(costs: Sequence[Cost], parallel: int, width: int) -> float:
    """Return what the clients of a round take: the work divided, but no less than the longest cohort."""
    work = sum(cost.clients * cost.seconds for cost in costs)
    longest = max((min(width, cost.clients) * cost.seconds for cost in costs), default=0.0)
    return max(work / max(parallel, 1), longest)


def size(count: float) -> str:
    """Return a number of bytes for people, with two digits at least.

    Examples
    --------
    >>> size(340_000), size(11_500_000_000)
    ('340 kB', '12 GB')
    """
    unit, *larger = "B", "kB", "MB", "GB", "TB"
    while count >= 999.5 and larger:
        count, unit = count / 1000, larger.pop(0)
    return f"{count:.1f} {unit}" if count < 9.95 and unit != "B" else f"{count:.0f} {unit}"


def span(seconds: float) -> str:
    """Return a time for people, with two digits.

    Examples
    --------
    >>> span(0.00123), span(0.04), span(14.2), span(150), span(9000)
    ('1.2 ms', '40 ms', '14 s', '2.5 min', '2.5 h')
    """
    ends = ("ms", 1e-3, 0.0995), ("s", 1.0, 119.5), ("min", 60.0, 7170.0), ("h", 3600.0, math.inf)
    unit, length = next((unit, length) for unit, length, end in ends if seconds < end)
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
