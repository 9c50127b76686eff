"""Distributions over models: fits against NumPy in float64, samples by their moments, mixtures by hand."""

import numpy as np
import pytest
import torch

from fedkd.errors import KnowledgeError
from fedkd.server.posterior import dirichlet_mixtures, fit_gaussian, fit_steps

NAMES = ["w", "b"]


def clients(count=5, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "w": torch.from_numpy(draw.normal(2.0, 3.0, (3, 4)).astype(np.float32)),
            "b": torch.from_numpy(draw.normal(-1.0, 0.1, 4).astype(np.float32)),
            "running_var": torch.from_numpy(draw.uniform(0.01, 0.02, 4).astype(np.float32)),
            "num_batches_tracked": torch.tensor(3 + number),
        }
        for number in range(count)
    ]


def stack(states, name):
    return np.stack([state[name].numpy().astype(np.float64) for state in states])


def test_the_gaussian_has_the_weighted_moments_of_the_clients():
    states, weights = clients(), [1, 2, 3, 4, 10]
    fit = fit_gaussian(iter(states), weights, NAMES)
    for name in NAMES:
        x = stack(states, name)
        mean = np.average(x, axis=0, weights=weights)
        np.testing.assert_allclose(fit.mean[name].numpy(), mean, rtol=1e-12)
        variance = np.average((x - mean) ** 2, axis=0, weights=weights)
        np.testing.assert_allclose(fit.variance[name].numpy(), variance, rtol=1e-10)
    assert set(fit.variance) == set(NAMES)


def test_variances_survive_large_means():
    # E[x²] - E[x]² would lose them: 1e8 and 1e8 + 1 squared differ in the 9th digit.
    states = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (1e8, 1e8 + 1)]
    fit = fit_gaussian(states, [1, 1], ["w"])
    assert fit.variance["w"].item() == pytest.approx(0.25, rel=1e-6)


def test_samples_have_the_moments_of_the_gaussian_and_only_parameters_vary():
    states, weights = clients(), [1, 2, 3, 4, 10]
    fit = fit_gaussian(iter(states), weights, NAMES)
    noise = torch.Generator().manual_seed(0)
    drawn = [fit.sample(noise) for _ in range(4000)]
    for name in NAMES:
        x = stack(drawn, name)
        sd = fit.variance[name].sqrt().numpy()
        np.testing.assert_allclose(x.mean(0), fit.mean[name].numpy(), atol=5 * sd.max() / np.sqrt(4000))
        np.testing.assert_allclose(x.std(0), sd, rtol=0.08)
    buffers = np.average(stack(states, "running_var"), axis=0, weights=weights)
    for one in (drawn[0], drawn[-1]):
        np.testing.assert_allclose(one["running_var"].numpy(), buffers, rtol=1e-6)
        # (3 + 2·4 + 3·5 + 4·6 + 10·7) / 20 = 6
        assert one["num_batches_tracked"].item() == 6 and one["num_batches_tracked"].dtype == torch.int64
        assert one["w"].dtype == torch.float32
    again = fit.sample(torch.Generator().manual_seed(0))
    assert all(torch.equal(again[name], drawn[0][name]) for name in again)


def test_steps_are_normalised_tensor_by_tensor_as_in_the_released_code():
    states, start = clients(), clients(1, seed=9)[0]
    fit = fit_steps(iter(states), start, NAMES, scale=0.1, floor=1e-5)
    for name in NAMES:
        steps = stack(states, name) - start[name].numpy().astype(np.float64)
        lengths = np.array([np.linalg.norm(step) for step in steps])
        unit = steps / lengths.reshape(-1, *[1] * (steps.ndim - 1))
        mean = start[name].numpy() + lengths.mean() * unit.mean(0)
        np.testing.assert_allclose(fit.mean[name].numpy(), mean, rtol=1e-9)
        variance = np.maximum((unit**2).mean(0) - unit.mean(0) ** 2, 1e-5)
        np.testing.assert_allclose(fit.variance[name].numpy(), (lengths.mean() * 0.1) ** 2 * variance, rtol=1e-9)
    np.testing.assert_allclose(fit.mean["running_var"], stack(states, "running_var").mean(0), rtol=1e-9)


def test_clients_that_did_not_move_give_the_start():
    start = clients(1)[0]
    fit = fit_steps([start, start], start, NAMES)
    sample = fit.sample(torch.Generator().manual_seed(0))
    assert all(torch.equal(sample[name], start[name]) for name in NAMES)


def test_mixtures_are_the_weighted_means_of_their_dirichlet_draws():
    states, weights = clients(), [1, 2, 3, 4, 10]
    drawn = dirichlet_mixtures(iter(states), weights, 3, np.random.default_rng(5), alpha=0.7)
    gammas = np.random.default_rng(5).dirichlet([0.7] * 5, size=3)
    for one, gamma in zip(drawn, gammas, strict=True):
        for name in (*NAMES, "running_var"):
            expected = np.average(stack(states, name), axis=0, weights=gamma * np.array(weights))
            np.testing.assert_allclose(one[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert one["num_batches_tracked"].dtype == torch.int64


def test_large_concentrations_give_the_weighted_mean():
    states, weights = clients(), [1, 2, 3, 4, 10]
    [one] = dirichlet_mixtures(iter(states), weights, 1, np.random.default_rng(0), alpha=1e7)
    mean = np.average(stack(states, "w"), axis=0, weights=weights)
    np.testing.assert_allclose(one["w"].numpy(), mean, atol=0.02)


def test_nobody_has_no_distribution():
    with pytest.raises(KnowledgeError, match="no models"):
        fit_gaussian([], [], NAMES)
