import os

import numpy as np
import pytest
import torch

from fedkd import scenario
from fedkd.data import proxy as module
from fedkd.data.batches import ArrayData
from fedkd.data.proxy import build_proxy, cut, resize_images
from fedkd.data.sources import load
from fedkd.errors import ScenarioError


def build(data, seed=0, **spec):
    data = scenario.Data(**data)
    dataset = load(data)
    train = ArrayData(dataset.x_train, dataset.y_train, kind=dataset.kind, mean=dataset.mean, std=dataset.std)
    section = scenario.Proxy(**spec)
    held_out, _, _ = cut(section, len(train), seed=seed)
    return build_proxy(section, data, dataset, train, held_out, seed=seed), dataset, held_out


def test_cut_is_a_partition_of_the_training_data():
    spec = scenario.Proxy(source="held-out", size=30, server_labels=20)
    held_out, server, rest = cut(spec, 100, seed=3)

    assert (len(held_out), len(server), len(rest)) == (30, 20, 50)
    assert sorted(np.concatenate([held_out, server, rest])) == list(range(100))
    again = cut(spec, 100, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((held_out, server, rest), again))
    assert not np.array_equal(held_out, cut(spec, 100, seed=4)[0])
    assert len(cut(scenario.Proxy(source="held-out"), 105, seed=0)[0]) == 10
    assert len(cut(scenario.Proxy(source="noise", size=50), 100, seed=0)[2]) == 100


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        ({"source": "held-out", "size": 100}, "proxy.size"),
        ({"source": "held-out", "size": 10, "server_labels": 90}, "proxy.server_labels"),
        ({"source": "noise", "labelled": True}, "proxy.labelled"),
        ({"source": "none", "labelled": True}, "proxy.labelled"),
    ],
)
def test_impossible_cuts(spec, key):
    with pytest.raises(ScenarioError) as error:
        cut(scenario.Proxy(**spec), 100, seed=0)
    assert error.value.key == key


@pytest.mark.parametrize("labelled", [False, True])
def test_held_out(labelled):
    proxy, dataset, held_out = build({}, source="held-out", size=50, labelled=labelled)

    assert proxy is not None and len(proxy) == proxy.size == 50 and proxy.same_shape
    batch = proxy.data.gather(np.array([0, 49]))
    raw = dataset.x_train[held_out[[0, 49]]] / 255
    assert np.allclose(batch.x[:, 0].numpy(), (raw - dataset.mean[0]) / dataset.std[0], atol=1e-5)
    if labelled:
        assert np.array_equal(proxy.labels, dataset.y_train[held_out])
        assert proxy.capabilities == {"proxy", "proxy-labels", "same-shape"}
    else:
        assert proxy.capabilities == {"proxy", "same-shape"} and batch.y.tolist() == [-1, -1]
        with pytest.raises(ScenarioError) as error:
            _ = proxy.labels
        assert error.value.key == "proxy.labelled"


def test_no_proxy():
    assert build({}, source="none")[0] is None


def test_another_set_of_the_same_shape_is_not_copied(write_npz):
    task = write_npz()
    other = write_npz("hundred.npz", y_train=np.arange(20) + 50, y_test=np.arange(8), classes=None)
    proxy, dataset, _ = build({"source": f"npz:{task}"}, source=f"npz:{other}", size=7)

    assert proxy is not None and len(proxy) == 7 and proxy.same_shape and not proxy.labelled
    assert isinstance(proxy.data.x.base, np.memmap)
    batch = proxy.data.gather(proxy.ids)
    assert (batch.y == -1).all() and batch.x.shape == (7, *dataset.input_shape)
    assert len(build({"source": f"npz:{task}"}, source=f"npz:{other}")[0] or ()) == 20


@pytest.mark.parametrize("shape", [(20, 12, 10), (20, 12, 10, 4), (20, 6, 5)])
def test_foreign_images_take_the_shape_of_the_task(write_npz, shape):
    task = write_npz()
    grey = np.full(shape, 100, dtype=np.uint8)
    other = write_npz("other.npz", x_train=grey, x_test=grey[:8])
    proxy, dataset, _ = build({"source": f"npz:{task}"}, source=f"npz:{other}")

    assert proxy is not None and not proxy.same_shape and "same-shape" not in proxy.capabilities
    x = proxy.data.gather(proxy.ids).x
    wanted = (100 / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    assert x.shape == (20, 3, 6, 5) and np.allclose(x.numpy(), wanted[None, :, None, None], atol=1e-5)


def test_colour_becomes_grey_by_luminance():
    red = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    red[..., 0] = 200

    assert resize_images(red, 1, 4, 4).tolist() == np.full((1, 4, 4), 60).tolist()  # 0.299 * 200 = 59.8
    assert resize_images(red, 3, 8, 8).shape == (1, 8, 8, 3)
    ramp = np.array([[[0, 100]]], dtype=np.uint8)
    assert resize_images(ramp, 1, 1, 4).tolist() == [[[0, 25, 75, 100]]]


def test_noise_is_seeded():
    (a, dataset, _), (b, _, _), (c, _, _) = (build({}, seed=s, source="noise", size=40) for s in (0, 0, 1))
    assert a and b and c

    x = [p.data.gather(p.ids).x for p in (a, b, c)]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])
    assert a.data.x.dtype == np.uint8 and 100 < a.data.x.mean() < 155
    assert len(build({}, source="noise")[0] or ()) == len(dataset.y_train) // 10


def test_synthetic_task_gets_more_of_its_mixture():
    data = {"source": "synthetic", "options": {"dimensions": 6, "classes": 3, "train": 90}}
    proxy, dataset, _ = build(data, source="synthetic")

    assert proxy is not None and proxy.data.x.shape == (90, 6)
    assert not np.array_equal(proxy.data.x, dataset.x_train)
    noise, _, _ = build(data, source="noise", size=500)
    assert noise is not None and abs(noise.data.x.std() - dataset.x_train.std()) < 0.2


def test_texts_are_translated_word_by_word(write_npz):
    def texts(name, words, rows):
        x = np.array(rows, dtype=np.uint16)
        vocab = np.frombuffer("\n".join(["<pad>", "<unk>", *words]).encode(), dtype=np.uint8)
        y = np.zeros(len(x), dtype=int)
        return write_npz(name, x_train=x, y_train=y, x_test=x, y_test=y, vocab=vocab)

    task = texts("task.npz", ["cat", "dog"], [[2, 3, 0]])
    other = texts("other.npz", ["dog", "cow", "cat"], [[4, 3, 2, 2], [2, 0, 0, 0]])
    proxy, _, _ = build({"source": f"npz:{task}"}, source=f"npz:{other}")

    assert proxy is not None and proxy.data.gather(proxy.ids).x.tolist() == [[2, 1, 3], [3, 0, 0]]


@pytest.mark.parametrize(
    ("spec", "key", "text"),
    [
        ({"source": "digits"}, "proxy.source", "own data"),
        ({"source": "synthetic"}, "proxy.source", "vector"),
        ({"source": "heldout"}, "proxy.source", "held-out"),
        ({"source": "synthetic:x"}, "proxy.source", ""),
    ],
)
def test_unusable_sets_are_refused(spec, key, text):
    with pytest.raises(ScenarioError) as error:
        build({}, **spec)
    assert error.value.key == key and text in str(error.value)


def test_size_beyond_the_set_is_refused(write_npz):
    with pytest.raises(ScenarioError) as error:
        build({}, source=f"npz:{write_npz()}", size=21)
    assert error.value.key == "proxy.size"


@pytest.mark.data
def test_cifar100_for_cifar10_and_mnist():
    if not os.environ.get("FEDKD_DATA"):
        pytest.skip("FEDKD_DATA is not set")
    proxy, _, _ = build({"source": "npz:cifar10.npz"}, source="npz:cifar100.npz")
    assert proxy is not None and len(proxy) == 6000 and proxy.same_shape
    grey, _, _ = build({"source": "npz:mnist.npz"}, source="npz:cifar100.npz", size=100)
    assert grey is not None and grey.data.gather(grey.ids).x.shape == (100, 1, 28, 28)
    assert module.resize_images(np.zeros((2, 28, 28), np.uint8), 3, 32, 32).shape == (2, 32, 32, 3)
