import numpy as np
import pytest
import torch

from fedkd.data.batches import ArrayData, augment_images, epoch_order, step_order


def colour(n=6):
    x = np.random.default_rng(0).integers(0, 256, (n, 9, 7, 3), dtype=np.uint8)
    return ArrayData(x, np.arange(n), kind="image", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_normalised_per_channel(channels_last):
    data = colour()
    ids = np.array([4, 0, 4])
    batch = data.gather(ids, channels_last=channels_last)

    wanted = (data.x[ids] / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 1.0])
    assert batch.x.shape == (3, 3, 9, 7) and batch.x.dtype == torch.float32
    assert np.allclose(batch.x.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-6)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.x.is_contiguous(memory_format=layout)
    assert batch.y.tolist() == batch.ids.tolist() == [4, 0, 4]


@pytest.mark.parametrize("channels_last", [False, True])
def test_grey_images_are_normalised_in_the_layout_asked_for(channels_last):
    x = np.random.default_rng(0).integers(0, 256, (5, 9, 7), dtype=np.uint8)
    batch = ArrayData(x, mean=(0.1,), std=(0.5,)).gather(np.array([3, 1]), channels_last=channels_last)
    assert np.allclose(batch.x.numpy()[:, 0], (x[[3, 1]] / 255 - 0.1) / 0.5, atol=1e-6)
    # With one channel both layouts count as both; the strides decide what a convolution makes of it.
    assert batch.x.stride() == ((63, 1, 7, 1) if channels_last else (63, 63, 7, 1))


def test_other_kinds_and_missing_labels():
    tokens = ArrayData(np.array([[1, 2], [3, 0]], dtype=np.uint16), None, kind="tokens")
    vectors = ArrayData(np.ones((2, 3), dtype=np.float32), np.array([1, 0]), kind="vector")

    batch = tokens.gather(torch.tensor([1]))
    assert batch.x.dtype == torch.int64 and batch.x.tolist() == [[3, 0]] and batch.y.tolist() == [-1]
    batch = vectors.gather(np.array([0]))
    assert batch.x.dtype == torch.float32 and batch.y.tolist() == [1]
    assert tokens.labels is None
    with pytest.raises(ValueError, match="for images"):
        tokens.gather(np.array([0]), augment="flip", generator=torch.Generator())


def test_views_renumber():
    data = colour()
    view = data.take(np.array([5, 2, 3])).take(np.array([2, 0]))

    assert len(view) == 2 and view.labels is not None and view.labels.tolist() == [3, 5]
    assert torch.equal(view.gather(np.array([0, 1])).x, data.gather(np.array([3, 5])).x)
    assert view.gather(np.array([1])).ids.tolist() == [1]
    assert data.take(np.array([1]), labelled=False).labels is None


@pytest.mark.parametrize("ids", [[-1], [6]])
def test_unknown_ids_are_refused(ids):
    with pytest.raises(IndexError):
        colour().gather(np.array(ids))


def test_gathers_do_not_change_the_samples(tmp_path):
    np.save(tmp_path / "x.npy", colour().x)
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = ArrayData(x, None, kind="image")
    first = data.gather(np.arange(6)).x.clone()
    data.gather(np.arange(6)).x.zero_()

    assert torch.equal(data.gather(np.arange(6)).x, first)


def test_device_copy_gathers_the_same(monkeypatch):
    data = colour()
    wanted = data.gather(np.array([3, 1]))
    meta = data.gather(np.array([3, 1]), device="meta")  # another device, without needing one
    assert meta.x.shape == wanted.x.shape and meta.x.device.type == "meta"
    unlabelled = ArrayData(data.x).gather(np.array([3, 1]), device="meta")
    assert unlabelled.x.shape == wanted.x.shape and unlabelled.y.shape == wanted.y.shape
    samples, labels = data._copy(torch.device("cpu"))
    assert samples.dtype == torch.uint8 and labels is not None and samples.shape == (6, 9, 7, 3)


def reference(image, flip, dy, dx, pad):
    padded = np.pad(image, ((pad[0],) * 2, (pad[1],) * 2, (0, 0)))
    height, width = image.shape[:2]
    image = padded[pad[0] + dy : pad[0] + dy + height, pad[1] + dx : pad[1] + dx + width]
    return image[:, ::-1] if flip else image


@pytest.mark.parametrize("how", ["flip", "crop-flip"])
@pytest.mark.parametrize("side", [8, 32])
def test_augmentation_equals_a_slow_loop(how, side):
    x = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (16, side, side, 3), dtype=np.uint8))
    done = augment_images(x, how, torch.Generator().manual_seed(1))

    draws, pad = torch.Generator().manual_seed(1), (1, 1) if side == 8 else (4, 4)
    flips = torch.randint(0, 2, (16,), generator=draws)
    dys = dxs = torch.zeros(16, dtype=torch.long)
    if how == "crop-flip":
        dys = torch.randint(0, 2 * pad[0] + 1, (16,), generator=draws) - pad[0]
        dxs = torch.randint(0, 2 * pad[1] + 1, (16,), generator=draws) - pad[1]
    for i in range(16):
        wanted = reference(x[i].numpy(), flips[i].item(), dys[i].item(), dxs[i].item(), pad)
        assert np.array_equal(done[i].numpy(), wanted)
    assert 0 < flips.sum() < 16


def test_reflection_pads_with_pixels():
    x = torch.full((32, 32, 32, 1), 5, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    assert (augment_images(x, "crop-flip", generator, reflect=True) == 5).all()
    assert (augment_images(x, "crop-flip", generator) == 0).any()


def test_augmentation_depends_on_its_generator_alone():
    data = colour()
    ids = np.arange(6)
    one, other = (data.gather(ids, augment="crop-flip", generator=torch.Generator().manual_seed(s)).x for s in (0, 1))
    torch.manual_seed(5)
    again = data.gather(ids, augment="crop-flip", generator=torch.Generator().manual_seed(0)).x

    assert torch.equal(one, again) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="generator"):
        data.gather(ids, augment="flip")


def test_several_generators_draw_for_their_own_part(how="crop-flip"):
    images = torch.arange(6 * 8 * 8).reshape(6, 8, 8, 1)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    parts = [augment_images(part, how, own) for part, own in zip(images.split(2), generators(), strict=True)]
    assert torch.equal(augment_images(images, how, generators()), torch.cat(parts))


def test_epochs_hold_every_id_once():
    ids = np.array([10, 20, 30, 40, 50])
    batches = epoch_order(ids, 2, np.random.default_rng(0))

    assert [len(b) for b in batches] == [2, 2, 1]
    assert sorted(np.concatenate(batches)) == ids.tolist()
    assert [len(b) for b in epoch_order(ids, 2, np.random.default_rng(0), drop_single=True)] == [2, 2]
    assert epoch_order(ids[:1], 2, np.random.default_rng(0), drop_single=True) == []
    assert epoch_order(ids[:0], 2, np.random.default_rng(0)) == []


def test_steps_are_exact_and_reshuffled():
    ids = np.arange(5)
    batches = step_order(ids, 3, 7, np.random.default_rng(0))

    assert len(batches) == 7
    assert sorted(np.concatenate(batches[:2])) == sorted(np.concatenate(batches[2:4])) == ids.tolist()
    assert not np.array_equal(batches[0], batches[2])
    assert [len(b) for b in step_order(ids, 64, 3, np.random.default_rng(0))] == [5, 5, 5]
    assert step_order(ids[:1], 4, 3, np.random.default_rng(0), drop_single=True) == []
    assert step_order(ids[:0], 4, 3, np.random.default_rng(0)) == []
