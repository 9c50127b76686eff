"""Flower's own strategies between our selection and our evaluation."""

import gc

import numpy as np
import pytest
import torch

from fedkd.errors import ScenarioError
from fedkd.server.stock import stock_class, stock_names


def last(events):
    return [e for e in events if e["event"] == "round"][-1]


def test_flowers_fedavg_gives_our_fedavg(small, federate):
    ours, our_events = federate(small("fedavg"))
    theirs, their_events = federate(small("flwr:FedAvg"))
    for name, tensor in ours.students["mlp"].items():  # they average in float32, we in float64
        torch.testing.assert_close(theirs.students["mlp"][name], tensor, atol=1e-5, rtol=1e-4)
    assert [e["clients"] for e in our_events if e["event"] == "started"] == [
        e["clients"] for e in their_events if e["event"] == "started"
    ]
    assert last(our_events)["bytes_up"] == last(their_events)["bytes_up"]
    assert last(our_events)["bytes_down"] == last(their_events)["bytes_down"]


@pytest.mark.parametrize("name", stock_names())
def test_every_stock_strategy_runs_is_seeded_and_resumes(small, federate, name):
    needed = {"client_learning_rate": 0.1} if name == "QFedAvg" else {}
    scenario = small(
        {"name": f"flwr:{name}"} | needed, run__participation=1.0, models__norm="batch", client__batch_size=16
    )
    whole, events = federate(scenario)
    again, _ = federate(scenario)
    assert last(events)["received"] >= 5
    for key, tensor in whole.students["mlp"].items():
        assert torch.equal(tensor, again.students["mlp"][key])

    half, _ = federate(scenario, rounds=2)
    from fedkd import plugins

    rest = plugins.make_strategy(scenario)
    rest.bind(half.server)
    rest.load_state_dict(half.state_dict())
    for attribute in ("m_t", "v_t", "momentum_vector", "current_arrays"):
        before, after = getattr(half.inner, attribute, None), getattr(rest.inner, attribute, None)
        assert (before is None) == (after is None)
        if isinstance(before, dict) and not hasattr(before, "object_id"):
            assert all(np.array_equal(before[k], after[k]) for k in before)


def test_their_sampling_does_not_touch_the_global_generator(small, federate):
    import random

    random.seed(3)
    expected = random.Random(3).random()
    federate(small("flwr:FedAvg"), rounds=1)
    assert random.random() == expected


def test_the_collector_looks_at_little_while_they_aggregate(small, federate, monkeypatch):
    frozen = []
    flowers = stock_class("QFedAvg").inner_class
    original = flowers.aggregate_train

    def aggregate(self, *args):
        frozen.append(gc.get_freeze_count())
        return original(self, *args)

    monkeypatch.setattr(flowers, "aggregate_train", aggregate)
    scenario = small({"name": "flwr:QFedAvg", "client_learning_rate": 0.1})
    federate(scenario, rounds=1)
    assert frozen.pop() > 100_000  # what has been imported
    assert gc.get_freeze_count() == 0
    gc.freeze()  # somebody else's stays
    try:
        federate(scenario, rounds=1)
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.unfreeze()


def test_what_cannot_run_is_refused_with_a_way_out():
    with pytest.raises(ScenarioError, match="use fedprox"):
        stock_class("FedProx")
    with pytest.raises(ScenarioError, match="flwr:FedAdam"):
        stock_class("FedEverything")


def test_negative_counts_are_refused(small):
    from fedkd.plugins import make_strategy

    with pytest.raises(ScenarioError, match="num_malicious_nodes"):
        make_strategy(small({"name": "flwr:Krum", "num_malicious_nodes": -1}))
