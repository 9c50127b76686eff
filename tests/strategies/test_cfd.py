"""CFD: a round worked out by hand, bytes of the coder, changes since the last outputs and what happens without them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedkd.codecs import quantise
from fedkd.codecs.entropy import encode
from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, ProxyOutputs, QuantizedOutputs, Request
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student
from strategies.cfd import CFD, FreshDistillation

QUICK = {"name": "cfd", "subset_size": 40, "distill_batch_size": 20}
FLOAT = {"bits_up": 32, "bits_down": 32}
EVERYBODY = {"run__participation": 1.0}


def soft_ce(z, target):
    return -(target * z.log_softmax(1)).sum(1).mean()


def test_a_round_in_float32_is_dual_distillation(small, federate, tap_of, descend):
    """From the common start: digest, train, predict; then server: mean, distil (warm), predict. In plain PyTorch."""
    hyper = QUICK | FLOAT | {"distill_epochs": 2, "server_lr": 5e-3}
    scenario, tap = small(hyper, **EVERYBODY, run__rounds=2), tap_of()
    strategy, events = federate(scenario, mods=[tap])
    federation, seed = build_federation(scenario), scenario.run.seed
    proxy, train = federation.proxy.data, federation.train
    ids = tap.of(1)[0].down.get(Request).ids.numpy()

    server = build_student(scenario, federation.dataset, "mlp")
    labels = None
    for round in (1, 2):
        outputs = []
        for client, passed in enumerate(tap.of(round)):
            model = build_student(scenario, federation.dataset, "mlp")
            if labels is not None:
                torch.testing.assert_close(passed.down.get(ProxyOutputs).values, labels, rtol=1e-4, atol=1e-5)
                draw = rng(seed, Purpose.DIGEST, round, client)
                batches = [rows for _ in range(2) for rows in epoch_order(np.arange(40), 20, draw)]
                descend(model, proxy, ids, batches, lambda z, rows, y, labels=labels: soft_ce(z, labels[rows]))
            own = np.asarray(federation.shards[client].train)
            order = epoch_order(own, 16, rng(seed, Purpose.BATCHES, round, client))
            descend(model, train, np.arange(len(train)), order, lambda z, rows, y: F.cross_entropy(z, y))
            outputs.append(model(proxy.gather(ids).x).logits.softmax(1).detach())
            torch.testing.assert_close(passed.up.get(ProxyOutputs).values, outputs[-1], rtol=1e-4, atol=1e-5)
        mean = torch.stack(outputs).mean(0)
        draw = rng(seed, Purpose.DISTILLATION, round)
        draw.integers(2**63)  # the seed of dropout
        optimizer = torch.optim.Adam(server.parameters(), lr=5e-3)
        for rows in [rows for _ in range(2) for rows in epoch_order(np.arange(40), 20, draw)]:
            optimizer.zero_grad()
            soft_ce(server(proxy.gather(ids[rows]).x).logits, mean[rows]).backward()
            optimizer.step()
        labels = server(proxy.gather(ids).x).logits.softmax(1).detach()
    for name, tensor in server.state_dict().items():
        torch.testing.assert_close(strategy.students["mlp"][name], tensor, rtol=1e-4, atol=1e-5)
    last = events[-1]
    assert last["whose"] == "server"
    right = server(federation.test.gather(np.arange(100)).x).logits.argmax(1).numpy() == federation.test.labels
    assert last["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize(("up", "down"), [(1, 1), (3, 6), (12, 16)])
def test_what_travels_is_rounded_and_has_the_coders_bytes(small, federate, tap_of, up, down):
    tap = tap_of()
    hyper = QUICK | {"bits_up": up, "bits_down": down, "delta": False}
    strategy, events = federate(small(hyper, **EVERYBODY, run__rounds=2), mods=[tap])
    rounds = [e for e in events if e["event"] == "round"]
    sent = [each.up.get(QuantizedOutputs) for each in tap.of(2)]
    received = tap.of(2)[0].down.get(QuantizedOutputs)

    assert rounds[1]["bytes_up"] == {"quantized-outputs": sum(coded.words.nbytes for coded in sent)}
    assert rounds[1]["bytes_down"] == {"quantized-outputs": 6 * received.words.nbytes}
    assert rounds[0]["bytes_down"] == {"request": 6 * 4 * 40}
    probs = torch.stack([coded.probs(coded.check(4, 40, up)) for coded in sent])
    assert torch.equal((probs * (2**up - 1)).round() / (2**up - 1), probs) and not any(coded.delta for coded in sent)
    torch.testing.assert_close(strategy.consensus.double(), probs.double().mean(0), rtol=0, atol=1e-6)
    assert torch.equal(strategy.answer, quantise(strategy.server_outputs().softmax(1), down))
    assert received.bits == down
    assert len(strategy.known) == 6  # without changes nothing is kept of them
    assert not sum(kept.untyped_storage().nbytes() for kept in strategy.known.values())


def test_sixteen_bits_are_almost_float32(small, federate):
    """Of round 1: later ones are chaotic."""
    fine, _ = federate(small(QUICK | {"bits_up": 16, "bits_down": 16}, run__rounds=1))
    exact, _ = federate(small(QUICK | FLOAT, run__rounds=1))
    torch.testing.assert_close(fine.consensus, exact.consensus, rtol=0, atol=1 / 65535)
    torch.testing.assert_close(fine.answer / 65535, exact.answer, rtol=0, atol=1e-3)


def test_changes_say_the_same_in_other_bytes(small, federate, tap_of):
    hyper = QUICK | {"bits_up": 2}
    (plain, plain_events), (changes, events) = (
        federate(small(hyper | {"delta": delta}, **EVERYBODY), mods=[tap_of()]) for delta in (False, True)
    )
    without = ("seconds", "bytes_up", "bytes_down")
    one, two = ([{k: v for k, v in e.items() if k not in without} for e in each] for each in (plain_events, events))
    assert one == two
    assert all(torch.equal(plain.students["mlp"][k], changes.students["mlp"][k]) for k in plain.students["mlp"])
    first, later = ([e["bytes_up"] for e in each if e["event"] == "round"] for each in (plain_events, events))
    assert first[0] == later[0] and first[1:] != later[1:]


def test_only_who_is_new_gets_the_ids_and_sends_everything(small, federate, tap_of):
    tap = tap_of()
    _, events = federate(small(QUICK, run__participation=0.5, run__rounds=5), mods=[tap])
    seen: set[int] = set()
    for round in range(1, 6):
        passed = tap.of(round)
        for each in passed:
            assert ("request" in each.down) == (each.client not in seen)
            assert each.up.get(QuantizedOutputs).delta == (each.client in seen)
        new = {each.client for each in passed} - seen
        down = [e for e in events if e["event"] == "round"][round - 1]["bytes_down"]
        assert down.get("request", 0) == len(new) * 4 * 40
        seen |= new
    assert len(seen) == 6


def test_a_client_whose_upload_was_lost_starts_without_changes(small, federate, tap_of):
    def lose(round, kind, client, reply):
        if (round, kind, client) == (2, "train", 4):
            return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "lost"), reply_to=reply)
        return None

    tap = tap_of(lose)
    _, events = federate(small(QUICK, **EVERYBODY, run__rounds=4), mods=[tap])
    delta = [[each.up.get(QuantizedOutputs).delta for each in tap.of(round)] for round in (1, 2, 3, 4)]
    assert delta == [[False] * 6, [True] * 6, [True] * 4 + [False, True], [True] * 6]
    assert ["request" in each.down for each in tap.of(3)] == [False] * 4 + [True, False]
    assert [e["received"] for e in events if e["event"] == "round"] == [6, 5, 6, 6]


def test_a_client_that_has_lost_its_state_says_so_and_is_told_again(small, federate, tap_of):
    class Amnesia(tap_of):
        def __call__(self, message, context, call_next):
            round = message.content["config"]["server-round"]
            if (round, context.node_config["partition-id"]) == (2, 1) and message.metadata.message_type == "train":
                context.state.array_records.pop("fedkd.memory", None)
            return super().__call__(message, context, call_next)

    tap = Amnesia()
    _, events = federate(small(QUICK, **EVERYBODY), mods=[tap])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"]) for e in refused] == [(2, 1)]
    assert "subset is not known" in refused[0]["reason"]
    assert "request" in tap.of(3)[1].down and events[-1]["received"] == 6


@pytest.mark.parametrize("fault", ["words", "shape", "bits", "changes", "kind"])
def test_uploads_that_cannot_be_used_are_refused(small, federate, tap_of, fault):
    levels = quantise(torch.full((40, 4), 0.25), 1)
    bad = {
        "words": QuantizedOutputs(encode([(np.zeros((1, 40), np.int64), 4)])[:0], 40, 4, 1, False),
        "shape": QuantizedOutputs.of(levels[:39], 1),
        "bits": QuantizedOutputs.of(quantise(torch.full((40, 4), 0.25), 2), 2),
        "changes": QuantizedOutputs.of(levels, 1, levels),
        "kind": ProxyOutputs(torch.arange(40), torch.full((40, 4), 0.25), "probs"),
    }[fault]
    reason = {
        "words": "coded outputs",
        "shape": "wrong shape",
        "bits": "in 2 bits, not 1",
        "changes": "not known here",
        "kind": "no outputs in 1 bits",
    }[fault]

    def spoil(round, kind, client, reply):
        if (round, kind, client) == (1, "train", 2):
            del reply.content["quantized-outputs"], reply.content["quantized-outputs.meta"]
            records = Knowledge.of(bad).to_records()
            for name in (bad.kind, f"{bad.kind}.meta"):
                reply.content[name] = records[name]

    _, events = federate(small(QUICK, **EVERYBODY, run__rounds=2), mods=[tap_of(spoil)])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"]) for e in refused] == [(1, 2)] and reason in refused[0]["reason"]
    assert [e["received"] for e in events if e["event"] == "round"] == [5, 6]


@pytest.mark.parametrize("bits", [1, 2, 16, 32])
def test_a_model_whose_outputs_are_not_finite_has_no_vote(small, federate, tap_of, monkeypatch, bits):
    """Rounded they would look sound: with one bit, NaN is class 0."""
    outputs = FreshDistillation.outputs

    def diverged(self, student, ids):
        found = outputs(self, student, ids)
        broken = found.values.clone()
        if (student.round, student.partition_id) == (2, 3):
            broken[7] = torch.nan
        return ProxyOutputs(ids, broken, found.space)

    monkeypatch.setattr(FreshDistillation, "outputs", diverged)
    tap = tap_of()
    hyper = QUICK | {"bits_up": bits, "bits_down": bits}
    strategy, events = federate(small(hyper, **EVERYBODY), mods=[tap])
    refused = [e for e in events if e["event"] == "refused"]
    assert [(e["round"], e["partition_id"]) for e in refused] == [(2, 3)] and "NaN" in refused[0]["reason"]
    assert [each.client for each in tap.of(2)] == [0, 1, 2, 4, 5]
    assert [e["received"] for e in events if e["event"] == "round"] == [6, 5, 6]
    assert "request" in tap.of(3)[3].down and strategy.consensus.isfinite().all()  # and starts without changes


@pytest.mark.parametrize("bits", [1, 2, 16, 32])
def test_labels_that_are_not_finite_are_not_sent(small, federate, monkeypatch, bits):
    monkeypatch.setattr(CFD, "server_outputs", lambda self: torch.full((40, 4), torch.nan))
    with pytest.raises(KnowledgeError, match="the model's output holds NaN"):
        federate(small(QUICK | {"bits_down": bits}, **EVERYBODY))


@pytest.mark.parametrize("kind", ["sign-flip", "random"])
@pytest.mark.parametrize("delta", [True, False])
def test_attackers_send_what_can_be_read(small, federate, kind, delta):
    hyper = QUICK | {"delta": delta, "bits_up": 3, "reduce": "median"}
    _, events = federate(small(hyper, **EVERYBODY, attacks={"kind": kind, "share": 0.3}))
    assert not [e for e in events if e["event"] == "refused"]


def test_different_models_on_digits(federate, digits):
    _, events = federate(digits({"name": "cfd", "distill_epochs": 5}, models__server="resnet8", client__lr=0.1))
    last = events[-1]
    assert last["received"] == 6 and last["whose"] == "server" and set(last["distill"]) == {"resnet8"}
    assert 0 < last["bytes_up"]["quantized-outputs"] < 6 * 150 * np.log2(10) / 8  # changes: below log2 C bits each
    assert last["predictors"]["clients"]["accuracy"] > 0.15


def test_resume(small, resumes):
    resumes(small(QUICK | {"bits_down": 4}, run__rounds=4, run__participation=0.7))
