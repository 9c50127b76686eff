"""Distillation on the server: steps by hand, early stopping, what is returned, norm buffers, refusals."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkd.data.batches import ArrayData
from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, RunError, ScenarioError
from fedkd.models import Outputs, build
from fedkd.seeds import Purpose, rng
from fedkd.server.distiller import Distiller
from fedkd.server.ensemble import Ensemble
from fedkd.server.members import ModelMember
from fedkd.server.targets import Targets
from fedkd.students import predict


class Net(nn.Module):
    """A linear map behind any layers."""

    def __init__(self, d: int, classes: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(d, classes, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Outputs:
        h = self.layers(x)
        return Outputs(self.head(h), h)


def vectors(rows: list[list[float]] | np.ndarray) -> ArrayData:
    return ArrayData(np.array(rows, dtype=np.float32), kind="vector")


def gaussian(n: int, d: int = 3, seed: int = 0) -> ArrayData:
    return vectors(np.random.default_rng(seed).normal(size=(n, d)))


def targets_for(values: list[list[float]], space: str = "logits", ids: list[int] | None = None) -> Targets:
    return Targets(torch.tensor(values), space, torch.tensor(ids or range(len(values))))


def noise_targets(n: int, classes: int = 4) -> Targets:
    generator = torch.Generator().manual_seed(1)
    return Targets(torch.randn(n, classes, generator=generator), "logits", torch.arange(n))


def plain(**options) -> Distiller:
    settings = {"reduction": "batchmean", "t_squared": False, "optimizer": "sgd", "lr": 0.1}
    return Distiller(**{**settings, "schedule": "constant", "clip": 0.0, **options})


def generator() -> np.random.Generator:
    return rng(0, Purpose.DISTILLATION, 1)


# --- steps by hand ------------------------------------------------------------------------------------------


def test_one_step_of_sgd_by_hand() -> None:
    # x = 2, logits (0, 0), student (1/2, 1/2), target (3/4, 1/4).
    # KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.304099 - 0.173287 = 0.130812
    # d KL / d logits = s - t = (-1/4, 1/4); d KL / d weight = 2·(-1/4, 1/4); step of 0.1: (0.05, -0.05)
    model = Net(1, 2)
    report = plain(steps=1).fit(model, vectors([[2.0]]), targets_for([[0.75, 0.25]], "probs"), generator=generator())
    assert model.head.weight.flatten().tolist() == pytest.approx([0.05, -0.05])
    assert report.loss_first == pytest.approx(0.130812, abs=1e-6) == report.loss_last
    assert (report.steps, report.best_score, report.stopped_early) == (1, None, False)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"reduction": "mean_all"}, 1 / 2),  # two classes
        ({"clip": 0.1}, 0.1 / math.sqrt(0.5)),  # the gradient (-1/2, 1/2) has norm √(1/2)
        ({"clip": 5.0}, 1),
        ({"lr": 0.3}, 3),
        ({"kind": "soft_ce"}, 1),
    ],
)
def test_settings_of_a_step_by_hand(options: dict, factor: float) -> None:
    model = Net(1, 2)
    plain(steps=1, **options).fit(model, vectors([[2.0]]), targets_for([[0.75, 0.25]], "probs"), generator=generator())
    assert model.head.weight.flatten().tolist() == pytest.approx([0.05 * factor, -0.05 * factor], rel=1e-4)


def test_temperature_by_hand() -> None:
    # Target logits (log 9, 0) at T = 2 are (3/4, 1/4); gradient (s - t)/T: half of the step above; T²: twice
    for t_squared, factor in ((False, 0.5), (True, 2.0)):
        model = Net(1, 2)
        plain(steps=1, temperature=2.0, t_squared=t_squared).fit(
            model, vectors([[2.0]]), targets_for([[math.log(9), 0.0]]), generator=generator()
        )
        assert model.head.weight.flatten().tolist() == pytest.approx([0.05 * factor, -0.05 * factor])


def test_momentum_and_weight_decay_by_hand() -> None:
    # Mean squared logits: the loss (w·1 - 1)² has gradient 2(w - 1).
    # Step 1, w = 0: g = -2, v = -2, w = 0.2.
    # Step 2: g = 2(0.2 - 1) + 0.5·0.2 = -1.5, v = 0.9·(-2) - 1.5 = -3.3, w = 0.2 + 0.33
    model = Net(1, 1)
    plain(steps=2, kind="mse", momentum=0.9, weight_decay=0.5).fit(
        model, vectors([[1.0]]), targets_for([[1.0]]), generator=generator()
    )
    assert model.head.weight.item() == pytest.approx(0.53)


def test_adam_and_cosine_by_hand() -> None:
    # Adam's first step is lr·sign(g). Of two steps, the rates are lr and lr·(1 + cos(π/2))/2 = lr/2;
    # with an equal gradient (mae: always -1) the second step is its rate again: 0.1 + 0.05
    model = Net(1, 1)
    plain(steps=2, kind="mae", optimizer="adam", schedule="cosine").fit(
        model, vectors([[1.0]]), targets_for([[9.0]]), generator=generator()
    )
    assert model.head.weight.item() == pytest.approx(0.15, abs=1e-6)


def test_defaults_are_those_of_feddf() -> None:
    d = Distiller(reduction="batchmean", t_squared=False)
    assert (d.optimizer, d.lr, d.schedule, d.steps, d.clip) == ("adam", 1e-3, "cosine", 10_000, 5.0)
    assert (d.check_every, d.patience, d.returns, d.kind, d.temperature) == (100, 1_000, "best", "kl", 1.0)
    assert d.norm_buffers == "train"  # statistics of BatchNorm move to the proxy set
    with pytest.raises(TypeError):
        Distiller()  # type: ignore[call-arg]


# --- one client ---------------------------------------------------------------------------------------------


def test_one_client_means_no_loss() -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    data = ArrayData(images, kind="image", mean=(0.5,), std=(0.25,))
    model = build("cnn", num_classes=3, input_shape=(1, 8, 8), kind="image")
    targets = Ensemble([ModelMember(model, model.state_dict())]).targets(data)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = plain(steps=3, batch_size=6).fit(
        model, ProxySet(data, False, True, "test"), targets, generator=generator()
    )
    assert report.loss_first == pytest.approx(0.0, abs=1e-6)
    assert all(torch.allclose(before[k], v, atol=1e-6) for k, v in model.state_dict().items())


def test_distillation_approaches_the_teacher() -> None:
    data, teacher, student = gaussian(64), Net(3, 4), Net(3, 4)
    nn.init.normal_(teacher.head.weight, generator=torch.Generator().manual_seed(0))
    targets = Ensemble([ModelMember(teacher)]).targets(data)
    report = Distiller(reduction="batchmean", t_squared=False, lr=0.05, steps=200, batch_size=32).fit(
        student, data, targets, generator=generator()
    )
    assert report.loss_last < 0.01 * report.loss_first
    agree = predict(student, data, range(64)).argmax(1) == targets.values.argmax(1)
    assert agree.float().mean() > 0.95


# --- batches ------------------------------------------------------------------------------------------------


class Recording(ArrayData):
    """Remembers which samples were asked for."""

    def gather(self, ids, **options):  # type: ignore[override]
        self.asked = [*getattr(self, "asked", []), torch.as_tensor(ids).tolist()]
        return super().gather(ids, **options)


def test_only_samples_with_targets_are_drawn() -> None:
    data = Recording(np.ones((10, 3), dtype=np.float32), kind="vector")
    targets = targets_for([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], ids=[7, 2, 4])
    plain(steps=0, epochs=2, batch_size=2).fit(Net(3, 2), data, targets, generator=generator())
    assert [len(batch) for batch in data.asked] == [2, 1, 2, 1]
    assert sorted(chain(*data.asked[:2])) == [2, 4, 7] == sorted(chain(*data.asked[2:]))


def test_steps_cycle_through_reshuffled_passes() -> None:
    data = Recording(np.ones((5, 3), dtype=np.float32), kind="vector")
    report = plain(steps=7, batch_size=2).fit(Net(3, 4), data, noise_targets(5), generator=generator())
    assert report.steps == 7 == len(data.asked)
    passes = [list(chain(*data.asked[0:3])), list(chain(*data.asked[3:6]))]
    assert sorted(passes[0]) == sorted(passes[1]) == [0, 1, 2, 3, 4]
    assert passes[0] != passes[1]


def test_targets_follow_their_samples() -> None:
    # One-hot samples: row i of the weights (transposed) moves towards the target of sample i alone
    data, targets = vectors(np.eye(3)), targets_for([[9.0], [5.0], [-1.0]], ids=[2, 0, 1])
    model = Net(3, 1)
    plain(steps=0, epochs=200, batch_size=2, kind="mse").fit(model, data, targets, generator=generator())
    assert model.head.weight.flatten().tolist() == pytest.approx([5.0, -1.0, 9.0], abs=1e-3)


def test_same_generator_same_bits_and_global_generator_untouched() -> None:
    data, states = gaussian(20), []
    for _ in range(2):
        model = Net(3, 4, nn.Dropout(0.5))
        before = torch.random.get_rng_state()
        plain(steps=9, batch_size=4).fit(model, data, noise_targets(20), generator=generator())
        assert torch.equal(before, torch.random.get_rng_state())
        states.append(model.head.weight.detach().clone())
    assert torch.equal(states[0], states[1])


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_bf16_is_near_float32_and_leaves_weights_and_losses_in_float32(norm: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    data = ArrayData(images, kind="image", mean=(0.5,), std=(0.25,))
    losses: list[Tensor] = []
    found = []
    for precision in ("fp32", "bf16", "bf16"):
        model = build("cnn", num_classes=3, input_shape=(1, 8, 8), kind="image", norm=norm)
        report = Distiller(
            reduction="batchmean", t_squared=False, steps=20, batch_size=8, channels_last=True, precision=precision
        ).fit(
            model,
            data,
            noise_targets(24, classes=3),
            generator=generator(),
            on_step=lambda step, loss: losses.append(loss),
        )
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        found.append((report.loss_last, torch.cat([tensor.flatten().detach() for tensor in model.parameters()])))
    assert {loss.dtype for loss in losses} == {torch.float32} and len(losses) == 60
    (full, weights), (half, other), (again, same) = found
    assert half == pytest.approx(full, rel=0.05) and not torch.equal(weights, other)
    assert half == again and torch.equal(other, same)


# --- validation ---------------------------------------------------------------------------------------------


def scripted(scores: list[float]):
    """A validation that returns scores in turn, and remembers the weights it saw."""
    seen: list[Tensor] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        seen.append(model.head.weight.detach().clone())  # type: ignore[union-attr, operator]
        return scores[len(seen) - 1]

    return validate, seen


def test_patience_and_best() -> None:
    validate, seen = scripted([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    model = Net(3, 4)
    report = plain(steps=100, check_every=10, patience=30, returns="best").fit(
        model, gaussian(20), noise_targets(20), generator=generator(), validate=validate
    )
    # best after 20 steps; 30, 40 (equal is not better) and 50 are not: 30 steps without improvement
    assert (report.steps, report.best_step, report.best_score, report.stopped_early) == (50, 20, 0.5, True)
    assert torch.equal(model.head.weight, seen[1]) and not torch.equal(seen[1], seen[4])
    assert model.training  # the mode that it came with


def test_last_in_spite_of_validation_and_a_check_after_the_last_step() -> None:
    validate, seen = scripted([0.9, 0.1, 0.2])
    model = Net(3, 4)
    report = plain(steps=25, check_every=10, patience=0, returns="last").fit(
        model, gaussian(20), noise_targets(20), generator=generator(), validate=validate
    )
    assert len(seen) == 3 and (report.best_score, report.best_step, report.stopped_early) == (0.9, 10, False)
    assert torch.equal(model.head.weight, seen[2])


def test_scores_of_nan_are_never_best() -> None:
    validate, seen = scripted([float("nan"), 0.2, float("nan")])
    model = Net(3, 4)
    report = plain(steps=3, check_every=1).fit(
        model, gaussian(20), noise_targets(20), generator=generator(), validate=validate
    )
    assert report.best_step == 2 and torch.equal(model.head.weight, seen[1])


def test_best_without_validation_is_the_last() -> None:
    models = [Net(3, 4), Net(3, 4)]
    for model, returns in zip(models, ("best", "last"), strict=True):
        plain(steps=5, returns=returns).fit(model, gaussian(20), noise_targets(20), generator=generator())
    assert torch.equal(models[0].head.weight, models[1].head.weight)


def test_on_step() -> None:
    calls: list[tuple[int, float]] = []
    report = plain(steps=3).fit(
        Net(3, 4),
        gaussian(20),
        noise_targets(20),
        generator=generator(),
        on_step=lambda step, loss: calls.append((step, float(loss))),
    )
    assert [step for step, _ in calls] == [1, 2, 3]
    assert (calls[0][1], calls[-1][1]) == (report.loss_first, report.loss_last)


# --- weight averages ----------------------------------------------------------------------------------------


def test_swa_by_hand() -> None:
    # mae with a far target: every step of SGD adds 0.1, w = 0.1·step; snapshots after 2 and 5: (0.2 + 0.5)/2
    model = Net(1, 1)
    plain(steps=6, kind="mae", returns="swa", swa_start=2, swa_every=3).fit(
        model, vectors([[1.0]]), targets_for([[9.0]]), generator=generator()
    )
    assert model.head.weight.item() == pytest.approx(0.35)


def test_swa_without_snapshots_is_the_last() -> None:
    model = Net(1, 1)
    plain(steps=6, kind="mae", returns="swa", swa_start=7).fit(
        model, vectors([[1.0]]), targets_for([[9.0]]), generator=generator()
    )
    assert model.head.weight.item() == pytest.approx(0.6)


# --- norm buffers -------------------------------------------------------------------------------------------

FOUR = vectors([[0.0], [2.0], [4.0], [6.0]])  # mean 3, unbiased variance (9 + 1 + 1 + 9)/3 = 20/3


def distil_norm(norm_buffers: str, n: int = 4, **options) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(1)
    model = Net(1, 2, norm)
    model.eval()
    targets = targets_for([[1.0, 0.0]] * n)
    plain(**{"steps": 2, "batch_size": 4, "norm_buffers": norm_buffers, **options}).fit(
        model, FOUR, targets, generator=generator()
    )
    assert not model.training and not norm.training
    return norm


def test_norm_buffers_by_hand() -> None:
    norm = distil_norm("train")
    # momentum 0.1, twice the same batch: 0 → 0.3 → 0.27 + 0.3
    assert norm.running_mean is not None and norm.running_mean.item() == pytest.approx(0.57)
    norm = distil_norm("frozen")
    assert norm.running_mean is not None and norm.running_mean.item() == 0.0
    assert norm.running_var is not None and norm.running_var.item() == 1.0
    norm = distil_norm("reestimate")
    assert norm.running_mean is not None and norm.running_mean.item() == pytest.approx(3.0)
    assert norm.running_var is not None and norm.running_var.item() == pytest.approx(20 / 3)
    assert norm.momentum == 0.1


def test_reestimate_averages_over_batches() -> None:
    # batches of 2: means 1 and 5, unbiased variances 2 and 2
    norm = distil_norm("reestimate", batch_size=2)
    assert norm.running_mean is not None and norm.running_mean.item() == pytest.approx(3.0)
    assert norm.running_var is not None and norm.running_var.item() == pytest.approx(2.0)


def test_last_batch_of_one_is_dropped_for_batch_norm() -> None:
    data = Recording(np.arange(5, dtype=np.float32).reshape(5, 1), kind="vector")
    model = Net(1, 4, nn.BatchNorm1d(1))
    report = plain(steps=0, epochs=2, batch_size=2, norm_buffers="reestimate").fit(
        model, data, noise_targets(5), generator=generator()
    )
    assert report.steps == 4 and all(len(batch) == 2 for batch in data.asked)


def test_batches_of_one_are_refused_for_batch_norm_alone() -> None:
    for options in ({"batch_size": 1}, {"n": 1}):
        with pytest.raises(ScenarioError, match="BatchNorm needs batches of at least 2"):
            distil_norm("train", **options)
    distil_norm("frozen", batch_size=1)
    plain(steps=1, batch_size=1).fit(Net(3, 4), gaussian(5), noise_targets(5), generator=generator())


# --- refusals -----------------------------------------------------------------------------------------------


def test_divergence_is_named() -> None:
    model = Net(3, 4)
    with pytest.raises(RunError, match=r"diverged within \d+ steps.*lower the learning rate \(1e\+30\)"):
        plain(steps=50, lr=1e30, kind="mse", check_every=10).fit(
            model, gaussian(20), noise_targets(20), generator=generator()
        )


def test_samples_that_are_not_finite_are_named() -> None:
    rows = np.ones((5, 3), dtype=np.float32)
    rows[3, 1] = np.nan
    with pytest.raises(RunError, match="proxy sample 3 holds NaN"):
        plain(steps=5).fit(Net(3, 4), vectors(rows), noise_targets(5), generator=generator())


def test_a_student_that_is_not_finite_is_named() -> None:
    model = Net(3, 4)
    nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(RunError, match="before its distillation"):
        plain(steps=5).fit(model, gaussian(5), noise_targets(5), generator=generator())


def test_no_targets() -> None:
    empty = Targets(torch.zeros(0, 4), "logits", torch.zeros(0, dtype=torch.long))
    with pytest.raises(KnowledgeError, match="no sample has a target"):
        plain().fit(Net(3, 4), gaussian(5), empty, generator=generator())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"reduction": "mean"}, "reduction 'mean'"),
        ({"kind": "js"}, "kind 'js'"),
        ({"returns": "first"}, "returns 'first'"),
        ({"norm_buffers": "all"}, "norm_buffers 'all'"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"schedule": "linear"}, "schedule 'linear'"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": float("nan")}, "lr must be > 0, is nan"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"clip": -1.0}, "clip must be >= 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"check_every": 0}, "check_every must be at least 1"),
        ({"steps": 0, "epochs": 0}, "both 0"),
    ],
)
def test_settings_are_checked_at_construction(options: dict, reason: str) -> None:
    with pytest.raises(ScenarioError, match=reason):
        plain(**options)


# --- cycles, a start that is compared, an optimiser that goes on ----------------------------------------------


def test_cycles_of_the_learning_rate_by_hand() -> None:
    # mae with a far target: every step of SGD adds its rate. Cycles of 4 from 0.8 to 0.2: 0.65, 0.5, 0.35, 0.2
    model, weights = Net(1, 1), []
    plain(steps=6, kind="mae", lr=0.8, schedule="cyclic", lr_low=0.2, cycle=4).fit(
        model,
        vectors([[1.0]]),
        targets_for([[99.0]]),
        generator=generator(),
        on_step=lambda step, loss: weights.append(model.head.weight.item()),
    )
    assert np.diff([0.0, *weights]).tolist() == pytest.approx([0.65, 0.5, 0.35, 0.2, 0.65, 0.5])


@pytest.mark.parametrize(("start", "every"), [(500, 25), (510, 25), (0, 25)])
def test_snapshots_are_at_ends_of_cycles(start: int, every: int) -> None:
    distiller = plain(lr=0.8, schedule="cyclic", lr_low=0.2, cycle=every, swa_start=start, swa_every=every)
    rates = [distiller._rate(step, 1000) for step in range(start + 3 * every)]
    assert [rates[start + k * every - 1] for k in (1, 2, 3)] == pytest.approx([0.2] * 3)
    assert sum(rate == pytest.approx(0.2) for rate in rates[start:]) == 3


@pytest.mark.parametrize(
    ("compare", "scores", "best"),
    [
        (True, [0.9, 0.5, 0.8], 0),
        (True, [0.9, 0.5, 0.9], 2),  # as good as the start is good enough
        (True, [0.4, 0.5, 0.3], 1),
        (False, [0.5, 0.3], 1),
    ],
)
def test_a_start_that_nothing_equals_is_returned(compare: bool, scores: list[float], best: int) -> None:
    validate, seen = scripted(scores)
    model = Net(3, 4)
    report = plain(steps=2, check_every=1, returns="best", compare_start=compare).fit(
        model, gaussian(20), noise_targets(20), generator=generator(), validate=validate
    )
    at = best if compare else best - 1
    assert (report.best_step, report.best_score, len(seen)) == (best, scores[at], len(scores))
    assert torch.equal(model.head.weight, seen[at])


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"optimizer": "sgd", "momentum": 0.9}, {}])
def test_two_fits_that_carry_the_optimiser_are_one_long_fit(options: dict) -> None:
    data, targets = gaussian(8), noise_targets(8)
    settings = {"batch_size": 8, "lr": 0.05, **options}
    whole, halves, fresh = Net(3, 4), Net(3, 4), Net(3, 4)
    order = [np.arange(8)] * 6
    plain(**settings).fit(whole, data, targets, generator=generator(), order=order)
    carried: dict = {}
    for _ in range(2):
        plain(**settings).fit(halves, data, targets, generator=generator(), order=order[:3], carried=carried)
        plain(**settings).fit(fresh, data, targets, generator=generator(), order=order[:3])
    assert torch.equal(whole.head.weight, halves.head.weight)
    assert torch.equal(whole.head.weight, fresh.head.weight) == (not options)
    assert carried.keys() == {"head.weight"}


def test_the_state_of_an_optimiser_goes_through_a_checkpoint(tmp_path) -> None:
    from fedkd import checkpoint

    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    data = ArrayData(images, kind="image", mean=(0.5,), std=(0.25,))
    ends = []
    for through_disk in (False, True):
        model = build("cnn", num_classes=3, input_shape=(1, 8, 8), kind="image")
        carried: dict = {}
        for _ in range(2):
            plain(optimizer="adam", steps=3, batch_size=8, lr=0.01, channels_last=True).fit(
                model, data, noise_targets(24, 3), generator=generator(), carried=carried
            )
            if through_disk:
                checkpoint.save(carried, tmp_path)
                carried = checkpoint.load(tmp_path)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*ends)
