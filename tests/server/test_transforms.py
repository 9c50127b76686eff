"""What is done to reduced outputs, by hand and by properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.server.transforms import era, sharpen


def test_era_sharpens_and_flattens() -> None:
    # softmax(p / 0.1): ratio of two classes e^((p_i - p_j) / 0.1)
    sharp = era(torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    assert (sharp[0] / sharp[1]).item() == pytest.approx(math.exp(3), rel=1e-4)  # 20.1 > 4
    flat = era(torch.tensor([0.10] + [0.01] * 90))
    assert (flat[0] / flat[1]).item() == pytest.approx(math.exp(0.9), rel=1e-4)  # 2.46 < 10
    # the power has no such change of regime: 4² = 16, 10² = 100
    assert (sharpen(torch.tensor([0.4, 0.1, 0.5]), 2.0)[:2]).tolist() == pytest.approx([16 / 42, 1 / 42])
    p = sharpen(torch.tensor([0.10] + [0.01] * 90), 2.0)
    assert (p[0] / p[1]).item() == pytest.approx(100, rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 0.9), st.floats(0.001, 0.9), st.floats(0.02, 1.0))
def test_era_regime(p: float, q: float, temperature: float) -> None:
    # sharpens exactly where (p - q) / T > ln(p / q)
    p, q = max(p, q), min(p, q)
    after = float(torch.diff(era(torch.tensor([q, p], dtype=torch.double), temperature).log()))
    assert after == pytest.approx((p - q) / temperature, abs=1e-9)
    before = math.log(p / q)
    if abs(before - after) > 1e-9:
        assert (after > before) == ((p - q) / temperature > before)


def test_large_powers_do_not_underflow() -> None:
    assert sharpen(torch.tensor([0.02, 0.01] + [0.0] * 3), 60.0).tolist() == pytest.approx([1, 0, 0, 0, 0])
