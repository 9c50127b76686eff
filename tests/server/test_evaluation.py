"""Scores against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from fedkd.data.batches import ArrayData
from fedkd.models import Outputs
from fedkd.server.ensemble import Ensemble
from fedkd.server.evaluation import agreement, log_probs, scores, spread
from fedkd.server.members import ModelMember


def test_scores_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4): both samples are predicted as class 0 with confidence 0.75.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    got = scores(logits, torch.tensor([0, 1]))
    assert got["accuracy"] == 0.5
    assert got["loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, abs=1e-6)
    assert got["per_class"] == [1.0, 0.0]
    assert got["calibration_error"] == pytest.approx(0.25, abs=1e-6)  # confidence 0.75, accuracy 0.5


def test_logits_that_are_not_finite_are_no_prediction_to_be_confident_of():
    inf = float("inf")
    got = scores(torch.tensor([[0.0, inf], [float("nan")] * 2, [9.0, 0.0]]), torch.tensor([1, 0, 0]))
    assert got["accuracy"] == 1.0 and not math.isfinite(got["loss"])
    assert got["calibration_error"] == pytest.approx((2 + 1 / (1 + math.exp(9))) / 3)


class Scaled(torch.nn.Module):
    """Logits are the input times a number, which may be too large."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return Outputs(x * self.factor, x)


@pytest.mark.parametrize(
    ("factors", "second"),
    [([math.log(3) / 10, 3e38], [0.75, 0.25]), ([3e38], [0.5, 0.5]), ([float("nan")], [0.5, 0.5])],
)
def test_an_ensemble_is_uniform_where_it_has_no_finite_outputs(factors, second):
    data = ArrayData(np.array([[0.0, 0.0], [10.0, 0.0]], np.float32), kind="vector")  # 10 · 3e38 is too large
    got = log_probs(Ensemble([ModelMember(Scaled(factor)) for factor in factors]), data, 2)
    torch.testing.assert_close(got.exp(), torch.tensor([[0.5, 0.5], second]))


def test_a_class_without_test_samples_has_no_recall():
    assert scores(torch.eye(3), torch.tensor([0, 1, 1]))["per_class"] == [1.0, 0.5, None]


def test_calibration_error_is_zero_for_a_calibrated_model():
    # Confidence 0.75 four times, right three times.
    logits = torch.tensor([[math.log(3), 0.0]] * 4)
    assert scores(logits, torch.tensor([0, 0, 0, 1]))["calibration_error"] == pytest.approx(0.0, abs=1e-6)


def test_agreement_counts_equal_predictions_not_right_ones():
    assert agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 0.5


def test_worst_decile_is_the_mean_of_the_worst_tenth_and_at_least_one_client():
    assert spread([i / 20 for i in range(20)]) == {"accuracy": 0.475, "worst_decile": 0.025, "clients": 20}
    assert spread([0.2, 0.8])["worst_decile"] == 0.2
