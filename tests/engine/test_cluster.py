"""Runs over the machines of a cluster; here two nodes of one machine, in a process of their own."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from fedkd import run
from fedkd.parsing import parse


def scenario(terms=True, **system):
    return parse({
        "name": "two",
        "data": {"source": "synthetic", "options": {"classes": 4, "dimensions": 12, "train": 400, "test": 100}},
        "partition": {"name": "dirichlet", "alpha": 0.3, "clients": 12},
        "models": {"student": "mlp", "options": {"hidden": [4096]}},  # a state is too large for the driver
        # With the term, clients have a state, which lives on the nodes.
        "client": {"lr": 0.1, "terms": [{"teacher": "own"}] if terms else []},
        "system": {"server_threads": 1, "trainer": "sequential", **system},
        "run": {"rounds": 3},
    })


class Seen(run.Listener):
    nodes = 0

    def event(self, event):
        if event["event"] == "round":
            busy = [node for node in ray.nodes() if node["Alive"]]
            self.nodes = max(self.nodes, len(busy))
            self.free = ray.available_resources().get("CPU", 0)


class Leaves(Seen):
    # Removes a node with all that it holds when so many clients have replied in round 2.
    def __init__(self, cluster, node, replies):
        self.cluster, self.node, self.left = cluster, node, replies

    def event(self, event):
        super().event(event)
        if self.node is not None and event["event"] == "started" and event["round"] == 2:  # both workers take part
            while ray.available_resources().get("CPU", 0):
                time.sleep(0.1)
            time.sleep(3)
        if event["event"] == "reply" and event["round"] == 2 and self.node is not None:
            self.left -= 1
            if not self.left:
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.node = None


def outcome(result):
    rounds = [event for event in run.read_metrics(result.folder) if event["event"] == "round"]
    model = (result.folder / "model.safetensors").read_bytes().hex()
    return [{**event, "seconds": None} for event in rounds], model


if __name__ == "__main__":
    out = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    on_both = {"engine": "ray", "address": cluster.address}
    seen, removed = Seen(), []
    try:
        both = run.execute(scenario(**on_both), out=out / "both", listener=seen)
        for terms in (False, True):
            leaves = Leaves(cluster, second, replies=12 if terms else 1)
            removed.append(run.execute(scenario(terms, **on_both), out=out / "removed", listener=leaves))
            assert leaves.node is None
            second = None if terms else cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
    finally:
        ray.shutdown()
        cluster.shutdown()
    here = run.execute(scenario(engine="inline"), out=out / "here")
    plain = run.execute(scenario(terms=False, engine="inline"), out=out / "here")
    facts = json.loads((both.folder / "environment.json").read_text())
    print(json.dumps({
        "equal": outcome(both) == outcome(here),
        "place": [seen.nodes, seen.free, facts["workers"]],
        "equal without a node": [outcome(removed[0]) == outcome(plain), outcome(removed[1]) == outcome(here)],
        "refused": [result.summary["refused"] for result in removed],
        "resumed": [
            [event["after_round"] for event in run.read_metrics(result.folder) if event["event"] == "resumed"]
            for result in removed
        ],
    }))
"""


def test_a_run_on_two_nodes_and_one_that_loses_a_node(tmp_path):
    script = tmp_path / "cluster.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "FEDKD_CACHE": str(tmp_path / "cache"), "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400, env=env
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # A worker takes one CPU, and each node has one: both had a worker, and no CPU was left.
    assert found["equal"] and found["place"] == [2, 0, 2]
    assert found["equal without a node"] == [True, True] and found["refused"] == [0, 0]
    # All had replied, and then uploads and states of clients were gone: as from the checkpoint of round 1.
    assert found["resumed"][1] == [1]
