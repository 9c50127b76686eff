"""FedMD: pre-training, and a round of communicate, aggregate, distribute, digest, revisit, worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Error, Message
from scipy.optimize import minimize

from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.payloads import ProxyOutputs
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student
from strategies.fedmd import absolute_error

QUICK = {"name": "fedmd", "align": 20, "public_epochs": 2, "transfer_epochs": 2}
LABELLED = {"proxy__labelled": True, "run__participation": 1.0, "run__rounds": 2}


def test_digest_is_the_mean_absolute_error_over_samples_and_classes():
    loss = absolute_error(torch.tensor([[1.0, -2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.5, -0.5]]))
    assert float(loss) == pytest.approx((1 + 2 + 0.5 + 0.5) / 4)


def test_a_round_is_communicate_aggregate_distribute_digest_revisit(small, federate, tap_of, descend):
    scenario, tap = small(QUICK | {"digest_epochs": 2, "digest_batch_size": 8}, **LABELLED), tap_of()
    _, events = federate(scenario, mods=[tap])

    shared, trained = tap.of(2, "query.logits"), tap.of(2)
    assert [each.client for each in shared] == [each.client for each in trained] == list(range(6))
    logits = [each.up.get(ProxyOutputs).values.double() for each in shared]
    for each in trained:
        client, consensus = each.client, each.down.get(ProxyOutputs)
        assert consensus.space == "logits" and each.up.payloads == {}
        torch.testing.assert_close(consensus.values.double(), torch.stack(logits).mean(0))  # all, own ones included
        # What it communicated are the logits of the model with which it went into this round.
        federation = build_federation(scenario)
        proxy, train, own = federation.proxy.data, federation.train, np.asarray(federation.shards[client].train)
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(each.before)
        ids = consensus.ids.numpy()
        torch.testing.assert_close(model(proxy.gather(ids).x).logits.double(), logits[client], rtol=1e-5, atol=1e-5)
        # Digest, then revisit.
        seed, labels = scenario.run.seed, consensus.values
        draw = rng(seed, Purpose.DIGEST, 2, client)
        batches = [rows for _ in range(2) for rows in epoch_order(np.arange(20), 8, draw)]
        descend(model, proxy, ids, batches, lambda z, rows, y, labels=labels: (z - labels[rows]).abs().mean())
        order = epoch_order(own, 16, rng(seed, Purpose.BATCHES, 2, client))
        descend(model, train, np.arange(len(train)), order, lambda z, rows, y: F.cross_entropy(z, y))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)
    assert {e["whose"] for e in events if e["event"] == "round"} == {"clients"}
    assert not [e for e in events if e["event"] == "refused"]


def test_everybody_learns_from_public_labels_and_then_from_its_own(small, federate, tap_of, descend):
    hyper = QUICK | {"public_batch_size": 10, "transfer_epochs": 3, "transfer_batch_size": 12}
    scenario, tap = small(hyper, **LABELLED | {"run__participation": 0.5, "run__rounds": 1}), tap_of()
    federate(scenario, mods=[tap])

    prepared = tap.of(0, "train.pretrain")
    assert [each.client for each in prepared] == list(range(6))  # also those that sit round 1 out
    federation, client = build_federation(scenario), 2
    proxy, own = federation.proxy, np.asarray(federation.shards[client].train)
    order = rng(0, Purpose.METHOD_CLIENT, 0, client).permutation(60)[6:]  # a tenth is kept for early stopping
    draw = rng(0, Purpose.DIGEST, 0, client)
    model = build_student(scenario, federation.dataset, "mlp")
    labels = torch.from_numpy(proxy.labels)[order]
    batches = [rows for _ in range(2) for rows in epoch_order(np.arange(54), 10, draw)]
    descend(model, proxy.data, order, batches, lambda z, rows, y: F.cross_entropy(z, labels[rows]))
    draw = rng(0, Purpose.BATCHES, 0, client)
    batches = [rows for _ in range(3) for rows in epoch_order(own, 12, draw)]
    everything = np.arange(len(federation.train))
    descend(model, federation.train, everything, batches, lambda z, rows, y: F.cross_entropy(z, y))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(prepared[client].after[name], tensor, rtol=1e-4, atol=1e-5)
    assert prepared[client].up.payloads == {}  # nothing travels


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
def test_who_missed_its_pre_training_makes_up_for_it_once(small, federate, tap_of, trainer):
    def lose(message, context, call_next):
        if message.metadata.message_type == "train.pretrain" and context.node_config["partition-id"] == 2:
            return Message(Error(code=0, reason="gone"), reply_to=message)
        return call_next(message, context)

    scenario, tap = small(QUICK, **LABELLED, system__trainer=trainer, system__cohort=6), tap_of()
    federate(scenario, mods=[tap, lose])
    assert [each.client for each in tap.of(0, "train.pretrain")] == [0, 1, 3, 4, 5]
    first, second = ({each.client: each for each in tap.of(round, "query.logits")} for round in (1, 2))
    late = 2 * 54 + 2 * build_federation(scenario).sizes[2]
    assert {p: each.config["samples"] for p, each in first.items()} == {0: 0, 1: 0, 2: late, 3: 0, 4: 0, 5: 0}
    assert {each.config["samples"] for each in second.values()} == {0}
    assert not first[2].before and first[2].after  # what it learnt is kept


def test_pre_training_stops_early(small, federate, tap_of):
    tap = tap_of()
    hyper = QUICK | {"public_epochs": 20, "public_patience": 1, "transfer_epochs": 25, "transfer_patience": 2}
    federate(small(hyper | {"min_delta": 1.0}, **LABELLED | {"run__rounds": 1}), mods=[tap])
    sizes = build_federation(small(hyper, **LABELLED)).sizes
    for each in tap.of(0, "train.pretrain"):
        # No accuracy is better than the first by more than 1: one pass more on public, two more on own samples.
        assert each.config["samples"] == 2 * 54 + 3 * sizes[each.client]


def test_early_stopping_watches_the_validation_split_if_there_is_one(small, federate, monkeypatch):
    from strategies import fedmd

    watched = []
    monkeypatch.setattr(fedmd, "accuracy", lambda student, data, ids: watched.append(len(ids)) or len(watched))
    scenario = small(QUICK, **LABELLED | {"run__rounds": 1}, partition__validation=0.25)
    federate(scenario)
    shards = build_federation(scenario).shards
    expected = [count for k in range(6) for count in [6] * 2 + [len(shards[k].validation) or len(shards[k].train)] * 2]
    assert watched == expected


def test_the_alignment_set_has_all_classes_alike_and_changes(small, federate, tap_of):
    tap = tap_of()
    scenario = small(QUICK, **LABELLED)
    federate(scenario, mods=[tap])
    labels = build_federation(scenario).proxy.labels
    sets = [tap.of(round)[0].down.get(ProxyOutputs).ids.numpy() for round in (1, 2)]
    assert not np.array_equal(*sets)
    for ids in sets:
        expected = 20 * np.bincount(labels, minlength=4) / len(labels)
        assert np.abs(np.bincount(labels[ids], minlength=4) - expected).max() < 1


def test_bytes_are_the_formulas(small, federate):
    outputs, request = 4 * 20 * 4 + 4 * 20, 4 * 20
    strategy, events = federate(small(QUICK, **LABELLED | {"run__participation": 0.7}))
    rounds = [e for e in events if e["event"] == "round"]
    for event in rounds:
        assert event["bytes_up"] == {"proxy-outputs": 4 * outputs}
        assert event["bytes_down"] == {"request": 4 * request, "proxy-outputs": 4 * outputs}
    assert strategy.server.traffic["up"] == {"proxy-outputs": 2 * 4 * outputs}  # nothing before round 1
    _, events = federate(small(QUICK | {"align": 5_000}, **LABELLED, proxy__size=30))
    assert events[-1]["bytes_down"] == {"proxy-outputs": 6 * (4 * 30 * 4 + 4 * 30)}


def test_logits_that_are_none_are_left_out_of_the_consensus(small, federate, tap_of):
    def spoil(round, kind, client, reply):
        if kind == "query.logits" and client == 3:
            bad = reply.content.array_records["proxy-outputs"]
            values = bad["values"].numpy().copy()
            values[0, 0] = np.nan
            bad["values"] = type(bad["values"])(values)

    tap = tap_of(spoil)
    _, events = federate(small(QUICK, **LABELLED | {"run__rounds": 1}), mods=[tap])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["partition_id"], "NaN" in e["reason"]) for e in refused] == [(3, True)]
    logits = [each.up.get(ProxyOutputs).values for each in tap.of(1, "query.logits") if each.client != 3]
    consensus = tap.of(1)[3].down.get(ProxyOutputs).values  # client 3 gets it none the less
    torch.testing.assert_close(consensus.double(), torch.stack(logits).double().mean(0))
    assert events[-1]["received"] == 6


def test_logits_of_absurd_size_are_refused_and_the_round_goes_on(small, federate, tap_of):
    def spoil(round, kind, client, reply):
        if kind == "query.logits" and client == 3:
            bad = reply.content.array_records["proxy-outputs"]
            values = bad["values"].numpy().copy()
            values[0, :2] = 3e38, -3e38
            bad["values"] = type(bad["values"])(values)

    _, events = federate(small(QUICK, **LABELLED), mods=[tap_of(spoil)])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"], "3e+38" in e["reason"]) for e in refused] == [(1, 3, True), (2, 3, True)]
    assert events[-1]["received"] == 6 and events[-1]["accuracy"] > 0.3


def test_different_models_on_digits(federate, digits):
    _, events = federate(digits(QUICK | {"align": 100}, proxy__labelled=True))
    last = events[-1]
    assert last["received"] == 6 and last["whose"] == "clients" and last["accuracy"] > 0.3


def geometric_median(logits):
    """The point of every sample with the least sum of distances from the clients', found by its subgradient."""

    def around(points):
        def total(x):
            offset = x - points
            distance = np.linalg.norm(offset, axis=1, keepdims=True)
            return distance.sum(), (offset / np.maximum(distance, 1e-12)).sum(0)

        return minimize(total, points.mean(0), jac=True, options={"gtol": 1e-8}).x

    return np.stack([around(logits[:, sample]) for sample in range(logits.shape[1])])


ROBUST = {
    "median": lambda logits: np.median(logits, axis=0),
    "trimmed": lambda logits: np.sort(logits, axis=0)[3:7].mean(0),  # of ten clients, whole ones in 35 % at either end
    "geometric": geometric_median,
}


@pytest.mark.parametrize("reduce", [*ROBUST, "spectral"])
def test_a_robust_consensus(small, federate, reduce, tap_of):
    tap, hyper = tap_of(), QUICK | {"reduce": reduce, "corrupted": 0.35}
    federate(small(hyper, **LABELLED | {"run__rounds": 1}, partition__clients=10), mods=[tap])
    logits = np.stack([each.up.get(ProxyOutputs).values.numpy() for each in tap.of(1, "query.logits")]).astype(float)
    consensus = tap.of(1)[0].down.get(ProxyOutputs).values.numpy()
    assert ((consensus >= logits.min(0) - 1e-5) & (consensus <= logits.max(0) + 1e-5)).all()
    others = {"mean": logits.mean(0), **{name: middle(logits) for name, middle in ROBUST.items()}}
    if reduce in others:
        np.testing.assert_allclose(consensus, others.pop(reduce), rtol=0, atol=1e-5)
    assert all(np.abs(consensus - other).max() > 1e-3 for other in others.values())


@pytest.mark.parametrize("crash", [0.0, 0.3])
def test_resume(small, resumes, crash):
    resumes(small(QUICK, **LABELLED | {"run__rounds": 3, "run__participation": 0.7}, faults__crash=crash))


def test_ray_gives_the_same_bits_as_this_process(small, tmp_path, ray_session):
    """The only exchange besides training that workers sum, and models that clients keep from it to training."""
    from fedkd import run

    found = []
    for engine in ("inline", "ray"):
        system = {"engine": engine, "workers": 2 if engine == "ray" else 0, "trainer": "sequential", "cohort": 2}
        result = run.execute(small(QUICK, **LABELLED, system=system | {"server_threads": 1}), out=tmp_path / engine)
        rounds = [e for e in run.read_metrics(result.folder) if e["event"] == "round"]
        found.append([{k: v for k, v in e.items() if k != "seconds"} for e in rounds])
    assert found[0] == found[1] and len(found[0]) == 2
