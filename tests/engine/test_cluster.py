"""Runs over the machines of a cluster; here two unlike nodes of one machine, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, threading, time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from fedkd import grids, run
from fedkd.cluster import shared_engine
from fedkd.engine import RayGrid
from fedkd.parsing import parse

STORE = 80 << 20  # bytes of the driver's node for objects


def scenario(terms=True, **system):
    return parse({
        "name": "two",
        "data": {"source": "synthetic", "options": {"classes": 4, "dimensions": 12, "train": 400, "test": 100}},
        "partition": {"name": "dirichlet", "alpha": 0.3, "clients": 12},
        "models": {"student": "mlp", "options": {"hidden": [4096]}},  # a state is too large for the driver
        # With the term, clients have a state, which lives on the nodes; without the ensemble uploads are read once.
        "client": {"lr": 0.1, "terms": [{"teacher": "own"}] if terms else []},
        "system": {"server_threads": 1, "trainer": "sequential", **system},
        "run": {"rounds": 3, "evaluate_ensemble": terms},
    })


def where():
    import ray  # by value: workers cannot import this script

    return ray.get_runtime_context().get_node_id()


class Watch(run.Listener):
    # Sees on which nodes workers are when a round begins, which waits until all of them have loaded the app.
    second = None  # the node that comes and goes

    def __init__(self):
        self.replies, self.places = Counter(), []

    def event(self, event):
        if event["event"] == "started":
            self.replies.clear()
        if event["event"] == "started" and Watch.second:
            self.places.append(sorted(Counter(ray.get([a.compute.remote(where, []) for a in actors()])).values()))
        self.replies[event["event"]] += 1
        self.heard(event["event"], event.get("round"))

    def heard(self, event, round):
        pass

    def leave(self):
        cluster.remove_node(Watch.second, allow_graceful=False)
        Watch.second = None

    def come(self):
        if Watch.second is None:
            Watch.second = cluster.add_node(num_cpus=2)
            cluster.wait_for_nodes()


class LeavesTwice(Watch):
    # With states that were saved, before round 2; with uploads and unsaved states, when all have replied in round 3.
    again = False

    def heard(self, event, round):
        if event == "started" and round == 2:
            # The driver has read all states, to save them, and would still have copies: something takes their room.
            room = ray.put(np.zeros(STORE - (1 << 20), np.uint8))
            self.leave()
            del room
        if event == "round" and round == 2:
            self.come()
        if event == "reply" and round == 3 and self.replies[event] == 12 and not self.again:
            self.again = True
            self.leave()


class LeavesInTheMiddle(Watch):
    # As soon as somebody is trained there in round 2.
    def heard(self, event, round):
        if (event, round) == ("started", 2):
            self.thread = threading.Thread(target=self.wait)
            self.thread.start()
        if (event, round) == ("round", 2):
            self.thread.join()

    def wait(self):
        while not any("away" in file.read_text() for file in notes.iterdir()):
            time.sleep(0.01)
        self.leave()


def actors():
    return made[-1]._pool.actors


def slow_away(folder, head):
    # A mod that notes where clients are trained in round 2; on any node but the head that takes longer than it lasts.
    def mod(message, context, call_next):
        if message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2:
            away = ray.get_runtime_context().get_node_id() != head
            with (folder / str(context.node_config["partition-id"])).open("a") as file:
                file.write("away " if away else "here ")
            time.sleep(60 * away)
        return call_next(message, context)

    return mod


def outcome(result):
    rounds = [event for event in run.read_metrics(result.folder) if event["event"] == "round"]
    model = (result.folder / "model.safetensors").read_bytes().hex()
    return [{**event, "seconds": None} for event in rounds], model


def said(result, what, *keys):
    return [[event[key] for key in keys] for event in run.read_metrics(result.folder) if event["event"] == what]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    made, make_app, notes = [], grids.make_app, out / "notes"
    notes.mkdir()
    grids.RayGrid = lambda *given, **more: made.append(RayGrid(*given, **more)) or made[-1]
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    twice, middle = LeavesTwice(), LeavesInTheMiddle()
    on_both = {"engine": "ray", "address": cluster.address}
    try:
        twice.come()
        with shared_engine(scenario(**on_both)):  # workers stay for the second run, as in a sweep
            lost = run.execute(scenario(**on_both), out=out / "lost", listener=twice)
            middle.come()
            grids.make_app = partial(make_app, mods=[slow_away(notes, where())])
            again = run.execute(scenario(terms=False, **on_both), out=out / "again", listener=middle)
        assert Watch.second is None
    finally:
        cluster.shutdown()
        grids.make_app = make_app
    here = run.execute(scenario(engine="inline"), out=out / "here")
    plain = run.execute(scenario(terms=False, engine="inline"), out=out / "here")
    runs = {"lost": (lost, here), "again": (again, plain)}
    print(json.dumps({
        "places": {"lost": twice.places, "again": middle.places},
        "workers": json.loads((lost.folder / "environment.json").read_text())["workers"],
        "grids": len(made),
        "equal": {name: outcome(one) == outcome(other) for name, (one, other) in runs.items()},
        "refused": {name: one.summary["refused"] for name, (one, _) in runs.items()},
        "resumed": {name: said(one, "resumed", "after_round") for name, (one, _) in runs.items()},
        "states lost": {name: one.summary["states_lost"] for name, (one, _) in runs.items()},
        "restored": said(lost, "state-lost", "round", "restored_from", "partition_id"),
        "trained": {file.name: file.read_text().split() for file in notes.iterdir()},
    }))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script says; starting a cluster takes long."""
    folder = tmp_path_factory.mktemp("cluster")
    script = folder / "cluster.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "FEDKD_CACHE": str(folder / "cache"), "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=200, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_unlike_nodes_have_a_worker_for_each_of_their_cpus(found):
    # Whenever both nodes were there and a round began; nobody had said how many workers there should be.
    assert found["places"] == {"lost": [[1, 2]] * 3, "again": [[1, 2]] * 2}
    assert found["workers"] == 3 and found["grids"] == 2  # clients were measured by the same workers


def test_a_run_that_loses_a_node_has_the_bits_of_one_in_a_single_process(found):
    assert found["equal"] == {"lost": True, "again": True}
    assert found["refused"] == {"lost": 0, "again": 0}


def test_clients_whose_node_leaves_while_they_are_trained_are_trained_again(found):
    assert len(found["trained"]) == 12
    places = [" ".join(places) for places in found["trained"].values()]
    assert set(places) == {"here", "away here"} and places.count("away here") <= 2  # a worker trains one at a time
    assert found["resumed"]["again"] == []


def test_saved_states_that_left_with_their_node_come_from_the_checkpoint(found):
    clients = {client for _, _, client in found["restored"]}
    assert 0 < len(clients) == len(found["restored"])
    assert {(round, saved) for round, saved, _ in found["restored"]} == {(2, 1)}
    assert found["states lost"] == {"lost": len(clients), "again": 0}


def test_a_run_whose_uploads_and_newer_states_left_goes_on_from_its_checkpoint(found):
    assert found["resumed"]["lost"] == [[2]]  # all had replied in round 3
