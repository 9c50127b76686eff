import time

import numpy as np
import pytest
from PIL import Image

from fedkd.data import hub
from fedkd.data.sources import load_source
from fedkd.errors import DataError, ScenarioError


@pytest.fixture(autouse=True)
def own_hugging_face_cache(monkeypatch, tmp_path_factory):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def write_parquet(folder, **columns):
    import datasets

    folder.mkdir(exist_ok=True)
    for part, n in (("train", 6), ("test", 3)):
        datasets.Dataset.from_dict({k: v[:n] for k, v in columns.items()}).to_parquet(str(folder / f"{part}.parquet"))


def test_texts_from_parquet(tmp_path):
    texts = ["a red cat", "A blue cat!", "red dog", "blue dog", "red red", "blue"]
    write_parquet(
        tmp_path / "toy", text=texts, label=["x", "y", "x", "y", "x", "y"], who=["p", "q", "p", "q", "q", "q"]
    )

    data = load_source("hub:toy", str(tmp_path), owner_column="who", column="text", length=3)

    assert (data.kind, data.input_shape, data.classes) == ("tokens", (3,), ("x", "y"))
    assert data.vocab is not None
    words = data.vocab.tobytes().decode().split("\n")
    assert words == ["<pad>", "<unk>", "red", "blue", "a", "cat", "dog"]
    assert data.x_train[0].tolist() == [4, 2, 5] and data.x_train[5].tolist() == [3, 0, 0]
    assert data.y_train.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.natural_ids is not None and data.natural_ids.tolist() == [0, 1, 0, 1, 1, 1]


def test_images_from_a_folder(tmp_path):
    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for j in range(2):
                Image.fromarray(np.full((4, 5), 90 * i, dtype=np.uint8)).save(
                    tmp_path / "pets" / part / name / f"{j}.png"
                )

    data = load_source("hub:pets", str(tmp_path))

    assert (data.kind, data.input_shape, data.classes) == ("image", (1, 4, 5), ("cat", "dog"))
    assert (data.x_test[data.y_test == 1] == 90).all()


def test_wrong_columns_and_splits_are_named(tmp_path):
    write_parquet(tmp_path / "toy", text=["a"] * 6, label=[0, 1] * 3)

    for options, key in (
        ({"train_split": "tran"}, "data.options.train_split"),
        ({"test_split": "dev"}, "data.options.test_split"),
        ({"label_column": "lable"}, "data.options.label_column"),
        ({"test_share": 1.0}, "data.options.test_share"),
        ({"length": 0}, "data.options.length"),
    ):
        with pytest.raises(ScenarioError) as error:
            load_source("hub:toy", str(tmp_path), **options)
        assert error.value.key == key
    cut = load_source("hub:toy", str(tmp_path), test_share=0.5, test_split="none")
    assert len(cut.y_train) == len(cut.y_test) == 3


def test_offline_fails_at_once(monkeypatch):
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    load = lambda: load_source("hub:nobody/nothing-of-this-name")  # noqa: E731
    with pytest.raises(DataError, match="cannot be reached"):
        load()
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"HF_HOME.*hub:FOLDER"):
        load()
    assert time.perf_counter() - start < 5


def test_probe_obeys_the_offline_switch(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub._reachable()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    assert not hub._reachable()


def test_missing_folder():
    with pytest.raises(DataError, match="no such folder"):
        load_source("hub:/no/such/folder")
