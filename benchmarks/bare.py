"""The bare loop: what a round costs without any framework, in one process per worker.

Every client loads the global weights, takes its steps, and is added to a float64 sum; memory layout and allocator are
PyTorch's and the C library's defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from common import WORKERS, Clock, Side, make_model, this_side, train
from torch import Tensor, nn

State = dict[str, Tensor]


def clients_of(side: Side, place: int, selected: list[int], model: nn.Module, start: State, sums: State) -> None:
    """Run every second client of a round, say, and leave the sum of their weights in `sums`."""
    for total in sums.values():
        total.zero_()
    for client in selected[place::WORKERS]:
        model.load_state_dict(start)
        if side.load.steps:
            train(model, *side.shards(client), side.load)
        for name, tensor in model.state_dict().items():
            sums[name] += tensor


def serve(place: int, selected: Tensor, start: State, sums: State, gate: Any) -> None:
    """Body of the other processes."""
    torch.set_num_threads(1)
    side = this_side()
    model = make_model(side.load)
    while True:
        gate.wait()
        clients_of(side, place, selected.tolist(), model, start, sums)
        gate.wait()


def run(side: Side, clock: Clock) -> dict[str, Any]:
    torch.set_num_threads(1)
    load, rng, model = side.load, np.random.default_rng(0), make_model(side.load)
    start = {name: tensor.clone().share_memory_() for name, tensor in model.state_dict().items()}
    sums = [{name: t.double().share_memory_() for name, t in start.items()} for _ in range(WORKERS)]
    selected = torch.arange(load.selected).share_memory_()
    context = mp.get_context("spawn")
    gate = context.Barrier(WORKERS)
    for place in range(1, WORKERS):
        context.Process(target=serve, args=(place, selected, start, sums[place], gate), daemon=True).start()
    for _ in range(clock.total):
        chosen = np.sort(rng.choice(load.clients, load.selected, replace=False))
        selected.copy_(torch.from_numpy(chosen))
        gate.wait()
        clients_of(side, 0, selected.tolist(), model, start, sums[0])
        gate.wait()
        for name, tensor in start.items():
            tensor.copy_(sum(part[name] for part in sums) / load.selected)
        clock.tick()
    return clock.result()
