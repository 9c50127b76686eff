"""Distributed distillation: consensus against matrix powers in float64, invariants of tracking, bytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord

from fedkd import run
from fedkd.data.batches import Batch, epoch_order, step_order
from fedkd.data.federation import build_federation
from fedkd.errors import KnowledgeError
from fedkd.models import Outputs
from fedkd.payloads import Knowledge, PeerOutputs, ProxyOutputs, Request
from fedkd.seeds import Purpose, rng
from fedkd.server.graph import metropolis
from fedkd.students import build_student
from strategies.distributed import ESTIMATE, SAID, DistributedDistillation, PeerLearning, disagreement

EVERYBODY = {"run__participation": 1.0}
N, P, C = 6, 60, 4


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


class Taps:
    """A Flower mod that keeps what clients remember after every message that is not an evaluation."""

    def __init__(self):
        self.estimates, self.said = {}, {}

    def __call__(self, message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type != "evaluate":
            memory = context.state["fedkd.memory"]
            p = context.node_config["partition-id"]
            self.estimates[p], self.said[p] = (memory[name].numpy().copy() for name in (ESTIMATE, SAID))
        return reply

    @property
    def stacks(self):
        """Estimates and soft decisions [N, P, C] in float64."""
        return tuple(np.stack([each[p] for p in sorted(each)]).astype(float) for each in (self.estimates, self.said))


def averaging(graph):
    """Return the matrix of Metropolis weights."""
    weights = np.zeros((N, N))
    for client, others in graph.items():
        weights[client, others] = metropolis(graph)[client]
    np.fill_diagonal(weights, 1 - weights.sum(1))
    return weights


def method(**hyper):
    return {"name": "distributed", **hyper}


@pytest.mark.parametrize("consensus", ["tracking", "restart"])
def test_on_a_complete_graph_one_step_is_the_mean(small, federate, consensus):
    for rounds in (1, 3):
        taps = Taps()
        federate(small(method(graph="complete", consensus=consensus), **EVERYBODY), [taps], rounds=rounds)
        estimates, said = taps.stacks
        assert estimates.shape == (N, P, C)
        np.testing.assert_allclose(estimates, np.broadcast_to(said.mean(0), estimates.shape), atol=1e-6)


@pytest.mark.parametrize("graph", ["ring", "star", "regular", "erdos-renyi"])
def test_several_steps_are_powers_of_the_matrix_of_weights(small, federate, graph):
    taps = Taps()
    hyper = method(graph=graph, degree=3, gossip_steps=3, consensus="restart")
    strategy, _ = federate(small(hyper, **EVERYBODY), [taps], rounds=2)
    estimates, said = taps.stacks
    power = np.linalg.matrix_power(averaging(strategy.neighbours), 3)
    np.testing.assert_allclose(estimates, np.einsum("kj,jnc->knc", power, said), atol=1e-6)


def test_tracking_adds_the_change_of_decisions_and_preserves_their_sum(small, federate):
    seen = []
    for rounds in (1, 2, 3):
        taps = Taps()
        strategy, _ = federate(small(method(), **EVERYBODY), [taps], rounds=rounds)
        seen.append(taps.stacks)
    weights = averaging(strategy.neighbours)
    estimate, before = np.zeros((N, P, C)), np.zeros((N, P, C))
    for told, said in seen:
        estimate = np.einsum("kj,jnc->knc", weights, estimate + said - before)
        before = said
        np.testing.assert_allclose(told, estimate, atol=1e-5)
        np.testing.assert_allclose(told.sum(0), said.sum(0), atol=1e-5)


def test_with_subsets_and_absent_clients_the_sum_is_preserved_too(small, federate):
    taps = Taps()
    hyper = method(reference_size=25, redraw=True, graph="erdos-renyi")
    _, events = federate(small(hyper, run__participation=0.5, run__rounds=6), [taps])
    estimates, said = taps.stacks
    np.testing.assert_allclose(estimates.sum(0), said.sum(0), atol=1e-5)
    assert (said.any(2).sum(1) >= 25).all()
    assert {e["received"] for e in rounds_of(events)} == {3}


def test_the_loss_is_cross_entropy_on_private_and_squared_distance_on_reference_samples():
    draw = np.random.default_rng(0)
    logits, estimates = draw.normal(size=(5, 3)), draw.dirichlet([1.0] * 3, size=4) * 1.3 - 0.1
    y, ids = np.array([1, 0, -1, -1, 2]), np.array([9, 4, 3, 0, 7])  # private rows have meaningless ids
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ce = -np.log(p[[0, 1, 4], [1, 0, 2]]).mean()
    square = ((p[[2, 3]] - estimates[[3, 0]]) ** 2).sum(1).mean()
    soft = -(estimates[[3, 0]] * np.log(p[[2, 3]])).sum(1).mean()
    batch = Batch(torch.zeros(5, 1), torch.tensor(y), torch.tensor(ids))
    out, aux = Outputs(torch.tensor(logits), torch.tensor(logits)), {"estimates": torch.tensor(estimates)}

    for distance, expected in (("mse", square), ("soft_ce", soft)):
        local = PeerLearning(DistributedDistillation(rho=0.7, distance=distance))
        terms = local.loss({}, batch, out, (), aux)
        assert float(terms["ce"]) == pytest.approx(ce)
        assert float(terms["consensus"]) == pytest.approx(0.7 * expected)
    private = Batch(batch.x[:2], batch.y[:2], batch.ids[:2])
    first = local.loss({}, private, Outputs(out.logits[:2], out.logits[:2]), (), {})
    assert first.keys() == {"ce"}


def test_every_reference_sample_is_drawn_to_the_estimate_of_its_own(small, federate, tap_of):
    """Round 2 of every client in plain PyTorch, when 25 of 60 reference samples have been talked about."""
    tap = tap_of()
    hyper = method(graph="ring", rho=5.0, reference_size=25, reference_batch_size=8)
    scenario = small(hyper, **EVERYBODY, run__rounds=2)
    strategy, _ = federate(scenario, [tap])
    federation = build_federation(scenario)
    ids = tap.of(1)[0].down.get(Request).ids.numpy()
    assert len(ids) == 25 and (ids != np.arange(25)).any()
    said = [each.up.get(ProxyOutputs).values for each in tap.of(1)]
    for client, each in enumerate(tap.of(2)):
        one, two = strategy.neighbours[client]
        estimates = (said[client] + said[one] + said[two]) / 3  # what Metropolis's weights are on a ring
        own = np.asarray(federation.shards[client].train)
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(each.before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = epoch_order(own, 16, rng(0, Purpose.BATCHES, 2, client))
        beside = step_order(np.arange(25), 8, len(batches), rng(0, Purpose.METHOD_CLIENT, 2, client))
        for private, rows in zip(batches, beside, strict=True):
            batch, reference = federation.train.gather(private), federation.proxy.data.gather(ids[rows])
            distance = (model(reference.x).logits.softmax(1) - estimates[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            (F.cross_entropy(model(batch.x).logits, batch.y) + 5 * distance).backward()
            optimizer.step()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)


def test_rho_zero_is_local_training_and_a_positive_one_is_not(small, federate, tap_of):
    def models(strategy):
        tap = tap_of()
        federate(small(strategy, **EVERYBODY), mods=[tap])
        return tap.models()

    alone = models("local")
    assert models(method(rho=0.0)) == alone != models(method(rho=1e-3))
    assert len(alone) == 3 * N


def test_private_batches_stay_what_they_are_without_reference_samples(small, federate):
    """Nothing is learnt from the reference set at ρ → 0, though its samples are in every batch."""
    _, tiny = federate(small(method(rho=1e-12), **EVERYBODY))
    _, none = federate(small(method(rho=0.0), **EVERYBODY))
    for one, two in zip(rounds_of(tiny), rounds_of(none), strict=True):
        assert one["train"]["ce"] == pytest.approx(two["train"]["ce"], rel=1e-5)


def test_consensus_pulls_the_devices_together(small, federate):
    def last(**hyper):
        _, events = federate(small(method(graph="complete", **hyper), **EVERYBODY, run__rounds=4, partition__alpha=0.1))
        return rounds_of(events)[-1]

    free, held = last(rho=0.0), last(rho=20.0)
    spread = {"consensus": "restart"}
    assert (
        last(rho=20.0, **spread)["distill"]["gossip"]["disagreement"]
        < 0.8 * (last(rho=0.0, **spread)["distill"]["gossip"]["disagreement"])
    )
    assert held["predictors"]["clients"]["accuracy"] > free["predictors"]["clients"]["accuracy"]


def test_cross_entropy_with_estimates_that_are_no_distributions_is_refused(small):
    from fedkd import plugins
    from fedkd.errors import ScenarioError

    with pytest.raises(ScenarioError, match="distance = 'mse' or consensus = 'restart'"):
        plugins.make_strategy(small(method(distance="soft_ce")))
    assert plugins.make_strategy(small(method(distance="soft_ce", consensus="restart"))).space == "probs"


def test_disagreement_is_the_distance_from_the_mean():
    one, two = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert disagreement([one, two]) == pytest.approx(math.sqrt((0.5 + 0.0) / 2))


def test_measured_bytes_are_the_formulas(small, federate):
    """On a star of six, one client has five neighbours and five have one."""
    scenario = small(method(graph="star", gossip_steps=2, reference_size=40), **EVERYBODY, run__rounds=1)
    [event] = rounds_of(federate(scenario)[1])
    outputs = 4 * 40 * C
    assert event["bytes_up"] == {"proxy-outputs": N * 2 * (outputs + 4 * 40)}
    assert event["bytes_down"] == {
        "request": N * 4 * 40,
        "peer-outputs": 2 * sum(m * outputs + 4 * 40 + 8 * m for m in (5, 1, 1, 1, 1, 1)),
    }
    assert event["whose"] == "clients"


def test_different_devices_on_digits(small, federate):
    scenario = small(
        method(),
        data__source="digits",
        data__options={},
        models__student=["mlp", "cnn", "resnet8"],
        models__options={},
        client__steps=2,
        run__rounds=2,
        **EVERYBODY,
    )
    _, events = federate(scenario)
    assert rounds_of(events)[-1]["received"] == N and "consensus" in rounds_of(events)[-1]["train"]


PEERS = {
    "ids": torch.tensor([0, 7]),
    "peers": torch.tensor([3, 4, 8]),
    "weights": torch.tensor([0.25, 0.25, 0.5]),
    "values": torch.rand(3, 2, 5),
}


def test_what_neighbours_say_survives_the_wire():
    sent = Knowledge.of(PeerOutputs(**PEERS, more=True))
    records = sent.to_records()
    got = Knowledge.from_records(records).get(PeerOutputs)
    got.check(5, 8)
    assert got.more and all(torch.equal(getattr(got, name), value) for name, value in PEERS.items())
    arrays = records.array_records["peer-outputs"].values()
    assert sent.nbytes["peer-outputs"] == 4 * 3 * 2 * 5 + 4 * 2 + 8 * 3 == sum(a.numpy().nbytes for a in arrays)
    assert torch.equal(got.with_outputs(lambda values, space: -values).values, -PEERS["values"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": torch.tensor([0, 8])}, "outside the proxy set"),
        ({"values": torch.rand(3, 2, 4)}, "wrong shape"),
        ({"weights": torch.tensor([0.5, 0.5])}, "wrong shape"),
        ({"weights": torch.tensor([0.5, 0.5, 0.5])}, "sum to more than 1"),
        ({"weights": torch.tensor([0.5, -0.5, 0.5])}, "negative"),
        ({"values": torch.full((3, 2, 5), math.nan)}, "NaN"),
    ],
)
def test_what_neighbours_cannot_say_is_refused(change, reason):
    with pytest.raises(KnowledgeError, match=reason):
        PeerOutputs(**PEERS | change).check(5, 8)


def spoiled(kind):
    """Return a Flower mod that puts a NaN into client 1's estimate, in its answers to one kind of message."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == kind:
            arrays = {k: a.numpy().copy() for k, a in reply.content["proxy-outputs"].items()}
            arrays["values"][0, 0] = math.nan
            reply.content["proxy-outputs"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        return reply

    return mod


# A ring of six has twelve ends of edges; without one client it is a path of five, which has eight.
@pytest.mark.parametrize(
    ("kind", "received", "ends", "messages"), [("train", 5, 8 + 8, 5 + 5), ("query.gossip", 6, 12 + 8, 6 + 5)]
)
def test_estimates_that_cannot_be_used_are_refused_and_the_others_go_on(
    small, federate, kind, received, ends, messages
):
    scenario = small(method(gossip_steps=2), **EVERYBODY, run__rounds=1)
    _, events = federate(scenario, [spoiled(kind)])
    [refused] = [e for e in events if e["event"] == "refused"]
    assert refused["partition_id"] == 1 and "NaN" in refused["reason"]
    [event] = rounds_of(events)
    assert event["received"] == received
    assert event["bytes_down"]["peer-outputs"] == ends * (4 * P * C + 8) + messages * 4 * P


class StopAfter(run.Listener):
    """Presses Ctrl-C in the middle of round 3."""

    def event(self, event):
        if event["event"] == "reply" and event["round"] == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("redraw", [False, True])
def test_a_resumed_run_has_the_same_metrics(small, tmp_path, redraw):
    scenario = small(method(graph="regular", degree=3, redraw=redraw, gossip_steps=2))
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "halves", listener=StopAfter())
    resumed = run.resume(stopped.value.folder)
    one, two = (rounds_of(run.read_metrics(result.folder)) for result in (whole, resumed))
    assert one == two and len(one) == 3
