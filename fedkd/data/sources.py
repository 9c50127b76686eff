"""Data sources: from a name such as ``npz:mnist.npz`` to memory-mapped arrays with checked contents."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedkd import scenario
from fedkd.data import cache, hub, local, vision
from fedkd.data.cache import cache_folder
from fedkd.data.raw import Plan, Raw, check
from fedkd.errors import DataError, ScenarioError

__all__ = ["Dataset", "Kind", "cache_folder", "load", "load_source", "names"]

Kind = Literal["image", "tokens", "vector"]


@dataclass(frozen=True)
class Dataset:
    """Training and test data of one task, as read-only arrays.

    Attributes
    ----------
    name : str
        The source it came from.
    x_train, x_test : np.ndarray
        Images uint8 [N, H, W] or [N, H, W, C], tokens uint16 or int32 [N, L], vectors float32 [N, D].
    y_train, y_test : np.ndarray
        Labels, int64 [N], in 0..num_classes-1.
    classes : tuple of str
        Name of each class.
    kind : "image", "tokens" or "vector"
        What a sample is.
    mean, std : tuple of float
        Per channel, of all training images scaled to 0..1; empty for other kinds. `std` is never 0.
    vocab_size : int
        Number of token ids; 0 for other kinds. Id 0 is padding, 1 an unknown word.
    natural_ids : np.ndarray or None
        Owner of each training sample (a writer, a hospital), int64 [N].
    vocab : np.ndarray or None
        Newline-separated UTF-8 words by token id, uint8, where the source has them.
    """

    name: str
    x_train: np.ndarray = field(repr=False)
    y_train: np.ndarray = field(repr=False)
    x_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    classes: tuple[str, ...]
    kind: Kind
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocab_size: int = 0
    natural_ids: np.ndarray | None = field(default=None, repr=False)
    vocab: np.ndarray | None = field(default=None, repr=False)
    identity: str = field(default="", repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input: (C, H, W) of images, (L,) of tokens, (D,) of vectors."""
        shape = tuple(self.x_train.shape[1:])
        if self.kind != "image":
            return shape
        return (shape[2] if len(shape) == 3 else 1, shape[0], shape[1])


#: Prefix of a source -> (makes the plan, one line of description).
_SOURCES: dict[str, tuple[Callable[..., Plan], str, str]] = {
    "digits": (local.digits, "digits", "scikit-learn's 8x8 digits, 10 classes; needs no download"),
    "npz": (local.npz, "npz:PATH", "x_train, y_train, x_test, y_test (and classes, vocab, natural_ids)"),
    "torchvision": (vision.torchvision, "torchvision:NAME", ", ".join(vision.NAMES)),
    "hub": (hub.hub, "hub:NAME", "images or texts from the Hugging Face hub, or a folder of such files"),
    "synthetic": (local.synthetic, "synthetic", "a Gaussian mixture of vectors or images, of any size"),
}  # fmt: skip


def names() -> dict[str, str]:
    """Return each source's pattern and one line about it.

    Examples
    --------
    >>> list(names())
    ['digits', 'npz:PATH', 'torchvision:NAME', 'hub:NAME', 'synthetic']
    """
    return {pattern: description for _, pattern, description in _SOURCES.values()}


def load(spec: scenario.Data) -> Dataset:
    """Load the data of a scenario, cut to ``train_samples`` and ``test_samples``.

    Parameters
    ----------
    spec : scenario.Data
        The scenario's section.

    Raises
    ------
    ScenarioError
        If the source, one of its options or the number of samples is impossible.
    DataError
        If the data are not there or not as they should be; the message says how to get them.
    """
    data = load_source(spec.source, spec.folder, **spec.options)
    for key, wanted, there in (
        ("train_samples", spec.train_samples, len(data.y_train)),
        ("test_samples", spec.test_samples, len(data.y_test)),
    ):
        if wanted > there:
            raise ScenarioError(
                f"{wanted} is more than the {there} samples of {spec.source}",
                key=f"data.{key}",
                hint="0 uses all",
            )
    train, test = spec.train_samples or None, spec.test_samples or None
    owners = data.natural_ids
    return replace(
        data,
        x_train=data.x_train[:train],
        y_train=data.y_train[:train],
        x_test=data.x_test[:test],
        y_test=data.y_test[:test],
        natural_ids=None if owners is None else owners[:train],
    )


def load_source(source: str, folder: str = "", **options: Any) -> Dataset:
    """Load a data source whole.

    Parameters
    ----------
    source : str
        A pattern of `names`, such as ``"npz:cifar10.npz"``.
    folder : str
        Folder of the files; where it is empty or lacks them, ``$FEDKD_DATA`` is looked at too.
    **options
        Parameters of the source.

    Returns
    -------
    Dataset
        Arrays mapped from the cache: decoding happens once per machine, later loads take milliseconds.

    Raises
    ------
    ScenarioError
        If the source or an option is unknown.
    DataError
        If the data are not there or not as they should be.
    """
    kind, _, name = source.partition(":")
    if kind not in _SOURCES:
        raise ScenarioError(f"unknown data source {source!r}", key="data.source", hint=_suggest(kind))
    make, pattern, _ = _SOURCES[kind]
    if (":" in pattern) != bool(name):
        raise ScenarioError(f"{source!r} should read {pattern!r}", key="data.source")
    _check_options(make, source, options)
    plan = make(name, folder, **options)

    def decode() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        try:
            return _pack(check(plan.decode(), source))
        except MemoryError as error:
            raise DataError(f"{source} does not fit into this machine's memory: {error}") from error

    arrays, facts = cache.fetch(source, plan.identity, decode)
    return Dataset(
        name=source,
        classes=tuple(facts["classes"]),
        kind=facts["kind"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        vocab_size=facts["vocab_size"],
        identity=cache.digest(plan.identity),
        **arrays,
    )


def _suggest(kind: str) -> str:
    close = difflib.get_close_matches(kind, _SOURCES, n=1)
    known = ", ".join(pattern for _, pattern, _ in _SOURCES.values())
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {known}"


def _check_options(make: Callable[..., Plan], source: str, options: dict[str, Any]) -> None:
    known = list(inspect.signature(make).parameters)[2:]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            listed = ", ".join(known) or "none"
            raise ScenarioError(
                f"{source} has no such option", key=f"data.options.{option}", hint=f"{hint}options: {listed}"
            )


def _pack(raw: Raw) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and facts as they are cached; images get their mean and deviation."""
    arrays = {name: getattr(raw, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    arrays |= {n: a for n in ("natural_ids", "vocab") if (a := getattr(raw, n)) is not None}
    mean, std = _moments(raw.x_train) if raw.kind == "image" else ((), ())
    facts = {
        "classes": list(raw.classes),
        "kind": raw.kind,
        "mean": mean,
        "std": std,
        "vocab_size": raw.vocab_size,
    }
    return arrays, facts


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and deviation per channel on the 0..1 scale.

    Counting how often each of the 256 values occurs is exact and needs no float copy of the images.
    """
    channels = images.shape[3] if images.ndim == 4 else 1
    flat = images.reshape(-1, channels)
    counts = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(channels)]).astype(float)
    share = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = share @ values
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()
