"""Robust reduces of methods whose default is the mean, and what they are good for under attack."""

import numpy as np
import pytest
import torch

from fedkd.payloads import Knowledge, ProxyOutputs
from fedkd.server.transforms import Era

EVERYBODY = {"run__participation": 1.0, "partition__alpha": 100.0}


def labels_of(federate, scenario):
    """Return DS-FL's global labels of the last round and the clients' outputs that they were made of."""
    shared = {}

    def tap(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            knowledge = Knowledge.from_records(reply.content)
            shared[context.node_config["partition-id"]] = knowledge.get(ProxyOutputs).values.clone()
        return reply

    strategy, events = federate(scenario, mods=[tap])
    assert not [event for event in events if event["event"] == "refused"]
    return strategy.labels.values, torch.stack([shared[k] for k in sorted(shared)]).double()


def trimmed_mean(values):
    ordered = np.sort(values.numpy(), axis=0)
    cut = int(0.2 * len(ordered))
    return ordered[cut : len(ordered) - cut].mean(0)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("median", lambda values: np.median(values.numpy(), axis=0)), ("trimmed", trimmed_mean)],
)
def test_dsfl_sharpens_a_robust_middle_of_the_clients_outputs(small, federate, reduce, expected):
    settings = {"name": "dsfl", "open_size": 40, "reduce": reduce}

    labels, shared = labels_of(federate, small(settings, **EVERYBODY, run__rounds=2))

    middle = torch.from_numpy(expected(shared))
    middle = middle / middle.sum(1, keepdim=True)
    assert len(shared) == 6
    torch.testing.assert_close(labels.double(), Era(0.1)(middle), rtol=0, atol=1e-6)


def test_dsfl_with_the_mean_is_what_it_was(small, federate):
    labels, shared = labels_of(federate, small({"name": "dsfl", "open_size": 40}, **EVERYBODY, run__rounds=2))

    torch.testing.assert_close(labels.double(), Era(0.1)(shared.mean(0)), rtol=0, atol=1e-6)


def test_feddf_passes_its_reduce_to_the_ensemble(small, federate):
    settings = {"run__rounds": 1, "proxy__size": 40}
    found = {}
    for reduce in ("mean", "median", "geometric"):
        _, events = federate(small({"name": "feddf", "steps": 5, "reduce": reduce}, **EVERYBODY, **settings))
        found[reduce] = events[-1]["predictors"]
    assert len({found[reduce]["ensemble"]["loss"] for reduce in found}) == 3
    assert len({found[reduce]["server"]["loss"] for reduce in found}) == 3


@pytest.mark.parametrize("kind", ["sign-flip", "random", "label-flip"])
def test_medians_move_less_than_means_under_attack(small, federate, kind):
    """By the distance of the labels from those without attackers, before sharpening, which hides it."""
    moved = {}
    for reduce in ("mean", "median"):
        settings = {"name": "dsfl", "open_size": 40, "reduce": reduce, "aggregation": "mean"}
        more = {**EVERYBODY, "run__rounds": 1, "client__epochs": 5}
        clean, _ = labels_of(federate, small(settings, **more))
        poisoned, _ = labels_of(federate, small(settings, **more, attacks={"kind": kind, "share": 0.3}))
        moved[reduce] = float((clean - poisoned).abs().mean())

    assert 0 < moved["median"] < moved["mean"]
