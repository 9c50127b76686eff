"""FedGEMS against equations 1 to 6 of its paper, worked out in float64, and against what it says of requests."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord

from fedkd import run
from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.losses.response import cross_entropy, label_and_teacher
from fedkd.payloads import Knowledge, ProxyOutputs, Request
from fedkd.seeds import Purpose, rng
from fedkd.server.logit_pool import LogitPool
from fedkd.students import build_student
from strategies.fedgems import FedGEMS

METHOD = {"name": "fedgems", "public_batch_size": 20, "server_batch_size": 20, "server_lr": 0.01}
LABELLED = {"proxy__labelled": True}


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_label_and_teacher_is_the_papers_mixture():
    draw = np.random.default_rng(0)
    student, teacher, labels = draw.normal(size=(5, 4)), draw.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    taught, epsilon = np.array([1.0, 0, 1, 1, 0]), 0.75
    p, q = softmax(student), softmax(teacher)
    ce = -np.log(p[np.arange(5), labels])
    kl = (q * np.log(q / p)).sum(1)  # from the teacher to the student, not the other way round
    expected = np.where(taught == 1, epsilon * ce + (1 - epsilon) * kl, ce).mean()

    loss = label_and_teacher(
        torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), share=epsilon, taught=torch.tensor(taught)
    )

    assert float(loss) == pytest.approx(expected, rel=1e-12)
    all_taught = label_and_teacher(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), share=epsilon)
    assert float(all_taught) == pytest.approx((epsilon * ce + (1 - epsilon) * kl).mean(), rel=1e-12)


def upload(rows, ids=(1, 4)):
    return SimpleNamespace(knowledge=Knowledge.of(ProxyOutputs(torch.tensor(ids), torch.tensor(rows), "logits")))


def server_with(**hyper):
    strategy = FedGEMS(**hyper)
    strategy.server = SimpleNamespace(federation=SimpleNamespace(num_classes=3))  # type: ignore[assignment]
    return strategy


LABELS = torch.tensor([9, 0, 9, 9, 2])  # sample 1 is of class 0, sample 4 of class 2
SAID = [
    upload([[2.0, 0.0, 0.0], [3.0, 0.0, 0.0]]),  # right, wrong
    upload([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]),  # right, wrong
    upload([[0.0, 5.0, 0.0], [0.0, 0.0, 1.5]]),  # wrong, right
]


def test_clients_are_weighed_by_the_softmax_of_one_over_their_entropy_if_they_are_right():
    taught = server_with().fused(SAID, LABELS)

    both = np.array([[2.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    p = softmax(both)
    certainty = 1 / -(p * np.log(p)).sum(1)
    weights = np.exp(certainty) / np.exp(certainty).sum()
    assert taught.ids.tolist() == [1, 4]
    np.testing.assert_allclose(taught.values[0], weights @ both, rtol=1e-6)
    np.testing.assert_allclose(taught.values[1], [0.0, 0.0, 1.5], rtol=1e-6)  # the only one that is right
    backwards = server_with().fused(SAID[::-1], LABELS)
    torch.testing.assert_close(backwards.values, taught.values, rtol=0, atol=1e-6)


def test_samples_that_nobody_gets_right_have_no_teacher():
    taught = server_with().fused([SAID[0], SAID[1]], LABELS)
    assert taught.ids.tolist() == [1]
    assert len(server_with().fused([SAID[2]], torch.tensor([9, 0, 9, 9, 0]))) == 0


def test_fedgem_takes_the_plain_mean_of_all():
    taught = server_with(selective=False).fused(SAID, LABELS)
    expected = torch.tensor([[1.0, 5 / 3, 0.5 / 3], [1.0, 1 / 3, 0.5]])
    torch.testing.assert_close(taught.values, expected)


def test_what_is_wrong_and_not_remembered_is_asked_for():
    strategy = server_with()
    strategy.pool = LogitPool(5, 3)
    strategy.pool.put(torch.tensor([0, 3]), torch.ones(2, 3))
    right = torch.tensor([True, False, True, False, False])
    assert strategy.missing(right).tolist() == [1, 4]
    whole = server_with(selective=False)
    whole.pool = LogitPool(5, 3)
    assert whole.missing(right).tolist() == [0, 1, 2, 3, 4]


def test_epsilon_one_is_supervised_training_on_the_public_set(small, federate):
    scenario = small({**METHOD, "epsilon": 1.0, "server_epochs": 2}, **LABELLED, run__rounds=2)
    strategy, _ = federate(scenario)
    other, _ = federate(
        small({**METHOD, "epsilon": 1.0, "server_epochs": 2}, **LABELLED, client__lr=0.5, run__rounds=2)
    )

    proxy = strategy.server.proxy.data
    model = strategy.server.model("mlp", strategy.server.initial("mlp"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for round in (1, 2):
        generator = rng(0, Purpose.DISTILLATION, round)
        generator.integers(2**63)  # the seed of dropout comes first
        for _ in range(2):
            for rows in epoch_order(np.arange(60), 20, generator):
                batch = proxy.gather(rows)
                optimizer.zero_grad()
                cross_entropy(model(batch.x).logits, batch.y).backward()
                optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(strategy.students["mlp"][name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(strategy.students["mlp"][name], other.students["mlp"][name])  # whatever clients know


def divergence(teacher, student):
    """Return each sample's KL(teacher ‖ student) of logits [n, C]."""
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum(1)


def weighed(answers, label):
    """Return the mean of the clients' logits [C] for a sample, by the certainty of those that are right, or None."""
    correct = [z for z in answers if z.argmax() == label]
    if not correct:
        return None
    entropies = [-(z.softmax(0) * z.log_softmax(0)).sum() for z in correct]
    weights = (1 / torch.stack(entropies)).softmax(0)
    return sum(w * z for w, z in zip(weights, correct, strict=True))


def test_the_server_learns_from_labels_its_memory_and_clients_that_are_right(small, federate, tap_of):
    """Two rounds of the server in plain PyTorch, at ε = 0.75."""
    tap = tap_of()
    # Hard samples and large steps: the server shall unlearn some of what it was right about.
    hyper = {**METHOD, "epsilon": 0.75, "server_epochs": 2, "server_lr": 0.03}
    scenario = small(hyper, **LABELLED, run__rounds=2, data__options__separation=1.5)
    strategy, events = federate(scenario, [tap])

    proxy, labels = strategy.server.proxy.data, torch.as_tensor(strategy.server.proxy.labels)
    model = strategy.server.model("mlp", strategy.server.initial("mlp"))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03, weight_decay=1e-4)
    memory = {}
    for round, event in enumerate(rounds_of(events), start=1):
        said = model(proxy.gather(np.arange(60)).x).logits.detach()
        if round == 2:
            told = tap.of(2)[0].down.get(ProxyOutputs)
            torch.testing.assert_close(told.values, said, rtol=1e-4, atol=1e-5)
        right = [i for i in range(60) if said[i].argmax() == labels[i]]
        memory |= {i: said[i] for i in right}
        remembered = {i: z for i, z in memory.items() if i not in right}
        asked = [i for i in range(60) if i not in memory]
        answers = tap.of(round, "query.logits")
        assert len(answers) == 4 and all(each.down.get(Request).ids.tolist() == asked for each in answers)
        values = [each.up.get(ProxyOutputs).values for each in answers]
        fused = {i: weighed([each[row] for each in values], labels[i]) for row, i in enumerate(asked)}
        teachers = remembered | {i: z for i, z in fused.items() if z is not None}
        counts = {"right": len(right), "asked": len(asked), "distilled": len(teachers)}
        assert event["distill"]["mlp"].items() >= counts.items()
        # In round 2 there are samples of every kind, also ones that no client gets right.
        assert round == 1 or (right and 0 < len(remembered) < len(teachers) < 60 - len(right))

        generator = rng(0, Purpose.DISTILLATION, round)
        generator.integers(2**63)  # the seed of dropout comes first
        for _ in range(2):
            for rows in epoch_order(np.arange(60), 20, generator):
                logits = model(proxy.gather(rows).x).logits
                ce = F.cross_entropy(logits, labels[rows], reduction="none")
                taught = [at for at, i in enumerate(rows) if i in teachers]
                alone = [at for at, i in enumerate(rows) if i not in teachers]
                kl = divergence(torch.stack([teachers[rows[at]] for at in taught]), logits[taught])
                optimizer.zero_grad()
                ((ce[alone].sum() + (0.75 * ce[taught] + 0.25 * kl).sum()) / len(rows)).backward()
                optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(strategy.students["mlp"][name], tensor, rtol=1e-4, atol=1e-5)


def test_clients_digest_the_servers_logits_and_labels_and_then_learn_their_own_samples(
    small, federate, tap_of, descend
):
    """Round 2 of every client in plain PyTorch, at ε = 0.75."""
    hyper, tap = {**METHOD, "epsilon": 0.75, "public_epochs": 2}, tap_of()
    scenario = small(hyper, **LABELLED, run__rounds=2, run__participation=1.0)
    federate(scenario, [tap])
    federation = build_federation(scenario)
    everything = np.arange(len(federation.train))
    labels = torch.as_tensor(federation.proxy.labels)
    assert len(tap.of(2)) == 6
    for each in tap.of(2):
        server, own = each.down.get(ProxyOutputs).values, np.asarray(federation.shards[each.client].train)
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(each.before)

        def loss(z, rows, y, server=server):
            return 0.75 * F.cross_entropy(z, labels[rows]) + 0.25 * divergence(server[rows], z).mean()

        draw = rng(0, Purpose.DIGEST, 2, each.client)
        batches = [rows for _ in range(2) for rows in epoch_order(np.arange(60), 20, draw)]
        descend(model, federation.proxy.data, np.arange(60), batches, loss)
        batches = epoch_order(own, 16, rng(0, Purpose.BATCHES, 2, each.client))
        descend(model, federation.train, everything, batches, lambda z, rows, y: F.cross_entropy(z, y))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_server_remembers_what_it_was_right_about_and_asks_for_the_rest(small, federate):
    one, first = federate(small(METHOD, **LABELLED, run__rounds=1))
    labels = torch.as_tensor(one.server.proxy.labels)
    right = one.said.argmax(1) == labels
    missing = ~right & ~one.pool.known

    two, events = federate(small(METHOD, **LABELLED, run__rounds=2))
    last = rounds_of(events)[-1]

    clients, asked = 4, int(missing.sum())
    assert rounds_of(first)[0] == rounds_of(events)[0] and 0 < asked < rounds_of(events)[0]["distill"]["mlp"]["asked"]
    assert last["distill"]["mlp"]["asked"] == asked and last["distill"]["mlp"]["right"] == int(right.sum())
    assert last["bytes_up"] == {"proxy-outputs": clients * (4 * asked * 4 + 4 * asked)}
    assert last["bytes_down"] == {"request": clients * 4 * asked, "proxy-outputs": clients * (4 * 60 * 4 + 4 * 60)}
    assert torch.equal(two.pool.known, one.pool.known | right)
    assert torch.equal(two.pool.values[right], one.said[right])
    assert bool((two.pool.values.argmax(1) == labels)[two.pool.known].all())


def test_fedgem_asks_for_everything_every_round(small, federate):
    _, events = federate(small({**METHOD, "selective": False}, **LABELLED, run__rounds=2))
    for event in rounds_of(events):
        assert event["bytes_up"] == {"proxy-outputs": 4 * (4 * 60 * 4 + 4 * 60)}
        assert event["distill"]["mlp"]["distilled"] == 60


def test_larger_server_and_different_clients_on_digits(small, federate):
    scenario = small(
        METHOD,
        **LABELLED,
        data__source="digits",
        data__options={},
        models__student=["mlp", "cnn", "resnet8"],
        models__server="resnet20",
        models__options={},
        client__steps=2,
        run__rounds=2,
    )
    strategy, events = federate(scenario)
    assert list(strategy.students) == ["resnet20"]
    last = rounds_of(events)[-1]
    assert last["whose"] == "server" and {"server", "clients"} <= last["predictors"].keys()


def spoiled(change):
    """Return a Flower mod that changes client 1's answers to requests."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "query.logits":
            arrays = {k: a.numpy().copy() for k, a in reply.content["proxy-outputs"].items()}
            change(arrays)
            reply.content["proxy-outputs"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        return reply

    return mod


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a["values"].__setitem__((0, 0), math.nan), "NaN"),
        (lambda a: a.update(values=a["values"][:, :2]), "wrong shape"),
        (lambda a: a.update(ids=a["ids"][::-1].copy()), "not the ones that were asked for"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_and_the_round_goes_on(small, federate, change, reason):
    scenario = small(METHOD, **LABELLED, run__rounds=1, run__participation=1.0)
    _, events = federate(scenario, [spoiled(change)])
    [refused] = [e for e in events if e["event"] == "refused"]
    assert refused["partition_id"] == 1 and reason in refused["reason"]
    assert rounds_of(events)[0]["received"] == 6


class StopAfter(run.Listener):
    """Presses Ctrl-C in the middle of round 3."""

    def event(self, event):
        if event["event"] == "reply" and event["round"] == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_metrics(small, tmp_path):
    scenario = small(METHOD, **LABELLED)
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "halves", listener=StopAfter())
    resumed = run.resume(stopped.value.folder)
    one, two = (rounds_of(run.read_metrics(result.folder)) for result in (whole, resumed))
    assert one == two and len(one) == 3
