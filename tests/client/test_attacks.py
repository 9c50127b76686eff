"""Poisoned clients: who they are, what they train on, what they send, and that it is accepted."""

import numpy as np
import pytest
import torch

from fedkd import run
from fedkd.client.attacks import negated, random_outputs, random_update, sign_flipped
from fedkd.client.handlers import make_app
from fedkd.data.federation import build_federation
from fedkd.data.poison import draw_attackers, flipped
from fedkd.engine import InlineGrid, Nodes
from fedkd.errors import ScenarioError
from fedkd.payloads import ClassOutputs, Knowledge, ProxyOutputs, Request, Weights
from fedkd.scenario import Attacks
from fedkd.server.strategy import DistillationStrategy
from fedkd.students import build_student, snapshot
from fedkd.sweep import expand


def attack(kind, share=0.3, **more):
    return {"attacks": {"kind": kind, "share": share, **more}}


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


# --- who attacks -----------------------------------------------------------------------------------------


def test_a_share_of_the_clients_with_samples_attacks_and_a_larger_one_adds_to_them():
    sizes = np.array([0] + [5] * 20)
    few, many = (draw_attackers(Attacks(kind="random", share=share), sizes, seed=3).tolist() for share in (0.1, 0.3))

    assert (len(few), len(many)) == (2, 6)
    assert set(few) < set(many) and 0 not in many and many == sorted(many)
    assert draw_attackers(Attacks(kind="sign-flip", share=0.3), sizes, seed=3).tolist() == many
    assert draw_attackers(Attacks(kind="random", share=0.3), sizes, seed=4).tolist() != many


def test_somebody_stays_honest():
    assert len(draw_attackers(Attacks(kind="random", share=0.9), np.ones(3), seed=0)) == 2


def test_attackers_are_the_same_whatever_the_method_and_nothing_else_changes(small):
    clean = build_federation(small())
    poisoned = [build_federation(small(name, **attack("sign-flip"))) for name in ("fedavg", "dsfl")]

    assert poisoned[0].attackers.tolist() == poisoned[1].attackers.tolist() and len(poisoned[0].attackers) == 2
    assert not len(clean.attackers)
    for client in range(6):
        assert np.array_equal(clean.shards[client].train, poisoned[0].shards[client].train)
        assert poisoned[0].data_of(client) is poisoned[0].train


# --- flipped labels --------------------------------------------------------------------------------------


def test_labels_become_the_next_or_the_mirrored_class():
    y = np.arange(4)
    assert flipped(y, "next", 4).tolist() == [1, 2, 3, 0]
    assert flipped(y, "mirror", 4).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(("flip", "wrong"), [("next", [1, 2, 3, 0]), ("mirror", [3, 2, 1, 0])])
def test_attackers_train_on_wrong_labels_and_nobody_else(small, cohort, flip, wrong):
    scenario = small(partition__test=0.2, **attack("label-flip", flip=flip))
    federation = build_federation(scenario)
    true = federation.train.labels

    for client in range(6):
        ids = federation.shards[client].train
        seen = federation.data_of(client).gather(ids).y.numpy()
        expected = np.array(wrong)[true[ids]] if client in federation.attackers else true[ids]
        assert np.array_equal(seen, expected)
        assert torch.equal(federation.data_of(client).gather(ids).x, federation.train.gather(ids).x)


def test_an_attacker_learns_what_an_honest_client_with_those_labels_learns(small, federate, monkeypatch):
    """All but one flip, against a federation in which everybody's labels are wrong, and one in which they are right."""
    scenario = small(**attack("label-flip", 0.9), run__rounds=1)
    federation = build_federation(scenario)
    (honest,) = set(range(6)) - set(federation.attackers.tolist())
    sent = {}

    def tap(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train":
            sent[context.node_config["partition-id"]] = Knowledge.from_records(reply.content).get(Weights).state
        return reply

    def clients_of(scenario):
        sent.clear()
        federate(scenario, mods=[tap])
        return dict(sent)

    poisoned = clients_of(scenario)
    clean = clients_of(small(run__rounds=1))
    monkeypatch.setattr("fedkd.data.federation.Federation.data_of", lambda self, client: federation.poisoned)
    everybody = clients_of(small(run__rounds=1, run__evaluate_every=2))

    assert poisoned.keys() == clean.keys() and len(poisoned) >= 3
    for client, state in poisoned.items():
        reference = clean if client == honest else everybody
        assert all(torch.equal(tensor, reference[client][name]) for name, tensor in state.items())


def test_accuracy_is_measured_on_true_labels(small, cohort):
    honest = cohort(small(partition__test=0.3))
    attacked = cohort(small(partition__test=0.3, **attack("label-flip", 0.9)))
    weights = honest.weights(noise=1)

    def scores(clients):
        replies = clients.ask(Knowledge.of(weights), kind="evaluate", on="local")
        return [dict(reply.content["metrics"]) for reply in replies]

    assert scores(attacked) == scores(honest)


# --- what is sent ----------------------------------------------------------------------------------------


def test_a_flipped_update_leaves_statistics_and_counts_alone():
    state = {"w": torch.tensor([3.0, -1.0]), "bn.running_var": torch.tensor([2.0]), "n": torch.tensor(7)}
    received = {"w": torch.tensor([1.0, 1.0]), "bn.running_var": torch.tensor([1.0]), "n": torch.tensor(3)}

    sent = sign_flipped(Weights(state, "mlp"), received)

    assert sent.state["w"].tolist() == [-1.0, 3.0]
    assert (sent.state["bn.running_var"].item(), sent.state["n"].item()) == (2.0, 7)
    assert sent.arch == "mlp" and state["w"].tolist() == [3.0, -1.0]


def test_a_random_update_is_as_long_as_the_true_one():
    received = {"w": torch.full((50, 4), 2.0), "b": torch.zeros(3)}
    state = {"w": received["w"] + torch.linspace(-1, 1, 200).view(50, 4), "b": torch.zeros(3)}

    sent = random_update(Weights(state, "mlp"), received, np.random.default_rng(0)).state

    honest, update = (one["w"] - received["w"] for one in (state, sent))
    assert update.norm() == pytest.approx(honest.norm().item(), rel=1e-5)
    assert abs(torch.corrcoef(torch.stack([honest.flatten(), update.flatten()]))[0, 1]) < 0.2
    assert sent["b"].tolist() == [0, 0, 0]


def test_flipped_probabilities_are_those_of_negated_logits():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])

    assert torch.equal(negated(logits, "logits"), -logits)
    assert torch.allclose(negated(logits.softmax(1), "probs"), (-logits).softmax(1))
    certain = negated(torch.tensor([[1.0, 0.0]]), "probs")
    assert torch.isfinite(certain).all() and certain[0, 1] == pytest.approx(1.0)


def test_random_outputs_keep_shape_and_space():
    values = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) * 3
    change = random_outputs(np.random.default_rng(0))

    logits, probs = change(values, "logits"), change(values.softmax(1), "probs")

    assert logits.shape == probs.shape == (400, 5) and logits.dtype == probs.dtype == torch.float32
    assert logits.std().item() == pytest.approx(3, rel=0.1)
    assert torch.allclose(probs.sum(1), torch.ones(400)) and probs.min() >= 0
    assert probs[:, 0].mean().item() == pytest.approx(0.2, abs=0.02)  # of the uniform distribution on the simplex


def test_payloads_without_outputs_stay_as_they_are():
    request = Request(torch.arange(3))
    assert request.with_outputs(negated) is request


def test_classes_that_are_missing_stay_zero():
    table = ClassOutputs(torch.tensor([[0.9, 0.1], [0.0, 0.0]]), torch.tensor([2.0, 0.0]), "probs")

    sent = table.with_outputs(negated)

    sent.check(2, "probs")
    assert torch.allclose(sent.means, torch.tensor([[0.1, 0.9], [0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["sign-flip", "random"])
def test_only_attackers_send_something_else_and_other_records_stay(small, kind):
    scenario = small(**attack(kind))
    federation = build_federation(scenario)
    attackers, received = federation.attackers, build_student(scenario, federation.dataset, "mlp").state_dict()

    def replies(scenario):
        content = Knowledge.of(Weights(snapshot(received), "mlp")).to_records({"server-round": 1})
        nodes = Nodes.alike(6)
        with InlineGrid(lambda: make_app(scenario), nodes) as grid:
            messages = [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]
            return list(grid.send_and_receive(messages))

    honest, poisoned, again = (replies(one) for one in (small(), scenario, scenario))
    for client, (true, sent, twin) in enumerate(zip(honest, poisoned, again, strict=True)):
        true, sent, twin = (Knowledge.from_records(reply.content) for reply in (true, sent, twin))
        assert (sent.num_examples, sent.metrics) == (true.num_examples, true.metrics)
        for name, tensor in sent.get(Weights).state.items():
            assert torch.equal(tensor, twin.get(Weights).state[name])  # seeded
            update = true.get(Weights).state[name] - received[name]
            if client not in attackers:
                assert torch.equal(tensor, true.get(Weights).state[name])
            elif kind == "sign-flip":
                assert torch.allclose(tensor, received[name] - update, atol=1e-6)
            else:
                assert (tensor - received[name]).norm() == pytest.approx(update.norm().item(), rel=1e-3, abs=1e-6)
                assert not torch.allclose(tensor, true.get(Weights).state[name])
    assert [reply.content["config"]["partition-id"] for reply in poisoned] == list(range(6))


def test_what_clients_are_measured_by_is_not_attacked(small, cohort):
    clean, poisoned = (cohort(small(partition__test=0.3, **more)) for more in ({}, attack("random", 0.9)))
    weights = Knowledge.of(clean.weights())

    for config in ({"kind": "evaluate", "on": "local"}, {"kind": "train", "max-steps": 1}):
        true, sent = (
            [{**dict(r.content["metrics"])} for r in clients.ask(weights, **config)] for clients in (clean, poisoned)
        )
        assert true == sent


# --- rounds ----------------------------------------------------------------------------------------------

KINDS = ["label-flip", "sign-flip", "random"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fedavg", {"name": "feddf", "steps": 5}, "dsfl", "fd"], ids=str)
def test_attacks_are_accepted_and_change_the_result(small, federate, name, kind):
    settings = {"run__participation": 1.0, "run__rounds": 2}

    _, clean = federate(small(name, **settings))
    _, poisoned = federate(small(name, **settings, **attack(kind, 0.5)))
    _, again = federate(small(name, **settings, **attack(kind, 0.5)))

    assert not [event for event in poisoned if event["event"] == "refused"]
    assert rounds_of(poisoned) == rounds_of(again)
    assert rounds_of(poisoned)[-1]["predictors"] != rounds_of(clean)[-1]["predictors"]
    assert rounds_of(poisoned)[0]["bytes_up"] == rounds_of(clean)[0]["bytes_up"]


@pytest.mark.parametrize("name", ["fedavg", "dsfl"])
def test_a_cohort_trained_together_is_attacked_as_one_by_one(small, cohort, close, trained, name):
    """Attackers that flip labels see other samples, so they are trained together among themselves."""
    both = []
    for trainer in ("sequential", "vectorised"):
        clients = cohort(small(name, system__trainer=trainer, **attack("label-flip", 0.5)))
        knowledge = clients.weights() if name == "fedavg" else Request(torch.arange(4))
        replies = clients.ask(Knowledge.of(knowledge))
        both.append([Knowledge.from_records(reply.content) for reply in replies])
    for one, two in zip(*both, strict=True):
        if name == "fedavg":
            one, two = (k.get(Weights).state for k in (one, two))
        else:
            one, two = ({"values": k.get(ProxyOutputs).values} for k in (one, two))
        close({k: v.numpy() for k, v in one.items()}, {k: v.numpy() for k, v in two.items()}, tolerance=1e-4)
    assert trained["together"] == 6


def test_clients_that_attack_are_not_evaluated(small, federate):
    settings = {"partition__test": 0.2, "run__evaluate_clients": "all", "run__rounds": 1}

    _, events = federate(small("fd", **settings, **attack("sign-flip", 0.5)))

    (event,) = rounds_of(events)
    assert event["predictors"]["clients"]["clients"] == event["predictors"]["clients-local"]["clients"] == 3


def test_the_run_records_who_attacked(small, tmp_path):
    scenario = small(**attack("sign-flip"), run__rounds=1)

    result = run.execute(scenario, out=tmp_path)

    attackers = build_federation(scenario).attackers.tolist()
    assert result.summary["attackers"] == attackers
    recorded = [event for event in run.read_metrics(result.folder) if event["event"] == "attackers"]
    assert recorded == [{"event": "attackers", "kind": "sign-flip", "clients": attackers}]


def test_batch_norm_survives_flipped_signs(small, federate):
    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    scenario = small(
        data__options=images,
        models__student="cnn",
        models__options={},
        models__norm="batch",
        client__steps=2,
        run__rounds=2,
        **attack("sign-flip", 0.5),
    )

    _, events = federate(scenario)

    assert not [event for event in events if event["event"] == "refused"]
    assert np.isfinite(rounds_of(events)[-1]["predictors"]["server"]["loss"])


# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.3}, "attacks.share: has no effect without a kind of attack"),
        ({"kind": "random"}, "attacks.share: 0 of 6 clients is nobody"),
        ({"kind": "random", "share": 0.05}, "must be at least 0.083"),
        ({"kind": "random", "share": 0.5, "flip": "mirror"}, "attacks.flip: has no effect"),
        ({"kind": "random", "share": 1.0}, r"attacks.share: must be a number in \[0, 1\), is 1.0"),
        ({"kind": "flip", "share": 0.5}, "attacks.kind: must be one of"),
    ],
)
def test_settings_that_make_no_sense(small, settings, message):
    from fedkd.checks import check

    with pytest.raises(ScenarioError, match=message):
        check(small(attacks=settings))


def test_attacks_are_an_axis_of_a_sweep():
    from fedkd.scenario_file import read

    raw = {"sweep": {"attacks.kind": ["label-flip", "sign-flip"], "attacks.share": [0.1, 0.3]}}
    cells = expand(read(raw), checked=False)

    assert [(c.scenario.attacks.kind, c.scenario.attacks.share) for c in cells][1] == ("label-flip", 0.3)


def test_stock_strategies_are_attacked_like_ours(small, federate):
    for name in ("flwr:FedMedian", "flwr:FedTrimmedAvg"):
        strategy, events = federate(small(name, **attack("sign-flip"), run__rounds=1, run__participation=1.0))
        assert isinstance(strategy, DistillationStrategy)
        assert rounds_of(events)[0]["received"] == 6
