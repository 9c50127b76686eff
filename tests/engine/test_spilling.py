"""Clients' states that are more than Ray's object store holds; in a process with a Ray of its own."""

import json
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
import json, sys
from pathlib import Path

import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[1])

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from fedkd.engine import Nodes, RayGrid


def make_app():
    import numpy as np

    app = ClientApp()

    @app.train()
    def train(message, context):
        before = context.state.array_records.get("kept", ArrayRecord([np.zeros(2_000_000, np.float32)]))
        [kept] = before.to_numpy_ndarrays()
        context.state["kept"] = ArrayRecord([kept + np.float32(context.node_config["partition-id"] + 1)])
        return Message(RecordDict({"sum": ArrayRecord([kept[-1:] + context.state["kept"].to_numpy_ndarrays()[0][:1]])}),
                       reply_to=message)

    return app


def ask(grid):
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    return [float(reply.content["sum"].to_numpy_ndarrays()[0][0]) for reply in grid.send_and_receive(messages)]


with RayGrid(make_app, Nodes.alike(24), workers=1) as grid:
    calls = [ask(grid) for _ in range(3)]
    kept = {p: float(state["kept"].to_numpy_ndarrays()[0][7]) for p, state in grid.take_changed()}
spilled = sum(path.stat().st_size for path in Path(sys.argv[1]).rglob("ray_spilled_objects*/*"))
print(json.dumps({"calls": calls, "kept": list(kept.values()), "spilled": spilled}))
ray.shutdown()
"""


@pytest.mark.slow
def test_states_that_do_not_fit_into_memory_are_kept_on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")  # short: sockets lie in it
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # 24 states of 8 MB, and the ones that replace them; the store holds 80 MB.
    assert found["calls"] == [[(2 * call + 1) * (p + 1) for p in range(24)] for call in range(3)]
    assert found["kept"] == [3 * (p + 1) for p in range(24)]
    assert found["spilled"] > 80e6
