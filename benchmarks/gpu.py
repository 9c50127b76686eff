"""What a device can do, and what a client asks of it: floating-point operations."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from common import Clock, Side, Workload, make_model, told, workload
from torch.utils.flop_counter import FlopCounterMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def operations(load: Workload) -> int:
    """Return the floating-point operations of one client in a round."""
    height, width, channels = load.shape
    model, x = make_model(load), torch.randn(load.batch, channels, height, width)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x).logits, torch.zeros(load.batch, dtype=torch.int64)).backward()
    return counter.get_total_flops() * load.steps


def peak(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of a large matrix product, at PyTorch's default settings."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        for _ in range(5):
            torch.mm(one, other)
        _wait(device)
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * size**3 / best


def limits(side: Side, clock: Clock) -> dict[str, Any]:
    """Return the device's peak by precision, and a client's operations by workload."""
    device, quick = told()["device"], told()["quick"]
    size = 256 if quick else 8192 if device.startswith("cuda") else 1024
    return clock.result(
        peak={name: peak(device, dtype, size) for name, dtype in DTYPES.items()},
        operations={name: operations(workload(name, quick)) for name in told()["workloads"]},
    )


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
