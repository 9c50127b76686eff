"""Proxy sets: what the server (and for some methods every client) may use for distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedkd import scenario
from fedkd.data import cache
from fedkd.data.batches import ArrayData
from fedkd.data.sources import Dataset, load_source
from fedkd.errors import ScenarioError
from fedkd.seeds import Purpose, rng


@dataclass(frozen=True)
class ProxySet:
    """Samples for distillation, in the shape of the task and normalised like it.

    Attributes
    ----------
    data : ArrayData
        The samples; ids run from 0 to the size less one. Holds labels only if they may be seen.
    labelled : bool
        Whether methods may see labels.
    same_shape : bool
        Whether the samples had the task's shape as they came, without conversion.
    source : str
        Where they are from.
    """

    data: ArrayData
    labelled: bool
    same_shape: bool
    source: str

    def __len__(self) -> int:
        return len(self.data)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.data)

    @property
    def ids(self) -> np.ndarray:
        """Sample ids, int64 [size]."""
        return np.arange(len(self.data), dtype=np.int64)

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 [size].

        Raises
        ------
        ScenarioError
            If the scenario does not let methods see them.
        """
        if self.data.labels is None:
            raise ScenarioError(
                "the method wants labels of the proxy set, which has none",
                key="proxy.labelled",
                hint='set proxy.labelled = true with proxy.source = "held-out"',
            )
        return self.data.labels

    @property
    def capabilities(self) -> frozenset[str]:
        """Names that strategies may require: ``proxy``, ``proxy-labels``, ``same-shape``."""
        extra = {"proxy-labels": self.labelled, "same-shape": self.same_shape}
        return frozenset({"proxy", *(name for name, has in extra.items() if has)})


def cut(spec: scenario.Proxy, samples: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut held-out proxy samples and the server's labelled samples from the training data.

    Parameters
    ----------
    spec : scenario.Proxy
        The scenario's section.
    samples : int
        Number of training samples.
    seed : int
        The run's seed.

    Returns
    -------
    held_out, server_labels, rest : np.ndarray
        Ids of training samples, sorted; together they are all of them, each once.

    Raises
    ------
    ScenarioError
        If nothing would be left for the clients, or labels are wanted of a proxy that has none.
    """
    if spec.labelled and spec.source != "held-out":
        raise ScenarioError(
            f"the labels of proxy {spec.source!r} mean nothing for the task",
            key="proxy.labelled",
            hint='only proxy.source = "held-out" has usable labels',
        )
    size = (spec.size or max(1, samples // 10)) if spec.source == "held-out" else 0
    if size + spec.server_labels >= samples:
        raise ScenarioError(
            f"{size} held-out and {spec.server_labels} server samples leave nothing of {samples} for clients",
            key="proxy.size" if size >= spec.server_labels else "proxy.server_labels",
            hint="make them smaller, or raise data.train_samples",
        )
    everything = np.arange(samples, dtype=np.int64)
    held_out = np.sort(rng(seed, Purpose.PROXY).permutation(samples)[:size])
    rest = np.setdiff1d(everything, held_out, assume_unique=True)
    server = np.sort(rng(seed, Purpose.SERVER_LABELS).permutation(rest)[: spec.server_labels])
    return held_out, server, np.setdiff1d(rest, server, assume_unique=True)


def build_proxy(
    spec: scenario.Proxy,
    data: scenario.Data,
    dataset: Dataset,
    train: ArrayData,
    held_out: np.ndarray,
    *,
    seed: int,
) -> ProxySet | None:
    """Return the proxy set of a scenario, or None if it has none.

    Parameters
    ----------
    spec : scenario.Proxy
        The scenario's section.
    data : scenario.Data
        The task's data section; its folder is where another data set is looked for.
    dataset : Dataset
        The task's data.
    train : ArrayData
        The task's training samples.
    held_out : np.ndarray
        Ids of held-out training samples, from `cut`.
    seed : int
        The run's seed: which samples are chosen, and the noise.

    Raises
    ------
    ScenarioError
        If the proxy is the task's own data, too small, or of another kind than the task.
    DataError
        If its data are not there.
    """
    if spec.source == "none":
        return None
    if spec.source == "held-out":
        return ProxySet(train.take(held_out, labelled=spec.labelled), spec.labelled, True, spec.source)
    if spec.source == "noise":
        size = spec.size or max(1, len(train) // 10)
        return ProxySet(_like(train, _noise(dataset, size, seed)), False, True, spec.source)
    return _foreign(spec, data, dataset, train, seed)


def _like(task: ArrayData, x: np.ndarray, rows: np.ndarray | None = None) -> ArrayData:
    """Return unlabelled samples that are normalised as the task's are."""
    return ArrayData(x, None, kind=task.kind, mean=task.mean, std=task.std, rows=rows)


def _noise(dataset: Dataset, size: int, seed: int) -> np.ndarray:
    """Return uniform pixels, uniform words (no padding), or normal vectors with the data's moments."""
    draw, shape = rng(seed, Purpose.PROXY), (size, *dataset.x_train.shape[1:])
    if dataset.kind == "image":
        return draw.integers(0, 256, shape, dtype=np.uint8)
    if dataset.kind == "tokens":
        return draw.integers(1, dataset.vocab_size, shape).astype(dataset.x_train.dtype)
    vectors = draw.standard_normal(shape) * dataset.x_train.std(axis=0) + dataset.x_train.mean(axis=0)
    return vectors.astype(np.float32)


def _foreign(spec: scenario.Proxy, data: scenario.Data, dataset: Dataset, train: ArrayData, seed: int) -> ProxySet:
    options: dict[str, Any] = {}
    if spec.source == "synthetic" and data.source == "synthetic":
        # More samples of the task's own mixture.
        options = {**data.options, "draw": data.options.get("draw", 0) + 1}
    try:
        other = load_source(spec.source, data.folder, **options)
    except ScenarioError as error:
        hint = f"none, held-out, noise or a data source; {error.hint}".strip("; ")
        raise ScenarioError(error.problem, key="proxy.source", hint=hint) from error
    if other.identity == dataset.identity:
        raise ScenarioError(
            f"{spec.source!r} is the task's own data, which the clients train on",
            key="proxy.source",
            hint='proxy.source = "held-out" cuts a proxy set from them',
        )
    if other.kind != dataset.kind:
        raise ScenarioError(
            f"{spec.source!r} holds {other.kind} samples, the task {dataset.kind} samples", key="proxy.source"
        )
    there = len(other.x_train)
    if spec.size > there:
        raise ScenarioError(
            f"{spec.size} is more than the {there} samples of {spec.source!r}",
            key="proxy.size",
            hint="0 uses all",
        )
    chosen = np.arange(there, dtype=np.int64)
    if spec.size:
        chosen = np.sort(rng(seed, Purpose.PROXY).permutation(there)[: spec.size])
    same_shape = other.x_train.shape[1:] == dataset.x_train.shape[1:]
    if same_shape and other.kind != "tokens":
        return ProxySet(_like(train, other.x_train, chosen), False, True, spec.source)

    def convert() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"x": _converted(other, dataset, chosen, spec.source)}, {}

    key = ["proxy", other.identity, dataset.input_shape, cache.digest(chosen)]
    if other.kind == "tokens":
        key.append(dataset.identity)
    arrays, _ = cache.fetch(f"proxy-{spec.source}", key, convert)
    return ProxySet(_like(train, arrays["x"]), False, same_shape, spec.source)


def _converted(other: Dataset, task: Dataset, chosen: np.ndarray, source: str) -> np.ndarray:
    if other.kind == "vector":
        raise ScenarioError(
            f"{source!r} has vectors of {other.x_train.shape[1]} values, the task of {task.x_train.shape[1]}",
            key="proxy.source",
        )
    if other.kind == "tokens":
        return _translate(other, task, other.x_train[chosen], source)
    channels, height, width = task.input_shape
    return resize_images(other.x_train[chosen], channels, height, width)


def resize_images(images: np.ndarray, channels: int, height: int, width: int) -> np.ndarray:
    """Return uint8 images with other channels and size.

    Parameters
    ----------
    images : np.ndarray
        uint8 [N, H, W] or [N, H, W, C].
    channels : int
        Colour becomes grey by the weights of ITU-R BT.601, grey becomes colour by repetition.
    height, width : int
        Reached by bilinear interpolation, with antialiasing where the image shrinks.

    Returns
    -------
    np.ndarray
        uint8 [N, height, width] for one channel, otherwise [N, height, width, channels].
    """
    shape = (len(images), height, width) if channels == 1 else (len(images), height, width, channels)
    result = np.empty(shape, dtype=np.uint8)
    for start in range(0, len(images), 1024):  # float copies of all images at once would be large
        part = torch.from_numpy(np.array(images[start : start + 1024])).float()
        part = part[:, None] if part.ndim == 3 else part.permute(0, 3, 1, 2)
        part = _recolour(part, channels)
        if part.shape[2:] != (height, width):
            part = F.interpolate(part, (height, width), mode="bilinear", antialias=True)
        pixels = part.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        result[start : start + 1024] = pixels[..., 0] if channels == 1 else pixels
    return result


def _recolour(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Return float images [N, C, H, W] with `channels` channels; transparency is dropped or opaque."""
    have = images.shape[1]
    if have == channels:
        return images
    if have == 2:  # grey and transparency
        images = images[:, :1]
    elif have >= 3:
        images = images[:, :3]
        if channels <= 2:
            images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if channels >= 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if channels in (2, 4):
        images = torch.cat([images, torch.full_like(images[:, :1], 255.0)], dim=1)
    return images


def _translate(other: Dataset, task: Dataset, tokens: np.ndarray, source: str) -> np.ndarray:
    """Return texts in the task's token ids: words by name, unknown ones as 1, cut or padded to length."""
    if other.vocab is None or task.vocab is None:
        raise ScenarioError(
            f"token ids of {source!r} mean other words than the task's, and a vocabulary is missing",
            key="proxy.source",
            hint="store both vocabularies (key vocab of the .npz files)",
        )
    theirs, ours = (d.vocab.tobytes().decode().split("\n") for d in (other, task) if d.vocab is not None)
    number = {word: i for i, word in enumerate(ours)}
    table = np.array([number.get(word, 1) for word in theirs], dtype=task.x_train.dtype)
    table[: min(2, len(table))] = range(min(2, len(table)))  # padding and unknown, whatever they are called
    length = task.x_train.shape[1]
    result = np.zeros((len(tokens), length), dtype=task.x_train.dtype)
    kept = table[tokens[:, :length].astype(np.int64)]
    result[:, : kept.shape[1]] = kept
    return result
