"""Models in two parts: a tail behind feature maps of the same model, and of others."""

import pytest
import torch

from fedkd import models
from fedkd.errors import ScenarioError
from fedkd.models.cut import Tail, tap_shape

X = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def build(name, **options):
    return models.build(name, num_classes=5, input_shape=(1, 12, 12), kind="image", seed=1, **options)


@pytest.mark.parametrize(("name", "stages"), [("cnn", 1), ("cnn", 2), ("resnet8", 2), ("vgg9", 3), ("mlp", 1)])
def test_a_tail_behind_the_model_itself_gives_the_models_logits(name, stages):
    model = build(name).eval()
    out = model(X)
    shape = tap_shape(model, X, stages)
    assert shape == tuple(out.taps[stages - 1].shape[1:])
    tail = Tail(model, stages, X, [shape]).eval()
    assert not tail.adapters  # nothing to adapt
    torch.testing.assert_close(tail(out.taps[stages - 1]).logits, out.logits, rtol=0, atol=0)


@pytest.mark.parametrize("source", [(16, 6, 6), (7, 12, 12), (4, 3, 3), (20,)])
@pytest.mark.parametrize("name", ["resnet8", "mlp"])
def test_feature_maps_of_other_models_pass_an_adapter(name, source):
    tail = Tail(build(name), 1, X, [source, (2, 5, 5)], seed=3)
    logits = tail(torch.randn(4, *source)).logits
    assert logits.shape == (4, 5)
    logits.sum().backward()
    adapter = tail.adapters["x".join(map(str, source))]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    other = tail.state_dict().keys() - tail.state_for(source, tail.state_dict()).keys()
    assert other and all(name.startswith("adapters.2x5x5.") for name in other)


def test_a_tail_is_a_copy_with_seeded_adapters():
    model = build("cnn")
    one, two = (Tail(model, 1, X, [(3, 4, 4)], seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with torch.no_grad():
        one.head.weight.zero_()
    assert float(model.head.weight.detach().abs().sum()) > 0


def test_a_model_without_so_many_stages_is_refused():
    with pytest.raises(ScenarioError, match=r"models\.server.*has 2 stage"):
        Tail(build("cnn"), 3, X, [])
    foreign = models.build("torchvision:resnet18", num_classes=5, input_shape=(3, 32, 32), kind="image")
    with pytest.raises(ScenarioError, match=r"models\.student.*no known stage"):
        tap_shape(foreign, torch.zeros(1, 3, 32, 32), 1)
    assert foreign.training
