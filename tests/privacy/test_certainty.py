"""Certainty scores: the fit against SciPy, the noise by its moments, the sensitivity by replacing samples."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from fedkd.privacy.certainty import fit_scorer, gaussian_sigma

PENALTY = 0.01


def samples(seed=0, own=30, negatives=20, width=4):
    draw = np.random.default_rng(seed)
    return draw.normal(0.5, 1.0, (own, width)), draw.normal(-0.5, 1.0, (negatives, width))


def fit(own, negatives, epsilon=0.0, seed=0, **options):
    settings = {"penalty": PENALTY, "epsilon": epsilon, "delta": 1e-5} | options
    return fit_scorer(own, negatives, generator=np.random.default_rng(seed), **settings)


def designed(own, negatives):
    """Return inputs of norm 1 at most and signs: features over the largest norm, a constant, both over √2."""
    x = np.concatenate([own, negatives])
    x = np.c_[x / np.sqrt((x**2).sum(1)).max(), np.ones(len(x))] / np.sqrt(2)
    return x, np.r_[np.ones(len(own)), -np.ones(len(negatives))]


@pytest.mark.parametrize("objective", ["mean", "sum"])
def test_weights_are_the_minimum_that_scipy_finds(objective):
    own, negatives = samples()
    x, t = designed(own, negatives)
    assert np.linalg.norm(x, axis=1).max() == pytest.approx(1.0)
    share = 1 / len(x) if objective == "mean" else 1.0

    def cost(w):
        return share * np.logaddexp(0, -t * (x @ w)).sum() + PENALTY / 2 * w @ w

    best = minimize(cost, np.zeros(5), method="BFGS", tol=1e-12).x
    scorer = fit(own, negatives, objective=objective)
    np.testing.assert_allclose(scorer.weights, best, rtol=2e-3, atol=2e-3)

    new = np.random.default_rng(1).normal(size=(7, 4))
    z = np.c_[new / scorer.norm, np.ones(7)] / np.sqrt(2) @ best
    np.testing.assert_allclose(scorer(new), 1 / (1 + np.exp(-z)), atol=1e-3)


def test_own_samples_score_higher_than_negatives():
    own, negatives = samples()
    scorer = fit(own, negatives)
    assert scorer(own).mean() > scorer(negatives).mean() + 0.1
    assert ((scorer(own) > 0) & (scorer(own) < 1)).all()


def test_no_replaced_sample_moves_the_weights_further_than_the_sensitivity():
    own, negatives = samples()
    n = len(own) + len(negatives)
    bound = 2 / (n * PENALTY)
    before = fit(own, negatives)
    furthest = 0.0
    for place in range(len(own)):
        for towards in (-1.0, 1.0):
            other = own.copy()
            other[place] = towards * before.norm / math.sqrt(own.shape[1])  # as far out as any sample may be
            after = fit(other, negatives)
            if after.norm == pytest.approx(before.norm):  # the norm itself is not protected
                furthest = max(furthest, float(np.linalg.norm(after.weights - before.weights)))
    assert 0.05 * bound < furthest <= bound


def test_noise_of_the_gaussian_mechanism():
    # ε = 0.1, δ = 1e-5, sensitivity 2 / (50 · 0.01) = 4: σ = √(2 ln 125000) · 4 / 0.1 = 193.79
    own, negatives = samples()
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) * (2 / (50 * PENALTY)) / 0.1
    assert sigma == pytest.approx(193.79, abs=0.01)
    assert gaussian_sigma(4.0, 0.1, 1e-5) == pytest.approx(sigma)
    exact = fit(own, negatives).weights
    noise = np.concatenate([fit(own, negatives, epsilon=0.1, seed=seed).weights - exact for seed in range(60)])
    assert noise.std() == pytest.approx(sigma, rel=0.15) and abs(noise.mean()) < sigma / 5
    again = fit(own, negatives, epsilon=0.1, seed=3).weights
    assert (again == fit(own, negatives, epsilon=0.1, seed=3).weights).all()


def test_the_released_objective_is_regularised_n_times_less_and_has_the_noise_of_the_mean():
    own, negatives = samples()
    released = fit(own, negatives, objective="sum")
    np.testing.assert_allclose(released.weights, fit(own, negatives, penalty=PENALTY / 50).weights)
    noisy = [fit(own, negatives, epsilon=0.1, objective=objective).weights for objective in ("sum", "mean")]
    np.testing.assert_allclose(noisy[0] - released.weights, noisy[1] - fit(own, negatives).weights)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (1.5, 1e-5), (0.5, 0.0), (0.5, 1.0)])
def test_promises_that_the_mechanism_cannot_keep_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match="epsilon"):
        gaussian_sigma(1.0, epsilon, delta)
