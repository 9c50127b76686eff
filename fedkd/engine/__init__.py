"""The engine: Flower grids that run simulated clients in this process or on Ray workers.

It knows Flower and Ray and nothing of distillation: any `flwr.clientapp.ClientApp` runs on it.
"""

from fedkd.garbage import paused

with paused():  # a worker imports PyTorch and Flower here
    from fedkd.engine.grid import SimulationGrid
    from fedkd.engine.inline import InlineGrid
    from fedkd.engine.nodes import Nodes
    from fedkd.engine.ray_grid import RayGrid

__all__ = ["InlineGrid", "Nodes", "RayGrid", "SimulationGrid"]
