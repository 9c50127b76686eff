"""What a source hands over before it is cached, and the checks that everything must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd.errors import DataError

#: Most classes of data that do not name them.
MOST_CLASSES = 100_000


@dataclass
class Raw:
    """Arrays of a source as decoded; `check` brings them to the dtypes and kinds of `Dataset`.

    `kind` may stay empty: uint8 with 3 or 4 dimensions are images, other integers tokens, floats vectors.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...] = ()
    kind: str = ""
    vocab_size: int = 0
    vocab: np.ndarray | None = None
    natural_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Plan:
    """How to get a source: what its content depends on (the cache's key), and the decoding itself."""

    identity: Any
    decode: Callable[[], Raw]


def check(raw: Raw, source: str) -> Raw:
    """Return `raw` with the dtypes of `Dataset`; refuse what is not as it should be.

    Raises
    ------
    DataError
        Naming the source, the array and what is wrong with it.
    """

    def bad(array: str, problem: str) -> DataError:
        return DataError(f"{source}: {array} {problem}")

    raw.kind = raw.kind or _kind(raw.x_train, bad)
    for split in ("train", "test"):
        x, y = getattr(raw, f"x_{split}"), getattr(raw, f"y_{split}")
        if x.ndim == 0:
            raise bad(f"x_{split}", f"is a single value, {x}; should be one sample for each label")
        if len(x) == 0:
            raise bad(f"x_{split}", "has no samples")
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            raise bad(f"y_{split}", f"has shape {y.shape}; should be one label for each sample")
        if len(x) != len(y):
            raise bad(f"x_{split} and y_{split}", f"differ in length: {len(x)} and {len(y)}")
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise bad(f"y_{split}", "holds NaN or infinity")
        if y.dtype.kind not in "iu":
            raise bad(f"y_{split}", f"has dtype {y.dtype}; labels must be integers")
        setattr(raw, f"y_{split}", y.astype(np.int64))
        setattr(raw, f"x_{split}", _samples(x, f"x_{split}", raw, bad))
    if raw.x_train.shape[1:] != raw.x_test.shape[1:]:
        raise bad("x_test", f"has samples of shape {raw.x_test.shape[1:]}, x_train {raw.x_train.shape[1:]}")
    _check_labels(raw, bad)
    if raw.kind == "tokens":
        _check_tokens(raw, bad)
    if raw.natural_ids is not None:
        if raw.natural_ids.shape != raw.y_train.shape:
            raise bad("natural_ids", f"has shape {raw.natural_ids.shape}; should be one owner per training sample")
        # Owners may be names: number them in sorted order.
        raw.natural_ids = np.unique(raw.natural_ids, return_inverse=True)[1].astype(np.int64)
    return raw


def _kind(x: np.ndarray, bad: Callable[[str, str], DataError]) -> str:
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return "image"
    if x.dtype.kind in "iu" and x.ndim == 2:
        return "tokens"
    if x.dtype.kind == "f" and x.ndim == 2:
        return "vector"
    hint = " (images must be uint8 0..255)" if x.ndim in (3, 4) else ""
    raise bad(
        "x_train",
        f"has dtype {x.dtype} and shape {x.shape}; should be uint8 images [N, H, W] or [N, H, W, C], "
        f"integer tokens [N, L] or float vectors [N, D]{hint}",
    )


def _samples(x: np.ndarray, name: str, raw: Raw, bad: Callable[[str, str], DataError]) -> np.ndarray:
    if raw.kind == "image":
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise bad(name, f"has dtype {x.dtype} and shape {x.shape}; should be uint8 [N, H, W] or [N, H, W, C]")
        if x.ndim == 4 and x.shape[3] not in (1, 2, 3, 4):
            raise bad(name, f"has shape {x.shape}; colour channels (1 to 4) come last")
        x = x[..., 0] if x.ndim == 4 and x.shape[3] == 1 else x
    elif x.ndim != 2 or x.dtype.kind not in ("f" if raw.kind == "vector" else "iu"):
        raise bad(name, f"has dtype {x.dtype} and shape {x.shape}; x_train holds {raw.kind}")
    elif raw.kind == "vector":
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise bad(name, "holds NaN or infinity")
    if 0 in x.shape:
        raise bad(name, f"has shape {x.shape}: an empty side")
    return x


def _check_labels(raw: Raw, bad: Callable[[str, str], DataError]) -> None:
    if not raw.classes:
        highest = int(max(raw.y_train.max(), raw.y_test.max()))
        if highest >= MOST_CLASSES:  # ids or prices taken for labels; a list of names would fill the memory
            split = "train" if highest == raw.y_train.max() else "test"
            raise bad(f"y_{split}", f"holds label {highest}; labels are 0..{MOST_CLASSES - 1}, numbered without gaps")
        raw.classes = tuple(str(c) for c in range(highest + 1))
    for split in ("train", "test"):
        y = getattr(raw, f"y_{split}")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= len(raw.classes):
            wrong = low if low < 0 else high
            raise bad(
                f"y_{split}",
                f"holds label {wrong}; with {len(raw.classes)} classes, labels are 0..{len(raw.classes) - 1}",
            )


def _check_vocab(vocab: np.ndarray, bad: Callable[[str, str], DataError]) -> None:
    how = 'make it with np.frombuffer("\\n".join(words).encode(), dtype=np.uint8)'
    if vocab.dtype != np.uint8:
        raise bad("vocab", f"has dtype {vocab.dtype}; should be uint8, the words of all token ids; {how}")
    try:
        vocab.tobytes().decode()
    except UnicodeDecodeError as error:
        raise bad("vocab", f"is not UTF-8 text ({error}); {how}") from None


def _check_tokens(raw: Raw, bad: Callable[[str, str], DataError]) -> None:
    low = min(int(raw.x_train.min()), int(raw.x_test.min()))
    high = max(int(raw.x_train.max()), int(raw.x_test.max()))
    if raw.vocab is not None:
        _check_vocab(raw.vocab, bad)
    if raw.vocab is not None and not raw.vocab_size:
        raw.vocab_size = len(raw.vocab.tobytes().split(b"\n"))
    raw.vocab_size = raw.vocab_size or max(high + 1, 2)
    if low < 0 or high >= raw.vocab_size:
        wrong = low if low < 0 else high
        raise bad("x_train or x_test", f"holds token id {wrong}; ids are 0..{raw.vocab_size - 1}")
    dtype = np.uint16 if raw.vocab_size <= 65536 else np.int32
    raw.x_train, raw.x_test = raw.x_train.astype(dtype), raw.x_test.astype(dtype)
