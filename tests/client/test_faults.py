"""Injected faults: each is refused with its reason and counted, and the round goes on without that client."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkd import run
from fedkd.client.faults import SLOWDOWN, draw, inject
from fedkd.engine import InlineGrid, Nodes
from fedkd.errors import RunError, ScenarioError
from fedkd.parsing import parse
from fedkd.scenario import Faults
from fedkd.seeds import Purpose, rng

REASONS = {
    "crash": "injected fault: the client crashed",
    "silent": "injected fault: no reply came",
    "nan": "NaN",
    "shape": "wrong shape",
    "keys": "wrong keys",
}


def refused(events):
    return [(e["round"], e["partition_id"], e["reason"]) for e in events if e["event"] == "refused"]


def hit(scenario, kind, round, partition_id):
    """Whether a client should have a fault, by the documented stream."""
    return kind in draw(scenario.faults, rng(scenario.run.seed, Purpose.FAULT, round, partition_id))


# --- one message -----------------------------------------------------------------------------------------


@pytest.fixture
def ask(small):
    """Return a function that sends one message to a faulty client that shares two arrays."""
    kept = ArrayRecord({"w": Array(np.ones((2, 3), np.float32)), "n": Array(np.array(7))})

    def client(message, context):
        return Message(RecordDict({"weights": kept, "config": ConfigRecord({"arch": "mlp"})}), reply_to=message)

    def ask(kind="train", config=None, **faults):
        app = ClientApp(mods=[inject(lambda context: small(faults=faults))])
        for register in (app.train, app.query, app.evaluate):
            register()(client)
        with InlineGrid(lambda: app, Nodes.alike(4)) as grid:
            content = RecordDict({"config": ConfigRecord({"server-round": 1, **(config or {})})})
            (reply,) = grid.send_and_receive([grid.create_message(content, kind, grid.nodes.node_id(3), "1")])
        assert list(kept) == ["w", "n"] and kept["w"].numpy().tolist() == [[1] * 3] * 2  # the client's own
        return reply

    return ask


def test_without_faults_the_reply_is_the_clients(ask):
    reply = ask()

    assert list(reply.content["weights"]) == ["w", "n"]
    assert reply.content["config"] == {"arch": "mlp"}


def test_a_crash_is_an_exception(ask):
    assert "RuntimeError: injected fault: the client crashed" in ask(crash=1.0).error.reason


def test_a_lost_reply_is_an_error(ask):
    assert ask(silent=1.0).error.reason == "injected fault: no reply came"


def test_a_nan_is_put_among_floating_point_numbers(ask):
    arrays = ask(nan=1.0).content["weights"]

    assert np.isnan(arrays["w"].numpy()).sum() == 1
    assert arrays["n"].numpy() == 7


def test_one_array_has_a_wrong_shape(ask):
    shapes = {name: tuple(array.shape) for name, array in ask(shape=1.0).content["weights"].items()}

    assert shapes in ({"w": (2, 2, 3), "n": ()}, {"w": (2, 3), "n": (2,)})


def test_one_array_has_a_wrong_name(ask):
    assert list(ask(keys=1.0).content["weights"]) in (["w?", "n"], ["w", "n?"])


def test_a_straggler_says_so_beside_what_else_it_says(ask):
    assert ask(straggle=1.0, straggle_factor=4).content["config"] == {"arch": "mlp", SLOWDOWN: 4.0}


@pytest.mark.parametrize("kind", ["query", "evaluate"])
def test_what_the_simulator_itself_asks_never_fails(ask, kind):
    assert ask(kind, crash=1.0).content["config"] == {"arch": "mlp"}


def test_measuring_clients_never_fails(ask):
    assert ask("train", {"max-steps": 2}, crash=1.0).content["config"] == {"arch": "mlp"}


def test_the_first_fault_counts():
    assert draw(Faults(crash=1, silent=1, nan=1), np.random.default_rng(0)) == ["crash", "silent", "nan"]


def test_a_higher_rate_adds_faulty_clients_and_changes_no_other():
    def faulty(**rates):
        return {k for k in range(500) if "nan" in draw(Faults(**rates), rng(0, Purpose.FAULT, 1, k))}

    few, many = faulty(nan=0.1), faulty(nan=0.3, crash=0.5)

    assert few < many
    assert 30 <= len(few) <= 70 and 120 <= len(many) <= 180


# --- rounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REASONS)
def test_a_faulty_client_is_refused_and_the_result_is_that_of_the_others(small, federate, kind):
    scenario = small(faults={kind: 0.4}, run__participation=1.0)
    without = small(run__participation=1.0)

    strategy, events = federate(scenario)

    eligible = strategy.server.federation.eligible.tolist()
    expected = [(round, k) for round in (1, 2, 3) for k in eligible if hit(scenario, kind, round, k)]
    found = refused(events)
    assert 3 <= len(expected) <= 12  # the seed gives some
    assert sorted((round, k) for round, k, _ in found) == expected
    assert all(REASONS[kind] in reason for _, _, reason in found)
    for event in [e for e in events if e["event"] == "round"]:
        assert event["received"] == event["selected"] - sum(round == event["round"] for round, _ in expected)

    def never(message, context, call_next):
        """The same federation, in which those clients upload nothing."""
        if (int(message.metadata.group_id), context.node_config["partition-id"]) in expected:
            return Message(Error(0, "none"), reply_to=message)
        return call_next(message, context)

    others, _ = federate(without, mods=[never])
    for name, tensor in strategy.students["mlp"].items():
        assert torch.equal(tensor, others.students["mlp"][name])


def test_too_few_uploads_stop_the_run_and_it_can_be_resumed(small, tmp_path):
    def scenario(least):
        """With this seed four of six uploads are usable in round 2, and three in round 3."""
        return small(faults={"nan": 0.4}, run__participation=1.0, run__seed=3, system__min_replies=least)

    with pytest.raises(RunError) as stopped:
        run.execute(scenario(4), out=tmp_path)

    assert "usable uploads, at least 4 are needed" in str(stopped.value)
    folder = next((tmp_path / "small").iterdir())
    assert f"fedkd resume {folder}" in str(stopped.value)
    rounds = [e for e in run.read_metrics(folder) if e["event"] == "round"]
    assert [e["round"] for e in rounds] == [1, 2]

    text = (folder / "scenario.toml").read_text()
    (folder / "scenario.toml").write_text(text.replace("min_replies = 4", "min_replies = 3"))
    resumed = run.resume(folder)

    whole = run.execute(scenario(3), out=tmp_path / "whole")
    assert resumed.summary["curve"] == whole.summary["curve"]


def test_rates_are_checked():
    with pytest.raises(ScenarioError, match=r"faults.nan: must be a number in \[0, 1\], is 1.5"):
        parse({"faults": {"nan": 1.5}})
