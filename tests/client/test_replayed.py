"""Students whose steps are replayed from graphs: the bits of students whose steps are taken."""

import pytest

from fedkd.graphs import Graph, Recorder


@pytest.mark.parametrize(
    "client",
    [
        {},
        {"momentum": 0.9, "weight_decay": 1e-2, "schedule": "cosine"},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adam", "lr": 0.01, "schedule": "linear", "clip": 0.5},
    ],
    ids=["sgd", "cosine", "adam", "adam-linear"],
)
@pytest.mark.parametrize("term", [None, "ema:0.9", "own"])
def test_replayed_training_has_the_bits_of_training(small, cohort, close, taped, monkeypatch, client, term):
    terms = [{"loss": "kd", "weight": 0.5, "teacher": term}] if term else []
    scenario = small("fedavg", client=client | {"epochs": 6, "batch_size": 8, "terms": terms}, system__graphs=True)
    monkeypatch.setattr("fedkd.tapes.REPLAYS", 1000)
    before = cohort(scenario).train(2, trainer="vectorised")
    with taped() as tapes:
        close(cohort(scenario).train(2, trainer="vectorised"), before, 0.0)
    assert sum(tape.replays for tape in tapes) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_of_training_have_the_bits_of_training(small, cohort, close, monkeypatch, model, precision):
    client = {"optimizer": "adam", "lr": 0.01, "steps": 20, "batch_size": 16, "precision": precision}
    terms = [{"loss": "kd", "weight": 0.5, "teacher": "ema:0.9"}]
    scenario = small("fedavg", data__options={"classes": 4, "train": 400, "test": 40, "shape": [16, 16]},
                     models={"student": model, "options": {}}, client=client | {"terms": terms},
                     system={"device": "cuda", "graphs": True})  # fmt: skip
    replayed, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda self, inputs: (replayed.append(self), replay(self, inputs)))
    monkeypatch.setattr(Recorder, "_waits", lambda self: True)
    with_graphs = cohort(scenario).train(2, trainer="vectorised")
    assert len(replayed) > 20
    monkeypatch.setattr("fedkd.graphs.REPLAYS", 1000)
    close(cohort(scenario).train(2, trainer="vectorised"), with_graphs, 0.0)
