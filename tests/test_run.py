"""Runs: equal metrics on every engine and when resumed, folders, refusals, failures."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from safetensors.torch import load_file

from fedkd import checkpoint, grids, run
from fedkd.errors import RunError, ScenarioError
from fedkd.server.descent import Descent

STRATEGIES = [
    {"name": "fedavg"},
    {"name": "fedprox"},
    {"name": "feddf", "steps": 10, "batch_size": 16},
    {"name": "fedgkd"},
    {"name": "fedntd"},
    {"name": "dsfl", "open_size": 40, "distill_epochs": 1},
    {"name": "fd"},
    {"name": "flwr:FedAdam"},
]
IDS = [s["name"] for s in STRATEGIES]

# "local" keeps Flower from joining a Ray that another process has left behind.
LOCAL_RAY = {
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {"address": "local", "num_cpus": 2, "include_dashboard": False},
}


def metrics(folder):
    """Return the round events without what depends on the clock."""
    rounds = [e for e in run.read_metrics(folder) if e["event"] == "round"]
    return [{k: v for k, v in e.items() if k != "seconds"} for e in rounds]


def with_stateful_clients(small, strategy, **changes):
    """A federation whose clients remember something whatever the method: running statistics that stay at home."""
    buffers = "all" if strategy["name"].startswith("flwr:") else "params_only"
    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    settings = {
        "models__student": "cnn",
        "models__options": {},
        "models__norm": "batch",
        "models__buffers": buffers,
        "data__options": images,
        "proxy__size": 40,
        "client__steps": 3,
    }
    return small(strategy, **settings | changes)


class StopAfter(run.Listener):
    """Presses Ctrl-C in the middle of a round."""

    def __init__(self, round):
        self.round = round

    def event(self, event):
        if event["event"] == "reply" and event["round"] == self.round + 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", STRATEGIES, ids=IDS)
def test_a_resumed_run_has_the_same_metrics(small, tmp_path, strategy):
    terms = [{"teacher": "own"}, {"teacher": "last:2"}, {"teacher": "last:2", "weight": 0.0}]
    scenario = with_stateful_clients(small, strategy)
    if strategy["name"] == "fedavg":
        scenario = with_stateful_clients(small, strategy, client__terms=terms)
    whole = run.execute(scenario, out=tmp_path / "whole")
    saved = checkpoint.load(max((whole.folder / "checkpoints").iterdir()))
    assert bool(len(saved["clients"]["id"])) != strategy["name"].startswith("flwr:")  # there is something to resume

    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "halves", listener=StopAfter(2))
    folder = stopped.value.folder
    assert not (folder / "summary.json").exists()
    resumed = run.resume(folder)

    assert metrics(resumed.folder) == metrics(whole.folder)
    assert len(metrics(whole.folder)) == 3
    for model in whole.folder.glob("model*.safetensors"):
        one, two = load_file(model), load_file(resumed.folder / model.name)
        assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=IDS)
def test_ray_gives_the_same_bits_as_this_process(small, tmp_path, strategy, ray_session):
    inline = run.execute(with_stateful_clients(small, strategy), out=tmp_path / "inline")
    for workers in (1, 2) if strategy["name"] in ("feddf", "fd") else (2,):
        scenario = with_stateful_clients(small, strategy, system__engine="ray", system__workers=workers)
        on_ray = run.execute(scenario, out=tmp_path / str(workers))
        assert metrics(on_ray.folder) == metrics(inline.folder)


# Where workers answer queries, hold tails or samples, keep models for their clients, remember what they have sent, or
# have nothing to do.
ON_WORKERS = ["fedbe", "fedaux", "fedftg", "fedgkd_vote", "fedgems", "fedgkt", "distributed", "fedmd", "cfd"]
ON_WORKERS += ["mhat", "cronus", "fedcad", "local", "centralized"]
CREDIBLE = {"fedcad": {"partition__alpha": 5.0}}  # else its clients believe no teacher in so short a run


@pytest.mark.parametrize("name", ON_WORKERS)
def test_every_other_method_has_the_same_bits_on_workers(small, fast, needs, tmp_path, name, ray_session):
    images = {"data__options": {"classes": 4, "train": 300, "test": 40, "shape": [8, 8]}, "models__options": {}}
    settings = {"run__rounds": 2, "client__steps": 2, "system__trainer": "sequential", **images, **needs(name)}
    settings |= {"models__student": "cnn", "models__norm": "batch", "models__buffers": "params_only"}
    settings |= CREDIBLE.get(name, {})
    inline = run.execute(small(fast(name), **settings), out=tmp_path / "inline")
    on_ray = small(fast(name), **settings, system__engine="ray", system__workers=2)
    assert metrics(run.execute(on_ray, out=tmp_path / "ray").folder) == metrics(inline.folder)


@pytest.mark.parametrize(
    ("strategy", "attacks"),
    [
        ({"name": "feddf", "steps": 10, "batch_size": 16}, {}),
        ({"name": "dsfl", "open_size": 40, "distill_epochs": 1}, {"kind": "random", "share": 0.3}),
    ],
    ids=["feddf", "dsfl, attacked"],
)
def test_flowers_own_runtime_gives_the_same_metrics(small, tmp_path, strategy, attacks, ray_for_others):
    from flwr.simulation import run_simulation

    from fedkd.client.handlers import make_app as client_app
    from fedkd.server.handlers import make_app as server_app

    scenario = with_stateful_clients(small, strategy, attacks=attacks)
    ours = run.execute(scenario, out=tmp_path)

    events = []
    run_simulation(
        server_app=server_app(scenario, events.append),
        client_app=client_app(scenario),
        num_supernodes=scenario.partition.clients,
        backend_config=LOCAL_RAY,
    )

    theirs = [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]
    assert json.loads(json.dumps(theirs)) == metrics(ours.folder)


def test_the_folder_of_a_run_tells_everything(small, tmp_path):
    result = run.execute(small({"name": "feddf", "steps": 5}), out=tmp_path)
    folder = result.folder
    assert folder.parent == tmp_path / "small" and folder.name.startswith("feddf-seed0-")
    resolved = (folder / "scenario.toml").read_text()
    assert "alpha = 0.3" in resolved and "server_threads = 1" in resolved
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["server_threads"] == 1
    summary = json.loads((folder / "summary.json").read_text())
    last = metrics(folder)[-1]
    assert summary["final"] == last["accuracy"] == last["predictors"]["server"]["accuracy"]
    assert summary["ensemble"] == last["predictors"]["ensemble"]["accuracy"]
    assert 0 <= summary["agreement"] <= 1
    assert summary["best"] == max(e["accuracy"] for e in metrics(folder))
    assert summary["bytes_up"] == {"weights": sum(e["bytes_up"]["weights"] for e in metrics(folder))}
    assert load_file(folder / "model.safetensors").keys() == result_keys(small)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["round-000002", "round-000003"]


def result_keys(small):
    from fedkd.data.federation import build_federation
    from fedkd.students import build_student

    scenario = small()
    return build_student(scenario, build_federation(scenario).dataset, "mlp").state_dict().keys()


def test_a_finished_run_is_not_computed_again_unless_asked_for(small, tmp_path):
    first = run.execute(small(), out=tmp_path)
    again = run.execute(small(), out=tmp_path)
    fresh = run.execute(small(), out=tmp_path, fresh=True)
    assert again.skipped and again.folder == first.folder and again.summary == first.summary
    assert not fresh.skipped and fresh.folder != first.folder
    assert metrics(fresh.folder) == metrics(first.folder)


def test_events_after_the_checkpoint_are_void_when_a_run_is_resumed(tmp_path):
    events = [
        {"event": "round", "round": 1, "accuracy": 0.1},
        {"event": "refused", "round": 2},
        {"event": "round", "round": 2, "accuracy": 0.2},
        {"event": "resumed", "after_round": 1},
        {"event": "round", "round": 2, "accuracy": 0.2},
    ]
    text = "\n".join(json.dumps(e) for e in events) + '\n{"event": "rou'  # cut off by a crash
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [e["event"] for e in run.read_metrics(tmp_path)] == ["round", "resumed", "round"]


def test_a_line_that_a_crash_cut_off_does_not_swallow_the_next_event(small, tmp_path):
    scenario = small("fedavg", run__checkpoint_every=2)
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "cut", listener=StopAfter(2))
    folder = stopped.value.folder
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "roun')
    run.resume(folder)
    assert metrics(folder) == metrics(whole.folder)


def test_a_checkpoint_that_cannot_be_read_is_replaced_by_the_one_before(small, tmp_path):
    scenario = small("fedgkd")
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "cut", listener=StopAfter(2))
    folder = stopped.value.folder
    (folder / "checkpoints" / "round-000002" / "tensors.safetensors").write_bytes(b"half a fi")
    run.resume(folder)
    assert metrics(folder) == metrics(whole.folder)

    for path in (folder / "checkpoints").iterdir():
        (path / "tensors.safetensors").write_bytes(b"")
    (folder / "summary.json").unlink()
    with pytest.raises(RunError, match="to begin this run anew, remove"):
        run.resume(folder)


def test_one_folder_is_run_by_one_process_and_others_touch_nothing_in_it(small, tmp_path):
    def contents(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    class Meddler(run.Listener):
        folder = None

        def run_started(self, folder, scenario, federation, done):
            self.folder = folder
            with (folder / "metrics.jsonl").open("a") as log:
                log.write("half a line")  # as another process may see it in the middle of writing
            before = contents(folder)
            with pytest.raises(RunError, match="another process"):
                run.execute(small(), out=tmp_path)
            assert contents(folder) == before
            with (folder / "metrics.jsonl").open("a") as log:
                log.write("\n")

    meddler = Meddler()
    run.execute(small(), out=tmp_path, listener=meddler)
    assert meddler.folder is not None


def test_results_that_cannot_be_written_are_a_mistake_of_the_command(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ScenarioError, match="--out"):
        run.execute(small(), out=tmp_path / "file")


def test_the_recorded_number_of_threads_is_used_again(small, tmp_path, monkeypatch):
    scenario = small("fedavg", system__server_threads=0)
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path, listener=StopAfter(1))
    before = (stopped.value.folder / "scenario.toml").read_text()
    monkeypatch.setattr(run, "cores", lambda: 7)
    again = run.execute(scenario, out=tmp_path)
    assert again.folder == stopped.value.folder and (again.folder / "scenario.toml").read_text() == before


@pytest.mark.parametrize(("engine", "asked", "used"), [("inline", 0, 3), ("inline", 1, 1), ("ray", 0, 3)])
def test_the_server_distils_on_all_cores_unless_told_otherwise_while_nobody_else_computes(
    small, tmp_path, monkeypatch, ray_session, engine, asked, used
):
    seen, made, step, make = [], [], Descent.step, grids.RayGrid

    def watched(*given):
        seen.append((torch.get_num_threads(), any(grid._pool._dispatchers for grid in made)))
        return step(*given)

    def one_thread(message, context, call_next):
        assert torch.get_num_threads() == 1  # else this client is refused
        return call_next(message, context)

    monkeypatch.setattr(run, "cores", lambda: 3)
    monkeypatch.setattr(Descent, "step", watched)
    monkeypatch.setattr(grids, "RayGrid", lambda *given, **more: made.append(make(*given, **more)) or made[-1])
    monkeypatch.setattr(grids, "make_app", partial(grids.make_app, mods=[one_thread]))
    system = {"engine": engine, "server_threads": asked, "workers": 2 * (engine == "ray"), "trainer": "sequential"}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = run.execute(small({"name": "feddf", "steps": 5}, run__rounds=2, system=system), out=tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(used, False)] * 2 * 5
    assert result.summary["refused"] == 0 and len(made) == (engine == "ray")


# --- faults ------------------------------------------------------------------------------------------------------


def tampering(partition_id, change):
    """Return a Flower mod that changes the weights that one client uploads."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == partition_id and message.metadata.message_type == "train":
            arrays = {k: change(a.numpy().copy()) for k, a in reply.content["weights"].items()}
            reply.content["weights"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        return reply

    return mod


def replacing(partition_id, records):
    """Return a Flower mod that replaces records of what one client uploads."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == partition_id and message.metadata.message_type == "train":
            for name, record in records.items():
                reply.content[name] = record
        return reply

    return mod


def raising(partition_id):
    def mod(message, context, call_next):
        if context.node_config["partition-id"] == partition_id:
            raise ValueError("out of coffee")
        return call_next(message, context)

    return mod


@pytest.mark.parametrize(
    ("mod", "reason"),
    [
        (tampering(2, lambda a: a * float("nan")), "NaN"),
        (tampering(2, lambda a: a[:1]), "wrong shape"),
        (tampering(2, lambda a: a.astype("float64")), "wrong type"),
        (raising(2), "out of coffee"),
        (replacing(2, {"weights.meta": ConfigRecord({"type": "ProxyOutputs", "space": "probs"})}), "cannot be read"),
        (replacing(2, {"weights.meta": ConfigRecord({"type": "Weights", "arch": "cnn"})}), "weights of cnn"),
        (replacing(2, {"metrics": MetricRecord({"num-examples": 10**12})}), "examples from a client that has"),
        (replacing(2, {"metrics": MetricRecord({"num-examples": 0})}), "no examples"),
        (replacing(2, {"metrics": MetricRecord({"num-examples": 3, "loss": float("nan")})}), "not a finite number"),
        (replacing(2, {"weights": ArrayRecord()}), "wrong keys"),
    ],
)
def test_a_bad_upload_is_refused_with_a_reason_and_the_round_goes_on(small, federate, mod, reason):
    strategy, events = federate(small("fedavg", run__participation=1.0), mods=[mod])
    refused = [e for e in events if e["event"] == "refused"]
    rounds = [e for e in events if e["event"] == "round"]
    assert [e["round"] for e in refused] == [1, 2, 3]
    assert all(e["partition_id"] == 2 and reason in e["reason"] for e in refused)
    assert all(e["received"] == e["selected"] - 1 for e in rounds)
    assert all(bool(torch.isfinite(t).all()) for t in strategy.students["mlp"].values())


def test_a_refused_client_does_not_change_the_others_bits(small, federate):
    poisoned, _ = federate(small("fedavg", run__participation=1.0), mods=[tampering(2, lambda a: a + float("inf"))])
    missing, _ = federate(small("fedavg", run__participation=1.0), mods=[raising(2)])
    for name, tensor in poisoned.students["mlp"].items():
        assert torch.equal(tensor, missing.students["mlp"][name])


def test_malformed_knowledge_is_refused_by_the_client(small):
    from fedkd.client.handlers import REFUSED, make_app
    from fedkd.engine import InlineGrid, Nodes
    from fedkd.payloads import Knowledge, Weights

    scenario = small()
    with InlineGrid(lambda: make_app(scenario), Nodes.alike(6)) as grid:
        bad = Knowledge.of(Weights({"w": torch.zeros(1)}, "mlp")).to_records({"server-round": 1})
        node = next(iter(grid.get_node_ids()))
        (reply,) = grid.send_and_receive([Message(content=bad, message_type="train", dst_node_id=node)])
    assert reply.error.code == REFUSED and "wrong keys" in reply.error.reason


def test_a_client_with_huge_weights_does_not_stop_the_round(small, tmp_path, monkeypatch):
    """They are finite, and so is their average; but what models answer with them is not."""

    def huge(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            arrays = {name: Array(np.full_like(a.numpy(), 1e30)) for name, a in reply.content["weights"].items()}
            reply.content["weights"] = ArrayRecord(arrays)
        return reply

    monkeypatch.setattr(grids, "make_app", partial(grids.make_app, mods=[huge]))
    result = run.execute(small(run__participation=1.0, run__rounds=1), out=tmp_path)
    (event,) = [event for event in run.read_metrics(result.folder) if event["event"] == "round"]
    server, ensemble = event["predictors"]["server"], event["predictors"]["ensemble"]
    assert event["received"] == 6 and server["loss"] is None and 0 <= server["accuracy"] <= 1
    assert ensemble["loss"] < 2 and ensemble["accuracy"] > 0.25  # of the five others
    json.loads((result.folder / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("asked", "settled"),
    [({}, (4, 0.5)), ({"workers": 4}, (4, 0.5)), ({"workers": 2}, (2, 0.0)), ({"gpu_fraction": 0.25}, (0, 0.25))],
)
def test_a_run_goes_on_with_the_share_of_a_gpu_that_was_settled_for_its_workers(small, asked, settled):
    recorded = small(system={"engine": "ray", "workers": 4, "gpu_fraction": 0.5})
    system = run._as_recorded(small(system={"engine": "ray", **asked}), recorded).system
    assert (system.workers, system.gpu_fraction) == settled


def test_too_few_replies_stop_the_run_resumably(small, tmp_path):
    scenario = small("fedavg", run__participation=1.0, client__lr=1e30, system__min_replies=2)
    with pytest.raises(RunError, match=r"usable uploads[\s\S]*min_replies in the scenario.toml[\s\S]*fedkd resume"):
        run.execute(scenario, out=tmp_path)
    (folder,) = (tmp_path / "small").iterdir()
    assert not (folder / "summary.json").exists() and (folder / "error.txt").exists()
    events = run.read_metrics(folder)
    assert any(e["event"] == "refused" and "finite" in e["reason"] for e in events)
    assert events[-1]["event"] == "failed"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"proxy__source": "none", "strategy": {"name": "feddf"}}, "proxy.source"),
        ({"models__student": ["mlp", "cnn"], "strategy": {"name": "flwr:FedAdam"}}, "models.student"),
        ({"strategy": {"name": "fd"}, "client__terms": [{"teacher": "global"}]}, "client.terms"),
        ({"strategy": {"name": "feddf", "drop_worst": True}}, "proxy.server_labels"),
    ],
)
def test_a_scenario_that_cannot_run_writes_nothing(small, tmp_path, changes, key):
    changes = dict(changes)
    scenario = small(changes.pop("strategy", "fedavg"), **changes)
    with pytest.raises(ScenarioError) as error:
        run.execute(scenario, out=tmp_path, file="my.toml")
    assert key in str(error.value) and "my.toml" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", [{}, {"accuracy": 1e9}, {"accuracy": -0.1}])
def test_evaluations_that_cannot_be_are_refused(small, federate, said):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2 and message.metadata.message_type == "evaluate":
            reply.content["metrics"] = MetricRecord({"num-examples": 5, **said})
        return reply

    _, events = federate(small({"name": "fd"}), mods=[mod], rounds=1)
    assert any(e["event"] == "refused" and "accuracy" in e["reason"] for e in events)
    assert 0 <= [e for e in events if e["event"] == "round"][-1]["accuracy"] <= 1


def test_a_stock_strategy_survives_a_client_with_other_metrics(small, federate):
    mod = replacing(2, {"metrics": MetricRecord({"num-examples": 1, "joke": 1.0})})
    _, events = federate(small("flwr:FedAdam", run__participation=1.0), mods=[mod])
    assert all(e["received"] == e["selected"] for e in events if e["event"] == "round")


def test_a_fuse_that_reads_nothing_is_an_error(small, federate, monkeypatch):
    from strategies.fedavg import FedAvg

    monkeypatch.setattr(FedAvg, "fuse", lambda self, uploads: None)
    with pytest.raises(RunError, match="left uploads unread"):
        federate(small("fedavg"))


def test_client_evaluation_reports_mean_and_worst_decile(small, federate):
    _, events = federate(small("fedavg", run__evaluate_clients="all", partition__test=0.3))
    local = [e for e in events if e["event"] == "round"][-1]["predictors"]["clients-local"]
    assert 0 <= local["worst_decile"] <= local["accuracy"] <= 1 and local["clients"] >= 5


@pytest.mark.parametrize("strategy", ["fd", "fedavg"])
def test_text_models_learn_in_a_federation(small, federate, tmp_path, strategy):
    import numpy as np

    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    x = np.where(rng.random((400, 12)) < 0.8, 2 + y[:, None], rng.integers(0, 10, (400, 12))).astype(np.uint16)
    np.savez(
        tmp_path / "toy.npz",
        x_train=x[:300], y_train=y[:300].astype(np.uint8), x_test=x[300:], y_test=y[300:].astype(np.uint8),
        classes=np.array(["a", "b"]), vocab=np.frombuffer("\n".join("0123456789").encode(), np.uint8),
    )  # fmt: skip
    scenario = small(
        strategy,
        data={"source": f"npz:{tmp_path / 'toy.npz'}", "options": {}},
        models={"student": "text", "options": {}},
        partition__alpha=5.0,
        client__lr=1.0,
        run__participation=1.0,
    )
    _, events = federate(scenario)
    assert [e for e in events if e["event"] == "round"][-1]["accuracy"] > 0.9
