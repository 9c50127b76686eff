"""Generators: shapes, normalised samples, labels that count, seeds."""

import pytest
import torch

from fedkd.errors import ScenarioError
from fedkd.models.generators import build_generator


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("image", (1, 8, 8)), ("image", (3, 32, 32)), ("image", (2, 9, 13)), ("image", (1, 28, 28)), ("vector", (12,))],
)
def test_samples_have_the_shape_and_the_moments_of_the_task(kind, shape):
    generator = build_generator(kind, shape, 5, noise=10, width=8)
    x = generator(torch.randn(64, 10), torch.arange(64) % 5)
    assert x.shape == (64, *shape)
    channels = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(len(channels)), atol=1e-2, rtol=0)


def test_noise_and_label_both_count():
    generator = build_generator("image", (1, 8, 8), 3, noise=4, width=4).eval()
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    a = generator(z, torch.tensor([0, 1]))
    assert not torch.allclose(a, generator(z, torch.tensor([1, 1])))
    assert not torch.allclose(a, generator(z.flip(0), torch.tensor([0, 1])))


def test_equal_seeds_give_equal_bits_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, two, other = (build_generator("vector", (6,), 3, noise=4, width=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    states = [list(g.state_dict().values()) for g in (one, two, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_words_cannot_be_generated():
    with pytest.raises(ScenarioError, match="'tokens' cannot be generated"):
        build_generator("tokens", (16,), 4)
