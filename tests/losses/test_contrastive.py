"""NT-Xent against a plain double loop in float64."""

import math

import numpy as np
import pytest
import torch

from fedkd.losses.contrastive import nt_xent


def slow(first, second, temperature):
    z = [v / np.linalg.norm(v) for v in np.concatenate([first, second])]
    n = len(first)
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(z[i] @ z[partner] / temperature) / others)
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.1])
def test_nt_xent_is_the_formula(temperature):
    draw = np.random.default_rng(0)
    one, two = draw.normal(size=(5, 3)), draw.normal(size=(5, 3))
    loss = nt_xent(torch.from_numpy(one), torch.from_numpy(two), temperature=temperature)
    assert loss.item() == pytest.approx(slow(one, two, temperature), rel=1e-10)
    swapped = nt_xent(torch.from_numpy(two), torch.from_numpy(one), temperature=temperature)
    assert swapped.item() == pytest.approx(loss.item())


def test_views_that_agree_have_a_smaller_loss_and_lengths_do_not_count():
    z, other = torch.randn(6, 4), torch.randn(6, 4)
    assert nt_xent(z, z, temperature=0.5) < nt_xent(z, other, temperature=0.5)
    assert torch.isclose(nt_xent(z, other, temperature=0.5), nt_xent(3 * z, 0.1 * other, temperature=0.5))


def test_one_sample_has_nothing_to_differ_from():
    assert nt_xent(torch.randn(1, 4), torch.randn(1, 4), temperature=0.5).item() == pytest.approx(0, abs=1e-6)
