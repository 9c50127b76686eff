"""The preflight: what it measures, chooses, says and records, and that results know nothing of it."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from safetensors.torch import load_file

from fedkd import grids as grids_module
from fedkd import plugins, run
from fedkd import preflight as module
from fedkd.cli.screen import Screen
from fedkd.client import vectorised
from fedkd.client.handlers import make_app
from fedkd.engine import InlineGrid, Nodes
from fedkd.engine.measure import Measured
from fedkd.engine.placement import Node
from fedkd.errors import RunError
from fedkd.preflight import preflight
from fedkd.scenario import Client
from fedkd.server.runtime import ServerRuntime

MB = 10**6


class Ear(run.Listener):
    """Keeps the reports, and may press Ctrl-C after a round."""

    def __init__(self, stop_after=0):
        self.reports, self.stop_after = [], stop_after

    def preflight(self, report):
        self.reports.append(report)

    def event(self, event):
        if event["event"] == "round" and event["round"] == self.stop_after:
            raise KeyboardInterrupt


def metrics(folder):
    rounds = [e for e in run.read_metrics(folder) if e["event"] == "round"]
    return [{k: v for k, v in e.items() if k != "seconds"} for e in rounds]


# --- in a run ---------------------------------------------------------------------------------------------------


def stateful(small, **changes):
    """Clients that remember something: running statistics that stay at home, and their own last model."""
    return small(
        "feddf",
        strategy__steps=5,
        models={"student": "cnn", "norm": "batch", "buffers": "params_only", "options": {}},
        data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
        client__terms=[{"teacher": "own"}],
        **{"system__trainer": "sequential", **changes},
    )


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_results_know_nothing_of_it(small, tmp_path, monkeypatch, engine, request):
    if engine == "ray":
        request.getfixturevalue("ray_session")
    scenario = stateful(small, system__engine=engine, run__rounds=2)
    ear = Ear()
    measured = run.execute(scenario, out=tmp_path / "measured", listener=ear)
    (report,) = ear.reports
    assert report.notes == () and report.facts["architectures"]["cnn"]["sequential"]["seconds"] > 0

    def nothing(server, strategy):
        return SimpleNamespace(scenario=server.scenario, facts={}, placement=report.placement, rows={}, notes=())

    monkeypatch.setattr(run, "preflight", nothing)
    plain = run.execute(scenario, out=tmp_path / "plain")

    assert metrics(measured.folder) == metrics(plain.folder)  # bytes included
    assert {k: v for k, v in measured.summary.items() if not k.startswith("seconds")} == {
        k: v for k, v in plain.summary.items() if not k.startswith("seconds")
    }
    one, two = (load_file(result.folder / "model.safetensors") for result in (measured, plain))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_is_recorded_and_used_again_on_resume(small, tmp_path, monkeypatch):
    first = Ear(stop_after=1)
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(small(), out=tmp_path, listener=first)
    folder = stopped.value.folder
    resolved = (folder / "scenario.toml").read_text()
    recorded = json.loads((folder / "environment.json").read_text())
    assert len(first.reports) == 1
    assert 'trainer = "sequential"' in resolved and recorded["trainer"] == "sequential"
    assert (recorded["workers"], recorded["cohort"], recorded["threads_per_client"]) == (0, 0, 1)
    assert recorded["preflight"]["architectures"]["mlp"]["sequential"]["seconds"] > 0

    monkeypatch.setattr(run, "preflight", None)
    second = Ear()
    run.resume(folder, listener=second)
    assert second.reports == []
    assert (folder / "scenario.toml").read_text() == resolved
    assert json.loads((folder / "environment.json").read_text())["preflight"] == recorded["preflight"]


def test_the_first_round_knows_what_takes_long(small, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(InlineGrid, "expect", lambda self, rates: told.append(rates))
    images = {"classes": 4, "train": 400, "test": 40, "shape": [8, 8]}
    changes = {"data__options": images, "models__student": ["mlp", "cnn"], "models__options": {}}
    result = run.execute(small("fedavg", **changes, run__rounds=1), out=tmp_path)
    recorded = json.loads((result.folder / "environment.json").read_text())["preflight"]["seconds_per_sample"]
    assert told == [recorded] and 0 < recorded["mlp"] < recorded["cnn"]


def choosing(**choice):
    """Return a preflight that comes to this choice."""

    def chosen(server, strategy):
        system = server.scenario.system.model_copy(update=choice)
        return replace(preflight(server, strategy), scenario=server.scenario.model_copy(update={"system": system}))

    return chosen


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_the_chosen_trainer_trains(small, tmp_path, monkeypatch, engine, request):
    if engine == "ray":
        request.getfixturevalue("ray_session")
    settings = {"run__participation": 1.0, "run__rounds": 1, "client__steps": 3, "system__engine": engine}
    asked = small(system__trainer="vectorised", system__cohort=3, **settings)
    expected = run.execute(asked, out=tmp_path / "asked")
    together = []
    train = vectorised.train
    monkeypatch.setattr(vectorised, "train", lambda tasks: together.append(len(tasks)) or train(tasks))
    monkeypatch.setattr(run, "preflight", choosing(trainer="vectorised", cohort=3))
    result = run.execute(small(**settings), out=tmp_path / "auto")
    assert metrics(result.folder) == metrics(expected.folder)
    one, two = (load_file(each.folder / "model.safetensors") for each in (result, expected))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert engine == "ray" or together[-2:] == [3, 3]


@pytest.mark.parametrize("how", [run.execute, run.resume])
def test_what_was_chosen_is_kept_whatever_would_be_chosen_now(small, tmp_path, monkeypatch, how):
    monkeypatch.setattr(run, "preflight", choosing(trainer="vectorised", cohort=3))
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(small(), out=tmp_path, listener=Ear(stop_after=1))
    grids = []
    make_grid = run.make_grid
    monkeypatch.setattr(run, "make_grid", lambda *args, **kwargs: grids.append(make_grid(*args, **kwargs)) or grids[-1])
    again = how(stopped.value.folder) if how is run.resume else how(small(), out=tmp_path)
    system = run.load(str(again.folder / "scenario.toml")).scenario.system
    assert (system.trainer, system.cohort) == ("vectorised", 3)
    assert grids[0].cohort == 3


def test_a_client_that_fails_is_noted_and_the_run_goes_on(small, tmp_path, monkeypatch):
    def mod(message, context, call_next):
        if "max-steps" in message.content["config"]:
            raise ValueError("out of coffee")
        return call_next(message, context)

    monkeypatch.setattr(grids_module, "make_app", partial(make_app, mods=[mod]))
    ear = Ear()
    result = run.execute(small(), out=tmp_path, listener=ear)
    assert result.summary["rounds"] == 3 and result.summary["refused"] == 0
    (note,) = ear.reports[0].notes
    assert note.startswith("mlp could not be measured: ValueError: out of coffee")
    assert ear.reports[0].rows == {"trainer": "sequential", "placement": "fits 1 client per CPU, 1 worker"}


def test_a_method_that_cannot_say_yet_what_it_sends_is_noted(small, tmp_path, monkeypatch):
    from strategies.fedavg import FedAvg

    broadcast = FedAvg.broadcast

    def prepared_first(self, selected):
        self.calls = getattr(self, "calls", 0) + 1
        assert self.calls == 1  # what one broadcast leaves behind, the run does not see
        if not getattr(self, "prepared", False):
            raise AttributeError("no table yet")
        self.calls = 0
        return broadcast(self, selected)

    monkeypatch.setattr(FedAvg, "broadcast", prepared_first)
    monkeypatch.setattr(FedAvg, "prepare", lambda self: setattr(self, "prepared", True))
    ear = Ear()
    run.execute(small(), out=tmp_path, listener=ear)
    assert ear.reports[0].notes == ("mlp could not be measured: AttributeError: no table yet",)


def test_what_it_says_before_round_1(small, tmp_path):
    console = Console(record=True, width=120)
    with Screen(console) as screen:
        scenario = small(models={"student": ["mlp", "cnn"], "options": {}}, data__options={"shape": [8, 8]})
        run.execute(scenario, out=tmp_path, listener=screen)
    text = console.export_text()
    for line in (r"mlp .* and .* per client \(on average .* samples, .* steps\)", "cnn .* per client",
                 "trainer +sequential: a cohort holds one client",
                 r"placement +fits 1 client per CPU, 1 worker; round ≈ .*s"):  # fmt: skip
        assert module.re.search(line, text), text


# --- choices, with a grid whose clients take what a test says --------------------------------------------------


class FakeGrid:
    """Clients of `nodes` take what ``takes(trainer, steps of each client)`` says: seconds, host and GPU memory."""

    def __init__(self, clients, takes, machines=(), workers=2, errors=lambda trainer, count: ()):
        self.nodes, self.takes, self.workers, self.errors = Nodes.alike(clients), takes, workers, errors
        self._machines, self.calls, self.everywhere = machines or [Node(2)], [], []
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as grids do, for messages

    def machines(self, gpus):
        return [node if gpus else Node(node.cpus) for node in self._machines]

    def measure(self, cohorts, *, memory=False, everywhere=False):
        measured = []
        self.everywhere += [everywhere] * len(cohorts)
        for messages in cohorts:
            config = messages[0].content["config"]
            trainer, count = config["trainer"], len(messages)
            self.calls.append((trainer, count, config["max-steps"]))
            seconds, host, gpu = self.takes(trainer, count, config["max-steps"])
            if memory:  # which has to be found anew then
                seconds *= 3
            else:  # what was kept hides what is taken
                host = gpu = 0
            measured.append(Measured(seconds, host, gpu, 300 * MB, 50 * MB, tuple(self.errors(trainer, count))))
        return measured


def alike(small, clients=32, **changes):
    """So many clients with ten steps each."""
    return small(
        **{
            "partition": {"name": "iid", "clients": clients, "alpha": None},
            "run__participation": 1.0,
            "client__steps": 10,
            **changes,
        }
    )


def look(scenario, takes, **grid):
    report, grid = look_at(scenario, takes, **grid)
    return report, grid.calls


def look_at(scenario, takes, **grid):
    server = ServerRuntime(scenario, FakeGrid(scenario.partition.clients, takes, **grid))
    strategy = plugins.make_strategy(scenario)
    strategy.bind(server)
    report = preflight(server, strategy)
    assert not any(server.traffic.values()) and strategy.round == 0
    return report, server.grid


def steady(ratio, memory=10 * MB):
    """A client takes 10 ms and 2 ms a step; a vectorised cohort `1 / ratio` of the sum of its clients."""

    def takes(trainer, count, steps):
        seconds = count * (0.010 + 0.002 * steps)
        if trainer == "vectorised":
            return seconds / ratio, count * memory, count * memory
        return seconds, memory, memory

    return takes


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "sequential"), (1.05, "sequential"), (1.15, "vectorised")])
def test_the_vectorised_trainer_must_be_faster_by_a_margin(small, ratio, chosen):
    report, calls = look(alike(small), steady(ratio))
    assert report.scenario.system.trainer == chosen
    assert {count for _, count, _ in calls} == {1, 8}  # 32 clients make two cohorts of eight for each of two workers
    # Of ten steps a client takes 30 ms, 32 of them 0.96 s.
    took = report.facts["architectures"]["mlp"]
    assert took["sequential"]["seconds"] == pytest.approx(0.030)
    assert took["vectorised"]["seconds"] == pytest.approx(0.030 / ratio)
    assert took["vectorised"]["host_bytes"] == 10 * MB
    other = {"sequential": "vectorised", "vectorised": "sequential"}[chosen]
    assert module.re.fullmatch(rf"{chosen}: .*s of work in a round, {other} .*s", report.rows["trainer"])
    assert "0.96 s" in report.rows["trainer"]
    assert report.scenario.system.cohort == (8 if chosen == "vectorised" else 0)
    assert report.scenario.system.workers == 0


@pytest.mark.parametrize(
    ("clients", "cpus", "more", "compared", "width"),
    [
        (1000, 2, {"data__options": {"classes": 4, "train": 1100, "test": 40}}, 16, 0),  # the usual 63 are enough
        (100, 2, {}, 16, 25),
        (100, 2, {"system__workers": 1}, 16, 32),
        (100, 8, {}, 7, 0),  # the usual seven: each of so many workers has two cohorts
        (32, 2, {"system__cohort": 3}, 3, 3),
    ],
)
def test_cohorts_that_are_computed_as_one_are_wide_on_few_cpus(small, clients, cpus, more, compared, width):
    report, calls = look(alike(small, clients=clients, **more), steady(2.0), machines=[Node(cpus)])
    assert max(count for name, count, _ in calls if name == "vectorised") == compared
    assert report.scenario.system.trainer == "vectorised" and report.scenario.system.cohort == width


def test_the_width_of_a_trainer_that_is_set_does_not_depend_on_the_workers(small):
    report, _ = look(alike(small, clients=100, system__trainer="vectorised"), steady(2.0), workers=2)
    assert report.scenario.system.cohort == 0


def test_clients_of_unequal_size_are_seldom_together():
    # Batches of 4: one client has eight, the other one only one. Together that is eight steps, not nine.
    batches = [module._batches(samples, Client(batch_size=4)) for samples in (30, 4)]
    assert batches == [[4] * 7 + [2], [4]]
    assert (module._taken("sequential", batches, 0), module._taken("vectorised", batches, 0)) == (9, 8)
    assert module._batches(6, Client(batch_size=4, steps=3)) == [4, 2, 4]


def test_an_architecture_with_an_obstacle_is_not_compared(small):
    scenario = alike(small, models={"student": "cnn", "norm": "batch", "options": {}}, data__options={"shape": [8, 8]})
    report, calls = look(scenario, steady(9.0))
    assert report.rows["trainer"].startswith("sequential; cnn is trained one by one: the model has buffers")
    assert {name for name, _, _ in calls} == {"sequential"}


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
def test_a_trainer_that_is_set_is_kept_and_not_compared(small, trainer):
    report, calls = look(alike(small, system__trainer=trainer), steady(9.0 if trainer == "sequential" else 0.1))
    assert report.scenario.system.trainer == trainer and report.rows["trainer"] == trainer
    assert {name for name, count, _ in calls if count > 1} == ({"vectorised"} if trainer == "vectorised" else set())


def test_cohorts_of_one_client_are_not_compared(small):
    report, calls = look(alike(small, clients=6), steady(9.0))
    assert report.rows["trainer"] == "sequential: a cohort holds one client"
    assert {name for name, _, _ in calls} == {"sequential"}


def test_a_vectorised_cohort_that_fails_is_noted_and_not_chosen(small):
    report, _ = look(
        alike(small), steady(9.0), errors=lambda trainer, count: ["no rule"] if trainer == "vectorised" else []
    )
    assert report.scenario.system.trainer == "sequential"
    assert report.notes == ("mlp could not be measured as one: no rule",)
    assert report.rows["trainer"] == "sequential: cohorts could not be measured as one"


def test_a_gpu_is_shared_by_two_wide_cohorts(small):
    # 0.9 * 20 GB for two workers: 9 GB each, of which 50 MB are held and a context takes 629 MB.
    scenario = alike(small, clients=64)
    report, calls = look(scenario, steady(10.0, 800 * MB), machines=[Node(8, 1, 20 * 1000 * MB)], workers=1)
    system = report.scenario.system
    assert (system.trainer, system.workers, system.gpu_fraction, system.cohort) == ("vectorised", 2, 0.5, 10)
    assert max(count for _, count, _ in calls) == module.WIDTH  # for the memory of a client
    assert {count for name, count, _ in calls if name == "sequential"} == {1, 10}  # compared at the width of the run
    assert report.rows["placement"].startswith("fits 20 clients per GPU, 2 workers per GPU; round ≈ ")
    assert "800 MB on the GPU per client" in report.rows["mlp"]


@pytest.mark.parametrize(("ratio", "chosen"), [(1.05, "sequential"), (1.15, "vectorised")])
def test_on_a_gpu_the_margin_is_the_same(small, ratio, chosen):
    report, _ = look(alike(small), steady(ratio), machines=[Node(8, 1, 20 * 1000 * MB)], workers=1)
    assert report.scenario.system.trainer == chosen


def test_device_cpu_leaves_gpus_alone(small):
    report, _ = look(alike(small, system__device="cpu"), steady(0.5), machines=[Node(8, 1, 20 * 1000 * MB)], workers=8)
    assert report.placement.workers == 8 and report.placement.gpu_fraction == 0.0


def test_what_does_not_fit_is_refused(small):
    def too_large(trainer, count):
        return ["OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"]

    with pytest.raises(RunError, match=r"a client of mlp does not fit into memory: OutOfMemory[\s\S]*batch_size"):
        look(alike(small), steady(1.0), errors=too_large)
    with pytest.raises(RunError, match=r'a client of mlp does not fit on a GPU: it needs 9.7 GB[\s\S]*device = "cpu"'):
        look(alike(small), steady(1.0, 9000 * MB), machines=[Node(8, 1, 10_000 * MB)])
    with pytest.raises(RunError, match=r"set system.cohort to 3 or less"):
        look(
            alike(small, system__trainer="vectorised", system__cohort=4, system__workers=2),
            steady(1.0, 1200 * MB),
            machines=[Node(8, 1, 10_000 * MB)],
        )


def test_auto_goes_one_by_one_where_a_cohort_does_not_fit(small):
    report, _ = look(alike(small, system__cohort=8), steady(9.0, 2000 * MB), machines=[Node(8, 1, 10_000 * MB)])
    assert report.scenario.system.trainer == "sequential"
    assert "8 clients of mlp at once need" in report.rows["trainer"]


def test_on_cpus_all_workers_compare_at_once(small):
    _, grid = look_at(alike(small), steady(1.3))
    assert [count > 1 for _, count, _ in grid.calls] == grid.everywhere and any(grid.everywhere)
    _, grid = look_at(alike(small), steady(1.3), machines=[Node(8, 1, 20 * 1000 * MB)], workers=1)
    assert any(count > 1 for _, count, _ in grid.calls) and not any(grid.everywhere)


def test_what_a_cohort_takes_follows_from_a_few_steps_or_from_all(small):
    report, calls = look(alike(small), steady(1.3))  # eight clients with ten steps of 3 ms take 0.24 s
    assert {steps for _, count, steps in calls if count > 1} == {4, 10}  # four for the memory
    other, calls = look(alike(small, client__steps=40), steady(1.3))
    # A step takes 2.25 ms with all that is beside.
    assert {steps for _, count, steps in calls if count > 1} == {4, 6, 13}
    for found, seconds in ((report, 0.030), (other, 0.090)):
        took = found.facts["architectures"]["mlp"]
        assert took["sequential"]["seconds"] == pytest.approx(seconds)
        assert took["vectorised"]["seconds"] == pytest.approx(seconds / 1.3)


def test_memory_may_leave_cpus_idle(small):
    report, grid = look_at(alike(small), steady(1.0, 700 * MB), machines=[Node(8, memory=3500 * MB)], workers=8)
    assert not any(grid.everywhere)  # nor do so many cohorts fit, which are measured before
    assert report.scenario.system.workers == 3  # 300 MB and a client of 700 MB
    assert report.placement.worker_bytes == 1000 * MB


# --- on Ray, with GPUs that only Ray knows -----------------------------------------------------------------------


def test_logical_gpus_get_their_workers_after_the_probe(tmp_path):
    script = """
        import sys
        from pathlib import Path
        import ray
        from fedkd import run
        from fedkd.parsing import parse

        class Ear(run.Listener):
            def preflight(self, report):
                print(report.rows["placement"])

        if __name__ == "__main__":
            ray.init("local", num_cpus=4, num_gpus=2, log_to_driver=False, logging_level="ERROR")
            scenario = parse({
                "name": "gpus", "run": {"rounds": 1},
                "data": {"source": "synthetic", "options": {"classes": 4, "train": 200, "test": 40}},
                "models": {"student": "mlp"}, "partition": {"clients": 4, "alpha": 5.0},
            })
            folder = run.execute(scenario, out=Path(sys.argv[1]), listener=Ear()).folder
            print((folder / "scenario.toml").read_text())
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "script.py", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "fits 2 clients per GPU, 2 workers per GPU; round ≈ " in done.stdout, done.stderr
    assert "workers = 4\n" in done.stdout and "gpu_fraction = 0.5\n" in done.stdout
