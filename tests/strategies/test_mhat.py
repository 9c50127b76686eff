"""MHAT: joint training and the auxiliary model's labels, worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.client.exchange import JointTraining
from fedkd.data.batches import Batch, epoch_order
from fedkd.data.federation import build_federation
from fedkd.models import Outputs
from fedkd.payloads import ProxyOutputs
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student
from strategies.mhat import MHAT

QUICK = {"name": "mhat", "server_batch_size": 20}
EVERYBODY = {"run__participation": 1.0, "run__rounds": 2}
LN3 = math.log(3)


def test_the_loss_is_cross_entropy_of_own_and_soft_cross_entropy_of_public_samples():
    local = JointTraining(MHAT(public_weight=0.5))
    # Softmax of (ln 3, 0) is (3/4, 1/4). Of three samples the second is public, at place 1 of the labels.
    logits = torch.tensor([[LN3, 0.0], [LN3, 0.0], [0.0, LN3]])
    batch = Batch(torch.zeros(3, 1), torch.tensor([0, -1, 0]), torch.tensor([2, 1, 5]))
    aux = {"targets": torch.tensor([[1.0, 0.0], [0.2, 0.8]])}
    terms = local.loss({}, batch, Outputs(logits, logits, ()), (), aux)
    assert float(terms["ce"]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 3)
    assert float(terms["public"]) == pytest.approx(-0.5 * (0.2 * math.log(0.75) + 0.8 * math.log(0.25)) / 3)


def test_without_labels_yet_it_is_cross_entropy():
    logits = torch.tensor([[LN3, 0.0]])
    batch = Batch(torch.zeros(1, 1), torch.tensor([1]), torch.tensor([0]))
    terms = JointTraining(MHAT()).loss({}, batch, Outputs(logits, logits, ()), (), {})
    assert list(terms) == ["ce"] and float(terms["ce"]) == pytest.approx(-math.log(0.25))


def test_a_round_by_hand(small, federate, tap_of, descend):
    """Round 2 of every client, and the server's model after both rounds, in plain PyTorch."""
    hyper = {"public_size": 30, "public_weight": 2.0, "server_epochs": 3, "server_lr": 5e-3}
    scenario, tap = small(QUICK | hyper, **EVERYBODY), tap_of()
    strategy, events = federate(scenario, mods=[tap])
    federation, seed = build_federation(scenario), scenario.run.seed
    proxy, train = federation.proxy.data, federation.train
    server = build_student(scenario, federation.dataset, "mlp")
    made, ids = None, torch.empty(0)
    for round in (1, 2):
        passed = tap.of(round)
        if made is not None:
            down = passed[0].down.get(ProxyOutputs)
            assert torch.equal(down.ids, ids)
            torch.testing.assert_close(down.values, made, rtol=1e-4, atol=1e-5)
        mean = torch.stack([each.up.get(ProxyOutputs).values for each in passed]).mean(0)
        ids = passed[0].up.get(ProxyOutputs).ids
        draw = rng(seed, Purpose.DISTILLATION, round)
        draw.integers(2**63)  # the seed of dropout
        optimizer = torch.optim.Adam(server.parameters(), lr=5e-3)
        for rows in [rows for _ in range(3) for rows in epoch_order(np.arange(30), 20, draw)]:
            optimizer.zero_grad()
            logits = server(proxy.gather(ids[rows]).x).logits
            (-(mean[rows] * logits.log_softmax(1)).sum(1).mean()).backward()
            optimizer.step()
        made = server(proxy.gather(ids).x).logits.softmax(1).detach()
    for name, tensor in server.state_dict().items():
        torch.testing.assert_close(strategy.students["mlp"][name], tensor, rtol=1e-4, atol=1e-5)
    assert events[-1]["whose"] == "server"

    for client, each in enumerate(tap.of(2)):
        labels, own = each.down.get(ProxyOutputs), np.asarray(federation.shards[client].train)
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(each.before)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for rows in epoch_order(np.arange(30 + len(own)), 16, rng(seed, Purpose.BATCHES, 2, client)):
            optimizer.zero_grad()
            loss = 0.0
            for row in rows:
                if row < 30:
                    z = model(proxy.gather(labels.ids[[row]]).x).logits
                    loss = loss - 2.0 * (labels.values[row] * z.log_softmax(1)).sum()
                else:
                    sample = train.gather(own[[row - 30]])
                    loss = loss + F.cross_entropy(model(sample.x).logits, sample.y)
            (loss / len(rows)).backward()
            optimizer.step()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(each.after[name], tensor, rtol=1e-4, atol=1e-5)


def test_bytes_are_the_formulas(small, federate):
    for size, ids in ((20, {"request": 4 * 4 * 20}), (0, {})):  # of all samples no ids need to be asked for
        n = size or 60
        outputs = {"proxy-outputs": 4 * (4 * n * 4 + 4 * n)}
        _, events = federate(small(QUICK | {"public_size": size}, run__rounds=2))
        one, two = (e for e in events if e["event"] == "round")
        assert one["bytes_up"] == outputs == two["bytes_up"]
        assert one["bytes_down"] == ids
        assert two["bytes_down"] == ids | outputs


@pytest.mark.parametrize("bad", ["nan", "shape", "keys"])
def test_faulty_uploads_are_refused(small, federate, bad):
    _, events = federate(small(QUICK, **EVERYBODY, faults={bad: 0.4}))
    refused = [e for e in events if e["event"] == "refused"]
    received = [e["received"] for e in events if e["event"] == "round"]
    assert 0 < len(refused) == 12 - sum(received) and min(received) > 0


def test_malformed_labels_are_refused_by_the_client(small, federate):
    strategy, _ = federate(small(QUICK, **EVERYBODY), rounds=1)
    strategy.labels = ProxyOutputs(strategy.labels.ids, strategy.labels.values * 2, "probs")
    strategy.server.scenario.system.__dict__["min_replies"] = 0
    events = []
    strategy.server.on_event = events.append
    with pytest.raises(Exception, match="nothing to average"):
        strategy.start(strategy.server.grid, num_rounds=2)
    assert len([e for e in events if "no probability distributions" in e.get("reason", "")]) == 6


def test_different_models_and_a_larger_one_on_the_server(federate, digits):
    models = {"models__student": ["mlp", "cnn"], "models__server": "resnet8"}
    scenario = digits(QUICK | {"server_epochs": 20}, **models, client__lr=0.1, client__epochs=3)
    strategy, events = federate(scenario)
    last = events[-1]
    assert list(strategy.students) == ["resnet8"] and last["whose"] == "server" and last["received"] == 6
    assert last["accuracy"] > 0.15 and last["predictors"]["clients"]["accuracy"] > 0.15


def test_a_scenario_term_applies_to_public_samples_too(small, federate):
    term = {"loss": "ntd", "weight": 0.5, "teacher": "own"}
    _, events = federate(small(QUICK, **EVERYBODY, client__terms=[term]))
    last = events[-1]["train"]
    assert last["ntd"] > 0 and last["loss"] == pytest.approx(last["ce"] + last["public"] + last["ntd"])


def test_resume(small, resumes):
    resumes(small(QUICK | {"public_size": 30}, run__rounds=3, run__participation=0.7))
