"""Fixtures that all tests may ask for."""

import gc
import os
from contextlib import contextmanager

import pytest

from fedkd.garbage import paused

# Before anybody imports Flower or Ray.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
# Ray notices within seconds that a node has gone; by default it waits longer.
HEALTH_CHECK = {"initial_delay_ms": 0, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}
os.environ.update({f"RAY_health_check_{name}": str(value) for name, value in HEALTH_CHECK.items()})

# What is imported stays, and passes over all of it take time. Tests of garbage ask for them.
gc.set_threshold(*gc.get_threshold()[:2], 1000)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import all tests, and all that they test."""
    with paused():
        return (yield)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# Methods with settings that make a round short.
FAST = {
    "fedmd": {"name": "fedmd", "align": 40, "public_epochs": 2, "transfer_epochs": 2},
    "cfd": {"name": "cfd", "subset_size": 40, "bits_down": 4, "distill_batch_size": 20},
    "mhat": {"name": "mhat", "public_size": 40, "server_batch_size": 20},
    "cronus": {"name": "cronus", "initial_epochs": 2},
    "fedgems": {"name": "fedgems", "public_batch_size": 20, "server_batch_size": 20},
    "fedgkt": {"name": "fedgkt", "server_epochs": 1, "server_batch_size": 20},
    "distributed": {"name": "distributed", "graph": "complete", "gossip_steps": 2},
    "feddf": {"name": "feddf", "steps": 20, "batch_size": 16},
    "fedbe": {"name": "fedbe", "samples": 3, "epochs": 2, "batch_size": 16, "swa_start": 2, "swa_every": 2},
    "fedaux": {"name": "fedaux", "pretrain_epochs": 2, "pretrain_batch_size": 32, "batch_size": 16, "lr": 1e-3},
    "fedftg": {"name": "fedftg", "iterations": 2, "batch_size": 12, "noise": 6, "width": 8},
    "dsfl": {
        "name": "dsfl",
        "open_size": 40,
        "distill_batch_size": 20,
        "distill_epochs": 2,
        "server_lr": 0.1,
    },
}

# What a method needs of the scenario beside the proxy set that all have.
NEEDS = {name: {"proxy__server_labels": 30} for name in ("fedgkd_vote", "fedcad", "fedssd")}
NEEDS |= {name: {"proxy__labelled": True} for name in ("fedgems", "fedmd")}


@pytest.fixture(scope="session")
def ray_started():
    """Return a function that starts Ray with two CPUs, unless it runs; every RayGrid joins it.

    Workers are kept from test to test, as they are from run to run of a sweep.
    """
    import ray

    from fedkd.kept import kept_workers

    def start():
        if not ray.is_initialized():
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    with kept_workers():
        yield start
    ray.shutdown()


@pytest.fixture
def ray_session(ray_started):
    """Ray, started once, and again where Flower's simulation has ended it."""
    ray_started()


@pytest.fixture
def ray_for_others(ray_session):
    """Ray with all its CPUs free, for Flower's own simulation."""
    from fedkd.kept import release

    release()


@pytest.fixture
def small():
    """Return a function that makes small scenarios: six clients with a tiny MLP on synthetic data.

    Its keyword arguments are changes, with ``__`` for the dot of a dotted key.
    """
    from fedkd.parsing import merge, parse

    base = {
        "name": "small",
        "data": {
            "source": "synthetic",
            "options": {"classes": 4, "dimensions": 12, "train": 400, "test": 100, "separation": 3.0},
        },
        "partition": {"name": "dirichlet", "alpha": 0.3, "clients": 6},
        "proxy": {"source": "held-out", "size": 60},
        "models": {"student": "mlp", "options": {"hidden": [16]}},
        "client": {"lr": 0.1, "batch_size": 16},
        "system": {"engine": "inline", "server_threads": 1},
        "run": {"rounds": 3, "participation": 0.7},
    }

    def make(strategy="fedavg", **changes):
        raw = {}
        merge(raw, base)
        merge(raw, {"strategy": {"name": strategy} if isinstance(strategy, str) else strategy})
        merge(raw, {key.replace("__", "."): value for key, value in changes.items()})
        return parse(raw)

    return make


@pytest.fixture
def federate():
    """Return a function that runs a scenario in this process and returns strategy and events."""
    from fedkd import plugins
    from fedkd.client.handlers import make_app
    from fedkd.data.federation import build_federation
    from fedkd.engine import InlineGrid, Nodes
    from fedkd.server.runtime import ServerRuntime

    def run(scenario, mods=(), rounds=0):
        federation = build_federation(scenario)
        events = []
        nodes = Nodes.alike(federation.num_clients)
        with InlineGrid(lambda: make_app(scenario, mods), nodes, cohort=scenario.system.cohort) as grid:
            strategy = plugins.make_strategy(scenario)
            strategy.bind(ServerRuntime(scenario, grid, events.append))
            strategy.start(grid, num_rounds=rounds)
        return strategy, events

    return run


@pytest.fixture
def fast():
    """Return a function from the name of a method to the method with settings that make a round short."""
    return lambda name: FAST.get(name, {"name": name})


@pytest.fixture
def needs():
    """Return a function from the name of a method to what it needs of a scenario, as changes for `small`."""
    return lambda name: NEEDS.get(name, {})


class Tape:
    """A CUDA graph for machines without a GPU: it computes again, from inputs of its own."""

    def __init__(self, work, inputs):
        self.work, self.inputs, self.replays = work, [tensor.clone() for tensor in inputs], 0

    def replay(self, inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.work(*self.inputs)
        self.replays += 1


@pytest.fixture
def taped(monkeypatch):
    """Return a context in which work is recorded as on a GPU that waits for Python; it gives the tapes."""
    from fedkd.graphs import Recorder

    @contextmanager
    def context():
        tapes, begin = [], Recorder.__init__

        def able(self, device, on):
            begin(self, device, on)
            self.able = on

        def record(self, key, work, inputs):
            self._graphs[key] = Tape(work, inputs)
            tapes.append(self._graphs[key])

        with monkeypatch.context() as patch:
            for name, twin in {"__init__": able, "_record": record, "_mark": lambda self: None}.items():
                patch.setattr(Recorder, name, twin)
            patch.setattr(Recorder, "_waits", lambda self: True)
            yield tapes

    return context
