"""The machines of a cluster as placement wants them."""

import pytest
import ray

from fedkd.engine import machines as module
from fedkd.engine import pool
from fedkd.engine.machines import machines
from fedkd.engine.placement import Cost, Node, place
from fedkd.errors import RunError


def node(name, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


NODES = [
    node("head", CPU=2.0, memory=8e9, object_store_memory=2e9),
    node("box", CPU=16.0, GPU=2.0, memory=64e9),
    node("gone", alive=False, CPU=64.0, GPU=8.0),
]


def test_a_cluster_of_unlike_machines(monkeypatch):
    asked = []
    monkeypatch.setattr(module.ray, "nodes", lambda: NODES)
    monkeypatch.setattr(module, "_free_gpu_memory", lambda ids: asked.extend(ids) or {"box": 20 * 10**9})

    assert machines() == [Node(2.0, 0.0, 0, 8 * 10**9), Node(16.0, 2.0, 20 * 10**9, 64 * 10**9)]
    assert asked == ["box"]
    assert place(machines(), [Cost("cnn", 40, 0.1, gpu_bytes=10**9)]).workers == 8
    assert machines(gpus=False) == [Node(2.0, 0.0, 0, 8 * 10**9), Node(16.0, 0.0, 0, 64 * 10**9)]
    assert place(machines(gpus=False), []).workers == 18  # every core of the cluster, not of this machine


def test_machines_are_asked_for_their_gpus(ray_session):
    (here,) = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    free = module._free_gpu_memory([here])
    assert list(free) == [here] and free[here] >= 0  # 0 where there is no GPU to ask


def test_a_cluster_without_a_cpu_has_no_worker(ray_session, monkeypatch):
    monkeypatch.setattr(pool, "machines", lambda gpus: [Node(0.0)])
    with pytest.raises(RunError, match="no CPU for a worker"):
        pool.Pool((), workers=0, gpus_per_worker=0.0, address="")
