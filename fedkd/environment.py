"""What a run was computed with: versions, kind of machine, git commit."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedkd.scenario import Scenario
from fedkd.students import pick_device
from fedkd.threads import cores

_PACKAGES = ("fedkd", "flwr", "flwr-datasets", "torch", "torchvision", "ray", "numpy", "scikit-learn")


def environment(scenario: Scenario, workers: int, preflight: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, machine kind and git commit; never host names, users or paths.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario.
    workers : int
        Worker processes; 0 = none, everything in this process.
    preflight : mapping
        What was measured before round 1.
    """
    device = pick_device(scenario.system.device)
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(terse=True),
        "machine": platform.machine(),
        "processor": processor_vendor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "engine": scenario.system.engine,
        "workers": workers,
        "threads_per_client": 1,
        "server_threads": scenario.system.server_threads,
        "trainer": scenario.system.trainer,
        "cohort": scenario.system.cohort,
        "preflight": dict(preflight),
        "git_commit": git_commit(),
    }


def processor_vendor() -> str:
    """Return who made this machine's processor, as the processor itself says (``AuthenticAMD``); empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def git_commit() -> str | None:
    """Return the commit that this package's files are of, if they are in a git checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # as under `flwr run`, which does not install the project
        return None
