"""Cronus: the initial phase, robust labels, and training on own samples and robust labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Error, Message

from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.payloads import ProxyOutputs
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student

QUICK = {"name": "cronus", "initial_epochs": 2}
EVERYBODY = {"run__participation": 1.0, "run__rounds": 2}


def shared(passed):
    return torch.stack([each.up.get(ProxyOutputs).values for each in passed]).double()


def test_everybody_trains_alone_first_and_shares(small, federate, tap_of, descend):
    scenario, tap = small(QUICK, run__participation=0.5, run__rounds=1), tap_of()
    federate(scenario, mods=[tap])
    federation = build_federation(scenario)
    started = tap.of(0, "train.initial")
    assert [each.client for each in started] == list(range(6)) and len(tap.of(1)) == 3
    for client, each in enumerate(started):
        model = build_student(scenario, federation.dataset, "mlp")
        draw, own = rng(0, Purpose.BATCHES, 0, client), np.asarray(federation.shards[client].train)
        batches = [rows for _ in range(2) for rows in epoch_order(own, 16, draw)]
        everything = np.arange(len(federation.train))
        descend(model, federation.train, everything, batches, lambda z, rows, y: F.cross_entropy(z, y))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)
        probs = model(federation.proxy.data.gather(np.arange(60)).x).logits.softmax(1)
        torch.testing.assert_close(each.up.get(ProxyOutputs).values, probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
def test_who_missed_the_initial_phase_makes_up_for_it_once(small, federate, tap_of, trainer):
    def lose(message, context, call_next):
        if message.metadata.message_type == "train.initial" and context.node_config["partition-id"] == 2:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        return call_next(message, context)

    scenario, tap = small(QUICK, **EVERYBODY, system__trainer=trainer, system__cohort=6), tap_of()
    federate(scenario, mods=[tap, lose])
    sizes = build_federation(scenario).sizes
    assert [each.client for each in tap.of(0, "train.initial")] == [0, 1, 3, 4, 5]
    for round in (1, 2):
        for each in tap.of(round):
            alone = 2 * sizes[2] if (round, each.client) == (1, 2) else 0
            assert each.config["samples"] == alone + 60 + sizes[each.client]


def by_hand(name, values, corrupted):
    """Reduce outputs [K, n, C] in NumPy; coordinatewise middles are scaled to sum to one."""
    if name == "mean":
        return values.mean(0)
    if name == "median":
        middle = np.median(values, axis=0)
    elif name == "trimmed":
        cut = int(corrupted * len(values))
        middle = np.sort(values, axis=0)[cut : len(values) - cut].mean(0)
    elif name == "geometric":
        middle = values.mean(0)
        for _ in range(3_000):
            pull = 1 / np.maximum(np.linalg.norm(values - middle, axis=2, keepdims=True), 1e-12)
            middle = (pull * values).sum(0) / pull.sum(0)
    return middle / middle.sum(1, keepdims=True)


@pytest.mark.parametrize("name", ["mean", "median", "trimmed", "geometric"])
def test_the_labels_are_a_robust_mean_of_what_was_shared_before(small, federate, tap_of, name):
    tap = tap_of()
    hyper = QUICK | {"reduce": name, "corrupted": 0.34}
    strategy, _ = federate(small(hyper, **EVERYBODY), mods=[tap])
    for before, after in ((tap.of(0, "train.initial"), tap.of(1)), (tap.of(1), tap.of(2))):
        labels = after[0].down.get(ProxyOutputs)
        expected = by_hand(name, shared(before).numpy(), 0.34)
        np.testing.assert_allclose(labels.values.numpy(), expected, rtol=0, atol=2e-6)
        assert labels.ids.tolist() == list(range(60))
    expected = by_hand(name, shared(tap.of(2)).numpy(), 0.34)
    np.testing.assert_allclose(strategy.labels.values.numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hyper", [{"reduce": "trimmed"}, {"reduce": "spectral"}])
def test_nothing_trimmed_is_the_mean(small, federate, hyper):
    mean, _ = federate(small(QUICK | {"reduce": "mean"}, **EVERYBODY))
    robust, _ = federate(small(QUICK | hyper | {"corrupted": 0.0}, **EVERYBODY))
    torch.testing.assert_close(robust.labels.values, mean.labels.values, rtol=0, atol=1e-5)
    other, _ = federate(small(QUICK | hyper | {"corrupted": 0.4}, **EVERYBODY))
    assert not torch.allclose(other.labels.values, mean.labels.values, atol=1e-3)


def test_the_filter_is_the_default_and_outlives_attackers(small, federate, tap_of):
    """A fifth sends the opposite: how far the first labels are from the honest clients' mean."""
    from fedkd.data.poison import draw_attackers
    from fedkd.scenario import Attacks

    attack = {"kind": "sign-flip", "share": 0.2}
    far = {}
    for name in ("mean", "spectral", "median"):
        tap = tap_of()
        more = {"partition__alpha": 100.0, "partition__clients": 20, "attacks": attack, "run__rounds": 1}
        hyper = QUICK | {"initial_epochs": 6} | ({} if name == "spectral" else {"reduce": name})
        scenario = small(hyper, **EVERYBODY | more)
        federate(scenario, mods=[tap])
        attackers = draw_attackers(Attacks(**attack), build_federation(scenario).sizes, 0)
        honest = [each for each in tap.of(0, "train.initial") if each.client not in attackers]
        labels = tap.of(1)[0].down.get(ProxyOutputs).values.double()
        assert len(honest) == 16
        far[name] = float((labels - shared(honest).mean(0)).abs().mean())
    assert far["spectral"] < 0.5 * far["mean"] and far["median"] < 0.6 * far["mean"]


def test_clients_train_on_own_samples_and_public_ones_together(small, federate, tap_of):
    """Round 1 of every client in plain PyTorch, one sample after the other."""
    scenario, tap = small(QUICK, **EVERYBODY), tap_of()
    federate(scenario, mods=[tap])
    federation = build_federation(scenario)
    proxy, train = federation.proxy.data, federation.train
    for client, each in enumerate(tap.of(1)):
        labels, own = each.down.get(ProxyOutputs).values, np.asarray(federation.shards[client].train)
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(each.before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for rows in epoch_order(np.arange(60 + len(own)), 16, rng(0, Purpose.BATCHES, 1, client)):
            public, private = rows[rows < 60], rows[rows >= 60] - 60
            optimizer.zero_grad()
            loss = torch.zeros(())
            if len(public):
                loss = loss - (labels[public] * model(proxy.gather(public).x).logits.log_softmax(1)).sum()
            if len(private):
                batch = train.gather(own[private])
                loss = loss + F.cross_entropy(model(batch.x).logits, batch.y, reduction="sum")
            (loss / len(rows)).backward()
            optimizer.step()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0, 20])
def test_bytes_are_the_formulas(small, federate, size):
    n = size or 60
    outputs, request = 4 * n * 4 + 4 * n, 4 * size
    strategy, events = federate(small(QUICK | {"public_size": size}, run__rounds=2))
    for event in (e for e in events if e["event"] == "round"):
        assert event["bytes_up"] == {"proxy-outputs": 4 * outputs}
        assert event["bytes_down"] == {"proxy-outputs": 4 * outputs} | ({"request": 4 * request} if size else {})
    # Once before round 1: all six clients.
    assert strategy.server.traffic["up"] == {"proxy-outputs": (6 + 4 + 4) * outputs}


def test_outputs_that_are_none_are_refused(small, federate, tap_of):
    def spoil(round, kind, client, reply):
        if client == 1 and kind != "evaluate":
            bad = reply.content.array_records["proxy-outputs"]
            bad["values"] = type(bad["values"])(bad["values"].numpy() * np.float32(1.5))

    _, events = federate(small(QUICK, **EVERYBODY), mods=[tap_of(spoil)])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"]) for e in refused] == [(0, 1), (1, 1), (2, 1)]
    assert all("no probability distributions" in e["reason"] for e in refused)
    assert [e["received"] for e in events if e["event"] == "round"] == [5, 5]


def test_different_models_on_digits(federate, digits):
    _, events = federate(digits(QUICK | {"initial_epochs": 5}))
    last = events[-1]
    assert last["received"] == 6 and last["whose"] == "clients" and last["accuracy"] > 0.3


def test_resume(small, resumes):
    resumes(small(QUICK, run__rounds=3, run__participation=0.7))
