"""Scores against numbers worked out by hand."""

import math

import pytest
import torch

from fedkd.server.evaluation import agreement, scores, spread


def test_scores_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4): both samples are predicted as class 0 with confidence 0.75.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    got = scores(logits, torch.tensor([0, 1]))
    assert got["accuracy"] == 0.5
    assert got["loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, abs=1e-6)
    assert got["per_class"] == [1.0, 0.0]
    assert got["calibration_error"] == pytest.approx(0.25, abs=1e-6)  # confidence 0.75, accuracy 0.5


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
