"""Runs sides in processes of their own, watches what else the machine does, and describes the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import IO, Any

from common import SIDE, TICKS, Side, descendants, read_proc
from common import workload as workload_of
from runs import settings_of

from fedkd.scenario import Scenario
from fedkd.scenario_file import dump
from fedkd.threads import cores

HERE = Path(__file__).resolve().parent

LIMIT = 300
"""Seconds after which a side is given up."""

PACKAGES = ("fedkd", "flwr", "ray", "torch", "numpy", "pfl")


class SideFailed(Exception):
    """A side ended without a result."""


def run_side(
    name: str,
    workload: str,
    folder: Path,
    *,
    rounds: int,
    warmup: int,
    quick: bool = False,
    path: str = "",
    env: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run one side in a fresh process and return its result.

    Parameters
    ----------
    name : str
        The side.
    workload : str
        The workload.
    folder : Path
        Its data.
    rounds, warmup : int
        Rounds to measure, and before them.
    quick : bool
        The tiny version.
    path : str
        Further folder of packages.
    env : dict of str to str, optional
        Further environment variables.
    **options
        Whatever else the side wants to know.

    Returns
    -------
    dict
        What the side printed, and ``start`` (seconds to the end of its first round) and ``others`` (cores that other
        processes used meanwhile).

    Raises
    ------
    SideFailed
        With the end of what it wrote to standard error.
    """
    side = {"side": name, "workload": workload, "folder": str(folder), "quick": quick}
    side |= {"rounds": rounds, "warmup": warmup, **options}
    environment = environment_of(side, env or {}, path)
    log = folder / f"{name}.log"
    with Watch(environment[SIDE]) as watch, log.open("w") as errors:
        began = time.time()
        process = start([sys.executable, str(HERE / "side.py")], environment, subprocess.PIPE, errors)
        try:
            out, _ = process.communicate(timeout=LIMIT)
        except BaseException as error:
            stop(process.pid)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise SideFailed(f"not finished after {LIMIT} s") from None
    lines = [line.removeprefix("RESULT ") for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SideFailed(f"exit code {process.returncode}: {end_of(log)}")
    result = json.loads(lines[-1])
    if result.get("first"):
        result["start"] = result["first"] - began
    result["others"] = watch.others(*result.get("window", (began, time.time())))
    return result


def run_command(
    workload: str,
    folder: Path,
    *,
    quick: bool,
    path: str,
    env: dict[str, str],
    **settings: Any,
) -> dict[str, Any]:
    """Run ``fedkd run`` on a workload until its first round is over, as somebody would who types it.

    Parameters
    ----------
    workload, folder, quick, path, env
        As of `run_side`.
    **settings
        Further settings of the scenario, by section.

    Returns
    -------
    dict
        ``start`` and ``others``, see `run_side`; the round is over when its event is in ``metrics.jsonl``.

    Raises
    ------
    SideFailed
        With the end of what it wrote.
    """
    side = Side("command", workload_of(workload, quick), folder)
    table = settings_of(side, rounds=2)  # the last round would be evaluated
    table |= {section: table[section] | values for section, values in settings.items()}
    out = Path(tempfile.mkdtemp(dir=folder))
    file, log = out / "scenario.toml", out / "command.log"
    file.write_text(dump(Scenario.model_validate(table)))
    environment = environment_of({"side": side.name, "workload": workload}, env, path)
    with Watch(environment[SIDE]) as watch, log.open("w") as said:
        began = time.time()
        command = [sys.executable, "-m", "fedkd.cli", "run", str(file), "--out", str(out)]
        process = start(command, environment, said, said)
        try:
            while not (over := any('"event": "round"' in each.read_text() for each in out.rglob("metrics.jsonl"))):
                if process.poll() is not None or time.time() - began > LIMIT:
                    break
                time.sleep(0.01)
            end = time.time()
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LIMIT)
        finally:
            stop(process.pid)
    if not over:
        raise SideFailed(f"exit code {process.returncode} after {end - began:.0f} s: {end_of(log)}")
    return {"start": end - began, "others": watch.others(began, end)}


def environment_of(side: dict[str, Any], more: dict[str, str], path: str) -> dict[str, str]:
    """Return the environment of a side's processes."""
    return {
        **os.environ,
        SIDE: json.dumps(side),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH"), path])),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
        **more,
    }


def start(command: list[str], environment: dict[str, str], out: int | IO[str], errors: IO[str]) -> Popen[str]:
    """Start a side's process, in a session of its own."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": errors}
    return Popen(command, env=environment, **streams, text=True, start_new_session=True)


def end_of(log: Path) -> str:
    """Return the last lines of a log."""
    return " | ".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:])


def stop(pid: int) -> None:
    """Kill a side with all its processes."""
    for each in [*descendants(pid), pid]:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Watch(threading.Thread):
    """Samples how busy the machine is, and how much of it is one side's doing.

    Parameters
    ----------
    mark : str
        Value of the environment variable `SIDE` by which the side's processes are known, orphans too.
    """

    EVERY = 0.5

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark = f"{SIDE}={mark}\0"
        self._strangers = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - {os.getpid()}
        self._ours = {os.getpid()}
        self._spent: dict[int, int] = {}
        self._samples: list[tuple[float, float, float]] = []
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Sample until told to stop."""
        while True:
            self._samples.append((time.time(), busy_seconds(), self._own_seconds()))
            if self._over.wait(self.EVERY):
                return

    def _own_seconds(self) -> float:
        there = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()}
        for pid in there - self._strangers - self._ours:
            if self._mark in read_proc(pid, "environ"):
                self._ours.add(pid)
        for pid in self._ours & there:
            if stat := read_proc(pid, "stat"):
                fields = stat.rpartition(")")[2].split()
                self._spent[pid] = int(fields[11]) + int(fields[12])
        return sum(self._spent.values()) / TICKS

    def others(self, start: float, end: float) -> float:
        """Return how many cores other processes used on average between two times."""
        inside = [sample for sample in self._samples if start <= sample[0] <= end]
        if len(inside) < 2 or inside[-1][0] == inside[0][0]:
            inside = [self._samples[0], self._samples[-1]]
        (t0, busy0, own0), (t1, busy1, own1) = inside[0], inside[-1]
        return round(max(0.0, busy1 - busy0 - (own1 - own0)) / max(t1 - t0, 1e-9), 2)


def busy_seconds() -> float:
    """Return the core seconds that this machine has computed, or that its host has taken away, since it started."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        )
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + irq + softirq + steal) / TICKS


def machine() -> dict[str, Any]:
    """Return kind of processor, cores, memory, GPU and load average; never host names."""
    import torch

    cpu = platform.processor()
    for line in read_proc_file("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = next((int(line.split()[1]) for line in read_proc_file("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_gb": round(memory / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def versions(path: str = "") -> dict[str, str | None]:
    """Return versions of Python and the packages that are compared."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        folders = [*sys.path, path] if path else sys.path
        candidates = importlib.metadata.distributions(name=name, path=folders)
        found[name] = next((each.version for each in candidates), None)
    return found


def read_proc_file(path: str) -> list[str]:
    """Return the lines of a file; none where there is no such file."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
