import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import pearsonr
from torch.func import grad, vmap

from fedkd.losses import cross_entropy, kd, not_true_mask
from fedkd.losses.response import correlation, cross_entropies, decoupled_kd

# Logits whose probabilities are simple: student (1/2, 1/2) and (3/4, 1/4), teacher (4/5, 1/5) and (1/2, 1/2).
STUDENT = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
TEACHER = torch.tensor([[math.log(4), 0.0], [0.0, 0.0]])
# Sums over classes of t log(t/s), and of s log(s/t), by hand.
FORWARD = (0.8 * math.log(1.6) + 0.2 * math.log(0.4), 0.5 * math.log(2 / 3) + 0.5 * math.log(2))
REVERSE = (0.5 * math.log(0.625) + 0.5 * math.log(2.5), 0.75 * math.log(1.5) + 0.25 * math.log(0.5))
PLAIN = {"temperature": 1.0, "reduction": "batchmean", "t_squared": False}
KINDS = ("kl", "soft_ce", "mse", "mae")


def close(loss: torch.Tensor, expected: float, tolerance: float = 1e-6) -> None:
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_direction_and_reduction_against_hand_computed_values():
    close(kd(STUDENT, TEACHER, **PLAIN), sum(FORWARD) / 2)
    close(kd(STUDENT, TEACHER, **PLAIN, direction="reverse"), sum(REVERSE) / 2)
    close(kd(STUDENT, TEACHER, **PLAIN, direction="symmetric"), (sum(FORWARD) + sum(REVERSE)) / 4)
    close(kd(STUDENT, TEACHER, **PLAIN | {"reduction": "mean_all"}), sum(FORWARD) / 4)
    # Arguments cannot be exchanged unnoticed.
    assert abs(sum(FORWARD) - sum(REVERSE)) > 0.01


def test_kinds_against_hand_computed_values():
    cross = -(0.8 + 0.2) * math.log(0.5), -0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    close(kd(STUDENT, TEACHER, **PLAIN, kind="soft_ce"), sum(cross) / 2)
    close(kd(STUDENT, TEACHER, **PLAIN, kind="mse"), (math.log(4) ** 2 + math.log(3) ** 2) / 2)
    close(kd(STUDENT, TEACHER, **PLAIN, kind="mae"), (math.log(4) + math.log(3)) / 2)
    probs = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    close(kd(STUDENT, probs, **PLAIN, kind="mse", target_space="probs"), (2 * 0.09 + 2 * 0.0625) / 2)
    close(kd(STUDENT, probs, **PLAIN, kind="mae", target_space="probs"), (2 * 0.3 + 2 * 0.25) / 2)
    close(kd(STUDENT, probs, **PLAIN, target_space="probs"), sum(FORWARD) / 2)


def test_temperature_softens_both_and_t_squared_multiplies():
    # At T = 2, logits of twice the size have the probabilities of the originals at T = 1.
    at_two = PLAIN | {"temperature": 2.0}
    close(kd(2 * STUDENT, 2 * TEACHER, **at_two), sum(FORWARD) / 2)
    close(kd(2 * STUDENT, 2 * TEACHER, **at_two | {"t_squared": True}), 4 * sum(FORWARD) / 2)
    # Probabilities are taken as they are; differences of logits know no temperature.
    probs = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    close(kd(2 * STUDENT, probs, **at_two, target_space="probs"), sum(FORWARD) / 2)
    mse = kd(STUDENT, TEACHER, **at_two | {"t_squared": True}, kind="mse")
    close(mse, (math.log(4) ** 2 + math.log(3) ** 2) / 2)


def test_weights_against_hand_computed_values():
    samples = torch.tensor([3.0, 0.0])
    close(kd(STUDENT, TEACHER, **PLAIN, sample_weight=samples), 3 * FORWARD[0] / 2)
    close(
        kd(STUDENT, TEACHER, **PLAIN, kind="mse", class_weight=torch.tensor([2.0, 9.0])),
        2 * (math.log(4) ** 2 + math.log(3) ** 2) / 2,
    )
    each = torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    close(kd(STUDENT, TEACHER, **PLAIN, kind="mse", class_weight=each), 0.5 * math.log(3) ** 2 / 2)


def test_class_mask_leaves_classes_out_before_the_softmax():
    # Logits log(1, 1, 2) and log(3, 1, 5); without class 2 they are (1/2, 1/2) and (3/4, 1/4).
    student = torch.tensor([[1.0, 1.0, 2.0]]).log()
    teacher = torch.tensor([[3.0, 1.0, 5.0]]).log()
    mask = torch.tensor([True, True, False])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    close(kd(student, teacher, **PLAIN, class_mask=mask), expected)
    close(kd(student, teacher, **PLAIN | {"reduction": "mean_all"}, class_mask=mask), expected / 2)
    probs = torch.tensor([[3.0, 1.0, 5.0]]) / 9
    close(kd(student, probs, **PLAIN, class_mask=mask[None], target_space="probs"), expected)
    close(kd(student, teacher, **PLAIN, class_mask=mask, kind="mae"), math.log(3))


@pytest.mark.parametrize("kind", ["kl", "soft_ce"])
def test_not_true_distillation_with_two_classes_is_nothing(kind):
    student = torch.tensor([[1.0, -2.0], [0.3, 5.0]], requires_grad=True)
    teacher = torch.tensor([[0.1, 4.0], [-3.0, 0.2]])
    mask = not_true_mask(torch.tensor([0, 1]), 2)
    loss = kd(student, teacher, temperature=3.0, reduction="batchmean", t_squared=True, class_mask=mask, kind=kind)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None and not student.grad.any()


def test_a_sample_without_classes_counts_as_zero():
    mask = torch.tensor([[True, True], [False, False]])
    student = STUDENT.clone().requires_grad_()
    loss = kd(student, TEACHER, **PLAIN, class_mask=mask)
    loss.backward()
    close(loss, FORWARD[0] / 2)
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[1].any()


def test_not_true_mask_of_unlabelled_samples_keeps_all():
    assert not_true_mask(torch.tensor([1, -1]), 3).tolist() == [[True, False, True], [True, True, True]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    direction=st.sampled_from(["forward", "reverse", "symmetric"]),
    kind=st.sampled_from(KINDS),
    masked=st.booleans(),
)
def test_zero_for_equal_models_and_never_negative(seed, temperature, direction, kind, masked):
    generator = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = not_true_mask(torch.arange(5) % 4, 4) if masked else None
    setting = {
        "temperature": temperature,
        "reduction": "batchmean",
        "t_squared": False,
        "direction": direction,
        "kind": kind,
        "class_mask": mask,
    }
    assert kd(a, b, **setting).item() >= -1e-12
    same = kd(a, a, **setting).item()
    if kind == "soft_ce":
        logits = a.numpy() / temperature
        logits = np.where(mask.numpy(), logits, -np.inf) if mask is not None else logits
        p = softmax(logits, axis=1)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1).mean()
        assert same == pytest.approx(entropy)
    else:
        assert same == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_against_numpy(seed, direction):
    rng = np.random.default_rng(seed)
    a, b, w = rng.normal(size=(6, 5)) * 4, rng.normal(size=(6, 5)) * 4, rng.random(6)
    log_s, log_t = log_softmax(a / 2.5, axis=1), log_softmax(b / 2.5, axis=1)
    first, second = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    expected = sum(w[n] * math.exp(first[n, c]) * (first[n, c] - second[n, c]) for n in range(6) for c in range(5))
    loss = kd(
        torch.from_numpy(a),
        torch.from_numpy(b),
        temperature=2.5,
        reduction="mean_all",
        t_squared=True,
        direction=direction,
        sample_weight=torch.from_numpy(w),
    )
    close(loss, expected / 30 * 6.25, 1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["logits", "probs"])
def test_extreme_inputs_give_finite_gradients(kind, direction, space):
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e4]], requires_grad=True)
    certain = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    target = certain if space == "probs" else -student.detach()
    for mask in (None, not_true_mask(torch.tensor([0, 1, 2]), 3)):
        loss = kd(
            student,
            target,
            temperature=0.5,
            reduction="batchmean",
            t_squared=True,
            kind=kind,
            direction=direction,
            target_space=space,
            class_mask=mask,
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()


def test_half_precision_is_computed_in_float32():
    loss = kd(STUDENT.bfloat16(), TEACHER.bfloat16(), **PLAIN)
    assert loss.dtype == torch.float32
    close(loss, sum(FORWARD) / 2, 1e-2)


LABELS = torch.tensor([1, 0])
BY_LABEL = [-math.log(0.5), -math.log(0.75)]  # of STUDENT, by hand


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_has_at_least_float32_with_vmap_and_autocast_too(given, computed, together, autocast):
    logits = STUDENT.double().to(given)
    # By NumPy in float64 for the rounded logits, so that only the arithmetic of the loss is measured.
    expected = -log_softmax(logits.double().numpy(), axis=1)[np.arange(2), LABELS.numpy()]
    assert expected == pytest.approx(BY_LABEL, rel=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for loss, value in ((cross_entropy, expected.mean()), (cross_entropies, expected)):
            found = vmap(loss)(logits[None], LABELS[None])[0] if together else loss(logits, LABELS)
            assert found.dtype == computed
            assert found.numpy() == pytest.approx(value, rel=1e-6)


def test_gradients_reach_the_target_too():
    target = TEACHER.clone().requires_grad_()
    kd(STUDENT, target, **PLAIN).backward()
    assert target.grad is not None and target.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_a_loop(kind):
    generator = torch.Generator().manual_seed(0)
    students, teachers = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    labels = torch.randint(0, 5, (3, 4), generator=generator)

    def loss(student, teacher, y):
        mask = not_true_mask(y, 5)
        return kd(
            student,
            teacher,
            temperature=2.0,
            reduction="mean_all",
            t_squared=True,
            kind=kind,
            class_mask=mask,
        )

    losses, gradients = vmap(loss)(students, teachers, labels), vmap(grad(loss))(students, teachers, labels)
    for i in range(3):
        close(losses[i], loss(students[i], teachers[i], labels[i]).item())
        torch.testing.assert_close(gradients[i], grad(loss)(students[i], teachers[i], labels[i]))


def test_what_must_be_said_has_no_default():
    with pytest.raises(TypeError, match="reduction"):
        kd(STUDENT, TEACHER, temperature=1.0, t_squared=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="t_squared"):
        kd(STUDENT, TEACHER, temperature=1.0, reduction="batchmean")  # type: ignore[call-arg]


def test_wrong_shapes_and_choices_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        kd(STUDENT, TEACHER[:1], **PLAIN)
    with pytest.raises(ValueError, match="reduction must be one of"):
        kd(STUDENT, TEACHER, **PLAIN | {"reduction": "mean"})


def test_cross_entropy_by_hand():
    close(cross_entropy(STUDENT, torch.tensor([0, 1])), (math.log(2) + math.log(4)) / 2)


def test_cross_entropies_by_hand():
    np.testing.assert_allclose(cross_entropies(STUDENT, torch.tensor([0, 1])), [math.log(2), math.log(4)], rtol=1e-6)
    np.testing.assert_allclose(
        cross_entropies(STUDENT, torch.tensor([-1, 1])), [0.0, math.log(4)], rtol=1e-6
    )  # without a label there is no loss


@pytest.mark.parametrize("together", [False, True])
def test_a_label_that_is_missing_where_there_must_be_one_is_an_error(together):
    call = vmap(cross_entropy) if together else cross_entropy
    logits, labels = torch.zeros(2, 3, 4), torch.tensor([[0, 1, -1], [1, 2, 3]])
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        call(logits, labels) if together else call(logits[0], labels[0])


def test_cross_entropy_of_several_clients_is_that_of_each_without_taking_it_apart(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 6, dtype=torch.float64, generator=draw)
    labels = torch.randint(-1, 6, (3, 4), generator=draw)
    labels[1] = -1
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)  # cannot be imported; with SymPy

    def both(logits, labels):
        per_sample = cross_entropies(logits, labels)
        return per_sample, cross_entropy(logits, labels.clamp(min=0)) + per_sample.sum()

    together = logits.clone().requires_grad_()
    per_sample, total = vmap(both)(together, labels)
    total.sum().backward()
    for client in range(3):
        probs = log_softmax(logits[client].numpy(), axis=1)
        known = labels[client].numpy() >= 0
        picked = -np.take_along_axis(probs, labels[client].clamp(min=0).numpy()[:, None], 1)[:, 0]
        np.testing.assert_allclose(per_sample[client].detach(), picked * known)
        np.testing.assert_allclose(total[client].detach(), picked.mean() + (picked * known).sum())
        onehot = np.eye(6)[labels[client].clamp(min=0).numpy()]
        np.testing.assert_allclose(together.grad[client], (np.exp(probs) - onehot) * (1 / 4 + known)[:, None])


def test_decoupled_kd_by_hand():
    # Probabilities (1/2, 1/4, 1/4) and (1/5, 3/5, 1/5), label 0.
    student = torch.tensor([[2.0, 1.0, 1.0]]).log()
    teacher = torch.tensor([[1.0, 3.0, 1.0]]).log()
    target = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    rest = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    label = torch.tensor([0])
    loss = decoupled_kd(student, teacher, label, temperature=1.0, t_squared=False, alpha=2.0, beta=3.0)
    close(loss, 2 * target + 3 * rest)
    loss = decoupled_kd(2 * student, 2 * teacher, label, temperature=2.0, t_squared=True, alpha=2.0, beta=3.0)
    close(loss, 4 * (2 * target + 3 * rest))
    # Plain distillation is alpha = 1, beta = 1 - p_t(label).
    plain = decoupled_kd(student, teacher, label, temperature=1.0, t_squared=False, alpha=1.0, beta=0.8)
    close(plain, kd(student, teacher, **PLAIN).item())


def test_correlation_against_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    s, t = softmax(a / 2, axis=1), softmax(b / 2, axis=1)
    inter = np.mean([1 - pearsonr(s[n], t[n])[0] for n in range(6)])
    intra = np.mean([1 - pearsonr(s[:, c], t[:, c])[0] for c in range(4)])
    loss = correlation(torch.from_numpy(a), torch.from_numpy(b), temperature=2.0, t_squared=True, beta=1.5, gamma=0.5)
    close(loss, 4 * (1.5 * inter + 0.5 * intra), 1e-9)
    same = correlation(torch.from_numpy(a), torch.from_numpy(a), temperature=2.0, t_squared=True)
    close(same, 0, 1e-12)


@pytest.mark.parametrize("kind", ["kl", "soft_ce"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("masked", [False, True])
def test_of_finite_logits_loss_and_gradient_are_finite(kind, direction, masked):
    largest = torch.tensor([[3e38, -3e38, 0.0]]).repeat(1000, 1)
    mask = torch.tensor([True, True, False]) if masked else None
    for student, teacher in ((torch.zeros(1000, 3), largest), (largest, torch.zeros(1000, 3)), (largest, -largest)):
        student = student.clone().requires_grad_()
        loss = kd(student, teacher, **PLAIN, kind=kind, direction=direction, class_mask=mask)
        loss.backward()
        assert bool(loss.isfinite()) and bool(student.grad.isfinite().all())


def test_columns_that_vary_by_rounding_alone_give_no_gradient():
    # The mean of equal numbers may round: 1 - correlation would then have a gradient of some 1e7.
    for samples in range(2, 40):
        logits = torch.tensor([0.3, -1.2, 0.7, 0.1]).repeat(samples, 1).requires_grad_()
        teacher = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
        loss = correlation(logits, teacher, temperature=2.0, t_squared=False, beta=0.0, gamma=1.0)
        loss.backward()
        assert float(loss.detach()) == 1.0 and not logits.grad.any()
