"""Steps that are replayed: the bits of steps that are taken."""

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.data.batches import ArrayData
from fedkd.graphs import Graph, Recorder
from fedkd.models import build
from fedkd.seeds import Purpose, rng
from fedkd.server.distiller import Distiller
from fedkd.server.targets import Targets
from fedkd.students import pick_device

OPTIMISERS = [
    {"optimizer": "adam", "schedule": "cosine"},  # FedDF's
    {"optimizer": "adam", "schedule": "constant", "weight_decay": 1e-3, "amsgrad": True},
    {"optimizer": "sgd", "schedule": "constant", "lr": 0.05, "momentum": 0.9, "clip": 0.5},
    {
        "optimizer": "sgd",
        "schedule": "cyclic",
        "lr": 0.05,
        "lr_low": 0.01,
        "cycle": 3,
        "returns": "swa",
        "swa_every": 3,
    },
]


def distilled(settings, *, device="cpu", model="cnn", graphs=True, **options):
    """Distil a model, which has dropout, for 6 epochs of 8 batches, and return its weights and the report."""
    images = np.random.default_rng(0).integers(0, 256, (120, 12, 12), dtype=np.uint8)
    norm = "batch" if model == "resnet8" else "none"
    student = build(model, num_classes=4, input_shape=(1, 12, 12), kind="image", vocab_size=0, norm=norm, seed=0)
    student.add_module("drop", nn.Dropout(0.2))
    student.register_forward_pre_hook(lambda module, inputs: (module.drop(inputs[0]),))
    targets = Targets(torch.randn(120, 4, generator=torch.Generator().manual_seed(1)), "logits", torch.arange(120))
    distiller = Distiller(reduction="batchmean", t_squared=True, steps=0, epochs=6, batch_size=16, check_every=10,
                          device=device, graphs=graphs, **settings)  # fmt: skip
    report = distiller.fit(student, ArrayData(images), targets, generator=rng(0, Purpose.DISTILLATION, 1), **options)
    return [tensor.cpu() for tensor in student.state_dict().values()], report


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1] == other[1]


@pytest.mark.parametrize("settings", OPTIMISERS, ids=lambda s: "-".join(map(str, list(s.values())[:2])))
def test_replayed_steps_have_the_bits_of_steps(taped, settings):
    settings = settings | {"schedule": "constant" if settings["optimizer"] == "adam" else settings["schedule"]}
    before = distilled(settings)
    with taped() as tapes:
        assert same(distilled(settings), before)
    assert sum(tape.replays for tape in tapes) > 15
    seen = []
    with taped():
        distilled(settings, on_step=lambda step, loss: seen.append(float(loss)))
    assert seen[-1] == before[1].loss_last and len(set(seen)) > 40


def test_a_loss_of_somebody_elses_is_never_recorded(taped):
    calls = []

    def loss(logits, target, batch):
        calls.append(1)  # a graph would do this once
        return (logits - target).square().mean()

    with taped() as tapes:
        distilled({"optimizer": "sgd", "schedule": "constant"}, loss=loss)
    assert not tapes and len(calls) == 48


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["cnn", "resnet8"])
@pytest.mark.parametrize("settings", OPTIMISERS, ids=lambda s: "-".join(map(str, list(s.values())[:2])))
def test_graphs_of_steps_have_the_bits_of_steps(monkeypatch, settings, model, precision):
    how = {"device": pick_device("cuda"), "model": model}  # as in a run: with cuDNN's deterministic algorithms
    replayed, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, inputs: (replayed.append(self), replay(self, inputs)))
    monkeypatch.setattr(Recorder, "_waits", lambda self: True)
    with_graphs = distilled(settings | {"precision": precision}, **how)
    assert len(replayed) > 15
    monkeypatch.setattr("fedkd.graphs.REPLAYS", 1000)
    assert same(distilled(settings | {"precision": precision}, **how), with_graphs)
    assert same(distilled(settings | {"precision": precision}, graphs=False, **how), with_graphs)
