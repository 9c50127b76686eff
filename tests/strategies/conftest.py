"""What tests of several methods ask for."""

from typing import Any, NamedTuple

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


@pytest.fixture
def tap_of():
    """Return the class of taps."""
    return Tap


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
