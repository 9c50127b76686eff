"""Nested dicts and lists of tensors on disk: a safetensors file for the tensors, JSON for the rest. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSOR, _LIST = "#tensor", "#list"


def save(tree: Mapping[str, Any], folder: Path) -> None:
    """Write a tree as ``tensors.safetensors`` and ``tree.json`` into an existing folder.

    Parameters
    ----------
    tree : mapping
        Nested mappings (string keys) and lists of tensors, numbers, strings, booleans and None.
    folder : Path
        Where to write.

    Raises
    ------
    TypeError
        A leaf or key is of another type.
    """
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))  # paths may collide: {"a/b": …} and {"a": {"b": …}}
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise TypeError(f"{path or 'the state'} has keys that are no strings")
            return {key: strip(inner, f"{path}/{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return {_LIST: [strip(inner, f"{path}/{i}") for i, inner in enumerate(value)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be part of a checkpoint")

    text = json.dumps(strip(tree, ""))
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "tree.json").write_text(text)
    for name in ("tensors.safetensors", "tree.json"):  # on the disk before anything older is removed
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def load(folder: Path) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises
    ------
    OSError
        A file is missing.
    """
    # In a file they lie anywhere; products with a batch of one sample have other bits where memory is not aligned.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "tensors.safetensors").items()}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if _TENSOR in value:
                return tensors[value[_TENSOR]]
            if _LIST in value:
                return [fill(inner) for inner in value[_LIST]]
            return {key: fill(inner) for key, inner in value.items()}
        return value

    return fill(json.loads((folder / "tree.json").read_text()))


def verify(folder: Path) -> None:
    """Check that what `save` wrote is there, and was not cut off; the numbers are not read.

    Parameters
    ----------
    folder : Path
        Where it was written.

    Raises
    ------
    OSError, ValueError, SafetensorError
        It is not.
    """
    json.loads((folder / "tree.json").read_text())
    with safe_open(folder / "tensors.safetensors", framework="pt"):
        pass


def bytes_to_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor, so that they can be part of a tree."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def tensor_to_bytes(tensor: Tensor) -> bytes:
    """Undo `bytes_to_tensor`."""
    return tensor.numpy().tobytes()


def records_to_tree(records: RecordDict) -> dict[str, Any]:
    """Return a client's Flower state as a tree: arrays as tensors, metrics and configs as they are."""
    tree: dict[str, Any] = {"arrays": {}, "metrics": {}, "configs": {}}
    for name, arrays in records.array_records.items():
        tree["arrays"][name] = {k: torch.from_numpy(a.numpy().copy()) for k, a in arrays.items()}
    for name, metrics in records.metric_records.items():
        tree["metrics"][name] = {k: list(v) if isinstance(v, list) else v for k, v in metrics.items()}
    for name, config in records.config_records.items():
        tree["configs"][name] = {
            k: {"bytes": bytes_to_tensor(v)} if isinstance(v, bytes) else v for k, v in config.items()
        }
    return tree


def tree_to_records(tree: Mapping[str, Any]) -> RecordDict:
    """Undo `records_to_tree`."""
    records = RecordDict()
    for name, arrays in tree["arrays"].items():
        records[name] = ArrayRecord({k: Array(t.numpy()) for k, t in arrays.items()})
    for name, metrics in tree["metrics"].items():
        records[name] = MetricRecord(metrics)
    for name, config in tree["configs"].items():
        values = {k: tensor_to_bytes(v["bytes"]) if isinstance(v, dict) else v for k, v in config.items()}
        records[name] = ConfigRecord(values)
    return records
