"""Linear layers by oneDNN against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from fedkd.models import linear
from fedkd.models.linear import AMD, Linear, processor_vendor, quicken

pytestmark = pytest.mark.skipif(linear._ONEDNN is None, reason="this PyTorch has no oneDNN")


@pytest.fixture
def layer(monkeypatch):
    """Return a layer that takes oneDNN for the smallest product."""
    monkeypatch.setattr(linear, "WORTH", 0)
    torch.manual_seed(0)
    made = quicken(nn.Sequential(nn.Linear(40, 24)), vendor=AMD)[0]
    assert type(made) is Linear
    return made


def calls(monkeypatch):
    count = []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: count.append(1) or product(*a))
    return count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_outputs_and_gradients_are_those_of_pytorch(layer, monkeypatch, bias, strided):
    if not bias:
        layer.bias = None
    count = calls(monkeypatch)
    x = torch.randn(40, 7).t() if strided else torch.randn(7, 40)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    weight, offset = layer.weight.detach().double().requires_grad_(), layer.bias
    offset = None if offset is None else offset.detach().double().requires_grad_()
    # A mean of rows sends back a gradient that is expanded, not laid out.
    layer(ours).mean().backward()
    F.linear(theirs, weight, offset).mean().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-7)
    if offset is not None:
        torch.testing.assert_close(layer.bias.grad.double(), offset.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert len(count) == 4  # two forward, two of three gradients


def test_only_wanted_gradients_are_computed(layer, monkeypatch):
    count = calls(monkeypatch)
    layer(torch.randn(7, 40)).square().sum().backward()
    assert len(count) == 2


def test_what_it_is_not_for_goes_to_pytorch(layer, monkeypatch):
    count = calls(monkeypatch)
    layer(torch.randn(2, 3, 40))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 40)).dtype == torch.bfloat16
    stack = {name: torch.stack([tensor, tensor + 1]) for name, tensor in layer.named_parameters()}
    out = vmap(lambda params, x: functional_call(layer, params, (x,)))(stack, torch.randn(2, 5, 40))
    vmap(lambda x: layer(x))(torch.randn(2, 5, 40))
    layer.double()(torch.randn(3, 40, dtype=torch.float64))
    assert out.shape == (2, 5, 24) and not count


def test_short_products_are_left_alone(monkeypatch):
    count = calls(monkeypatch)
    quicken(nn.Linear(40, 24), vendor=AMD)(torch.randn(7, 40))
    assert not count


def test_subclasses_keep_their_forward():
    class Own(nn.Linear):
        pass

    assert type(quicken(Own(2, 2), vendor=AMD)) is Own


def test_the_processor_decides_unless_somebody_says_which(monkeypatch):
    monkeypatch.setattr(linear, "processor_vendor", lambda: "GenuineIntel")
    assert type(quicken(nn.Linear(2, 2))) is nn.Linear
    monkeypatch.setattr(linear, "processor_vendor", lambda: AMD)
    assert type(quicken(nn.Linear(2, 2))) is Linear


def test_the_vendor_is_what_the_processor_says(monkeypatch):
    processor_vendor.cache_clear()
    says = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
    monkeypatch.setattr(linear.Path, "read_text", lambda path: says)
    try:
        assert processor_vendor() == AMD
    finally:
        processor_vendor.cache_clear()
