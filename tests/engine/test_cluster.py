"""A run over the machines of a cluster; here two nodes of one machine, in a process of their own."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from fedkd import run
from fedkd.parsing import parse


def scenario(**system):
    return parse({
        "name": "two",
        "data": {"source": "synthetic", "options": {"classes": 4, "dimensions": 12, "train": 400, "test": 100}},
        "partition": {"name": "dirichlet", "alpha": 0.3, "clients": 12},
        "models": {"student": "mlp", "options": {"hidden": [16]}},
        "client": {"lr": 0.1, "terms": [{"teacher": "own"}]},  # clients have a state, which lives on the nodes
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


def outcome(result):
    rounds = [event for event in run.read_metrics(result.folder) if event["event"] == "round"]
    model = (result.folder / "model.safetensors").read_bytes().hex()
    return [{**event, "seconds": None} for event in rounds], model


if __name__ == "__main__":
    out = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    seen = Seen()
    try:
        both = run.execute(scenario(engine="ray", address=cluster.address), out=out / "both", listener=seen)
    finally:
        ray.shutdown()
        cluster.shutdown()
    here = run.execute(scenario(engine="inline"), out=out / "here")
    facts = json.loads((both.folder / "environment.json").read_text())
    print(json.dumps([outcome(both) == outcome(here), seen.nodes, seen.free, facts["workers"]]))
"""


def test_two_nodes_compute_the_bits_of_one_process(tmp_path):
    script = tmp_path / "cluster.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "FEDKD_CACHE": str(tmp_path / "cache"), "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, env=env
    )

    assert done.returncode == 0, done.stderr[-3000:]
    equal, nodes, free, workers = json.loads(done.stdout.splitlines()[-1])
    # A worker takes one CPU, and each node has one: both had a worker, and no CPU was left.
    assert (equal, nodes, workers, free) == (True, 2, 2, 0)
