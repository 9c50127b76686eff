"""Lines of a table are paired: one seed gives one federation, whatever the method, and attackers their due to all."""

import numpy as np
import pytest
import torch

from fedkd.client import sequential
from fedkd.data.federation import build_federation
from fedkd.seeds import Purpose
from tests.strategies.test_invariants import STRATEGIES

ROUNDS = 2
NO_LABELS = {"proxy__server_labels": 30, "proxy__labelled": True}
"""What tables give to all methods, because cutting labels from the data changes who has which samples."""

OTHER_BATCHES = {
    "centralized": "trains on everybody's samples at once",
    "cronus": "shuffles own and public samples into one set",
    "mhat": "does so, too",
}


@pytest.fixture
def observed(small, fast, federate, monkeypatch):
    """Return a function that runs a method and returns who was selected, and who was trained on which batches."""

    def run(name, **changes):
        batches = {}
        train = sequential.train

        def private(task, rows):
            ids = task.named(rows)  # in a set of own and proxy samples these come after all own ones
            return ids[ids < len(task.student.data)].tolist()

        def spy(task):
            own = task.student
            if task.purpose is Purpose.DROPOUT and own.round:
                batches.setdefault((own.round, own.partition_id), [private(task, rows) for rows in task.batches])
            train(task)

        with monkeypatch.context() as patch:
            patch.setattr(sequential, "train", spy)
            scenario = small(fast(name), **NO_LABELS, run__rounds=ROUNDS, system__trainer="sequential", **changes)
            strategy, events = federate(scenario)
        selected = [event["clients"] for event in events if event["event"] == "started"]
        return strategy, selected, batches, events

    return run


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_clients_batches_and_initial_weights_as_fedavg(observed, name):
    ours, plain = observed(name), observed("fedavg")

    federations = [one[0].server.federation for one in (ours, plain)]
    for client in range(6):
        assert np.array_equal(*(federation.shards[client].train for federation in federations))
    first, second = (one[0].server.initial("mlp") for one in (ours, plain))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    if name != "centralized":
        assert ours[1] == plain[1] and len(ours[1]) == ROUNDS
    if name not in OTHER_BATCHES:
        assert ours[2] == plain[2] and len(ours[2]) == sum(map(len, plain[1]))


@pytest.mark.parametrize("name", STRATEGIES)
def test_labels_for_some_methods_take_no_sample_from_others(small, needs, name):
    """Whether the proxy set's labels may be seen changes nothing else; the server's labels are cut for all alike."""
    plain, needy = (build_federation(small("fedavg", **changes)) for changes in ({}, needs(name)))
    if "proxy__server_labels" in needs(name):
        plain = build_federation(small("fedavg", proxy__server_labels=30))
    for client in range(6):
        assert np.array_equal(plain.shards[client].train, needy.shards[client].train)
    assert torch.equal(plain.proxy.data.gather(plain.proxy.ids).x, needy.proxy.data.gather(needy.proxy.ids).x)


@pytest.mark.parametrize("kind", ["label-flip", "sign-flip", "random"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_that_attackers_upload_is_refused(observed, name, kind):
    changes = {"run__participation": 1.0, "attacks": {"kind": kind, "share": 0.3}}

    strategy, _, _, events = observed(name, **changes)

    assert len(strategy.server.federation.attackers) == 2
    assert not [event for event in events if event["event"] == "refused"]
    rounds = [event for event in events if event["event"] == "round"]
    assert 0 <= rounds[-1]["accuracy"] <= 1
