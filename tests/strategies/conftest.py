"""What tests of several methods ask for."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch


class Passed(NamedTuple):
    """What passed a client with a message; its model as it was before and after."""

    round: int
    kind: str
    client: int
    down: Any
    up: Any
    before: dict
    after: dict
    config: Any


class Tap:
    """A mod that notes what passes every client, and spoils replies if it is told how."""

    def __init__(self, spoil=None):
        self.seen, self.spoil = [], spoil

    def __call__(self, message, context, call_next):
        from fedkd.payloads import Knowledge

        before, kind = self.model(context), message.metadata.message_type
        client, down = context.node_config["partition-id"], Knowledge.from_records(message.content)
        round = message.content["config"]["server-round"]
        reply = call_next(message, context)
        if kind != "evaluate" and not reply.has_error():
            up, config = Knowledge.from_records(reply.content), reply.content["config"]
            self.seen.append(Passed(round, kind, client, down, up, before, self.model(context), config))
        return (self.spoil and self.spoil(round, kind, client, reply)) or reply

    def model(self, context):
        kept = context.state.array_records.get("fedkd.memory")
        items = kept.items() if kept else ()
        return {k.removeprefix("model/"): torch.tensor(v.numpy()) for k, v in items if k.startswith("model/")}

    def of(self, round, kind="train"):
        """Return what passed in messages of a type in a round, by client."""
        return [each for each in self.seen if (each.round, each.kind) == (round, kind)]

    def models(self):
        """Return the bytes of each client's model after its last message in every round."""
        return {
            (each.round, each.client): {n: t.numpy().tobytes() for n, t in each.after.items()} for each in self.seen
        }


@pytest.fixture
def tap_of():
    """Return the class of taps."""
    return Tap


@pytest.fixture
def statistics_move(federate, monkeypatch):
    """Return a check that a step of distillation moves BatchNorm's statistics to its batch of proxy samples."""

    def check(method, scenario, samples):
        averages, distill = [], method.distill

        def watch(self):
            averages.append(dict(self.students["cnn"]))
            distill(self)

        monkeypatch.setattr(method, "distill", watch)
        strategy, _ = federate(scenario)
        [average], student = averages, strategy.students["cnn"]
        x = strategy.server.proxy.data.gather(samples(strategy)).x
        maps = torch.conv2d(x, average["body.stages.0.0.weight"], padding=1)
        for name, of_batch in {"running_mean": maps.mean((0, 2, 3)), "running_var": maps.var((0, 2, 3))}.items():
            before = average[f"body.stages.0.1.{name}"]
            torch.testing.assert_close(student[f"body.stages.0.1.{name}"], 0.9 * before + 0.1 * of_batch)
            assert float((before - of_batch).abs().max()) > 1e-3
        return len(x)

    return check


@pytest.fixture
def descend():
    """Return plain SGD: batches hold rows of `ids`, and the loss gets logits, rows and labels."""

    def run(model, data, ids, batches, loss, lr=0.1):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for rows in batches:
            batch = data.gather(ids[rows])
            optimizer.zero_grad()
            loss(model(batch.x).logits, torch.from_numpy(rows), batch.y).backward()
            optimizer.step()

    return run


@pytest.fixture
def adam():
    """Return Adam by its formulas (Kingma & Ba 2015): a function of gradients and a rate, which takes a step."""

    def make(parameters):
        parameters, steps = list(parameters), [0]
        moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]

        @torch.no_grad()
        def step(gradients, lr):
            steps[0] += 1
            for parameter, (first, second), gradient in zip(parameters, moments, gradients, strict=True):
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient**2 - second)
                size = (second / (1 - 0.999 ** steps[0])).sqrt() + 1e-8
                parameter -= lr * first / (1 - 0.9 ** steps[0]) / size

        return step

    return make


class Distilled(NamedTuple):
    """What came of distillations of a linear student: its weights [C, D], batches of sample ids, reports by round."""

    weights: torch.Tensor
    batches: list
    reports: list


@pytest.fixture
def distilled():
    """Return a function that lets a method distil members with given logits [K, n, C] into a student x ↦ W x.

    In float64, so that settings of little effect, such as a small weight decay, can be told from rounding.
    """
    from fedkd.data.batches import ArrayData
    from fedkd.models import Outputs
    from fedkd.server.members import StoredMember

    class Linear(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.from_numpy(weights.copy()))

        def forward(self, x):
            return Outputs(x.double() @ self.weights.T, x)

    class Watched(ArrayData):
        def gather(self, ids, **options):
            batches.append(torch.as_tensor(ids).numpy())
            return super().gather(ids, **options)

    class Proxy(SimpleNamespace):
        def __len__(self):
            return len(self.data)

    batches: list = []

    def run(method, logits, x, start, rounds=1):
        model, reports = Linear(start), []

        def load(arch, state):
            model.load_state_dict(state)
            return model

        method.server = SimpleNamespace(
            seed=0,
            device=torch.device("cpu"),
            channels_last=False,
            scenario=SimpleNamespace(system=SimpleNamespace(server_precision="fp32", graphs=False)),
            proxy=Proxy(data=Watched(x, None, kind="vector")),
            has_labels=False,
            model=load,
            state_of=lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()},
        )
        members = [StoredMember(range(len(x)), torch.from_numpy(z)) for z in logits]
        method.members, method.teachers = [SimpleNamespace(partition_id=k) for k in range(len(logits))], lambda: members
        method.students = {"linear": {"weights": torch.from_numpy(start.copy())}}
        batches.clear()
        for method.round in range(1, rounds + 1):
            method.distilled = {}
            method.distill()
            reports.append(method.distilled["linear"])
        return Distilled(method.students["linear"]["weights"], list(batches), reports)

    return run


@pytest.fixture
def linear_case():
    """Return logits of three members [3, 12, 4], samples [12, 5] and weights [4, 5], all of float32's numbers.

    Samples are of very different lengths, and so are gradients.
    """
    draw = np.random.default_rng(0)
    lengths = np.geomspace(0.1, 100, 12)[draw.permutation(12), None]
    case = draw.normal(size=(3, 12, 4)) * 3, draw.normal(size=(12, 5)) * lengths, draw.normal(size=(4, 5)) / 4
    return tuple(part.astype(np.float32).astype(np.float64) for part in case)


@pytest.fixture
def resumes(tmp_path):
    """Return a function that checks that a scenario gives the same bits in one go and stopped after a round."""
    from safetensors.torch import load_file

    from fedkd import run

    class StopAfter(run.Listener):
        """Presses Ctrl-C in the round after the given one, as soon as it has begun."""

        def __init__(self, round):
            self.round = round

        def event(self, event):
            if event["event"] == "started" and event["round"] == self.round + 1:
                raise KeyboardInterrupt

    def rounds(folder):
        events = [e for e in run.read_metrics(folder) if e["event"] == "round"]
        return [{k: v for k, v in e.items() if k != "seconds"} for e in events]

    def check(scenario, after=2):
        if scenario.system.trainer == "auto":  # two runs may measure otherwise, and bits depend on it
            one = scenario.system.model_copy(update={"trainer": "sequential"})
            scenario = scenario.model_copy(update={"system": one})
        whole = run.execute(scenario, out=tmp_path / "whole")
        with pytest.raises(run.RunInterrupted) as stopped:
            run.execute(scenario, out=tmp_path / "halves", listener=StopAfter(after))
        resumed = run.resume(stopped.value.folder)
        assert rounds(resumed.folder) == rounds(whole.folder)
        assert len(rounds(whole.folder)) == scenario.run.rounds > after
        same = ("bytes_up", "bytes_down", "predictors", "curve_bytes")
        assert {key: resumed.summary[key] for key in same} == {key: whole.summary[key] for key in same}
        for model in whole.folder.glob("model*.safetensors"):
            one, two = load_file(model), load_file(resumed.folder / model.name)
            assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
        return whole

    return check


@pytest.fixture
def digits():
    """Return a function that makes small scenarios on the digits: six clients with three different models."""
    from fedkd.parsing import merge, parse

    def make(strategy, **changes):
        raw = {
            "name": "digits",
            "data": {"source": "digits", "train_samples": 700, "test_samples": 200},
            "partition": {"name": "dirichlet", "alpha": 1.0, "clients": 6},
            "proxy": {"source": "held-out", "size": 150},
            "models": {"student": ["mlp", "cnn", "resnet8"]},
            "client": {"lr": 0.05, "batch_size": 16},
            "system": {"engine": "inline", "server_threads": 1, "trainer": "sequential"},
            "run": {"rounds": 2},
        }
        merge(raw, {"strategy": strategy})
        merge(raw, {key.replace("__", "."): value for key, value in changes.items()})
        return parse(raw)

    return make
