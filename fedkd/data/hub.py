"""Images and texts from the Hugging Face hub, through flwr-datasets; a local folder works the same way."""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedkd.data.cache import signature
from fedkd.data.local import data_folders
from fedkd.data.raw import Plan, Raw
from fedkd.data.vision import check_size, decode_images
from fedkd.errors import DataError, ScenarioError

_WORDS = re.compile(r"[a-z0-9']+")
_PROBE_SECONDS = 5.0


def hub(
    name: str,
    folder: str,
    *,
    subset: str = "",
    train_split: str = "train",
    test_split: str = "test",
    test_share: float = 0.0,
    column: str = "",
    label_column: str = "",
    owner_column: str = "",
    size: int | Sequence[int] = 0,
    grey: bool | None = None,
    length: int = 64,
    vocab: int = 20_000,
    revision: str = "",
) -> Plan:
    """Plan a data set of images or texts.

    Parameters
    ----------
    name : str
        Name on the hub, or a folder (looked up like an npz file) of parquet, image or csv files.
    folder : str
        Where a relative folder is looked for first.
    subset : str
        Configuration of the data set, where it has several.
    train_split, test_split : str
        Names of the splits.
    test_share : float
        Cut this share of the training split, at random from a fixed seed, as the test data instead.
    column, label_column, owner_column : str
        Column of the image or text, of the label, of the natural owner. The first two are found by their type
        if they are empty (the first image, otherwise the first text; the first class label, otherwise a
        column called label, labels, fine_label, target or class).
    size : int or (H, W)
        Images are resized to this; needed where they differ in size.
    grey : bool
        One channel instead of three; by default, as the first image is.
    length, vocab : int
        Texts: words kept of each, and entries of the vocabulary (words that occur at least twice in training
        texts, most frequent first) including padding (0) and unknown (1).
    revision : str
        Git revision of the data set on the hub.
    """
    if not isinstance(test_share, (int, float)) or not 0 <= test_share < 1:
        raise ScenarioError(f"must be in [0, 1), is {test_share!r}", key="data.options.test_share")
    for key, value, least in (("length", length, 1), ("vocab", vocab, 3)):
        if not isinstance(value, int) or value < least:
            raise ScenarioError(f"must be a whole number >= {least}, is {value!r}", key=f"data.options.{key}")
    sides = tuple(check_size(size))
    local = _local(name, folder)
    options = {k: v for k, v in locals().items() if k not in ("folder", "local", "name", "size")}

    def decode() -> Raw:
        try:
            train, test = _load(local or name, subset, revision, train_split, test_split, test_share)
            return _decode(train, test, name, column, label_column, owner_column, sides, grey, length, vocab)
        except (DataError, ScenarioError):
            raise
        except Exception as error:  # the libraries below raise whatever they like
            how = "check the files and the options" if local else f"is it {_endpoint()}/datasets/{name}?"
            raise DataError(f"hub:{name} cannot be loaded ({type(error).__name__}: {_brief(error)}); {how}") from error

    identity = {
        "source": "hub",
        "name": local or name,
        "files": signature(Path(local)) if local else None,
        **options,
    }
    return Plan(identity, decode)


def _local(name: str, folder: str) -> str:
    """Return the folder `name` if there is one, otherwise an empty string."""
    wanted = Path(os.path.expanduser(name))
    places = [wanted] if wanted.is_absolute() else [base / wanted for base in data_folders(folder)]
    found = next((str(place.resolve()) for place in places if os.path.isdir(place)), "")
    if not found and (wanted.is_absolute() or name.startswith((".", "~"))):
        raise DataError(f"hub:{name}: there is no such folder")
    return found


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, accepts a connection; its own retries take minutes."""
    flag = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE") or ""
    if flag.lower() in ("1", "true", "yes", "on"):
        return False
    target = urlsplit(_endpoint())
    proxy = os.environ.get(f"{target.scheme}_proxy") or os.environ.get(f"{target.scheme}_proxy".upper())
    if proxy:
        target = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        with socket.create_connection((target.hostname or "", port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


def _load(name: str, subset: str, revision: str, train: str, test: str, share: float) -> tuple[Any, Any]:
    """Return the training and test split, through flwr-datasets."""
    from flwr_datasets import FederatedDataset

    online = Path(name).is_dir() or _reachable()
    # No partitioner: the scenario's own partition comes later and also serves other sources.
    extra: dict[str, Any] = {"revision": revision} if revision else {}
    federated = FederatedDataset(dataset=name, subset=subset or None, partitioners={}, shuffle=False, **extra)

    def split(key: str, wanted: str) -> Any:
        try:
            return federated.load_split(wanted)
        except ValueError as error:
            if "is not present in the dataset's splits" not in str(error):
                raise
            hint = f"it has {str(error).split('splits:')[-1].strip(' .')}"
            if key == "test_split":
                hint += "; data.options.test_share = 0.2 cuts test data from the training data"
            raise ScenarioError(f"hub:{name} has no split {wanted!r}", key=f"data.options.{key}", hint=hint) from error

    try:
        with nullcontext() if online else _offline():
            if not share:
                return split("train_split", train), split("test_split", test)
            cut = split("train_split", train).train_test_split(test_size=share, seed=0)
            return cut["train"], cut["test"]
    except ScenarioError:
        raise
    except Exception as error:
        if online:
            raise
        raise DataError(
            f"hub:{name} is not in the cache of Hugging Face datasets, and {_endpoint()} cannot be reached. "
            "Load it once on a machine with internet access\n"
            f'  python -c "from datasets import load_dataset; load_dataset({name!r})"\n'
            "and copy its Hugging Face cache ($HF_HOME, by default ~/.cache/huggingface) here; or put the "
            "splits' parquet files into a folder and use hub:FOLDER"
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """Make the Hugging Face libraries use what is on disk and give up at once on the rest."""
    import huggingface_hub.constants as constants
    from datasets import config

    before = (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _decode(
    train: Any, test: Any, name: str, column: str, label: str, owner: str,
    size: tuple[int, ...], grey: bool | None, length: int, vocab: int,
) -> Raw:  # fmt: skip
    import datasets

    features = train.features
    for key, wanted in (("column", column), ("label_column", label), ("owner_column", owner)):
        if wanted and wanted not in features:
            listed = ", ".join(features)
            raise ScenarioError(
                f"hub:{name} has no column {wanted!r}", key=f"data.options.{key}", hint=f"it has {listed}"
            )
    usual = ("label", "labels", "fine_label", "target", "class")
    label = label or next((c for c, f in features.items() if isinstance(f, datasets.ClassLabel)), "")
    label = label or next((c for c in usual if c in features), "")
    texts = [c for c, f in features.items() if getattr(f, "dtype", "") in ("string", "large_string")]
    texts = [c for c in texts if c not in (label, owner)]
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    column = column or next(iter([*images, *texts]), "")
    if not column or not label:
        missing = "image or text" if not column else "label"
        key = "data.options." + ("column" if not column else "label_column")
        raise ScenarioError(f"hub:{name}: no {missing} column found", key=key, hint=f"it has {', '.join(features)}")

    y_train, y_test, classes = _labels(train, test, label)
    raw = Raw(np.empty(0), y_train, np.empty(0), y_test, classes)
    if owner:
        raw.natural_ids = np.asarray(train.with_format("numpy")[:][owner])
    if column in images:
        grey = train[0][column].mode in ("1", "L", "I", "I;16", "F") if grey is None else grey
        raw.kind = "image"
        raw.x_train, raw.x_test = (
            decode_images((row[column] for row in part.select_columns([column])), size, grey, f"hub:{name}")
            for part in (train, test)
        )
    else:
        raw.kind = "tokens"
        raw.x_train, raw.x_test, words = tokenise(list(train[column]), list(test[column]), length, vocab)
        raw.vocab = np.frombuffer("\n".join(words).encode(), dtype=np.uint8)
    return raw


def _labels(train: Any, test: Any, column: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return training and test labels as integers, and the classes' names; texts are numbered in order."""
    feature = train.features[column]
    y_train, y_test = (np.asarray(list(part[column])) for part in (train, test))
    if hasattr(feature, "names"):
        return y_train, y_test, tuple(feature.names)
    names, both = np.unique(np.concatenate([y_train, y_test]), return_inverse=True)
    return both[: len(y_train)], both[len(y_train) :], tuple(str(n) for n in names)


def tokenise(train: list[str], test: list[str], length: int, vocab: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return token ids of training and test texts and the vocabulary.

    Words are runs of ``[a-z0-9']`` in the lower-cased text. The vocabulary is every word that occurs at least
    twice in the training texts, by falling count (ties alphabetical), after padding (0) and unknown (1).

    Examples
    --------
    >>> ids, _, words = tokenise(["A cat, a dog", "a cat!"], ["the cat"], length=3, vocab=10)
    >>> words
    ['<pad>', '<unk>', 'a', 'cat']
    >>> ids.tolist()
    [[2, 3, 2], [2, 3, 0]]
    """
    split = [[_WORDS.findall((text or "").lower()) for text in part] for part in (train, test)]
    counts = Counter(word for words in split[0] for word in words)
    kept = sorted((w for w, n in counts.items() if n > 1), key=lambda w: (-counts[w], w))[: vocab - 2]
    words = ["<pad>", "<unk>", *kept]
    number = {word: i for i, word in enumerate(words)}
    ids = []
    for part in split:
        array = np.zeros((len(part), length), dtype=np.int32)
        for row, found in zip(array, part, strict=True):
            found = found[:length]
            row[: len(found)] = [number.get(word, 1) for word in found]
        ids.append(array)
    return ids[0], ids[1], words
