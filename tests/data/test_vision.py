"""torchvision's own loaders on small files in its formats; checksums are those of the files written here."""

import hashlib
import pickle

import numpy as np
import pytest
import torchvision.datasets as sets
from PIL import Image

from fedkd.data.sources import load_source
from fedkd.errors import DataError, ScenarioError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_idx_files(tmp_path, name):
    images = {part: RNG.integers(0, 256, (n, 28, 28)) for part, n in (("train", 12), ("t10k", 5))}
    for part, x in images.items():
        write_idx(tmp_path / name / "raw" / f"{part}-images-idx3-ubyte", x)
        write_idx(tmp_path / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(x)) % 10)

    data = load_source(f"torchvision:{name}", str(tmp_path))

    assert np.array_equal(data.x_train, images["train"]) and np.array_equal(data.x_test, images["t10k"])
    assert data.y_train.tolist() == [*range(10), 0, 1] and len(data.classes) == 10


def test_emnist_letters_are_upright_and_count_from_zero(tmp_path):
    for part, n in (("train", 27), ("test", 4)):
        images = np.zeros((n, 28, 28))
        images[:, 0, 5] = 255
        write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-letters-{part}-images-idx3-ubyte", images)
        labels = np.arange(n) % 26 + 1
        write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-letters-{part}-labels-idx1-ubyte", labels)

    data = load_source("torchvision:EMNIST", str(tmp_path), split="letters")

    assert data.classes[0] == "a" and data.num_classes == 26 and data.y_train[0] == 0
    assert data.x_train[0, 5, 0] == 255 and data.x_train[0, 0, 5] == 0


@pytest.mark.parametrize(("name", "label"), [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar_batches(tmp_path, monkeypatch, name, label):
    build = getattr(sets, name)
    folder = tmp_path / build.base_folder
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(folder / file)]

    red = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    red[:, 0] = 200
    files = [write(f, {"data": red.reshape(2, -1), label: [0, 1]}) for f, _ in build.train_list]
    tests = [write(f, {"data": red.reshape(2, -1), label: [1, 0]}) for f, _ in build.test_list]
    meta = write(build.meta["filename"], {build.meta["key"]: ["cat", "dog"]})
    monkeypatch.setattr(build, "train_list", files)
    monkeypatch.setattr(build, "test_list", tests)
    monkeypatch.setattr(build, "meta", build.meta | {"md5": meta[1]})

    data = load_source(f"torchvision:{name}", str(tmp_path))

    assert data.input_shape == (3, 32, 32) and data.classes == ("cat", "dog")
    assert (data.x_train[0, 0, 0] == [200, 0, 0]).all() and len(data.x_train) == 2 * len(files)


def test_svhn(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    listed = dict(sets.SVHN.split_list)
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        x = np.zeros((32, 32, 3, 4), dtype=np.uint8)
        x[..., 1, :] = 7
        scipy_io.savemat(file, {"X": x, "y": np.array([[10], [1], [2], [3]])})
        listed[part] = [listed[part][0], file.name, md5(file)]
    monkeypatch.setattr(sets.SVHN, "split_list", listed)

    data = load_source("torchvision:SVHN", str(tmp_path))

    assert data.y_train.tolist() == [0, 1, 2, 3] and (data.x_train[0, 0, 0] == [0, 7, 0]).all()


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    image = np.zeros((2, 3, 96, 96), dtype=np.uint8)  # as stored: channel, column, row
    image[:, 0, 5, 0] = 9
    content = {"X": image.tobytes(), "y": bytes([1, 10])}
    for listed in ("train_list", "test_list"):
        files = []
        for file, _ in getattr(sets.STL10, listed):
            (folder / file).write_bytes(content[file[-5]])
            files.append([file, md5(folder / file)])
        monkeypatch.setattr(sets.STL10, listed, files)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))

    data = load_source("torchvision:STL10", str(tmp_path))

    assert data.y_train.tolist() == [0, 9] and data.x_train[0, 0, 5].tolist() == [9, 0, 0]


def write_images(root, sizes=((6, 5),), classes=("cat", "dog")):
    for part in ("train", "test"):
        for i, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for j in range(3):
                height, width = sizes[j % len(sizes)]
                pixels = np.full((height, width, 3), 40 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{j}.png")


def test_image_folder(tmp_path):
    write_images(tmp_path)

    data = load_source("torchvision:ImageFolder", str(tmp_path))
    grey = load_source("torchvision:ImageFolder", str(tmp_path), size=[3, 4], grey=True)

    assert data.input_shape == (3, 6, 5) and data.classes == ("cat", "dog")
    assert (data.x_train[data.y_train == 1] == 40).all()
    assert grey.input_shape == (1, 3, 4)


def test_image_folder_with_different_sizes_needs_one(tmp_path):
    write_images(tmp_path, sizes=((6, 5), (7, 7)))

    with pytest.raises(DataError, match=r"differ in size .* set data\.options\.size"):
        load_source("torchvision:ImageFolder", str(tmp_path))
    assert load_source("torchvision:ImageFolder", str(tmp_path), size=4).input_shape == (3, 4, 4)


def test_image_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="train/CLASS/IMAGE"):
        load_source("torchvision:ImageFolder", str(tmp_path))
    write_images(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    Image.new("RGB", (5, 6)).save(tmp_path / "train" / "cow" / "0.png")
    with pytest.raises(DataError, match="cow occur in only one of train and test"):
        load_source("torchvision:ImageFolder", str(tmp_path))
    with pytest.raises(ScenarioError):
        load_source("torchvision:ImageFolder", str(tmp_path), size=[1, 2, 3])


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "SVHN"])
def test_offline_says_which_files_go_where(tmp_path, name):
    with pytest.raises(DataError) as error:
        load_source(f"torchvision:{name}", str(tmp_path))

    message = str(error.value)
    assert "cannot be downloaded" in message and "http" in message
    place = {"MNIST": "MNIST/raw", "CIFAR10": "cifar-10-batches-py", "SVHN": "train_32x32.mat"}[name]
    assert str(tmp_path / place) in message
