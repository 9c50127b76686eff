"""FedBE: teachers, targets, SWA and presets against numbers worked out independently."""

import numpy as np
import pytest
import torch

from fedkd import run
from fedkd.errors import ScenarioError
from fedkd.payloads import Weights

FAST = {"name": "fedbe", "samples": 3, "epochs": 2, "batch_size": 16, "swa_start": 2, "swa_every": 2}
IMAGES = {"classes": 4, "train": 160, "test": 40, "shape": [8, 8]}
BN = {"models__student": "cnn", "models__options": {"width": 0.25}, "models__norm": "batch", "data__options": IMAGES}


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


class Watched:
    """Keeps what a strategy had in its hands when it began to distil."""

    def __init__(self, monkeypatch, cls):
        original = cls.distill

        def distill(method):
            self.average = {arch: dict(state) for arch, state in method.students.items()}
            self.uploads = [(u.num_examples, dict(u.state)) for u in method.members]
            self.teachers = [
                teacher.outputs(method.server.proxy.data, torch.arange(60)).double() for teacher in method.teachers()
            ]
            self.targets = method.ensemble().targets(method.server.proxy.data).values
            original(method)

        monkeypatch.setattr(cls, "distill", distill)


@pytest.fixture
def watched(monkeypatch):
    from strategies.fedbe import FedBE

    return Watched(monkeypatch, FedBE)


@pytest.mark.parametrize("sampling", ["gaussian", "dirichlet", "steps"])
def test_teachers_are_average_samples_and_clients_and_targets_their_sharpened_mean(small, federate, watched, sampling):
    federate(small(FAST | {"sampling": sampling}, run__rounds=1))
    assert len(watched.teachers) == 1 + 3 + 4
    probs = torch.stack(watched.teachers).softmax(-1).mean(0)
    expected = probs**2 / (probs**2).sum(1, keepdim=True)
    torch.testing.assert_close(watched.targets.double(), expected, atol=1e-6, rtol=0)
    average, *drawn = (outputs for outputs in watched.teachers[:4])
    assert all(not torch.allclose(average, one) for one in drawn)


def test_the_average_is_weighted_by_examples_and_so_are_the_samples(small, federate, watched):
    strategy, _ = federate(small(FAST, run__rounds=1))
    weights = [count for count, _ in watched.uploads]
    for name, tensor in watched.average["mlp"].items():
        x = np.stack([state[name].double().numpy() for _, state in watched.uploads])
        np.testing.assert_allclose(tensor.numpy(), np.average(x, axis=0, weights=weights), atol=1e-6)
    # Drawn afresh from the same stream: what was distilled is what the distribution of these uploads gives.
    from fedkd.server.posterior import fit_gaussian

    strategy.round = 1
    rng = strategy.rng()
    fit = fit_gaussian([s for _, s in watched.uploads], weights, set(watched.average["mlp"]))
    noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
    first = fit.sample(noise)
    outputs = strategy.server.predict("mlp", first, strategy.server.proxy.data)
    torch.testing.assert_close(outputs.double(), watched.teachers[1])


def test_steps_are_taken_from_the_model_that_was_sent_to_the_clients(small, federate, watched, tap_of):
    tap = tap_of()
    strategy, _ = federate(small(FAST | {"sampling": "steps"}, run__rounds=2), mods=[tap])
    start = tap.of(2)[0].down.get(Weights).state
    uploads = [passed.up.get(Weights).state for passed in tap.of(2)]
    assert all(torch.equal(passed.down.get(Weights).state[n], t) for passed in tap.of(2) for n, t in start.items())
    assert any(not torch.equal(t, strategy.server.initial("mlp")[n]) for n, t in start.items())

    noise = torch.Generator().manual_seed(int(strategy.rng().integers(2**63)))
    for drawn in watched.teachers[1:4]:
        sample = {}
        for name, began in start.items():
            steps = torch.stack([state[name].double() - began.double() for state in uploads])
            lengths = steps.flatten(1).norm(dim=1)
            directions = steps / lengths.view(-1, *[1] * began.ndim)
            deviation = directions.var(0, correction=0).clamp(min=1e-5).sqrt()
            random = torch.randn(began.shape, generator=noise, dtype=torch.float64)
            moved = directions.mean(0) + 0.1 * deviation * random
            sample[name] = (began.double() + lengths.mean() * moved).float()
        outputs = strategy.server.predict("mlp", sample, strategy.server.proxy.data)
        torch.testing.assert_close(outputs.double(), drawn, rtol=0, atol=1e-5)


def test_mixtures_are_drawn_with_the_concentration_that_is_set(small, federate, watched):
    strategy, _ = federate(small(FAST | {"sampling": "dirichlet", "alpha": 0.3}, run__rounds=1))
    counts, states = zip(*watched.uploads, strict=True)
    for gamma, drawn in zip(strategy.rng().dirichlet([0.3] * 4, size=3), watched.teachers[1:4], strict=True):
        sample = {}
        for name in states[0]:
            x = np.stack([state[name].double().numpy() for state in states])
            mixed = np.average(x, axis=0, weights=gamma * np.array(counts))
            sample[name] = torch.from_numpy(mixed).float()
        outputs = strategy.server.predict("mlp", sample, strategy.server.proxy.data)
        torch.testing.assert_close(outputs.double(), drawn, rtol=0, atol=1e-5)


def test_clients_alone_without_sharpening_are_feddf_with_probabilities(small, federate, watched, monkeypatch):
    alone = FAST | {"samples": 0, "with_average": False, "exponent": 1.0}
    federate(small(alone, run__rounds=1))
    from strategies.feddf import FedDF

    other = Watched(monkeypatch, FedDF)
    federate(small({"name": "feddf", "steps": 1, "space": "probs"}, run__rounds=1))
    torch.testing.assert_close(watched.targets, other.targets, atol=1e-7, rtol=0)


@pytest.mark.parametrize("sampling", ["gaussian", "dirichlet", "steps"])
def test_sampling_disturbs_nobody_else(small, federate, tap_of, monkeypatch, sampling):
    from fedkd.client.task import Task
    from fedkd.server import distiller

    stream, epoch_order = Task.stream, distiller.epoch_order

    def run(samples):
        tap, batches, order = tap_of(), {}, []

        def private(task):
            for batch in stream(task):
                batches.setdefault((task.student.round, task.student.partition_id), []).append(batch)
                yield batch

        def public(*arguments, **options):
            made = list(epoch_order(*arguments, **options))
            order.extend(made)
            return made

        with monkeypatch.context() as patch:
            patch.setattr(Task, "stream", private)
            patch.setattr(distiller, "epoch_order", public)
            method = FAST | {"sampling": sampling, "samples": samples}
            scenario = small(method, **BN, data__augment="crop-flip", system__trainer="sequential", run__rounds=2)
            strategy, events = federate(scenario, mods=[tap])
        assert len(strategy.drawn) == 1 + samples
        selected = [event["clients"] for event in events if event["event"] == "started"]
        uploads = {passed.client: passed.up.get(Weights).state for passed in tap.of(1)}
        return selected, batches, order, uploads, strategy.students["cnn"]

    selected, batches, order, uploads, student = run(samples=0)
    same_selected, same_batches, same_order, same_uploads, other_student = run(samples=3)
    assert selected == same_selected and len(selected) == 2
    trained = {(round, client) for round, chosen in enumerate(selected, 1) for client in chosen}
    assert batches.keys() == same_batches.keys() == trained
    for key, seen in batches.items():  # augmented samples, labels and ids
        for one, two in zip(seen, same_batches[key], strict=True):
            assert all(map(torch.equal, one, two))
    assert len(order) == 2 * 2 * 4 and all(map(np.array_equal, order, same_order))
    assert uploads.keys() == same_uploads.keys() == set(selected[0])
    for client, state in uploads.items():
        assert all(torch.equal(tensor, same_uploads[client][name]) for name, tensor in state.items())
    assert not torch.equal(student["head.weight"], other_student["head.weight"])  # samples do teach


def test_the_student_is_the_mean_of_snapshots(small, federate, monkeypatch):
    from fedkd.server import distiller

    taken = []
    add = distiller.StateMean.add
    monkeypatch.setattr(
        distiller.StateMean,
        "add",
        lambda mean, state, weight=1.0: (
            taken.append({k: v.clone() for k, v in state.items()}) if mean.name == "the student" else None,
            add(mean, state, weight),
        )[-1],
    )
    strategy, events = federate(small(FAST, run__rounds=1))
    # 60 samples in batches of 16, twice: 8 steps; snapshots after 2, 4, 6 and 8.
    assert rounds_of(events)[0]["distill"]["mlp"]["steps"] == 8 and len(taken) == 4
    for name, tensor in strategy.students["mlp"].items():
        mean = torch.stack([state[name].double() for state in taken]).mean(0)
        torch.testing.assert_close(tensor.double(), mean, atol=1e-6, rtol=0)


# Halfway to the first end of a cycle, then cycles of four steps that end where snapshots are taken: after 2, 6 and 10.
CYCLES = [3 / 4, 1, 1 / 4, 1 / 2, 3 / 4, 1, 1 / 4, 1 / 2, 3 / 4, 1, 1 / 4, 1 / 2]


@pytest.mark.parametrize(
    ("schedule", "reduction", "fractions"), [("cyclic", "mean_all", CYCLES), ("constant", "batchmean", [0] * 12)]
)
def test_a_distillation_by_hand(distilled, linear_case, schedule, reduction, fractions):
    from strategies.fedbe import FedBE

    z, x, start = linear_case
    rates = {"lr": 0.05, "lr_low": 0.02, "schedule": schedule}
    method = FedBE(epochs=4, batch_size=5, reduction=reduction, swa_start=2, swa_every=4, **rates)
    student, batches, [report] = distilled(method, z, x, start)
    assert [len(rows) for rows in batches] == [5, 5, 2] * 4

    p = torch.from_numpy(z).softmax(-1).mean(0)
    target = (p**2 / (p**2).sum(1, keepdim=True)).float().double()
    x, weights, velocity = torch.from_numpy(x), torch.from_numpy(start).requires_grad_(), torch.zeros(4, 5)
    norms, losses, snapshots = [], [], []
    for rows, fraction in zip(batches, fractions, strict=True):
        log_q = (x[rows] @ weights.T).log_softmax(1)
        divergences = (target[rows] * (target[rows].log() - log_q)).sum(1)
        loss = divergences.mean() / (4 if reduction == "mean_all" else 1)
        [gradient] = torch.autograd.grad(loss, [weights])
        with torch.no_grad():
            velocity = 0.9 * velocity + gradient + 1e-5 * weights
            weights -= (0.05 + (0.02 - 0.05) * fraction) * velocity
        norms.append(float(gradient.norm()))
        losses.append(float(loss.detach()))
        if len(losses) in (2, 6, 10):
            snapshots.append(weights.detach().clone())
    assert max(norms) > 6  # nothing is clipped
    torch.testing.assert_close(student, torch.stack(snapshots).mean(0), rtol=0, atol=1e-7)
    assert (report["loss_first"], report["loss_last"]) == pytest.approx((losses[0], losses[-1]), rel=1e-6)


def test_norm_statistics_are_estimated_afresh_on_the_proxy_set(small, federate):
    strategy, _ = federate(small(FAST | {"batch_size": 60}, **BN, proxy__size=60, run__rounds=1))
    server = strategy.server
    model = server.model("cnn", strategy.students["cnn"]).eval()
    x = server.proxy.data.gather(torch.arange(60), channels_last=server.channels_last).x
    first = model.body.stages[0]
    maps = first[0](x)
    norm = first[1]
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), atol=1e-4, rtol=1e-3)


def test_presets_and_nobody_to_learn_from(small, federate):
    from fedkd import plugins

    paper = plugins.make_strategy(small({"name": "fedbe"}))
    code = plugins.make_strategy(small({"name": "fedbe", "preset": "code"}))
    assert (paper.sampling, paper.schedule, paper.reduction) == ("gaussian", "cyclic", "mean_all")
    assert (code.sampling, code.schedule, code.reduction) == ("steps", "constant", "mean_all")
    with pytest.raises(ScenarioError, match="there are no teachers"):
        plugins.make_strategy(small({"name": "fedbe", "samples": 0, "with_average": False, "with_clients": False}))
    with pytest.raises(ScenarioError, match="needs one model for all clients"):
        run.prepare(small(FAST, models__student=["mlp", "cnn"], models__options={}, data__options=IMAGES))


@pytest.mark.parametrize("buffers", ["all", "params_only"])
def test_two_rounds_with_batch_norm_and_bytes(small, federate, buffers):
    scenario = small(FAST | {"sampling": "steps"}, **BN, models__buffers=buffers, run__rounds=2)
    strategy, events = federate(scenario)
    theta = sum(tensor.nbytes for tensor in strategy.server.initial("cnn").values())
    for event in rounds_of(events):
        assert event["bytes_up"] == {"weights": 4 * theta} == event["bytes_down"]
        assert 0 <= event["predictors"]["ensemble"]["accuracy"] <= 1


def test_two_rounds_on_digits(small, federate):
    data = {"source": "digits", "train_samples": 400, "test_samples": 100, "options": {}}
    _, events = federate(small(FAST | {"samples": 2}, data=data, models__student="cnn", models__options={}))
    assert len(rounds_of(events)) == 3


def test_a_poisoned_upload_is_refused_and_the_round_goes_on(small, federate):
    _, events = federate(small(FAST, faults__nan=0.4, run__rounds=2))
    refused = [e for e in events if e["event"] == "refused"]
    assert refused and all("NaN" in e["reason"] for e in refused)
    assert rounds_of(events)[-1]["received"] < 4
