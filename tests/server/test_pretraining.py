"""Self-supervised pre-training: what is trained, what stays, seeds, and that the loss falls."""

import numpy as np
import pytest
import torch

from fedkd.data.batches import ArrayData
from fedkd.errors import RunError
from fedkd.models import build
from fedkd.server.pretraining import SimCLR


def images(count=48):
    return ArrayData(
        np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8), kind="image", mean=(0.5,), std=(0.25,)
    )


def cnn(norm="group"):
    return build("cnn", num_classes=3, input_shape=(1, 8, 8), kind="image", norm=norm)


def fit(model, data, seed=0, **options):
    settings = {"epochs": 2, "batch_size": 16, "width": 8} | options
    return SimCLR(**settings).fit(model, data, generator=np.random.default_rng(seed))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_body_learns_and_the_head_stays(norm):
    model = cnn(norm).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    untouched = torch.random.get_rng_state()
    report = fit(model, images(), channels_last=True)
    after = model.state_dict()
    assert report.steps == 6 and np.isfinite([report.loss_first, report.loss_last]).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(after[name], before[name]) == name.startswith("head"), name
        assert parameter.grad is None
    assert not model.training and torch.equal(untouched, torch.random.get_rng_state())


def test_views_of_a_sample_grow_alike():
    report = fit(cnn(), images(), epochs=30, lr=3e-3)
    assert report.loss_last < 0.9 * report.loss_first


def test_equal_generators_give_equal_bits():
    states = []
    for seed in (0, 0, 1):
        model = cnn()
        fit(model, images(), seed)
        states.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("kind", ["vector", "tokens"])
def test_vectors_and_texts(kind):
    draw = np.random.default_rng(0)
    if kind == "vector":
        data = ArrayData(draw.normal(size=(20, 6)).astype(np.float32), kind=kind)
        model = build("mlp", num_classes=3, input_shape=(6,), kind=kind, hidden=[8])
    else:
        data = ArrayData(draw.integers(0, 30, (20, 7)).astype(np.int32), kind=kind)
        model = build("text", num_classes=3, input_shape=(7,), kind=kind, vocab_size=30, dim=8)
    before = [parameter.detach().clone() for parameter in model.body.parameters()]
    assert fit(model, data).steps == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, model.body.parameters(), strict=True))


def test_divergence_is_named():
    with pytest.raises(RunError, match="pre-training diverged"):
        fit(cnn("none"), images(), lr=1e30)
