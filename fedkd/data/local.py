"""Sources that need no library of data sets: embedded digits, .npz files, a Gaussian mixture."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.cache import signature
from fedkd.data.raw import Plan, Raw
from fedkd.errors import DataError, ScenarioError
from fedkd.seeds import Purpose, rng


def digits(name: str, folder: str) -> Plan:
    """Plan scikit-learn's 1,797 digits of 8x8 pixels: a fixed, stratified fifth of them is the test set."""

    def decode() -> Raw:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        y = bunch.target.astype(np.int64)
        # One shuffle, the same for every run: a prefix of the training data is then a random sample of it.
        order = rng(0, Purpose.DATA).permutation(len(y))
        test = np.concatenate([(of := order[y[order] == c])[: round(len(of) / 5)] for c in range(10)])
        train = order[~np.isin(order, test)]
        test = order[np.isin(order, test)]
        return Raw(x[train], y[train], x[test], y[test], tuple(str(c) for c in range(10)))

    return Plan({"source": "digits"}, decode)


def npz(name: str, folder: str) -> Plan:
    """Plan a ``.npz`` file: x_train, y_train, x_test, y_test; optional classes, vocab, natural_ids."""
    path = find_file(name, folder)

    def decode() -> Raw:
        try:
            content: Any = np.load(path, allow_pickle=False)
            if isinstance(content, np.ndarray):
                raise DataError(f"{path} is a single array; a .npz archive is needed")
            with content:
                return _decode_npz(content, path)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path} cannot be read as a .npz file: {error}") from error

    return Plan({"source": "npz", "path": str(path.resolve()), "file": signature(path)}, decode)


def _decode_npz(content: Any, path: Path) -> Raw:
    needed = ("x_train", "y_train", "x_test", "y_test")
    missing = [key for key in needed if key not in content.files]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(content.files) or 'nothing'}")
    arrays = {}
    for key in (*needed, "classes", "vocab", "natural_ids"):
        try:
            arrays[key] = content[key] if key in content.files else None
        except ValueError as error:
            raise DataError(f"{path}: {key} holds Python objects, which are never unpickled") from error
    classes = arrays.pop("classes")
    named = () if classes is None else tuple(str(c) for c in np.ravel(classes))
    return Raw(**arrays, classes=named)


def find_file(name: str, folder: str = "") -> Path:
    """Return the file `name`, looked up below `folder`, then ``$FEDKD_DATA``, then the working folder.

    Raises
    ------
    DataError
        If it is in none of them; the message lists where it was looked for.
    """
    wanted = Path(os.path.expanduser(name))  # pathlib raises where there is no such user
    tried = [wanted] if wanted.is_absolute() else [base / wanted for base in data_folders(folder)]
    tried = list(dict.fromkeys(path.absolute() for path in tried))
    for path in tried:
        if os.path.isfile(path):  # pathlib raises for names that are too long
            return path
    raise DataError(
        f"no file {name!r}; looked for\n"
        + "\n".join(f"  {path}" for path in tried)
        + "\nName its folder with data.folder (--set data.folder=...) or $FEDKD_DATA"
    )


def data_folders(folder: str = "") -> list[Path]:
    """Return the folders where files are looked for, in order."""
    named = [folder, os.environ.get("FEDKD_DATA", "")]
    return [Path(os.path.expanduser(f)) for f in named if f] + [Path.cwd()]


def synthetic(
    name: str,
    folder: str,
    *,
    classes: int = 10,
    dimensions: int = 32,
    train: int = 2000,
    test: int = 500,
    separation: float = 3.0,
    shape: Sequence[int] = (),
    owners: int = 0,
    seed: int = 0,
    draw: int = 0,
) -> Plan:
    """Plan a Gaussian mixture: class means on a sphere of radius `separation`, unit noise around them.

    Parameters
    ----------
    name, folder : str
        Not used.
    classes : int
        Number of classes, at least 2.
    dimensions : int
        Length of the vectors; follows from `shape` where that is given.
    train, test : int
        Numbers of samples, equally many of each class up to one.
    separation : float
        Distance of the class means from the origin, in standard deviations of the noise.
    shape : sequence of int
        (H, W) or (H, W, C): samples are uint8 images, 32 grey levels to a standard deviation around 128.
    owners : int
        Number of natural owners among whom training samples are dealt at random; 0 = none.
    seed : int
        Seed of the class means.
    draw : int
        Another draw of samples from the same mixture.
    """
    whole = {"classes": (classes, 2), "dimensions": (dimensions, 1), "train": (train, 1), "test": (test, 1),
             "owners": (owners, 0), "seed": (seed, 0), "draw": (draw, 0)}  # fmt: skip
    for key, (value, least) in whole.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ScenarioError(f"must be a whole number >= {least}, is {value!r}", key=f"data.options.{key}")
    if not isinstance(separation, (int, float)) or not 0 <= separation < float("inf"):
        raise ScenarioError(f"must be a number >= 0, is {separation!r}", key="data.options.separation")
    sides = shape if isinstance(shape, (list, tuple)) else (0,)
    if len(sides) not in (0, 2, 3) or any(type(side) is not int or side < 1 for side in sides):
        raise ScenarioError(f"must be [H, W] or [H, W, C], is {shape!r}", key="data.options.shape")

    def decode() -> Raw:
        size = int(np.prod(shape)) if shape else dimensions
        means = rng(seed, Purpose.DATA).standard_normal((classes, size))
        means *= separation / np.linalg.norm(means, axis=1, keepdims=True)
        stream = rng(seed, Purpose.DATA, round=1 + draw)

        def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
            y = stream.permutation(np.arange(count) % classes)
            x = stream.standard_normal((count, size), dtype=np.float32)
            x += means[y].astype(np.float32)
            if not shape:
                return x, y
            return np.clip(128 + 32 * x, 0, 255).astype(np.uint8).reshape(count, *shape), y

        x_train, y_train = sample(train)
        x_test, y_test = sample(test)
        owner = stream.integers(0, owners, train) if owners else None
        named = tuple(str(c) for c in range(classes))
        return Raw(x_train, y_train, x_test, y_test, named, natural_ids=owner)

    options = {key: value for key, (value, _) in whole.items()}
    identity = {"source": "synthetic", **options, "separation": separation, "shape": list(shape)}
    return Plan(identity, decode)
