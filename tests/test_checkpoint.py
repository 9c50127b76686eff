"""Checkpoints: nested states survive the disk, with bits and types; nothing else can be written."""

import pytest
import torch

from fedkd import checkpoint


def test_trees_survive_the_disk(tmp_path):
    tree = {
        "round": 3,
        "none": None,
        "students": {"cnn": {"a.weight": torch.randn(2, 3), "count": torch.tensor(4)}},
        "history": [{"w": torch.ones(1)}, {"w": torch.zeros(1)}],
        "empty": {"dict": {}, "list": [], "tensor": torch.empty(0)},
        "raw": checkpoint.bytes_to_tensor(b"\x00abc"),
    }

    checkpoint.save(tree, tmp_path)
    got = checkpoint.load(tmp_path)

    assert got["round"] == 3 and got["none"] is None and got["empty"]["dict"] == {} and got["empty"]["list"] == []
    assert torch.equal(got["students"]["cnn"]["a.weight"], tree["students"]["cnn"]["a.weight"])
    assert got["students"]["cnn"]["count"].dtype == torch.int64
    assert [float(past["w"]) for past in got["history"]] == [1.0, 0.0]
    assert checkpoint.tensor_to_bytes(got["raw"]) == b"\x00abc"


def test_the_same_tensor_twice_is_written_twice(tmp_path):
    shared = torch.arange(3)
    checkpoint.save({"a": shared, "b": shared}, tmp_path)
    got = checkpoint.load(tmp_path)
    assert torch.equal(got["a"], got["b"])


def test_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot be part of a checkpoint"):
        checkpoint.save({"x": object()}, tmp_path)
    with pytest.raises(TypeError, match="keys that are no strings"):
        checkpoint.save({"x": {1: 2}}, tmp_path)


def test_tensors_are_aligned_as_torch_aligns_them(tmp_path):
    # In the file, one number of one byte moves all that come after it.
    checkpoint.save({"first": torch.zeros(1, dtype=torch.uint8), "rest": [torch.ones(3) for _ in range(9)]}, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 and tensor.tolist() == [1.0] * 3 for tensor in loaded["rest"])
