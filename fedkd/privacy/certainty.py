"""How certain it is that a sample is one of a client's: a logistic regression with differential privacy (FedAUX)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """Return the noise of the Gaussian mechanism: √(2 ln(1.25 / δ)) · sensitivity / ε.

    Parameters
    ----------
    sensitivity : float
        Largest change of what is released, in the Euclidean norm, when one sample is replaced.
    epsilon : float
        In (0, 1]: beyond, the formula promises too much.
    delta : float
        In (0, 1).

    Raises
    ------
    ValueError
        Parameters outside these ranges.

    Notes
    -----
    Dwork, Roth, The Algorithmic Foundations of Differential Privacy, 2014, theorem A.1.

    Examples
    --------
    >>> round(gaussian_sigma(1.0, 1.0, 1e-5), 4)
    4.8448
    """
    if not 0 < epsilon <= 1 or not 0 < delta < 1:
        raise ValueError(f"the Gaussian mechanism takes 0 < epsilon <= 1 and 0 < delta < 1, not {epsilon}, {delta}")
    return math.sqrt(2 * math.log(1.25 / delta)) * sensitivity / epsilon


@dataclass(frozen=True)
class Scorer:
    """Probability that features are those of the client's own samples.

    Parameters
    ----------
    weights : np.ndarray
        Float64 [D + 1]; the last one is the intercept's.
    norm : float
        Largest Euclidean norm of the features that it was fitted to.
    """

    weights: np.ndarray
    norm: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return probabilities, float64 [n], for features [n, D]."""
        return 0.5 * (1 + np.tanh(0.5 * (_inputs(features, self.norm) @ self.weights)))  # the logistic function


def fit_scorer(
    own: np.ndarray,
    negatives: np.ndarray,
    *,
    penalty: float,
    epsilon: float,
    delta: float,
    generator: np.random.Generator,
    objective: Literal["mean", "sum"] = "mean",
) -> Scorer:
    """Fit a logistic regression that tells a client's samples from public ones, and add noise to its weights.

    It minimises (1 / n) Σ_i log(1 + exp(-t_i ⟨w, x_i⟩)) + (λ / 2) ‖w‖² over n samples, its own (t = 1) and the
    negatives (t = -1). With ‖x‖ <= 1 the objective is λ-strongly convex and no sample moves its gradient by more
    than 2 / n, so replacing one moves w by at most 2 / (n λ); Gaussian noise is calibrated to that.

    Parameters
    ----------
    own, negatives : np.ndarray
        Features [n, D], not all of them zero.
    penalty : float
        λ > 0.
    epsilon, delta : float
        Privacy of the weights; an epsilon of 0 adds no noise, and promises nothing.
    generator : np.random.Generator
        The noise.
    objective : str
        ``mean``, as above; ``sum``: the sum of the losses instead of their mean, as in the released code of FedAUX,
        with the noise of the mean: n times too little for the privacy that it claims.

    Notes
    -----
    Chaudhuri, Monteleoni, Privacy-Preserving Logistic Regression, NIPS 2008. The intercept is the weight of a constant
    feature and penalised like all others: of a free one the bound says nothing. Features and constant are scaled to
    ‖x‖ <= 1 by the largest norm among the samples, which is not protected itself. FedAUX bounds features alone
    by 1; here both are divided by √2, so that λ counts double against its paper and code, and at the same λ, n and ε
    the noise in a score's logit is 1/√2 of the code's.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    features = np.concatenate([own, negatives]).astype(np.float64)
    norm = max(float(np.linalg.norm(features, axis=1).max()), np.finfo(np.float64).tiny)
    x, labels = _inputs(features, norm), np.repeat([1, 0], [len(own), len(negatives)])
    n = len(x)
    # scikit-learn minimises ‖w‖² / 2 + C Σ loss.
    strength = 1 / (n * penalty) if objective == "mean" else 1 / penalty
    with threadpool_limits(1):  # the bits must not depend on the cores of the machine
        fit = LogisticRegression(C=strength, fit_intercept=False, max_iter=1000, tol=1e-6).fit(x, labels)
    weights = fit.coef_[0].astype(np.float64)
    if epsilon:
        weights = weights + generator.normal(0.0, gaussian_sigma(2 / (n * penalty), epsilon, delta), len(weights))
    return Scorer(weights, norm)


def _inputs(features: np.ndarray, norm: float) -> np.ndarray:
    """Return scaled features and a constant, float64 [n, D + 1]; of norm 1 at most where features have `norm`."""
    constant = np.ones((len(features), 1))
    return np.hstack([np.asarray(features, dtype=np.float64) / norm, constant]) / math.sqrt(2)
