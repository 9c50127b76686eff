"""Ceiling and floor: all data in one place, and no exchange at all."""

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from fedkd.payloads import Knowledge, Weights
from strategies.local import Alone, Local

IMAGES = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def equal(one, two):
    return all(torch.equal(tensor, two.students["mlp"][name]) for name, tensor in one.students["mlp"].items())


ONE_CLIENT = {"partition": {"name": "iid", "alpha": None, "clients": 1}, "run__participation": 1.0}


# --- centralized ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client": {"optimizer": "adam", "lr": 0.01, "lr_decay": 0.9, "schedule": "cosine", "epochs": 2}},
        {"client": {"steps": 5, "momentum": 0.9, "clip": 0.5}},
        {"partition__test": 0.2, "partition__validation": 0.1},
        {"client__terms": [{"teacher": "last:2", "weight": 1.0}, {"teacher": "own"}]},
    ],
    ids=["plain", "adam", "steps", "splits", "terms"],
)
def test_with_one_client_centralized_is_fedavg_to_the_bit(small, federate, changes):
    central, events = federate(small("centralized", **ONE_CLIENT, **changes))
    fedavg, others = federate(small("fedavg", **ONE_CLIENT, **changes))
    assert equal(central, fedavg)
    for one, two in zip(rounds_of(events), rounds_of(others), strict=True):
        assert one["predictors"]["server"].items() <= two["predictors"]["server"].items()  # no ensemble to agree with
        assert one["train"] == two["train"] and one["whose"] == two["whose"] == "server"


def test_it_trains_on_everybodys_training_samples_and_no_others(small, federate):
    scenario = small("centralized", partition__test=0.2, partition__validation=0.1, proxy__server_labels=30)
    strategy, _ = federate(scenario, rounds=1)
    federation = strategy.server.federation
    expected = sorted(int(k) for shard in federation.shards for k in shard.train)
    assert strategy.samples.tolist() == expected
    kept = [k for shard in federation.shards for part in (shard.validation, shard.test) for k in part]
    assert not set(expected) & {int(k) for k in [*kept, *federation.server_labels]}
    assert len(expected) + len(kept) + 30 + 60 == 400


def test_it_starts_where_fedavg_starts_and_learns_more(small, federate):
    central, events = federate(small("centralized", partition__alpha=0.05))
    fedavg, others = federate(small("fedavg", partition__alpha=0.05))
    start = central.server.initial("mlp")
    assert all(torch.equal(tensor, fedavg.server.initial("mlp")[name]) for name, tensor in start.items())
    assert [list(s.train) for s in central.server.federation.shards] == [
        list(s.train) for s in fedavg.server.federation.shards
    ]
    assert rounds_of(events)[-1]["accuracy"] > rounds_of(others)[-1]["accuracy"]


def test_its_traffic_is_the_data_once(small, federate):
    strategy, events = federate(small("centralized"))
    assert all(e["bytes_up"] == {} and e["bytes_down"] == {} for e in rounds_of(events))
    vector = 12 * strategy.server.federation.train.x.itemsize
    assert dict(strategy.server.traffic["up"]) == {"training-data": (400 - 60) * (vector + 4)}
    assert not strategy.server.traffic["down"]

    images, _ = federate(small("centralized", data__options=IMAGES, models__options={}, client__steps=1), rounds=1)
    assert dict(images.server.traffic["up"]) == {"training-data": (200 - 60) * (8 * 8 + 4)}  # one byte a pixel


def test_the_number_of_clients_and_who_is_selected_mean_nothing_to_it(small, federate):
    every, _ = federate(small("centralized", partition={"name": "iid", "alpha": None, "clients": 2}))
    other, _ = federate(small("centralized", partition={"name": "iid", "alpha": None, "clients": 9}))
    assert equal(every, other)


def test_wrong_labels_of_attackers_and_faults_do_not_reach_it(small, federate):
    clean, _ = federate(small("centralized"))
    spoilt, events = federate(small("centralized", attacks={"kind": "label-flip", "share": 0.5}, faults={"nan": 1.0}))
    assert equal(clean, spoilt) and not [e for e in events if e["event"] == "refused"]


@pytest.mark.parametrize("who", ["all", "selected"])
def test_clients_can_evaluate_its_model(small, federate, who):
    _, events = federate(small("centralized", partition__test=0.2, run__evaluate_clients=who), rounds=1)
    measured = rounds_of(events)[-1]["predictors"]["clients-local"]
    assert measured["clients"] == 6 and 0 <= measured["worst_decile"] <= measured["accuracy"] <= 1


def test_it_resumes_to_the_same_bits(small, resumes):
    terms = [{"teacher": "last:2", "weight": 1.0}, {"teacher": "own"}]
    whole = resumes(small("centralized", client__terms=terms))
    data = whole.summary["bytes_up"]["training-data"]
    assert whole.summary["bytes_up"] == {"training-data": data} and whole.summary["curve_bytes"] == [data] * 3


def test_it_resumes_with_statistics_that_do_not_travel(small, resumes):
    resumes(
        small(
            "centralized",
            models={"student": "cnn", "options": {}, "norm": "batch", "buffers": "params_only"},
            data__options=IMAGES,
            client__steps=3,
        )
    )


# --- local ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
def test_local_is_fd_with_gamma_zero_to_the_bit(small, federate, tap_of, trainer):
    own, taught, slight = tap_of(), tap_of(), tap_of()
    settings = {"system__trainer": trainer, "system__cohort": 6}
    _, alone = federate(small("local", **settings), mods=[own])
    _, fd = federate(small({"name": "fd", "gamma": 0.0}, **settings), mods=[taught])
    federate(small({"name": "fd", "gamma": 1e-3}, **settings), mods=[slight])
    assert own.models() == taught.models() != slight.models()
    assert [e["predictors"] for e in rounds_of(alone)] == [e["predictors"] for e in rounds_of(fd)]
    assert {e["whose"] for e in rounds_of(alone)} == {"clients"}


def test_with_one_client_local_is_fedavg(small, federate, tap_of):
    tap = tap_of()
    _, alone = federate(small("local", **ONE_CLIENT), mods=[tap])
    server, fedavg = federate(small("fedavg", **ONE_CLIENT))
    own = tap.of(3)[0].after
    assert own.keys() == server.students["mlp"].keys()
    assert all(torch.equal(tensor, server.students["mlp"][name]) for name, tensor in own.items())
    assert [e["accuracy"] for e in rounds_of(alone)] == [e["accuracy"] for e in rounds_of(fedavg)]
    assert [e["train"] for e in rounds_of(alone)] == [e["train"] for e in rounds_of(fedavg)]


def test_nothing_travels_and_clients_are_evaluated_on_both_kinds_of_data(small, federate):
    scenario = small("local", partition={"test": 0.25, "alpha": 0.05}, run__evaluate_clients="all")
    strategy, events = federate(scenario)
    assert not strategy.server.traffic["up"] and not strategy.server.traffic["down"]
    last = rounds_of(events)[-1]
    assert last["received"] == last["selected"] == 4
    world, own = (last["predictors"][name]["accuracy"] for name in ("clients", "clients-local"))
    assert last["accuracy"] == world < own  # few classes each: easy at home, not elsewhere


def test_a_client_goes_on_with_its_own_model_and_one_that_rests_keeps_it(small, federate):
    def accuracies(rounds):
        scenario = small("local", run__participation=0.2)  # one of six a round
        _, events = federate(scenario, rounds=rounds)
        return rounds_of(events)

    one, three = accuracies(1), accuracies(3)
    assert three[0] == one[0] and three[0]["predictors"] != three[2]["predictors"]


def test_an_upload_that_nobody_asked_for_is_refused(small, federate):
    gift = Knowledge.of(Weights({"w": torch.zeros(1)}, "mlp")).to_records()

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2 and message.metadata.message_type == "train":
            reply.content = RecordDict(
                {**reply.content, "weights": gift["weights"], "weights.meta": gift["weights.meta"]}
            )
        return reply

    _, events = federate(small("local", run__participation=1.0, run__rounds=1), mods=[mod])
    (refused,) = [e for e in events if e["event"] == "refused"]
    assert refused["partition_id"] == 2 and refused["reason"] == "nobody asked for weights"
    assert rounds_of(events)[0]["received"] == 5


def test_models_may_differ(small, federate):
    settings = {"models__student": ["mlp", "cnn", "resnet8"], "models__options": {}, "data__options": IMAGES}
    _, events = federate(small("local", **settings, run__participation=1.0, client__steps=2), rounds=2)
    assert rounds_of(events)[-1]["received"] == 6


def test_local_resumes_to_the_same_bits(small, resumes):
    resumes(small("local"))


def test_the_client_half_takes_in_and_shares_nothing():
    student = type("S", (), {"num_examples": 7})()
    local = Alone(Local())
    assert local.absorb(student, Knowledge()) == {}  # type: ignore[arg-type]
    shared = local.share(student)  # type: ignore[arg-type]
    assert shared.num_examples == 7 and not shared.payloads


@pytest.mark.parametrize("name", ["local", "centralized"])
def test_they_run_on_digits(small, federate, name):
    _, events = federate(small(name, data={"source": "digits", "options": {}}, run__rounds=2))
    assert np.isfinite(rounds_of(events)[-1]["accuracy"])
