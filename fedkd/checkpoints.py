"""The checkpoints of a run: what survives a crash, written under temporary names and renamed.

A folder ``checkpoints`` holds, for each of the last two rounds that were saved, ``round-N`` with the strategy, the
traffic and an index that says in which ``clients-N`` the state of each client is. Only states that have changed are
written, so that a checkpoint costs as much as the clients that took part; all but the index, which has two numbers for
each client that has a state by now.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
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

    def load(self) -> tuple[dict[str, Any], dict[int, RecordDict]] | None:
        """Return the last checkpoint that can be read, and the clients' states; None if there is none.

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
        return at, _read(self._file(at)).get(partition_id) if at else None

    def save(self, strategy: DistillationStrategy, server: ServerRuntime, grid: SimulationGrid, seconds: float) -> None:
        """Save what a run needs to go on after the round that is complete."""
        at = strategy.round
        changed = grid.take_changed()
        index = dict(self._index)
        for partition in changed:
            index.pop(partition, None)
        states = {p: state for p, state in changed.items() if state}
        if states:
            trees = {str(p): checkpoint.records_to_tree(state) for p, state in states.items()}
            _write({"clients": trees}, self._file(at))
            index |= dict.fromkeys(states, at)
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
        _write(tree, self.root / f"round-{at:06d}")
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

    def _states(self) -> dict[int, RecordDict]:
        states: dict[int, RecordDict] = {}
        for at in sorted(set(self._index.values())):
            saved = _read(self._file(at))
            states |= {p: saved[p] for p, other in self._index.items() if other == at}
        return states

    def _file(self, at: int) -> Path:
        return self.root / f"clients-{at:06d}"


def restore(
    tree: Mapping[str, Any],
    states: dict[int, RecordDict],
    strategy: DistillationStrategy,
    server: ServerRuntime,
    grid: SimulationGrid,
) -> None:
    """Restore strategy, traffic and clients from a checkpoint."""
    strategy.load_state_dict(tree["strategy"])
    for way, kinds in tree["traffic"].items():
        server.traffic[way].update(kinds)
    grid.load_state_dict(states)


def _write(tree: Mapping[str, Any], final: Path) -> None:
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    checkpoint.save(tree, temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)


def _read(path: Path) -> dict[int, RecordDict]:
    clients = checkpoint.load(path)["clients"]
    return {int(p): checkpoint.tree_to_records(saved) for p, saved in clients.items()}
