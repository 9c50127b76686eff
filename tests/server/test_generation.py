"""Data-free machinery: label draws, diversity against a slow loop, teachers that let gradients through."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd.models import build
from fedkd.server.generation import Teachers, diversity, draw_labels


def test_labels_are_drawn_in_proportion_to_counts():
    labels = draw_labels(torch.tensor([10, 0, 30, 60]), 20_000, np.random.default_rng(0))
    share = torch.bincount(labels, minlength=4) / 20_000
    assert share[1] == 0
    torch.testing.assert_close(share, torch.tensor([0.1, 0.0, 0.3, 0.6]), atol=0.02, rtol=0)
    assert labels.dtype == torch.int64


def test_diversity_is_the_formula():
    draw = np.random.default_rng(0)
    z, x = draw.normal(size=(5, 3)), draw.normal(size=(5, 2, 2, 2))
    products = [((z[i] - z[j]) ** 2).mean() * np.abs(x[i] - x[j]).mean() for i in range(5) for j in range(5)]
    found = diversity(torch.from_numpy(z), torch.from_numpy(x))
    assert found.item() == pytest.approx(math.exp(-np.mean(products)), rel=1e-10)


def test_samples_that_are_alike_have_diversity_one_and_a_finite_gradient():
    x = torch.ones(4, 1, 2, 2, requires_grad=True)
    loss = diversity(torch.randn(4, 3), x)
    loss.backward()
    assert loss.item() == 1.0 and bool(x.grad.isfinite().all())


def federation():
    """Stand in for the server and for two uploads of a tiny model with BatchNorm."""
    options = {"num_classes": 3, "input_shape": (1, 8, 8), "kind": "image", "norm": "batch", "width": 0.25}
    server = SimpleNamespace(
        device=torch.device("cpu"),
        model=lambda arch: build("cnn", seed=0, **options),
        complete=lambda arch, state: dict(state),
    )
    models = [build("cnn", seed=seed, **options) for seed in (1, 2)]
    return server, models, [SimpleNamespace(arch="cnn", state=model.state_dict()) for model in models]


def test_teachers_are_the_uploaded_models_in_evaluation_mode():
    server, models, uploads = federation()
    teachers, x = Teachers(server, uploads), torch.randn(6, 1, 8, 8)  # type: ignore[arg-type]
    assert len(teachers) == 2
    for number, model in enumerate(models):
        torch.testing.assert_close(teachers.logits(number, x), model.eval()(x).logits)
    weights = torch.tensor([[0.25] * 6, [0.75] * 6])
    expected = sum(w * m(x).logits.softmax(1) for w, m in zip((0.25, 0.75), models, strict=True))
    mean = teachers.mean_probs(x, weights)
    torch.testing.assert_close(mean, expected)
    assert not mean.requires_grad


def test_gradients_reach_the_samples_and_not_the_teachers():
    server, models, uploads = federation()
    teachers = Teachers(server, uploads)  # type: ignore[arg-type]
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    teachers.logits(1, x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in models[1].parameters())
