"""Models' outputs on the workers: the same bits everywhere, streamed, kept for a round, and what depends on them."""

import gc
import weakref
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd import plugins
from fedkd.client.handlers import make_app
from fedkd.data.batches import ArrayData
from fedkd.data.federation import build_federation
from fedkd.engine import InlineGrid, Nodes, RayGrid
from fedkd.errors import KnowledgeError, RunError
from fedkd.payloads import Weights
from fedkd.server.compute import Compute
from fedkd.server.ensemble import Ensemble
from fedkd.server.members import ModelMember
from fedkd.server.runtime import ServerRuntime
from fedkd.students import build_student, predict
from fedkd.threads import one_thread

IMAGES = {
    "models__student": "cnn",
    "models__options": {},
    "data__options": {"classes": 4, "train": 200, "test": 1100, "shape": [8, 8]},  # more than one shard of test data
    "proxy__size": 40,
    "proxy__server_labels": 20,
    "client__steps": 2,
}


@contextmanager
def bound(scenario, make=InlineGrid, **options):
    """A strategy on a grid, with its events."""
    events = []
    with make(partial(make_app, scenario), Nodes.alike(build_federation(scenario).num_clients), **options) as grid:
        strategy = plugins.make_strategy(scenario)
        strategy.bind(ServerRuntime(scenario, grid, events.append))
        strategy.events = events
        yield strategy


@contextmanager
def trained(scenario, make=InlineGrid, **options):
    """A strategy whose clients have trained and whose uploads are kept."""
    with bound(scenario, make, **options) as strategy:
        strategy.round = 1
        strategy.train(strategy.select(), keep=True)
        yield strategy


def all_logits(strategy, data):
    return list(strategy.server.compute.logits([upload.message for upload in strategy.members], data))


class Foreign:
    """A grid that is not ours: it cannot compute."""


@pytest.mark.parametrize(("buffers", "workers"), [("all", 1), ("params_only", 2)])
def test_outputs_have_the_same_bits_wherever_they_are_computed(small, ray_session, buffers, workers):
    norm = "group" if buffers == "all" else "batch"
    scenario = small("feddf", **IMAGES, models__norm=norm, models__buffers=buffers)
    found = []
    for make, options in ((InlineGrid, {}), (RayGrid, {"workers": workers})):
        with trained(scenario, make, **options) as strategy:
            test = strategy.server.federation.test
            found.append(torch.cat([*all_logits(strategy, test), *all_logits(strategy, strategy.server.proxy.data)]))
            if make is InlineGrid:
                grid = strategy.server.grid
                here = Compute(scenario, Foreign(), strategy.server.federation)
                foreign = list(here.logits([grid.whole(upload.message) for upload in strategy.members], test))
                model = build_student(scenario, strategy.server.federation.dataset, "cnn")
                with one_thread():
                    states = [strategy.server.complete("cnn", upload.state) for upload in strategy.members]
                    plain = [predict(model, test, range(1100), state=s, channels_last=True) for s in states]
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.cat(foreign), found[0][: len(foreign) * 1100])
    assert torch.equal(torch.cat(plain), torch.cat(foreign))  # shards change nothing


def test_feddf_is_the_same_on_all_engines(small, ray_session):
    method = {"name": "feddf", "steps": 3, "batch_size": 16, "drop_worst": True}
    changes = {"models__student": ["cnn", "mlp"], "data__options": IMAGES["data__options"] | {"test": 40}}
    scenario = small(method, **IMAGES | changes, run__rounds=2, run__participation=1.0)
    records = []
    for make, options in ((InlineGrid, {}), (RayGrid, {"workers": 2})):
        with bound(scenario, make, **options) as strategy:
            strategy.start(strategy.server.grid)
            events = [e for e in strategy.events if e["event"] in ("round", "dropped")]
            records.append([{k: v for k, v in e.items() if k != "seconds"} for e in events])
    assert records[0] == records[1]
    assert any(event["event"] == "dropped" for event in records[0])
    assert records[0][-1]["predictors"].keys() == {"server/cnn", "server/mlp", "ensemble"}


def test_a_worker_that_dies_changes_no_bits(small, ray_session, tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(
        "import os, pathlib\n"
        "from torch import nn\n"
        "class Fragile(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        try:\n"
        "            pathlib.Path(__file__).with_name('armed').unlink()\n"
        "        except FileNotFoundError:\n"
        "            return super().forward(x)\n"
        "        os.kill(os.getpid(), 9)\n"
        "def fragile(num_classes, input_shape):\n"
        "    return Fragile(input_shape[0], num_classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scenario = small("feddf", models__student="fragile:fragile", models__options={})
    with trained(scenario, RayGrid, workers=2) as strategy:
        proxy = strategy.server.proxy.data
        before = all_logits(strategy, proxy)
        strategy.server._compute = None  # with what it has kept
        (tmp_path / "armed").touch()
        after = all_logits(strategy, proxy)
        assert not (tmp_path / "armed").exists()
    assert len(before) > 1 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Counting:
    """A grid that computes here, a few jobs ahead, and counts the results that are alive."""

    AHEAD = 3

    def __init__(self):
        self.calls, self.jobs, self.most, self.held = 0, 0, 0, []

    def compute(self, function, jobs):
        self.calls += 1
        self.jobs += len(jobs)
        ready = []
        for job in jobs:
            ready.append(function(*job))
            self.held = [ref for ref in self.held if ref() is not None] + [weakref.ref(ready[-1])]
            self.most = max(self.most, sum(ref() is not None for ref in self.held))
            if len(ready) > self.AHEAD:
                yield ready.pop(0)
        while ready:
            yield ready.pop(0)


def weights(scenario, seed):
    changed = scenario.model_copy(update={"run": scenario.run.model_copy(update={"seed": seed})})
    return Weights(dict(build_student(changed, build_federation(scenario).dataset, "mlp").state_dict()), "mlp")


@pytest.fixture
def models(small):
    """Two dozen models on a counting grid."""
    scenario = small("feddf")
    federation, grid = build_federation(scenario), Counting()
    compute = Compute(scenario, grid, federation)
    members = [compute.member(weights(scenario, seed)) for seed in range(24)]
    return SimpleNamespace(
        scenario=scenario, federation=federation, grid=grid, compute=compute, members=members, proxy=federation.proxy
    )


@pytest.mark.parametrize("options", [{}, {"space": "votes"}, {"weights": "entropy"}])
def test_memory_does_not_grow_with_the_number_of_members(models, options):
    compute = Compute(models.scenario, models.grid, models.federation, kept=0)
    members = [compute.member(member.source) for member in models.members]
    Ensemble(members, **options).targets(models.proxy)
    assert models.grid.calls == 1 and models.grid.jobs == 24
    assert models.grid.most <= Counting.AHEAD + 2  # those ahead, and the one that is being reduced


def test_targets_are_those_of_the_models_themselves(models):
    model = build_student(models.scenario, models.federation.dataset, "mlp")
    plain = [ModelMember(model, weights(models.scenario, seed).state) for seed in range(24)]
    for options in ({}, {"reduce": "median"}, {"space": "probs", "reduce": "geometric"}):
        computed = Ensemble(models.members, **options).targets(models.proxy, ids=[5, 2, 30])
        assert torch.equal(computed.values, Ensemble(plain, **options).targets(models.proxy, ids=[5, 2, 30]).values)
        assert computed.ids.tolist() == [5, 2, 30]


def test_the_same_outputs_are_computed_once_as_long_as_their_models_are_there(models):
    compute, proxy, test = models.compute, models.proxy, models.federation.test
    first = Ensemble(models.members).targets(proxy)
    again = Ensemble([compute.member(member.source) for member in models.members], reduce="median")
    assert torch.equal(Ensemble(models.members[::-1]).targets(proxy).values, first.values)
    again.targets(proxy)
    assert compute.computed == 24
    Ensemble(models.members).targets(proxy, ids=[1, 2])
    Ensemble(models.members).targets(test)
    assert compute.computed == 72
    room = compute._room
    del again, models.members[:]
    gc.collect()
    assert not compute._kept and compute._room == room + 24 * 4 * 4 * (60 + 2 + 100)


def test_what_has_no_room_is_computed_again(models):
    compute = Compute(models.scenario, models.grid, models.federation, kept=2 * 60 * 4 * 4)
    members = [compute.member(member.source) for member in models.members[:3]]
    targets = [Ensemble(members).targets(models.proxy).values for _ in range(2)]
    assert compute.computed == 4 and torch.equal(*targets)


def test_data_that_are_not_the_federations_travel_and_nothing_is_kept(models):
    augmented = ArrayData(models.proxy.data.gather(models.proxy.ids).x.numpy() + 1, kind="vector")
    targets = [Ensemble(models.members).targets(augmented).values for _ in range(2)]
    assert models.compute.computed == 48 and not models.compute._kept
    assert torch.equal(*targets)
    assert not torch.allclose(targets[0], Ensemble(models.members).targets(models.proxy).values)


def test_a_model_whose_outputs_are_not_finite_does_not_count(models):
    broken = weights(models.scenario, 1)
    next(iter(broken.state.values()))[0] = float("nan")
    both = Ensemble([models.members[0], models.compute.member(broken)]).targets(models.proxy)
    assert torch.equal(both.values, Ensemble(models.members[:1]).targets(models.proxy).values)


def test_members_on_workers_need_data_and_go_with_others(models):
    with pytest.raises(KnowledgeError, match="needs data"):
        Ensemble(models.members).targets()
    model = build_student(models.scenario, models.federation.dataset, "mlp")
    mixed = [models.members[0], ModelMember(model, weights(models.scenario, 1).state), *models.members[2:]]
    expected = Ensemble(models.members).targets(models.proxy)
    assert torch.equal(Ensemble(mixed).targets(models.proxy).values, expected.values)


def test_weights_that_do_not_fit_are_an_error(models, small):
    with bound(small("feddf")) as strategy:
        member = strategy.server.compute.member(Weights({"w": torch.zeros(1)}, "mlp"))
        with pytest.raises(RunError, match="weights do not fit the model: missing"):
            member.outputs(models.proxy.data, torch.arange(3))


def test_bf16_is_for_distillation_and_nothing_that_is_measured(models):
    half = models.scenario.model_copy(
        update={"system": models.scenario.system.model_copy(update={"server_precision": "bf16"})}
    )
    compute = Compute(half, models.grid, models.federation)
    sources = [member.source for member in models.members[:2]]
    for data, same in ((models.federation.test, True), (models.proxy.data, False)):
        full, low = (torch.cat(list(c.logits(sources, data))) for c in (models.compute, compute))
        assert torch.equal(full, low) == same and torch.allclose(full, low, atol=0.1)


def test_all_server_models_are_evaluated_in_one_computation(small):
    changes = {"models__student": ["mlp", "cnn"], "data__options": IMAGES["data__options"]}
    with trained(small("fedavg", **IMAGES | changes)) as strategy:
        calls = []
        compute = strategy.server.grid.compute
        strategy.server.grid.compute = lambda function, jobs: calls.append(len(jobs)) or compute(function, jobs)
        record = strategy.evaluate()
    # Two models on two shards of the test data, and the uploads likewise.
    assert calls == [4, 2 * len(strategy.members)]
    labels = np.asarray(strategy.server.federation.test.labels)
    for arch, state in strategy.students.items():
        logits = strategy.server.predict(arch, state, strategy.server.federation.test)
        accuracy = (logits.argmax(1).numpy() == labels).mean()
        assert record["predictors"][f"server/{arch}"]["accuracy"] == pytest.approx(accuracy)
