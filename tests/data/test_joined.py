"""Two sets of samples as one: the same samples as from either, on either path to them."""

import numpy as np
import pytest
import torch

from fedkd.data.batches import ArrayData
from fedkd.data.joined import joined


def images(count, seed, shape=(6, 5), **more):
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
    return ArrayData(pixels, draw.integers(0, 3, count), mean=(0.4,), std=(0.2,), **more)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_samples_are_those_of_the_two(shape):
    first, second = images(10, 0, shape), images(7, 1, shape).take(np.array([6, 2, 4]))
    both = joined(first, second)

    batch = both.gather(np.array([3, 12, 0, 10]))

    assert len(both) == 13
    for row, (part, at) in enumerate([(first, 3), (second, 2), (first, 0), (second, 0)]):
        assert torch.equal(batch.x[row], part.gather(np.array([at])).x[0])
    assert batch.y.tolist() == [first.labels[3], -1, first.labels[0], -1]  # labels of the second stay hidden
    assert batch.ids.tolist() == [3, 12, 0, 10]
    with pytest.raises(IndexError):
        both.gather(np.array([13]))


def test_it_can_be_copied_and_cut_like_any_other():
    first, second = images(4, 0), images(3, 1)
    both = joined(first, second)
    whole = np.concatenate([first.x, second.x])
    assert np.array_equal(np.array(both.x), whole)  # what is copied to a GPU
    assert np.array_equal(both.take(np.array([5, 1])).gather(np.arange(2)).ids, [0, 1])
    assert torch.equal(both.take(np.array([5, 1])).gather(np.arange(2)).x, both.gather(np.array([5, 1])).x)


def test_a_single_channel_may_be_left_out():
    first, second = images(4, 0, (6, 5)), images(3, 1, (6, 5, 1))
    assert torch.equal(joined(first, second).gather(np.array([4])).x, second.gather(np.array([0])).x)


def test_the_same_two_are_joined_once():
    first, second = images(4, 0), images(3, 1)
    assert joined(first, second) is joined(first, second)  # clients with the same data can be trained together
    assert joined(first, second) is not joined(second, first)


def test_images_of_the_second_are_never_augmented():
    first, second = images(4, 0), images(3, 1)
    both, ids = joined(first, second), np.array([0, 5, 3, 4])
    generator = torch.Generator().manual_seed(0)
    draws = [both.gather(ids, augment="crop-flip", generator=generator).x for _ in range(8)]
    plain = both.gather(ids).x
    for row, is_private in enumerate([True, False, True, False]):
        assert any(not torch.equal(x[row], plain[row]) for x in draws) == is_private
    again = first.gather(ids % 4, augment="crop-flip", generator=torch.Generator().manual_seed(0)).x
    assert torch.equal(draws[0][[0, 2]], again[[0, 2]])  # changed as ever
    some = both.take(np.array([3, 5, 4])).relabelled(np.zeros(3, dtype=int))
    changed = [some.gather(np.arange(3), augment="crop-flip", generator=generator).x for _ in range(8)]
    assert any(not torch.equal(x[0], plain[2]) for x in changed)
    assert all(torch.equal(x[1:], plain[[1, 3]]) for x in changed)


@pytest.mark.parametrize(("kind", "dtype"), [("tokens", np.uint16), ("vector", np.float32)])
def test_other_kinds(kind, dtype):
    first, second = (ArrayData(np.full((3, 4), value, dtype), kind=kind) for value in (1, 2))
    batch = joined(first, second).gather(np.array([0, 5]))
    assert batch.x[:, 0].tolist() == [1, 2] and batch.y.tolist() == [-1, -1]
