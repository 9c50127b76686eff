import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test decodes into a folder of its own, and finds no data by accident."""
    from fedkd.data import federation

    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
    federation._federations.clear()


@pytest.fixture
def write_npz(tmp_path):
    """Write a small .npz of images; keyword arguments replace arrays, None leaves one out."""

    def write(name="toy.npz", folder=tmp_path, **changes):
        rng = np.random.default_rng(0)
        arrays = {
            "x_train": rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8),
            "y_train": np.arange(20, dtype=np.uint8) % 4,
            "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
            "y_test": np.arange(8, dtype=np.uint8) % 4,
            "classes": np.array(["a", "b", "c", "d"]),
        } | changes
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / name, **{k: v for k, v in arrays.items() if v is not None})
        return folder / name

    return write
