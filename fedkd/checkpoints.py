"""The checkpoints of a run: what survives a crash, written under temporary names and renamed.

A folder ``checkpoints`` holds, for each of the last two rounds that were saved, ``round-N`` with the strategy, the
traffic and an index that says in which ``clients-N`` the state of each client is. Only states that have changed are
written, so that a checkpoint costs as much as the clients that took part; all but the index, which has two numbers for
each client that has a state by now. States are written and read part by part, as they may be more than there is memory
for.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from safetensors import SafetensorError

from fedkd import checkpoint
from fedkd.engine.grid import SimulationGrid
from fedkd.errors import RunError
from fedkd.server.runtime import ServerRuntime
from fedkd.server.strategy import DistillationStrategy

KEPT = 2  # checkpoints: the one before is there for a crash in the middle of writing
PART = 256 << 20  # bytes of states in a part of ``clients-N``, at least; the last one has less


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Parameters
    ----------
    folder : Path
        The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkpoints"
        self._index: dict[int, int] = {}  # partition id -> round whose file holds the client's state
        self._needed: set[Path] = set()  # files that the last checkpoint refers to

    def load(self) -> tuple[dict[str, Any], Iterator[tuple[int, RecordDict]]] | None:
        """Return the last checkpoint that can be read, and the clients' states, by and by; None if there is none.

        Raises
        ------
        RunError
            There are some, but none can be read.
        """
        found = sorted(self.root.glob("round-*"), reverse=True)
        for path in found:
            try:
                tree = checkpoint.load(path)
                self._index = dict(zip(tree["clients"]["id"].tolist(), tree["clients"]["saved"].tolist(), strict=True))
                self._needed = {self._file(at) for at in self._index.values()}
                for part in (part for file in self._needed for part in _parts(file)):
                    checkpoint.verify(part)
                return tree, self._states()
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logging.getLogger("fedkd").warning("checkpoint %s cannot be read (%s)", path.name, error)
        if found:
            raise RunError(
                f"no checkpoint in {self.root} can be read; another version of fedkd may have written them\n"
                f"  to begin this run anew, remove {self.root.parent}"
            )
        return None

    def state_of(self, partition_id: int) -> tuple[int, RecordDict | None]:
        """Return the state of a client as it was saved last, and after which round; 0 and None if it never was."""
        at = self._index.get(partition_id, 0)
        return at, next((state for p, state in _read(self._file(at)) if p == partition_id), None) if at else None

    def save(self, strategy: DistillationStrategy, server: ServerRuntime, grid: SimulationGrid, seconds: float) -> None:
        """Save what a run needs to go on after the round that is complete."""
        at = strategy.round
        index = dict(self._index)

        def states() -> Iterator[tuple[int, RecordDict]]:
            for partition, state in grid.take_changed():
                index.pop(partition, None)
                if state:
                    index[partition] = at
                    yield partition, state

        _write_states(states(), self._file(at))
        tree = {
            "round": at,
            "seconds": seconds,
            "traffic": {way: dict(kinds) for way, kinds in server.traffic.items()},
            "strategy": strategy.state_dict(),
            "clients": {
                "id": torch.from_numpy(np.fromiter(index.keys(), np.int64, len(index))),
                "saved": torch.from_numpy(np.fromiter(index.values(), np.int64, len(index))),
            },
        }
        with _renamed(self.root / f"round-{at:06d}") as folder:
            checkpoint.save(tree, folder)
        self._index = index
        self._tidy()

    def _tidy(self) -> None:
        """Remove older checkpoints, and states that none of those left refers to."""
        rounds = sorted(self.root.glob("round-*"))
        for path in rounds[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)
        before, self._needed = self._needed, {self._file(at) for at in self._index.values()}
        for path in self.root.glob("clients-*"):
            if path not in before | self._needed:
                shutil.rmtree(path, ignore_errors=True)

    def _states(self) -> Iterator[tuple[int, RecordDict]]:
        index = dict(self._index)
        for at in sorted(set(index.values())):
            yield from ((p, state) for p, state in _read(self._file(at)) if index.get(p) == at)

    def _file(self, at: int) -> Path:
        return self.root / f"clients-{at:06d}"


def restore(
    tree: Mapping[str, Any],
    states: Iterable[tuple[int, RecordDict]],
    strategy: DistillationStrategy,
    server: ServerRuntime,
    grid: SimulationGrid,
) -> None:
    """Restore strategy, traffic and clients from a checkpoint."""
    strategy.load_state_dict(tree["strategy"])
    for way, kinds in tree["traffic"].items():
        server.traffic[way].update(kinds)
    grid.load_state_dict(states)


def _write_states(states: Iterable[tuple[int, RecordDict]], final: Path) -> None:
    """Write clients' states part by part; nothing if there are none."""
    trees: dict[str, Any] = {}
    size = parts = 0
    with _renamed(final) as folder:

        def write() -> None:
            nonlocal trees, size, parts
            part = folder / f"{parts:06d}"
            part.mkdir()
            checkpoint.save({"clients": trees}, part)
            trees, size, parts = {}, 0, parts + 1

        for partition, state in states:
            tree = trees[str(partition)] = checkpoint.records_to_tree(state)
            size += sum(tensor.nbytes for arrays in tree["arrays"].values() for tensor in arrays.values())
            if size >= PART:
                write()
        if trees:
            write()


@contextmanager
def _renamed(final: Path) -> Iterator[Path]:
    """Give a folder to write into, which then takes its name; it vanishes if it stays empty."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(final, ignore_errors=True)
    if any(temporary.iterdir()):
        os.replace(temporary, final)
    else:
        temporary.rmdir()


def _parts(path: Path) -> list[Path]:
    """Return the parts of clients' states, of which there is at least one."""
    return sorted(path.iterdir())


def _read(path: Path) -> Iterator[tuple[int, RecordDict]]:
    for part in _parts(path):
        for p, saved in checkpoint.load(part)["clients"].items():
            yield int(p), checkpoint.tree_to_records(saved)
