"""What the plain loop does faster than PyTorch's own calls, against these."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedkd.client import sequential


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize("missing", [False, True])
def test_gradients_are_those_of_backward(monkeypatch, missing):
    if missing:
        monkeypatch.setattr(sequential, "_ENGINE", None)
    ours, theirs = layers(), layers()
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    for _ in range(2):  # gradients add up
        sequential.backward(F.cross_entropy(ours(x), y))
        F.cross_entropy(theirs(x), y).backward()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, expected.grad)


def test_a_gradient_may_be_changed_in_place():
    for _ in range(2):
        weight = torch.tensor(2.0, requires_grad=True)
        sequential.backward(weight.view(()))  # whose gradient is the one that everything starts from
        weight.grad.mul_(10)  # as clipping may
        assert weight.grad == 10


def test_a_loss_that_depends_on_nothing_is_refused():
    with pytest.raises(RuntimeError, match="does not require grad"):
        sequential.backward(torch.tensor(1.0))
