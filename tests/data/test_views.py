"""Random views: shapes, determinism, and that they change what they should and nothing else."""

import torch

from fedkd.data.views import CORRUPTED, _crop, random_view


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_views_are_seeded_and_differ():
    x = torch.randn(8, 3, 12, 10)
    one, again, other = (random_view(x, "image", generator(seed)) for seed in (0, 0, 1))
    assert one.shape == x.shape and torch.equal(one, again) and not torch.equal(one, other)


def test_an_image_without_content_stays_so_but_for_its_brightness():
    x = torch.full((50, 1, 8, 8), 2.0)
    view = random_view(x, "image", generator())
    assert (view.flatten(1).std(1) < 1e-5).all()
    shift = view[:, 0, 0, 0] - 2.0
    assert 0.1 < shift.std() < 0.4 and shift.abs().max() <= 0.4 + 1e-6


def test_crops_show_nothing_that_is_not_there():
    ramp = torch.linspace(0, 1, 16).expand(40, 1, 16, 16)
    view = _crop(ramp.contiguous(), generator())
    assert view.min() >= -1e-6 and view.max() <= 1 + 1e-6
    rising = (view[:, 0, 0, -1] > view[:, 0, 0, 0]).float().mean()
    assert 0.2 < rising < 0.8  # about half of them are mirrored
    spread = view[:, 0, 0].amax(1) - view[:, 0, 0].amin(1)
    assert spread.min() > 0.3 and spread.max() <= 1 + 1e-6  # a quarter of the area at least


def test_some_colour_images_turn_grey():
    x = torch.randn(200, 3, 8, 8)
    view = random_view(x, "image", generator())
    grey = (view - view.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert 0.1 < grey.float().mean() < 0.3


def test_numbers_of_a_vector_come_from_the_same_place_in_other_samples():
    x = torch.arange(60).view(20, 3).float()
    view = random_view(x, "vector", generator())
    for column in range(3):
        assert set(view[:, column].tolist()) <= set(x[:, column].tolist())
    changed = (view != x).float().mean()
    assert abs(float(changed) - CORRUPTED) < 0.15


def test_words_turn_unknown_and_padding_stays():
    x = torch.tensor([[5, 6, 7, 0, 0]] * 100)
    view = random_view(x, "tokens", generator())
    assert (view[:, 3:] == 0).all() and set(view[:, :3].unique().tolist()) == {1, 5, 6, 7}
    assert abs(float((view[:, :3] == 1).float().mean()) - CORRUPTED) < 0.1
