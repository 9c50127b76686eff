"""The folder of a run: its name, event log, lock and models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.errors import RunError
from fedkd.files import write_atomic
from fedkd.scenario import Scenario, digest

if TYPE_CHECKING:
    import torch

    from fedkd.server.runtime import Event


def folder_of(scenario: Scenario, out: Path, fresh: bool) -> Path:
    """Return the folder of a scenario's run below `out`; with `fresh`, one that does not exist yet."""
    label = re.sub(r"[^a-z0-9]+", "-", (scenario.label or scenario.strategy.name).lower()).strip("-") or "run"
    folder = out / scenario.name / f"{label}-seed{scenario.run.seed}-{digest(scenario)}"
    count = 1
    base = folder.name
    while fresh and folder.exists():
        count += 1
        folder = folder.with_name(f"{base}-{count}")
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the run of a folder came to its end."""
    return (folder / "summary.json").exists()


def read_metrics(folder: Path) -> list[Event]:
    """Return the events of a run's ``metrics.jsonl``, without those that an interruption made void.

    Rounds after the checkpoint from which a run was resumed are computed again, and logged again; a last line
    that was cut off is left out.
    """
    events: list[Event] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == "resumed":
            events = [e for e in events if e.get("round", 0) <= event["after_round"] > 0]
        events.append(event)
    return events


def write_model(path: Path, state: Mapping[str, torch.Tensor], arch: str) -> None:
    """Write a model as safetensors, whole or not at all; its architecture is in the metadata."""
    from safetensors.torch import save_file  # here: whether a run is finished is known without PyTorch

    temporary = path.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in state.items()}, temporary, metadata={"arch": arch})
    os.replace(temporary, path)


def drop_partial_line(path: Path) -> None:
    """Remove a last line that a crash cut off, so that the next event does not continue it."""
    if path.exists():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            write_atomic(path, text[: text.rfind(b"\n") + 1])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises
    ------
    RunError
        Another process is running it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is at work in {folder}") from None
        yield
