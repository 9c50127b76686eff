import multiprocessing
import os
import time

import numpy as np
import pytest

from fedkd import scenario
from fedkd.data import sources
from fedkd.data.sources import load, load_source
from fedkd.errors import DataError, ScenarioError


def test_digits_are_split_by_class():
    data = load_source("digits")

    assert data.kind == "image" and data.input_shape == (1, 8, 8) and data.num_classes == 10
    assert data.x_train.dtype == np.uint8 and data.x_train.max() == 255 and data.y_train.dtype == np.int64
    assert len(data.y_train) + len(data.y_test) == 1797
    whole = np.bincount(np.concatenate([data.y_train, data.y_test]))
    assert np.abs(np.bincount(data.y_test) - whole / 5).max() <= 0.5
    assert data.mean == pytest.approx([(data.x_train / 255).mean()])
    assert data.std == pytest.approx([(data.x_train / 255).std()])


def test_second_load_comes_from_the_cache_at_once(write_npz):
    path = write_npz()
    first = load_source(f"npz:{path}")
    start = time.perf_counter()
    again = load_source(f"npz:{path}")

    assert time.perf_counter() - start < 0.1
    assert np.array_equal(first.x_train, again.x_train) and not again.x_train.flags.writeable
    assert isinstance(again.x_train.base, np.memmap)


def test_changed_file_is_decoded_again(write_npz):
    path = write_npz()
    load_source(f"npz:{path}")
    write_npz(x_train=np.zeros((20, 6, 5, 3), dtype=np.uint8))
    os.utime(path, ns=(1, 1))

    assert load_source(f"npz:{path}").x_train.max() == 0


def test_damaged_cache_is_made_again(write_npz, monkeypatch):
    path = write_npz()
    load_source(f"npz:{path}")
    for file in sources.cache_folder().rglob("x_train.npy"):
        file.write_bytes(b"\x93NUMPY")

    assert load_source(f"npz:{path}").x_train.shape == (20, 6, 5, 3)


def _load(path):
    return load_source(f"npz:{path}").x_train.sum()


def test_processes_may_decode_at_once(write_npz):
    path = write_npz()
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(_load, [path] * 8)

    assert len(set(sums)) == 1
    assert len(list((sources.cache_folder() / "data").iterdir())) == 1


def test_npz_is_looked_up_in_order(write_npz, tmp_path, monkeypatch):
    write_npz(folder=tmp_path / "a", classes=np.array(list("AAAA")))
    write_npz(folder=tmp_path / "b", classes=np.array(list("BBBB")))
    write_npz(folder=tmp_path / "c", classes=np.array(list("CCCC")))
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path / "b"))
    monkeypatch.chdir(tmp_path / "c")

    assert load_source("npz:toy.npz", str(tmp_path / "a")).classes[0] == "A"
    assert load_source("npz:toy.npz").classes[0] == "B"
    monkeypatch.delenv("FEDKD_DATA")
    assert load_source("npz:toy.npz").classes[0] == "C"
    with pytest.raises(DataError, match=r"looked for\n(.|\n)*FEDKD_DATA"), monkeypatch.context() as m:
        m.chdir(tmp_path)
        load_source("npz:toy.npz", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((3, 6, 5, 3), dtype=np.uint8)}, "differ in length: 3 and 20"),
        ({"y_train": np.arange(20)}, "holds label 19; with 4 classes"),
        ({"y_train": np.arange(20) - 1}, "holds label -1"),
        ({"y_train": np.full(20, np.nan)}, "y_train holds NaN"),
        ({"y_train": np.zeros(20)}, "labels must be integers"),
        ({"y_train": np.zeros((20, 2), dtype=int)}, "one label for each sample"),
        ({"y_train": np.array([None] * 20)}, "never unpickled"),
        ({"x_train": np.zeros((20, 6, 5, 3))}, "images must be uint8"),
        ({"x_train": np.zeros((20, 3, 6, 5), dtype=np.uint8)}, "come last"),
        ({"x_train": np.zeros((20, 7, 5, 3), dtype=np.uint8)}, r"x_test has samples of shape \(6, 5, 3\)"),
        ({"x_train": np.zeros((20, 4))}, "x_train holds vector"),
        (
            {"x_train": np.full((20, 4), np.nan), "x_test": np.zeros((8, 4))},
            "x_train holds NaN",
        ),
        (
            {"x_train": np.full((20, 4), -1), "x_test": np.zeros((8, 4), dtype=int)},
            "holds token id -1",
        ),
        ({"x_test": np.zeros((0, 6, 5, 3), dtype=np.uint8), "y_test": np.zeros(0, int)}, "has no samples"),
        ({"natural_ids": np.zeros(3, dtype=int)}, "one owner per training sample"),
    ],
)
def test_bad_npz_is_refused(write_npz, changes, message):
    path = write_npz(**changes)

    with pytest.raises(DataError, match=message):
        load_source(f"npz:{path}")


def test_file_that_is_no_npz(tmp_path):
    (tmp_path / "a.npz").write_text("hello")
    np.save(tmp_path / "b.npy", np.zeros(3))

    for name in ("a.npz", "b.npy"):
        with pytest.raises(DataError, match=name):
            load_source(f"npz:{tmp_path / name}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_test": np.array(5, dtype=np.uint8)}, "x_test is a single value"),
        ({"y_train": np.arange(20) * 10**11, "classes": None}, "y_train holds label 1900000000000"),
        ({"y_test": np.arange(8) * 10**11, "classes": None}, "y_test holds label 700000000000"),
        ({"vocab": np.array(["<pad>", "<unk>"])}, "vocab has dtype <U5.*np.frombuffer"),
        ({"vocab": np.frombuffer(b"\xff", dtype=np.uint8)}, "vocab is not UTF-8"),
    ],
)
def test_arrays_that_make_no_sense_are_named(write_npz, changes, says):
    if "vocab" in changes:
        changes |= {"x_train": np.ones((20, 7), dtype=np.uint16), "x_test": np.zeros((8, 7), dtype=np.uint16)}

    with pytest.raises(DataError, match=says):
        load_source(f"npz:{write_npz(**changes)}")


def test_folders_of_nobody_hold_no_file():
    with pytest.raises(DataError, match="looked for"):
        load_source("npz:~nobody-of-this-name/a.npz", folder="~nobody-of-this-name")


def test_tokens_vectors_and_owners(write_npz):
    words = np.frombuffer(b"<pad>\n<unk>\nred\ngreen", dtype=np.uint8)
    tokens = write_npz(
        x_train=np.ones((20, 7), dtype=np.uint16),
        x_test=np.zeros((8, 7), dtype=np.uint16),
        vocab=words,
        natural_ids=np.array(["z", "y"] * 10),
        classes=None,
    )
    vectors = write_npz("v.npz", x_train=np.ones((20, 7)), x_test=np.zeros((8, 7)))

    data = load_source(f"npz:{tokens}")
    assert (data.kind, data.input_shape, data.vocab_size) == ("tokens", (7,), 4)
    assert data.classes == ("0", "1", "2", "3") and data.x_train.dtype == np.uint16
    assert data.natural_ids is not None and data.natural_ids.tolist() == [1, 0] * 10
    data = load_source(f"npz:{vectors}")
    assert (data.kind, data.input_shape, data.mean) == ("vector", (7,), ())
    assert data.x_train.dtype == np.float32


def test_synthetic_is_as_separable_as_asked():
    near = load_source("synthetic", classes=3, dimensions=8, train=300, test=300, separation=0)
    far = load_source("synthetic", classes=3, dimensions=8, train=300, test=300, separation=20)

    def accuracy(data):
        means = np.stack([data.x_train[data.y_train == c].mean(0) for c in range(3)])
        return (((data.x_test[:, None] - means) ** 2).sum(2).argmin(1) == data.y_test).mean()

    assert accuracy(far) == 1 and accuracy(near) < 0.5
    assert np.bincount(far.y_train).tolist() == [100, 100, 100]


def test_synthetic_images_and_draws():
    a = load_source("synthetic", train=50, shape=[4, 4, 3])
    b = load_source("synthetic", train=50, shape=[4, 4, 3], draw=1)

    assert a.kind == "image" and a.input_shape == (3, 4, 4)
    assert not np.array_equal(a.x_train, b.x_train)


def test_load_cuts_from_the_front(write_npz):
    path = write_npz(natural_ids=np.arange(20))
    data = load(scenario.Data(source=f"npz:{path}", train_samples=12, test_samples=3))

    assert len(data.x_train) == len(data.y_train) == 12 and len(data.x_test) == 3
    assert data.natural_ids is not None and len(data.natural_ids) == 12
    with pytest.raises(ScenarioError, match="21 is more than the 20") as error:
        load(scenario.Data(source=f"npz:{path}", train_samples=21))
    assert error.value.key == "data.train_samples"


@pytest.mark.parametrize(
    ("source", "options", "key", "hint"),
    [
        ("digit", {}, "data.source", "'digits'"),
        ("npz", {}, "data.source", ""),
        ("digits:x", {}, "data.source", ""),
        ("torchvision:Mnist", {}, "data.source", "'MNIST'"),
        ("digits", {"classes": 3}, "data.options.classes", "options: none"),
        ("synthetic", {"class": 3}, "data.options.class", "'classes'"),
        ("synthetic", {"classes": 1}, "data.options.classes", ""),
        ("synthetic", {"train": "x"}, "data.options.train", ""),
        ("synthetic", {"separation": -1}, "data.options.separation", ""),
        ("synthetic", {"shape": [0, 3]}, "data.options.shape", ""),
        ("synthetic", {"shape": 3}, "data.options.shape", ""),
        ("torchvision:ImageFolder", {"size": 3.5}, "data.options.size", ""),
        ("hub:nobody/nothing", {"size": "big"}, "data.options.size", ""),
        ("torchvision:EMNIST", {"split": "x"}, "data.options.split", ""),
    ],
)
def test_impossible_source_is_refused(source, options, key, hint):
    with pytest.raises(ScenarioError) as error:
        load_source(source, **options)

    assert error.value.key == key and hint in error.value.hint


def test_unwritable_cache_says_what_to_do(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "file"))

    with pytest.raises(DataError, match="--cache"):
        load_source("digits")


def test_heavy_libraries_are_not_imported():
    import subprocess
    import sys

    heavy = "'datasets', 'flwr_datasets', 'torchvision', 'sklearn'"
    code = f"import sys, fedkd.data; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind", "shape", "classes"),
    [
        ("cifar10", "image", (3, 32, 32), 10),
        ("mnist", "image", (1, 28, 28), 10),
        ("ag_news", "tokens", (64,), 4),
        ("pneumonia_mnist", "image", (1, 28, 28), 2),
    ],
)
def test_real_files(name, kind, shape, classes):
    if not os.environ.get("FEDKD_DATA"):
        pytest.skip("FEDKD_DATA is not set")
    data = load_source(f"npz:{name}.npz")

    assert (data.kind, data.input_shape, data.num_classes) == (kind, shape, classes)
    if name == "mnist":
        assert data.mean == pytest.approx([0.1307], abs=1e-4) and data.std == pytest.approx([0.3081], abs=1e-4)
    if name == "ag_news":
        assert data.vocab is not None and data.vocab_size > data.x_train.max()
