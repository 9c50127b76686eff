"""Image sets of torchvision, read from disk or downloaded, and folders of images."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.cache import cache_folder, signature
from fedkd.data.local import data_folders
from fedkd.data.raw import Plan, Raw
from fedkd.errors import DataError, ScenarioError

#: Name -> files below the data folder, as torchvision wants them, and where they can be had.
_FILES: dict[str, tuple[tuple[str, ...], str]] = {
    "MNIST": (("MNIST/raw",), "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "FashionMNIST": (("FashionMNIST/raw",), "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
    "EMNIST": (("EMNIST/raw",), "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"),
    "KMNIST": (("KMNIST/raw",), "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
    "CIFAR10": (("cifar-10-batches-py",), "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "CIFAR100": (("cifar-100-python",), "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "SVHN": (("train_32x32.mat", "test_32x32.mat"), "http://ufldl.stanford.edu/housenumbers/"),
    "STL10": (("stl10_binary",), "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
}
NAMES = (*_FILES, "ImageFolder")
_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
_CONTENT = {
    "MNIST": _IDX,
    "FashionMNIST": _IDX,
    "KMNIST": _IDX,
    "EMNIST": "emnist-SPLIT-{train,test}-{images-idx3,labels-idx1}-ubyte",
    "CIFAR10": "data_batch_1 to data_batch_5, test_batch, batches.meta",
    "CIFAR100": "train, test, meta",
    "STL10": "train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin, class_names.txt",
}
_TIMEOUT = 20.0  # seconds without an answer after which a download counts as failed


def torchvision(
    name: str, folder: str, *, split: str = "balanced", size: int | Sequence[int] = 0, grey: bool = False
) -> Plan:
    """Plan an image set of torchvision.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    folder : str
        torchvision's ``root``; also looked for in ``$FEDKD_DATA`` and the cache folder, downloaded if absent.
        For ImageFolder: the folder that holds ``train/CLASS/*.png`` and ``test/CLASS/*.png`` (or ``val/``).
    split : str
        EMNIST only: byclass, bymerge, balanced, letters, digits or mnist.
    size : int or (H, W)
        ImageFolder only: images are resized to this; needed where they differ in size.
    grey : bool
        ImageFolder only: one channel instead of three.
    """
    if name == "ImageFolder":
        return _image_folder(folder, size, grey)
    if name not in _FILES:
        lower = {known.lower(): known for known in NAMES}
        close = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = (f"did you mean {lower[close[0]]!r}? " if close else "") + f"known: {', '.join(NAMES)}"
        raise ScenarioError(f"unknown torchvision data set {name!r}", key="data.source", hint=hint)
    splits = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
    if split not in splits:
        raise ScenarioError(f"{split!r} is none of {', '.join(splits)}", key="data.options.split")
    store = cache_folder() / "torchvision"
    homes = [*data_folders(folder), store]
    root = next((home for home in homes if all((home / f).exists() for f in _FILES[name][0])), None)
    if root is None:
        root = Path(os.path.expanduser(folder)) if folder else store
        _open(name, root, split)  # downloads; afterwards the files can be signed
    root = root.resolve()

    def decode() -> Raw:
        return _decode(name, *_open(name, root, split))

    files = [signature(root / file) for file in _FILES[name][0] if (root / file).exists()]
    identity = {"source": "torchvision", "name": name, "root": str(root), "files": files}
    return Plan(identity | ({"split": split} if name == "EMNIST" else {}), decode)


def _open(name: str, root: Path, split: str) -> tuple[Any, Any]:
    """Return torchvision's training and test set from `root`, downloaded if they are not whole there."""
    import torchvision.datasets as sets

    build: Callable[..., Any] = getattr(sets, name)

    def both(download: bool) -> tuple[Any, Any]:
        if name in ("SVHN", "STL10"):
            return tuple(build(str(root), split=part, download=download) for part in ("train", "test"))  # type: ignore[return-value]
        extra = {"split": split} if name == "EMNIST" else {}
        return tuple(build(str(root), train=part, download=download, **extra) for part in (True, False))  # type: ignore[return-value]

    try:
        return both(download=False)
    except ImportError as error:  # SVHN needs SciPy
        raise DataError(f"torchvision:{name} cannot be read: {error}; pip install {error.name}") from error
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        reason = error
    try:
        with _impatient():
            root.mkdir(parents=True, exist_ok=True)
            return both(download=True)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        places, url = _FILES[name]
        content = _CONTENT.get(name, "")
        raise DataError(
            f"torchvision:{name} is not on disk ({_brief(reason)}) "
            f"and cannot be downloaded ({_brief(error)}).\n"
            f"On a machine with internet access, get {url} and put, below the folder named by data.folder or "
            "$FEDKD_DATA,\n"
            + "\n".join(f"  {root / place}" + (f"  with {content}" if content else "") for place in places)
        ) from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextmanager
def _impatient() -> Iterator[None]:
    """Let connections time out: torchvision's downloads have no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _decode(name: str, train: Any, test: Any) -> Raw:
    def arrays(part: Any) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(part.data)
        y = np.asarray(part.labels if name in ("SVHN", "STL10") else part.targets, dtype=np.int64)
        if name in ("SVHN", "STL10"):
            x = x.transpose(0, 2, 3, 1)
        if name == "EMNIST":
            x = x.transpose(0, 2, 1)  # the files hold images lying on their side
        return x, y

    (x_train, y_train), (x_test, y_test) = arrays(train), arrays(test)
    classes = tuple(str(c) for c in getattr(train, "classes", ()))
    if classes and classes[0] == "N/A":  # EMNIST letters count from 1
        classes, y_train, y_test = classes[1:], y_train - 1, y_test - 1
    return Raw(x_train, y_train, x_test, y_test, classes, kind="image")


def _image_folder(folder: str, size: int | Sequence[int], grey: bool) -> Plan:
    sides = check_size(size)
    tried = data_folders(folder) if not folder else [Path(os.path.expanduser(folder))]
    for root in tried:
        held_out = next((root / n for n in ("test", "val", "valid") if (root / n).is_dir()), None)
        if (root / "train").is_dir() and held_out:
            break
    else:
        raise DataError(
            "no folder of images: expected train/CLASS/IMAGE and test/CLASS/IMAGE (or val/) below "
            + " or ".join(str(root.absolute()) for root in tried)
            + "; name the folder with data.folder or $FEDKD_DATA"
        )
    root, parts = root.resolve(), (root.resolve() / "train", root.resolve() / held_out.name)

    def decode() -> Raw:
        import torchvision.datasets as sets

        try:
            train, test = (sets.ImageFolder(str(part)) for part in parts)
        except (FileNotFoundError, OSError) as error:
            raise DataError(f"{root}: {_brief(error)}") from error
        if train.classes != test.classes:
            both = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(f"{root}: {', '.join(both)} occur in only one of {parts[0].name} and {parts[1].name}")
        files = [str(root)]
        x_train = decode_images((train.loader(f) for f, _ in train.samples), tuple(sides), grey, *files)
        x_test = decode_images((test.loader(f) for f, _ in test.samples), tuple(sides), grey, *files)
        return Raw(
            x_train,
            np.array(train.targets),
            x_test,
            np.array(test.targets),
            tuple(train.classes),
            kind="image",
        )

    identity = {"source": "ImageFolder", "root": str(root), "size": sides, "grey": grey,
                "files": [signature(part) for part in parts]}  # fmt: skip
    return Plan(identity, decode)


def check_size(size: Any) -> list[int]:
    """Return the option `size` as [H, W], or refuse it; zeros stand for images as they are."""
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or any(type(side) is not int or side < 0 for side in sides):
        raise ScenarioError(f"must be a number of pixels or [H, W], is {size!r}", key="data.options.size")
    return sides


def decode_images(images: Iterator[Any], size: tuple[int, ...], grey: bool, source: str) -> np.ndarray:
    """Return PIL images as one uint8 array [N, H, W] (`grey`) or [N, H, W, 3].

    Parameters
    ----------
    images : iterator of PIL images
        Read one at a time.
    size : (H, W)
        Pixels after bilinear resizing; (0, 0) keeps them, and all must then have the same size.
    grey : bool
        One channel instead of three.
    source : str
        Named in errors.

    Raises
    ------
    DataError
        If the sizes differ and none is given, or a file is no image.
    """
    from PIL import Image

    arrays = []
    try:
        for image in images:
            image = image.convert("L" if grey else "RGB")
            if any(size):
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            arrays.append(np.asarray(image))
            if arrays[-1].shape != arrays[0].shape:
                raise DataError(
                    f"{source}: images differ in size ({arrays[0].shape[:2]} and {arrays[-1].shape[:2]}); "
                    "set data.options.size, such as 64"
                )
    except OSError as error:
        raise DataError(f"{source}: an image cannot be read: {error}") from error
    if not arrays:
        raise DataError(f"{source}: no images")
    return np.stack(arrays)
