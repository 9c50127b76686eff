"""The machines of a Ray cluster, as `fedkd.engine.placement` wants them."""

from __future__ import annotations

import logging

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedkd.engine.placement import Node

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds to wait for what machines say about their GPUs."""


def machines(gpus: bool = True) -> list[Node]:
    """Return what the machines of the cluster offer; Ray must be initialised.

    Parameters
    ----------
    gpus : bool
        Whether GPUs may be used; without, they are not counted.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in alive]
    free: dict[str, int] = {}
    if gpus:
        free = _free_gpu_memory(
            [n["NodeID"] for n, has in zip(alive, resources, strict=True) if has.get("GPU", 0) >= 1]
        )
    return [
        Node(
            cpus=float(has.get("CPU", 0.0)),
            gpus=float(has.get("GPU", 0.0)) if gpus else 0.0,
            gpu_bytes=free.get(node["NodeID"], 0),
            memory=int(has.get("memory", 0)),
        )
        for node, has in zip(alive, resources, strict=True)
    ]


def _free_gpu_memory(node_ids: list[str]) -> dict[str, int]:
    """Return the free memory of each machine's GPU that has least of it; the driver may have no GPU, or another one."""

    def ask() -> int:  # inside, so that it travels by value: importing this package there would take seconds
        import os
        import subprocess

        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # nvidia-smi itself lists those that others use, too
            command += ["--id", visible]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return min(int(line) for line in said.split()) << 20  # it counts in MiB
        except (OSError, subprocess.SubprocessError, ValueError):
            return 0  # another make of GPU, or a logical one

    asked = {
        node: ray.remote(ask)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in node_ids
    }
    try:
        return {node: ray.get(reference, timeout=PATIENCE) for node, reference in asked.items()}
    except (RayError, GetTimeoutError) as error:
        log.warning("the memory of the GPUs is not known (%s); nothing is checked against it", type(error).__name__)
        return {}
