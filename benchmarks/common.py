"""What all sides share: the workloads, data, models, the training loop, the clock, and memory of processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd import models

WORKERS = 2
CLASSES = 10
TEST_SAMPLES = 100
TICKS = os.sysconf("SC_CLK_TCK")

SIDE = "FEDKD_BENCHMARK_SIDE"
"""Environment variable that tells all processes of a side what they are part of."""


@dataclass(frozen=True)
class Workload:
    """One round, as every side runs it.

    Parameters
    ----------
    clients : int
        Registered clients; all hold the same number of samples.
    selected : int
        Clients that take part in a round.
    samples : int
        Samples of one client.
    model : str
        Model of fedkd; all sides use this very module.
    options : dict
        Its parameters.
    shape : tuple of int
        Height, width and channels of an image.
    steps : int
        SGD steps of a client; 0: it returns the weights unchanged.
    batch, lr : int, float
        Samples of a step, learning rate.
    """

    clients: int = 100
    selected: int = 100
    samples: int = 320
    model: str = "mlp"
    options: dict[str, Any] = field(default_factory=lambda: {"hidden": (200,)})
    shape: tuple[int, int, int] = (28, 28, 1)
    steps: int = 10
    batch: int = 32
    lr: float = 0.1


WORKLOADS = {
    "W1": Workload(steps=0),
    "W1-45MB": Workload(steps=0, options={"hidden": (14_150,)}),
    "W2": Workload(),
    "W3": Workload(clients=40, selected=40, model="cnn", options={}),
    "W4": Workload(clients=10_000, samples=32),
    "W5": Workload(clients=10, selected=10, samples=6_000, model="cnn", options={}, lr=0.05),
    # Two populations over the same million samples: one sample each, or a hundred. Every batch is one sample, so
    # that both do the same work in a round.
    "W6-10000": Workload(clients=10_000, samples=100, shape=(8, 8, 1), batch=1),
    "W6-1000000": Workload(clients=1_000_000, samples=1, shape=(8, 8, 1), batch=1),
    "GPU-W2": Workload(),
    "GPU-W3": Workload(model="cnn", options={}),
    "GPU-ResNet-8": Workload(model="resnet8", options={}, shape=(32, 32, 3)),
}


def workload(name: str, quick: bool) -> Workload:
    """Return a workload; with `quick` a tiny one that only shows that everything works."""
    full = WORKLOADS[name]
    if not quick:
        return full
    clients, samples = max(8, full.clients // 100), min(full.samples, 64)
    hidden = {"hidden": (min(200, full.options["hidden"][0]),)} if "hidden" in full.options else {}
    return replace(full, clients=clients, selected=8, samples=samples, options=hidden, steps=min(full.steps, 2))


# --- data ----------------------------------------------------------------------------------------------------


def write_data(folder: Path, load: Workload) -> None:
    """Write random images and labels: one .npz file for fedkd, two .npy files that the other sides map."""
    rng = np.random.default_rng(0)
    shape = load.shape if load.shape[2] > 1 else load.shape[:2]
    count = load.clients * load.samples
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    y = rng.integers(0, CLASSES, count, dtype=np.int64)
    y[:CLASSES] = np.arange(CLASSES)  # every class occurs
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    test = slice(0, min(TEST_SAMPLES, count))
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[test], y_test=y[test])


@dataclass(frozen=True)
class Side:
    """What the environment tells a process about the side that it is part of.

    Parameters
    ----------
    name : str
        Name of the side.
    load : Workload
        The workload.
    folder : Path
        Where `write_data` wrote.
    """

    name: str
    load: Workload
    folder: Path

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels, mapped into memory."""
        return np.load(self.folder / "x.npy", mmap_mode="r"), np.load(self.folder / "y.npy", mmap_mode="r")

    @cached_property
    def shards(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Samples of a client by its number, ready for the model; 1 MB each in W2, and in W4 hardly one comes back."""
        return lru_cache(maxsize=200)(self._read)

    @cached_property
    def model(self) -> nn.Module:
        """The process's model."""
        return make_model(self.load)

    def _read(self, client: int) -> tuple[Tensor, Tensor]:
        x, y = (array[client * self.load.samples : (client + 1) * self.load.samples] for array in self.arrays)
        images = torch.from_numpy(np.array(x)).view(-1, *self.load.shape).permute(0, 3, 1, 2).float().div_(255)
        # Not contiguous(): one channel passes for both layouts, and convolutions would take the other one.
        return images.clone(memory_format=torch.contiguous_format), torch.from_numpy(np.array(y))


def told() -> dict[str, Any]:
    """Return what the harness tells the processes of a side; those that it starts inherit it."""
    return json.loads(os.environ[SIDE])


@cache
def this_side() -> Side:
    """Return the side of this process."""
    return Side(told()["side"], workload(told()["workload"], told()["quick"]), Path(told()["folder"]))


# --- models and training -------------------------------------------------------------------------------------


def make_model(load: Workload) -> nn.Module:
    """Return the model of a workload, the same bits in every process."""
    height, width, channels = load.shape
    return models.build(
        load.model,
        num_classes=CLASSES,
        input_shape=(channels, height, width),
        kind="image",
        vocab_size=0,
        norm="none",
        seed=0,
        **load.options,
    )


def train(model: nn.Module, x: Tensor, y: Tensor, load: Workload) -> None:
    """Take the SGD steps of one client, as a plain PyTorch program does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=load.lr)
    for rows in batches(len(x), load):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]).logits, y[rows]).backward()
        optimizer.step()


def batches(samples: int, load: Workload) -> Iterator[Tensor]:
    """Yield the rows of each step: passes over all samples, each shuffled anew."""
    left = load.steps
    while left > 0:
        for rows in torch.randperm(samples).split(load.batch)[:left]:
            yield rows
            left -= 1


# --- time and memory -----------------------------------------------------------------------------------------


class Clock:
    """Takes the time of every round; a side calls `tick` at the end of each.

    Parameters
    ----------
    rounds : int
        Rounds to measure.
    warmup : int
        Rounds before them, at least 1.
    memory : bool
        Whether to note peaks of memory, in the driver and in all its descendants.
    """

    def __init__(self, rounds: int, warmup: int, memory: bool = False) -> None:
        self.rounds, self.warmup, self.memory = rounds, warmup, memory
        self.total = warmup + rounds
        self.ticks: list[tuple[float, float]] = []  # end of a round, start of the next
        self.first = 0.0
        self.window = [0.0, 0.0]
        self.cores: dict[str, float] = {}
        self.peaks: list[dict[str, float]] = []

    def tick(self) -> None:
        """Note the end of a round."""
        end = time.perf_counter()
        if not self.ticks:
            self.first = time.time()
        if self.memory:
            self.peaks.append(take_peaks())
        if len(self.ticks) == self.warmup - 1:
            self.window[0], self.cores = time.time(), core_seconds()
        elif len(self.ticks) == self.total - 1:
            self.window[1] = time.time()
            self.cores = {name: spent - self.cores.get(name, 0.0) for name, spent in core_seconds().items()}
        self.ticks.append((end, time.perf_counter()))

    @property
    def over(self) -> bool:
        """Whether all rounds that are wanted are done."""
        return len(self.ticks) >= self.total

    def result(self, **more: Any) -> dict[str, Any]:
        """Return what the side prints."""
        seconds = [after[0] - before[1] for before, after in zip(self.ticks, self.ticks[1:])]
        return {
            "seconds": seconds[-self.rounds :] if self.rounds else [],
            "first": self.first,
            "window": self.window,
            "core_seconds": {name: round(spent / max(self.rounds, 1), 4) for name, spent in self.cores.items()},
            "peaks": self.peaks,
            **more,
        }


def answer(result: dict[str, Any]) -> None:
    """Print the one line that the harness reads."""
    print(f"\nRESULT {json.dumps(result)}", flush=True)


def descendants(root: int) -> list[int]:
    """Return the ids of all processes below `root`."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := read_proc(int(entry), "stat")):
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found, fresh = [], [root]
    while fresh:
        children = parents.get(fresh.pop(), [])
        found += children
        fresh += children
    return found


def read_proc(pid: int, name: str) -> str:
    """Return a file of ``/proc``; empty if the process is gone or somebody else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def kind_of(pid: int) -> str:
    """Return what a process of this side is: ``driver``, ``workers``, or ``rest`` (Ray's own)."""
    if pid == os.getpid():
        return "driver"
    command = read_proc(pid, "cmdline").replace("\0", " ")
    if command.startswith("ray::"):
        return "rest" if "Agent" in command else "workers"
    return "workers" if "multiprocessing" in command or "side.py" in command else "rest"


def core_seconds() -> dict[str, float]:
    """Return the core seconds that the processes of this side have spent, by their kind."""
    spent: dict[str, float] = {}
    for pid in [os.getpid(), *descendants(os.getpid())]:
        if stat := read_proc(pid, "stat"):
            fields = stat.rpartition(")")[2].split()
            kind = kind_of(pid)
            spent[kind] = spent.get(kind, 0.0) + (int(fields[11]) + int(fields[12])) / TICKS
    return spent


def take_peaks() -> dict[str, float]:
    """Return peak resident memory since the last call, in MB: of this process, and the sum over the workers.

    Without pages of shared memory: those of Ray's object store that a process has ever touched stay in its count, and
    what the store holds is not the process's. ``store`` is how much of it this process has touched.
    """
    peaks = {"driver": 0.0, "workers": 0.0, "store": 0.0}
    for pid in [os.getpid(), *descendants(os.getpid())]:
        kind, lines = kind_of(pid), [line.split() for line in read_proc(pid, "status").splitlines()]
        found = {line[0]: int(line[1]) / 1024 for line in lines if line and line[0] in ("VmHWM:", "RssShmem:")}
        if kind in peaks and len(found) == 2:
            peaks[kind] = round(peaks[kind] + found["VmHWM:"] - found["RssShmem:"], 1)
            if kind == "driver":
                peaks["store"] = round(found["RssShmem:"], 1)
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
    return peaks
