"""FedAUX: the exchange of scores, weights for each sample, the optimiser that goes on, switches, resume."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fedkd.payloads import Knowledge, SampleScores, Weights
from fedkd.server.ensemble import Ensemble

FAST = {"name": "fedaux", "pretrain_epochs": 2, "pretrain_batch_size": 32, "batch_size": 16, "lr": 1e-3}
EXACT = FAST | {"epsilon": 0.0}
THETA = 4 * (12 * 16 + 16 + 16 * 4 + 4)  # the MLP 12-16-4 in float32


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def equal(one, two):
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.fixture
def prepared(small, federate, monkeypatch):
    """Return a function that runs a scenario and tells the students with which clients were scored."""
    from strategies.fedaux import FedAUX

    def make(strategy, **changes):
        seen, check = {}, FedAUX.check_scores

        def watch(method, upload):
            seen.update(method.students)
            check(method, upload)

        monkeypatch.setattr(FedAUX, "check_scores", watch)
        scenario = small(strategy, **{"run__rounds": 1, **changes})
        return (*federate(scenario), seen)

    return make


def test_scores_are_those_of_a_logistic_regression_on_frozen_features(prepared):
    strategy, _, students = prepared(EXACT)
    server = strategy.server
    model = server.model("mlp", students["mlp"]).eval()

    def features(data, ids):
        with torch.no_grad():
            return model(data.gather(torch.as_tensor(ids)).x).features.double().numpy()

    assert len(strategy.public) == 12 and len(strategy.asked) == 48  # a fifth of 60 samples, and the rest
    assert sorted([*strategy.public.tolist(), *strategy.asked.tolist()]) == list(range(60))
    negatives = features(server.proxy.data, strategy.public)
    asked = features(server.proxy.data, strategy.asked)
    assert sorted(strategy.scores) == server.federation.eligible.tolist()
    for client, scores in strategy.scores.items():
        own = features(server.federation.train, np.asarray(server.federation.shards[client].train))
        x = np.concatenate([own, negatives])
        norm, n = np.sqrt((x**2).sum(1)).max(), len(x)

        def inputs(f, norm=norm):
            return np.c_[f / norm, np.ones(len(f))] / np.sqrt(2)

        fit = LogisticRegression(C=1 / (n * 0.01), fit_intercept=False, tol=1e-8, max_iter=5000)
        fit.fit(inputs(x), np.r_[np.ones(len(own)), np.zeros(len(negatives))])
        np.testing.assert_allclose(scores.numpy(), fit.predict_proba(inputs(asked))[:, 1] + 1e-8, atol=2e-3)


def test_features_have_statistics_of_the_public_set_where_they_do_not_travel(prepared, monkeypatch):
    from strategies import fedaux

    seen, fit = [], fedaux.fit_scorer

    def watch(own, negatives, **options):
        seen.append(negatives)
        return fit(own, negatives, **options)

    monkeypatch.setattr(fedaux, "fit_scorer", watch)
    strategy, _, students = prepared(
        EXACT,
        data={"source": "digits", "train_samples": 300, "test_samples": 50, "options": {}},
        models={"student": "cnn", "options": {}, "norm": "batch", "buffers": "params_only"},
    )
    server = strategy.server
    model = server.model("cnn", students["cnn"]).eval()
    with torch.no_grad():
        expected = model(server.proxy.data.gather(strategy.public).x).features.numpy()
    assert len(seen) == 6
    for negatives in seen:
        np.testing.assert_allclose(negatives, expected, rtol=1e-5, atol=1e-5)


def test_noise_of_a_small_epsilon_drowns_the_scores_and_is_reported(prepared):
    exact, _, _ = prepared(EXACT)
    noisy, events, _ = prepared(FAST)
    for client, scores in exact.scores.items():
        assert float((scores - noisy.scores[client]).abs().max()) > 0.05
    [event] = [e for e in events if e["event"] == "scores"]
    assert (event["epsilon"], event["delta"], event["objective"], event["clients"]) == (0.1, 1e-5, "mean", 6)


def test_scores_travel_once_and_are_counted(prepared):
    strategy, events, _ = prepared(FAST, run__rounds=2)
    for event in rounds_of(events):
        assert event["bytes_up"] == {"weights": 4 * THETA} == event["bytes_down"]
    # Six clients: once 48 scores up, the model and 12 ids down; in two rounds four models each way.
    assert dict(strategy.server.traffic["up"]) == {"weights": 2 * 4 * THETA, "sample-scores": 6 * 4 * 48}
    assert dict(strategy.server.traffic["down"]) == {"weights": (6 + 2 * 4) * THETA, "request": 6 * 4 * 12}


def test_targets_are_weighted_by_each_client_on_each_sample(prepared, monkeypatch):
    from strategies.fedaux import FedAUX

    seen, distill = [], FedAUX.distill

    def watch(method):
        data = method.server.proxy.data
        outputs = [t.outputs(data, method.asked).double().numpy() for t in method.teachers()]
        scores = [method.scores[u.partition_id].double().numpy() for u in method.members]
        targets = method.weighted_ensemble().targets(data, ids=method.asked)
        seen.append((np.stack(outputs), np.stack(scores), targets, method.asked))
        distill(method)

    monkeypatch.setattr(FedAUX, "distill", watch)
    prepared(EXACT)
    [(z, s, targets, asked)] = seen
    expected = (s[:, :, None] * z).sum(0) / s.sum(0)[:, None]
    np.testing.assert_allclose(targets.values.numpy(), expected, atol=1e-5)
    assert torch.equal(targets.ids, asked) and targets.space == "logits"
    assert not np.allclose(expected, z.mean(0), atol=1e-3)


def test_equal_scores_are_feddf(prepared):
    strategy, _, _ = prepared(EXACT)
    method = type(strategy)()
    method.bind(strategy.server)

    class Said:
        def __init__(self, partition_id, seed):
            torch.manual_seed(seed)
            self.partition_id = partition_id
            state = {name: torch.randn_like(t) for name, t in strategy.students["mlp"].items()}
            self.message = Knowledge.of(Weights(state, "mlp")).to_records()

    method.members = [Said(0, 1), Said(3, 2), Said(5, 3)]  # type: ignore[list-item]
    data = strategy.server.proxy.data
    plain = Ensemble(method.teachers(), space="logits").targets(data, ids=method.asked).values
    for scores in ({0: 0.3, 3: 0.3, 5: 0.3}, {}):  # nobody's scores: all count the same
        method.scores = {p: torch.full((48,), value) for p, value in scores.items()}
        torch.testing.assert_close(method.weighted_ensemble().targets(data, ids=method.asked).values, plain)
    method.scores = {0: torch.full((48,), 0.7)}  # of the others there are none: they have no say
    only = method.weighted_ensemble().targets(data, ids=method.asked).values
    torch.testing.assert_close(only, method.teachers()[0].outputs(data, method.asked))


def test_two_distillations_by_hand(distilled, linear_case, adam):
    from strategies.fedaux import FedAUX

    z, x, start = linear_case
    asked, said = np.array([0, 1, 2, 4, 5, 7, 8, 10, 11]), np.random.default_rng(1).uniform(size=(3, 9))
    method = FedAUX(epochs=2, batch_size=5, lr=0.01)
    method.asked, method.moments = torch.from_numpy(asked), {}
    method.scores = {client: torch.from_numpy(values).float() for client, values in enumerate(said)}
    student, batches, reports = distilled(method, z, x, start, rounds=2)
    assert [len(rows) for rows in batches] == [5, 4] * 2 * 2

    mean = np.zeros((12, 4))
    mean[asked] = (said[:, :, None] * z[:, asked]).sum(0) / said.sum(0)[:, None]
    target, x = torch.from_numpy(mean).float().double().softmax(1), torch.from_numpy(x)
    weights, norms, losses = torch.from_numpy(start).requires_grad_(), [], []
    descend = adam([weights])  # which goes on in the second round
    for rows in batches:
        log_q = (x[rows] @ weights.T).log_softmax(1)
        loss = (target[rows] * (target[rows].log() - log_q)).sum() / len(rows)
        [gradient] = torch.autograd.grad(loss, [weights])
        descend([gradient], 0.01)
        norms.append(float(gradient.norm()))
        losses.append(float(loss.detach()))
    assert min(norms) > 5 and max(norms) > 4 * min(norms)  # clipping would tell
    torch.testing.assert_close(student, weights.detach(), rtol=0, atol=1e-7)
    ends = [report[key] for report in reports for key in ("loss_first", "loss_last")]
    assert ends == pytest.approx([losses[step] for step in (0, 3, 4, 7)], rel=1e-6)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda v: v * float("nan"), "NaN"),
        (lambda v: -v, "outside [0, 1]"),
        (lambda v: v + 1e6, "outside [0, 1]"),
        (lambda v: v[:-1], "wrong shape"),
    ],
)
def test_scores_that_are_none_are_refused_and_their_client_has_no_say(small, federate, spoil, reason):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "query.score" and context.node_config["partition-id"] == 2:
            said = Knowledge.from_records(reply.content)
            config = dict(reply.content.config_records["config"])
            said.payloads["sample-scores"] = SampleScores(spoil(said.get(SampleScores).values))
            reply.content = said.to_records(config)
        return reply

    strategy, events = federate(small(FAST, run__rounds=2, run__participation=1.0), mods=[mod])
    [refused] = [e for e in events if e["event"] == "refused"]
    assert refused["round"] == 0 and refused["partition_id"] == 2 and reason in refused["reason"]
    assert sorted(strategy.scores) == [0, 1, 3, 4, 5] and rounds_of(events)[-1]["received"] == 6


def test_pre_training_changes_the_body_alone_and_can_be_switched_off(prepared, small, federate):
    strategy, events, students = prepared(FAST)
    initial = strategy.server.initial("mlp")
    for name, tensor in students["mlp"].items():
        assert torch.equal(tensor, initial[name]) == name.startswith("head")
    assert [e["steps"] for e in events if e["event"] == "pretrained"] == [4]  # 60 samples, batches of 32, twice

    _, events, students = prepared(FAST | {"pretraining": False})
    assert equal(students["mlp"], initial) and not [e for e in events if e["event"] == "pretrained"]

    plain, events = federate(small(FAST | {"pretraining": False, "scoring": False}, run__rounds=1))
    assert not plain.scores and "request" not in plain.server.traffic["down"]
    # With neither, what is left is FedAvg, and a pass of distillation from uniform weights.
    slow = FAST | {"pretraining": False, "scoring": False, "lr": 1e-12}
    still, _ = federate(small(slow, run__rounds=1))
    average, _ = federate(small({"name": "fedavg", "weighting": "uniform"}, run__rounds=1))
    for name, tensor in still.students["mlp"].items():
        torch.testing.assert_close(tensor, average.students["mlp"][name], atol=1e-7, rtol=0)


def test_a_student_s_running_statistics_move_to_the_proxy_set(small, statistics_move):
    from strategies.fedaux import FedAUX

    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    changes = {"models__student": "cnn", "models__options": {"width": 0.25}, "models__norm": "batch"}
    method = FAST | {"pretraining": False, "scoring": False, "batch_size": 48}  # all that are no negatives at once
    scenario = small(method, **changes, data__options=images, run__rounds=1)
    assert statistics_move(FedAUX, scenario, lambda strategy: strategy.asked) == 48


def test_preset_code_fits_the_sum_of_the_losses(small):
    from fedkd import plugins

    assert plugins.make_strategy(small("fedaux")).objective == "mean"
    assert plugins.make_strategy(small({"name": "fedaux", "preset": "code"})).objective == "sum"


def test_the_optimiser_goes_on_from_round_to_round(small, federate):
    strategy, _ = federate(small(FAST, run__rounds=3))
    # 48 samples in batches of 16: 3 steps a round.
    assert {float(state["step"]) for state in strategy.moments["mlp"].values()} == {9.0}


def test_a_resumed_run_has_the_same_bits(small, resumes):
    resumes(small(FAST))


def test_two_rounds_on_digits_with_different_models(small, federate):
    scenario = small(
        FAST,
        data={"source": "digits", "train_samples": 400, "test_samples": 100, "options": {}},
        models__student=["cnn", "mlp"],
        models__options={},
        run__rounds=2,
        run__participation=1.0,
    )
    strategy, events = federate(scenario)
    assert rounds_of(events)[-1]["whose"] == "mean of 2 server models" and len(strategy.scores) == 6


def test_two_rounds_in_simulated_time(small, federate):
    scenario = small(FAST, run__rounds=2, clock={"profile": "lognormal", "dropout": 0.2})
    strategy, events = federate(scenario)
    assert len(rounds_of(events)) == 2 and 0 < len(strategy.scores) <= 6
