"""The grid that a scenario asks for: before clients are measured, and as the preflight wants it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fedkd.client.handlers import make_app
from fedkd.engine import InlineGrid, Nodes, RayGrid
from fedkd.engine.placement import PER_GPU

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.engine.grid import SimulationGrid
    from fedkd.preflight import Report
    from fedkd.scenario import Scenario


def make_grid(
    scenario: Scenario, federation: Federation, *, probe: bool = False, worker_bytes: int = 0
) -> SimulationGrid:
    """Return the engine that a scenario asks for, over the clients of a federation.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario. Without workers there is one for each CPU, or four share a GPU.
    federation : Federation
        Its clients.
    probe : bool
        Whether the grid is there to measure clients: where there are GPUs it is one worker with a whole one.
    worker_bytes : int
        Memory that a worker needs; 0 = not known.
    """
    nodes = Nodes(
        partition_ids=torch.arange(federation.num_clients).numpy(),
        archs=federation.archs,
        num_examples=federation.sizes,
    )
    app_factory = partial(make_app, scenario)
    if scenario.system.engine == "inline":
        return InlineGrid(app_factory, nodes, cohort=scenario.system.cohort)
    gpus = _gpus(scenario)
    workers = scenario.system.workers or PER_GPU * gpus
    share = scenario.system.gpu_fraction or (min(1.0, gpus / workers) if gpus else 0.0)
    if probe and gpus:
        workers, share = 1, 1.0
    return RayGrid(
        app_factory,
        nodes,
        cohort=scenario.system.cohort,
        workers=workers,
        gpus_per_worker=share,
        worker_bytes=worker_bytes,
        address=scenario.system.address,
    )


def planned_bytes(known: Mapping[str, Any] | None, scenario: Scenario) -> int:
    """Return the memory of a worker that was planned when a run began on a cluster; 0 = not known, or one machine.

    Parameters
    ----------
    known : mapping or None
        What the preflight recorded, see `fedkd.preflight.Report`.
    scenario : Scenario
        The resolved scenario.
    """
    return int(known["worker"].get("planned_bytes", 0)) if known and scenario.system.address else 0


def settle(grid: SimulationGrid, asked: Scenario, report: Report, federation: Federation) -> SimulationGrid:
    """Return a grid as a preflight wants it: the one that it used, if its workers are right.

    Parameters
    ----------
    grid : SimulationGrid
        With which clients were measured; closed if another one is returned.
    asked : Scenario
        The resolved scenario, before the preflight.
    report : Report
        What the preflight chose.
    federation : Federation
        The clients.
    """
    scenario = report.scenario
    differ = (report.placement.workers, report.placement.gpu_fraction) != (grid.workers, 0.0)
    # Of a cluster's machines some may have no memory for the workers that Ray has put there.
    if grid.workers and (differ or (asked.system.address and asked.system.workers)):
        grid.close()
        return make_grid(scenario, federation, worker_bytes=report.placement.worker_bytes)
    grid.cohort = scenario.system.cohort
    if (asked.system.trainer, scenario.system.trainer) == ("auto", "vectorised"):
        grid.load_app(partial(make_app, scenario))
    return grid


def _gpus(scenario: Scenario) -> int:
    """Return the number of GPUs that clients may use, in the cluster where one is joined."""
    if scenario.system.device == "cpu":
        return 0
    if scenario.system.engine == "ray":
        import ray

        if ray.is_initialized():
            return int(ray.cluster_resources().get("GPU", 0))
    return torch.cuda.device_count()
