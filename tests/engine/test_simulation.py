"""A Flower app as its quickstart writes one, on our engine and on Flower's own simulation runtime."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedkd import cli
from fedkd.engine.simulation import load_app, simulate
from fedkd.errors import ScenarioError

TASK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))

def load_data(partition_id, num_partitions):
    rng = torch.Generator().manual_seed(partition_id)
    y = torch.randint(3, (30 + 10 * partition_id,), generator=rng)
    x = torch.randn(len(y), 6, generator=rng) + torch.eye(3, 6)[y] * 3
    return x, y

def train(net, data, epochs, lr):
    x, y = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()

def test(net, data):
    x, y = data
    net.eval()
    with torch.no_grad():
        out = net(x)
    return nn.functional.cross_entropy(out, y).item(), (out.argmax(1) == y).float().mean().item()
"""

CLIENT = """
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from NAME.task import Net, load_data
from NAME.task import test as test_fn
from NAME.task import train as train_fn

app = ClientApp()

@app.train()
def train(msg: Message, context: Context):
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    loss = train_fn(model, data, context.run_config["local-epochs"], msg.content["config"]["lr"])
    visits = context.state["visits"]["times"] + 1 if "visits" in context.state else 1
    context.state["visits"] = MetricRecord({"times": visits})
    metrics = {"train_loss": loss, "num-examples": len(data[0]), "visits": visits}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)

@app.evaluate()
def evaluate(msg: Message, context: Context):
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    loss, accuracy = test_fn(model, data)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data[0])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
"""

SERVER = """
import json
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from NAME.task import Net

app = ServerApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    strategy = FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["lr"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    context.state["final"] = result.arrays
    for name in ("train", "evaluate"):
        for number, metrics in getattr(result, f"{name}_metrics_clientapp").items():
            context.state[f"{name}-{number}"] = metrics
    path = context.run_config["out"]
    if path:
        with open(path, "w") as file:
            weights = {name: tensor.tolist() for name, tensor in result.arrays.to_torch_state_dict().items()}
            last = result.evaluate_metrics_clientapp[3], result.train_metrics_clientapp[3]
            json.dump([weights, *map(dict, last)], file)
"""

PROJECT = """
[project]
name = "quickstart"
version = "1.0.0"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "NAME.server_app:app"
clientapp = "NAME.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 3
fraction-evaluate = 1.0
local-epochs = 5
lr = 0.1
out = ""
"""


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The folder of an app. Every app is a package of its own name, as modules stay loaded."""
    name = f"quickstart_{abs(hash(str(tmp_path)))}"
    package = tmp_path / "project" / name
    package.mkdir(parents=True)
    files = {"__init__.py": "", "task.py": TASK, "client_app.py": CLIENT, "server_app.py": SERVER}
    for file, text in files.items():
        (package / file).write_text(text.replace("NAME", name))
    (package.parent / "pyproject.toml").write_text(PROJECT.replace("NAME", name))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return package.parent


def final(context):
    return {name: array.numpy() for name, array in context.state["final"].items()}


def test_the_quickstart_app_learns_unchanged_and_equally_on_both_engines(quickstart, ray_session):
    server_app, client_app, run_config = load_app(quickstart)

    inline = simulate(server_app, client_app, 6, run_config=run_config, engine="inline")
    on_ray = simulate(server_app, client_app, num_supernodes=6, run_config=run_config, workers=2)

    assert inline.state["evaluate-3"]["eval_acc"] > 0.8 > inline.state["evaluate-1"]["eval_acc"]
    assert inline.state["train-3"]["visits"] == 3  # clients keep their state
    for name, values in final(inline).items():
        assert (values == final(on_ray)[name]).all()
    assert dict(inline.state["evaluate-2"]) == dict(on_ray.state["evaluate-2"])


def test_an_app_that_is_given_as_an_object_runs_too(ray_session):
    client, server = ClientApp(), ServerApp()

    @client.query()
    def answer(message, context):
        number = context.node_config["partition-id"] * context.run_config["factor"]
        return Message(RecordDict({"answer": MetricRecord({"number": number})}), reply_to=message)

    @server.main()
    def main(grid, context):
        asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        context.state["seen"] = MetricRecord(
            {"all": [r.content["answer"]["number"] for r in grid.send_and_receive(asked)]}
        )

    context = simulate(server, client, 5, run_config={"factor": 10}, workers=2)

    assert context.state["seen"]["all"] == [0, 10, 20, 30, 40]


def test_what_the_server_app_raises_reaches_the_caller():
    server = ServerApp()

    @server.main()
    def main(grid, context):
        raise LookupError("no luck")

    with pytest.raises(LookupError, match="no luck"):
        simulate(server, ClientApp(), 2, engine="inline")
    with pytest.raises(ValueError, match="at least 1"):
        simulate(server, ClientApp(), 0, engine="inline")


def test_the_command_runs_the_app_of_a_folder(quickstart, tmp_path, capsys):
    out = tmp_path / "out.json"
    config = f"lr=0.05 out='{out}'"

    assert cli.main(["simulate", str(quickstart), "--clients", "4", "--engine", "inline", "--run-config", config]) == 0

    weights, evaluated, trained = json.loads(out.read_text())
    assert set(weights) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert evaluated["eval_acc"] > 0.5 and trained["visits"] == 3


def test_each_worker_of_the_command_gets_its_share_of_a_gpu(quickstart, ray_session, capsys):
    command = ["simulate", str(quickstart), "--workers", "2", "--gpus", "0.75"]
    assert cli.main(command) == 1  # logical resources of the session: CPUs alone
    assert "2 workers need 1.5 GPUs, Ray has 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "pyproject.toml"),
        (["APP", "--run-config", "rl=0.1"], "no setting 'rl'"),
        (["APP", "--engine", "rai"], "did you mean 'ray'"),
        (["APP", "--clients", "0"], "--clients"),
    ],
)
def test_mistakes_of_the_command_are_told(quickstart, arguments, text, capsys):
    arguments = [str(quickstart) if argument == "APP" else argument for argument in arguments]

    assert cli.main(["simulate", *arguments]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("client_app:app", "client_app:ap", "client_app:ap cannot be loaded: AttributeError"),
        ("server_app:app", "gone:app", "gone:app cannot be loaded: ModuleNotFoundError"),
        ("server_app:app", "client_app:app", "is no ServerApp"),
        ("serverapp =", "server =", "no Flower app is declared"),
        ("[project]", "[project", "TOMLDecodeError"),
    ],
)
def test_folders_without_a_working_app_are_refused(quickstart, old, new, text):
    project = quickstart / "pyproject.toml"
    project.write_text(project.read_text().replace(old, new))

    with pytest.raises(ScenarioError, match=text):
        load_app(quickstart)


@pytest.mark.slow
def test_flowers_own_runtime_comes_to_the_same(quickstart, tmp_path):
    """In a process of its own, since that runtime stops Ray when it ends. It hands no settings to the apps."""
    theirs = tmp_path / "theirs.json"
    server_app, client_app, config = load_app(quickstart)
    context = simulate(server_app, client_app, 4, run_config=config, engine="inline")
    config["out"] = str(theirs)
    (package,) = (path.parent for path in quickstart.glob("*/task.py"))
    for file in package.glob("*_app.py"):
        file.write_text(
            re.sub(r'context\.run_config\["([\w-]+)"\]', lambda found: repr(config[found[1]]), file.read_text())
        )
    script = tmp_path / "theirs.py"
    script.write_text(f"""
from {package.name} import client_app, server_app
from flwr.simulation import run_simulation

backend = {{"init_args": {{"address": "local", "num_cpus": 2}}, "client_resources": {{"num_cpus": 1}}}}
run_simulation(server_app.app, client_app.app, 4, backend_config=backend)
""")
    env = {**os.environ, "PYTHONPATH": str(quickstart), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200, env=env)
    assert theirs.exists(), done.stdout + done.stderr
    weights, evaluated, trained = json.loads(theirs.read_text())

    # Flower adds replies in the order in which they arrive, so the last bits may differ.
    for name, values in final(context).items():
        assert values == pytest.approx(np.array(weights[name]), abs=1e-5)
    assert dict(context.state["evaluate-3"]) == pytest.approx(evaluated, abs=1e-5)
    assert dict(context.state["train-3"]) == pytest.approx(trained, abs=1e-5)
