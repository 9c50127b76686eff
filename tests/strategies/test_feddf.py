"""FedDF's schemes, filters and distillation against numbers worked out independently."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd import models
from fedkd.errors import ScenarioError
from fedkd.losses.response import kd
from fedkd.payloads import Weights
from fedkd.server.members import StoredMember
from fedkd.server.weighting import above_outliers
from strategies.feddf import FedDF

IMAGES = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def feddf(logits, **hyper):
    """A FedDF whose members have given logits [K, n, C]."""
    method = FedDF(**hyper)
    members = [StoredMember(range(logits.shape[1]), torch.from_numpy(z).float()) for z in logits]
    method.teachers = lambda: members  # type: ignore[method-assign, assignment]
    return method


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_targets_of_every_scheme(temperature):
    z = np.random.default_rng(0).normal(size=(4, 5, 3)) * 3
    logits = feddf(z, temperature=temperature).ensemble().targets()
    np.testing.assert_allclose(logits.values.numpy(), z.mean(0), atol=1e-5)
    for space in ("probs", "losses"):
        probs = feddf(z, temperature=temperature, space=space).ensemble().targets()
        assert probs.space == "probs"
        np.testing.assert_allclose(probs.values.numpy(), softmax(z / temperature).mean(0), atol=1e-6)


def test_the_mean_of_kls_is_the_kl_of_the_mean_and_a_constant():
    draw = np.random.default_rng(1)
    z, s = torch.from_numpy(draw.normal(size=(4, 5, 3)) * 2), torch.from_numpy(draw.normal(size=(5, 3)))
    options = {"temperature": 2.0, "reduction": "batchmean", "t_squared": False}
    one, two = s.clone().requires_grad_(), s.clone().requires_grad_()
    losses = torch.stack([kd(one, member, **options) for member in z]).mean()
    probs = (z / 2.0).softmax(-1)
    joint = kd(two, probs.mean(0), target_space="probs", **options)
    (losses + joint).backward()
    torch.testing.assert_close(one.grad, two.grad)

    p = probs.numpy()
    entropy = -(p.mean(0) * np.log(p.mean(0))).sum(-1).mean()
    spread = entropy + (p * np.log(p)).sum(-1).mean()  # the members' Jensen-Shannon divergence
    assert float((losses - joint).detach()) == pytest.approx(spread, rel=1e-9) and spread > 0


def test_losses_train_the_students_of_probs(small, federate):
    ends = [federate(small({"name": "feddf", "steps": 20, "space": space}))[0] for space in ("probs", "losses")]
    assert all(torch.equal(t, ends[1].students["mlp"][n]) for n, t in ends[0].students["mlp"].items())


def test_outliers_are_below_mean_less_one_and_a_half_deviations_of_all_but_the_best():
    scores = [*np.random.default_rng(0).uniform(0.5, 0.6, 9), 0.2, 0.95]
    rest = sorted(scores)[:-1]
    limit = np.mean(rest) - 1.5 * np.std(rest)
    assert above_outliers(scores) == [score >= limit for score in scores]
    assert above_outliers(scores).count(False) == 1
    assert above_outliers([0.1, 0.9]) == [True, True] and above_outliers([0.5] * 4) == [True] * 4


def judged(accuracies, **hyper):
    """Return which of some uploads with given accuracies FedDF keeps (four classes: chance is 0.25)."""
    method, dropped = FedDF(**hyper), []
    uploads = [SimpleNamespace(partition_id=p) for p in range(len(accuracies))]
    method.server = SimpleNamespace(  # type: ignore[assignment]
        label_accuracies=lambda uploads: iter(accuracies),
        federation=SimpleNamespace(num_classes=4),
        emit=lambda event, **fields: dropped.append(fields["partition_id"]),
    )
    method.round, method.members = 1, list(uploads)  # type: ignore[assignment]
    kept = [upload.partition_id for upload in method.good_enough(uploads)]  # type: ignore[arg-type]
    assert kept == [upload.partition_id for upload in method.members]
    assert sorted(kept + dropped) == list(range(len(accuracies)))
    return kept


OUTLIER, BELOW_CHANCE = [0.9, 0.6, 0.6, 0.6, 0.6, 0.31], [0.9, 0.6, 0.6, 0.6, 0.31, 0.29]


def test_members_are_dropped_below_chance_and_outliers_where_nobody_is():
    assert judged(OUTLIER, drop_worst=True) == [0, 1, 2, 3, 4, 5]
    assert judged(OUTLIER, drop_worst=True, drop_outliers=True) == [0, 1, 2, 3, 4]
    assert judged(OUTLIER, drop_outliers=True) == [0, 1, 2, 3, 4]
    # 1.2 · 0.25 = 0.3: somebody is below it, so only they go.
    assert judged(BELOW_CHANCE, drop_worst=True, drop_outliers=True) == [0, 1, 2, 3, 4]
    assert judged(BELOW_CHANCE, drop_outliers=True) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("filters", "accuracy"), [("drop_worst", 0.29), ("drop_outliers", 0.31)])
def test_who_is_dropped_is_neither_in_the_average_nor_in_the_ensemble(small, federate, monkeypatch, filters, accuracy):
    from fedkd.server.runtime import ServerRuntime

    sent, seen, distill = [], [], FedDF.distill

    def accuracies(server, uploads):
        sent.extend((upload.partition_id, upload.num_examples, dict(upload.state)) for upload in uploads)
        return iter([accuracy if upload.partition_id == 2 else 0.8 for upload in uploads])

    def watch(method):
        teachers = [t.outputs(method.server.proxy.data, torch.arange(60)).double() for t in method.teachers()]
        targets = method.ensemble().targets(method.server.proxy.data).values
        seen.append((method.students["mlp"], teachers, targets))
        distill(method)

    monkeypatch.setattr(ServerRuntime, "label_accuracies", accuracies)
    monkeypatch.setattr(FedDF, "distill", watch)
    changes = {"proxy__server_labels": 40, "run__rounds": 1, "run__participation": 1.0}
    strategy, events = federate(small({"name": "feddf", "steps": 1, filters: True}, **changes))
    [(average, teachers, targets)] = seen
    assert [e["partition_id"] for e in events if e["event"] == "dropped"] == [2]
    assert [p for p, _, _ in sent] == [0, 1, 2, 3, 4, 5]

    good = [(n, state) for p, n, state in sent if p != 2]
    for name, tensor in average.items():
        x = np.stack([state[name].double().numpy() for _, state in good])
        np.testing.assert_allclose(tensor.numpy(), np.average(x, axis=0, weights=[n for n, _ in good]), atol=1e-6)
    outputs = [strategy.server.predict("mlp", state, strategy.server.proxy.data).double() for _, state in good]
    assert len(teachers) == 5 and all(torch.equal(one, two) for one, two in zip(teachers, outputs, strict=True))
    torch.testing.assert_close(targets.double(), torch.stack(outputs).mean(0), atol=1e-5, rtol=0)


def test_a_distillation_by_hand(distilled, linear_case, adam):
    z, x, start = linear_case
    method = FedDF(steps=7, batch_size=5, temperature=2.0, lr=0.01)
    student, batches, [report] = distilled(method, z, x, start)
    assert [len(rows) for rows in batches] == [5, 5, 2, 5, 5, 2, 5]

    x, weights = torch.from_numpy(x), torch.from_numpy(start).requires_grad_()
    target = (torch.from_numpy(z).mean(0).float().double() / 2).softmax(1)
    descend, norms, losses = adam([weights]), [], []
    for step, rows in enumerate(batches):
        log_q = (x[rows] @ weights.T / 2).log_softmax(1)
        loss = (target[rows] * (target[rows].log() - log_q)).sum() / len(rows)
        [gradient] = torch.autograd.grad(loss, [weights])
        norms.append(float(gradient.norm()))
        descend([gradient * min(1.0, 5 / norms[-1])], 0.01 * (1 + math.cos(math.pi * step / 7)) / 2)
        losses.append(float(loss.detach()))
    assert min(norms) < 1 and max(norms) > 10  # clipping matters, and the size of the loss with it
    torch.testing.assert_close(student, weights.detach(), rtol=0, atol=1e-7)
    assert (report["loss_first"], report["loss_last"]) == pytest.approx((losses[0], losses[-1]), rel=1e-6)


def test_every_architecture_is_distilled_from_the_uploads_of_all(small, federate, tap_of, monkeypatch):
    from fedkd.server.distiller import Distiller

    told, fit, tap = [], Distiller.fit, tap_of()

    def watch(distiller, model, data, targets, **options):
        arch = "cnn" if any(isinstance(module, torch.nn.Conv2d) for module in model.modules()) else "mlp"
        told.append((arch, targets))
        return fit(distiller, model, data, targets, **options)

    monkeypatch.setattr(Distiller, "fit", watch)
    changes = {"models__student": ["mlp", "cnn"], "models__options": {}, "data__options": IMAGES}
    scenario = small({"name": "feddf", "steps": 1}, **changes, run__rounds=1, run__participation=1.0)
    strategy, _ = federate(scenario, mods=[tap])
    x = strategy.server.proxy.data.gather(torch.arange(60)).x

    outputs = []
    for sent in (passed.up.get(Weights) for passed in tap.of(1)):
        model = models.build(sent.arch, num_classes=4, input_shape=(1, 8, 8), kind="image").eval()
        model.load_state_dict(sent.state)
        with torch.no_grad():
            outputs.append((sent.arch, model(x).logits))
    of = {arch: torch.stack([z for its, z in outputs if its == arch]) for arch in ("mlp", "cnn")}
    assert len(of["mlp"]) == len(of["cnn"]) == 3 and sorted(arch for arch, _ in told) == ["cnn", "mlp"]
    mean = torch.cat([of["mlp"], of["cnn"]]).mean(0)
    for _, targets in told:
        assert targets.space == "logits" and targets.ids.tolist() == list(range(60))
        torch.testing.assert_close(targets.values, mean, rtol=0, atol=1e-4)
    assert all(float((its.mean(0) - mean).abs().max()) > 1e-2 for its in of.values())


def test_a_student_s_running_statistics_move_to_the_proxy_set(small, statistics_move):
    changes = {"models__student": "cnn", "models__options": {"width": 0.25}, "models__norm": "batch"}
    method = {"name": "feddf", "steps": 1, "batch_size": 60}  # the whole proxy set at once
    scenario = small(method, **changes, data__options=IMAGES, run__rounds=1)
    statistics_move(FedDF, scenario, lambda strategy: torch.arange(60))


def test_preset_code_weighs_uniformly_and_takes_the_batches_of_the_released_code(small):
    from fedkd import plugins

    paper = plugins.make_strategy(small("feddf"))
    code = plugins.make_strategy(small({"name": "feddf", "preset": "code"}))
    assert (paper.weighting, paper.batch_size) == ("examples", 128)
    assert (code.weighting, code.batch_size) == ("uniform", 64)


@pytest.mark.parametrize("option", ["drop_worst", "drop_outliers", "compare_start"])
def test_judging_needs_labels_on_the_server(small, option):
    from fedkd import plugins

    with pytest.raises(ScenarioError, match="server_labels"):
        plugins.make_strategy(small({"name": "feddf", option: True}))


def test_the_average_is_kept_where_distillation_does_not_help(small, federate):
    settings = {"name": "feddf", "steps": 100, "lr": 3.0}  # far too fast: the student gets worse
    changes = {"proxy__server_labels": 40, "run__rounds": 1}
    average, _ = federate(small("fedavg", **changes))
    kept, events = federate(small(settings | {"compare_start": True}, **changes))
    report = rounds_of(events)[0]["distill"]["mlp"]
    assert report["best_step"] == 0
    assert all(torch.equal(t, average.students["mlp"][n]) for n, t in kept.students["mlp"].items())
    lost, _ = federate(small(settings, **changes))
    assert any(not torch.equal(t, average.students["mlp"][n]) for n, t in lost.students["mlp"].items())


def test_two_rounds_on_digits(small, federate):
    scenario = small(
        {"name": "feddf", "steps": 30, "drop_worst": True, "drop_outliers": True, "compare_start": True},
        data={"source": "digits", "train_samples": 400, "test_samples": 100, "options": {}},
        models__student=["cnn", "mlp"],
        models__options={},
        proxy__server_labels=40,
        run__rounds=2,
    )
    _, events = federate(scenario)
    assert len(rounds_of(events)) == 2 and rounds_of(events)[-1]["whose"] == "mean of 2 server models"
