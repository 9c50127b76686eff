import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedkd import __version__, cli, jobs, run
from fedkd.cli.terminal import console
from fedkd.errors import RunError

SMALL = """
[data]
source = "synthetic"
options = { classes = 3, dimensions = 4, train = 90, test = 30 }
[partition]
name = "iid"
clients = 3
[models]
student = "mlp"
[system]
engine = "inline"
[run]
rounds = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small scenario, and a cache of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "small.toml").write_text(SMALL)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(console, "width", 200)
    return folder


def fedkd(*args):
    return cli.main([str(arg) for arg in args])


# --- mistakes: exit code 2, one message, nothing written -------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["strategy=fedavgg"], ["strategy.name", "'fedavgg'", "did you mean 'fedavg'"]),
        (["strategy.mu=1"], ["strategy.mu", "no hyper-parameter", "weighting"]),
        (["models.student=mpl"], ["models.student", "'mpl'", "did you mean 'mlp'"]),
        (["models.student=text"], ["models.student", "'text'", "vector"]),
        (["partition.name=idd"], ["partition.name", "'idd'", "did you mean 'iid'"]),
        (["data.source=sintetic"], ["data.source", "'sintetic'", "did you mean 'synthetic'"]),
        (["data.source=npz:gone.npz", "data.options={}"], ["data.source", "gone.npz", "FEDKD_DATA"]),
        (["data.options.clases=2"], ["data.options.clases", "did you mean 'classes'"]),
        (["strategy=feddf"], ["proxy.source", "needs a proxy set", 'source = "held-out"']),
        (["partition.alpha=0"], ["partition.alpha", "a number > 0", "is 0"]),
        (["partition.alpha=-0.5"], ["partition.alpha", "a number > 0", "is -0.5"]),
        (["partition.clients=91"], ["partition.clients", "91 clients", "90"]),
        (["partition.min_samples=31"], ["partition.min_samples", "31", "30"]),
        (["proxy.source=held-out", "proxy.size=1000"], ["proxy.size", "1000"]),
        (["run.participation=0"], ["run.participation", "(0, 1]", "is 0"]),
        (["run.participation=1.01"], ["run.participation", "(0, 1]", "is 1.01"]),
        (["partition.alpha=nan"], ["partition.alpha", "is nan"]),
        (["client.lr=nan"], ["client.lr", "is nan"]),
        (["data.options.separation=nan"], ["data.options.separation", "is nan"]),
        (["run.round=2"], ["run.round", "unknown key", "did you mean 'rounds'"]),
        (["sweep.strategy=['fedavg', 'feddf']"], ["needs a proxy set", "in the sweep, at 'feddf'"]),
        (["models.options.hiden=[3]"], ["models.options", "'hiden'", "did you mean 'hidden'"]),
        (["models.student=builtins:dict"], ["models.student", "'builtins:dict'", "cannot be called"]),
        (["models.student=builtins:max"], ["models.student", "'builtins:max'"]),
        (["client.terms=[{loss = 'math:sin'}]"], ["client.terms", "'math:sin'", "teacher_out"]),
        (["data.options.train=100000000000000"], ["synthetic", "memory"]),
        (["data.options.shape=3"], ["data.options.shape", "[H, W]", "is 3"]),
        (["name=a/b"], ["name", "'a/b'"]),
        (["partition.name=resampled", "partition.clients=20000", "strategy=fd"], ["partition.clients", "10,000"]),
        (
            ["partition.clients=20000", "partition.test=0.2", "run.evaluate_clients=all"],
            ["run.evaluate_clients", 'use "selected"'],
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate"])
def test_wrong_scenarios(here, capsys, command, settings, parts):
    code = fedkd(command, "small.toml", *(word for setting in settings for word in ("--set", setting)))

    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: small.toml: ")
    for part in parts:
        assert part in printed.err
    assert printed.out == ""
    assert [path.name for path in here.iterdir()] == ["small.toml"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["run", "quickstrt"], ["no scenario is called 'quickstrt'", "did you mean 'quickstart'"]),
        (["run", "gone.toml"], ["gone.toml", "no such file"]),
        (["run", "~nobody-of-this-name/gone.toml"], ["gone.toml", "no such file"]),
        (["run", "a" * 300], ["no scenario is called"]),
        (["run", "small.toml", "--set", "rounds"], ["key=value"]),
        (["run", "small.toml", "--engine", "spark"], ["system.engine", "'ray', 'inline'", "'spark'"]),
        (["run", "small.toml", "--workers", "-1"], ["system.workers", "is -1"]),
        (["run", "small.toml", "--workers", "two"], ["--workers", "two"]),
        (["run"], ["SCENARIO"]),
        (["rnu"], ["rnu"]),
        (["resume", "."], ["holds no run"]),
        (["list", "strategie"], ["'strategie'", "did you mean 'strategies'"]),
        (["describe", "feddff"], ["nothing is called 'feddff'", "did you mean 'feddf'"]),
        (["new", "strategy", "my-method"], ["'my-method'", "my_method"]),
        (["new", "strategy", "class"], ["'class'"]),
        (["new", "strategy", "json"], ["'json'", "json_method"]),
    ],
)
def test_wrong_command_lines(here, capsys, args, parts):
    code = fedkd(*args)

    printed = capsys.readouterr().err
    assert code == 2
    for part in parts:
        assert part in printed
    assert [path.name for path in here.iterdir()] == ["small.toml"]


def test_wrong_data_and_weights_are_found_before_anything_is_written(here, capsys):
    with (here / "wrong.npz").open("wb") as file:
        np.savez(file, x_train=np.ones((4, 3)), y_train=[0.0, np.nan, 1.0, 0.0], x_test=np.ones((1, 3)), y_test=[0])
    save_file({"head.weight": torch.zeros(2, 2)}, here / "wrong.safetensors")
    before = sorted(here.iterdir())
    for setting, parts in {
        "data.source=npz:wrong.npz": ["error: small.toml: npz:wrong.npz: y_train", "NaN"],
        "models.pretrained=wrong.safetensors": ["error: small.toml: models.pretrained", "does not fit", "missing"],
    }.items():
        assert fedkd("run", "small.toml", "--set", setting, "--set", "data.options={}") == 2

        printed = capsys.readouterr().err
        for part in parts:
            assert part in printed
        assert sorted(here.iterdir()) == before


# --- running -------------------------------------------------------------------------------------------


def test_a_run_prints_its_table_and_is_skipped_the_second_time(here, capsys):
    assert fedkd("run", "small.toml", "--out", "results") == 0
    first = capsys.readouterr().out
    assert fedkd("run", "small.toml", "--out", "results") == 0
    second = capsys.readouterr().out

    for word in (
        "samples per client and class",
        "Jensen-Shannon",
        "up",
        "down",
        "results",
        "curves",
    ):
        assert word in first
    assert "finished before" in second and "finished before" not in first
    (folder,) = [path for path in (here / "results" / "small").iterdir() if path.is_dir()]
    assert (folder / "summary.json").exists()
    assert (here / "results" / "small" / "curves.png").exists()
    assert fedkd("resume", folder) == 0


def test_a_sweep_writes_mean_and_deviation(here, capsys):
    code = fedkd("run", "small.toml", "--set", "sweep.run.seed=[0, 1]", "--set", "run.rounds=1")

    assert code == 0
    assert "± " in (here / "runs" / "small" / "results.md").read_text()
    assert {path.suffix for path in (here / "runs" / "small").glob("results.*")} == {".md", ".csv", ".tex"}
    assert "seed 1" in capsys.readouterr().out


def test_ctrl_c_prints_how_to_go_on(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise run.RunInterrupted(Path("runs/small/x"))

    monkeypatch.setattr(jobs, "execute_sweep", interrupted)

    assert fedkd("run", "small.toml") == 130
    assert "fedkd resume runs/small/x" in capsys.readouterr().err


def test_a_failed_run_exits_with_1(here, capsys, monkeypatch):
    def failing(cells, **kwargs):
        return [], [(cells[0], RunError("round 1: no client replied"))]

    monkeypatch.setattr(jobs, "execute_sweep", failing)

    assert fedkd("run", "small.toml") == 1
    assert "no client replied" in capsys.readouterr().err


# --- looking -------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    assert fedkd("--version") == 0
    assert capsys.readouterr().out.strip() == f"fedkd {__version__}"
    assert fedkd("--help") == 0
    assert "partition" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("strategies", "feddf"),
        ("scenarios", "quickstart"),
        ("models", "resnet8"),
        ("datasets", "npz:PATH"),
        ("partitioners", "dirichlet"),
        ("losses", "kd"),
    ],
)
def test_lists(here, capsys, kind, entry):
    assert fedkd("list", kind) == 0
    assert entry in capsys.readouterr().out


def test_listing_imports_no_heavy_library():
    code = "import sys, fedkd.cli as c; c.main(['list']); print({'torch', 'ray', 'flwr'} & {*sys.modules})"
    root = str(Path(cli.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert done.stdout.splitlines()[-1] == "set()"
    assert "feddf" in done.stdout and "quickstart" in done.stdout


def test_a_strategy_is_described(here, capsys):
    assert fedkd("describe", "feddf") == 0

    printed = capsys.readouterr().out
    for part in (
        "Lin et al.",
        "NeurIPS 2020",
        "4·|θ|",
        "requires",
        "proxy",
        "different models",
        "paper and code",
        "verified",
        "on the server",
        "code: weighting = uniform",
        "temperature",
        "a number > 0",
        "10000",
    ):
        assert part in printed


@pytest.mark.parametrize("name", ["cnn", "npz:any.npz", "dirichlet", "kd", "quickstart", "fedgkd"])
def test_everything_that_is_listed_can_be_described(here, capsys, name):
    assert fedkd("describe", name) == 0
    assert name.split(":")[0] in capsys.readouterr().out


def test_partition_shows_table_skew_and_picture(here, capsys):
    assert fedkd("partition", "small.toml", "--out", "pictures") == 0

    printed = capsys.readouterr().out
    assert "30" in printed and "Jensen-Shannon" in printed and "effective classes" in printed
    assert (here / "pictures" / "small" / "partition.png").exists()
    assert "summary.json" not in {path.name for path in here.rglob("*")}


def test_validate_writes_nothing(here, capsys):
    assert fedkd("validate", "small.toml") == 0
    assert "valid, one cell: fedavg" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["small.toml"]


# --- writing -------------------------------------------------------------------------------------------


def test_a_new_strategy_passes_its_own_test_and_runs(here, capsys):
    assert fedkd("new", "strategy", "my_method") == 0
    assert "pip install -e ." in capsys.readouterr().out
    folder = here / "my_method"
    assert {path.name for path in folder.iterdir()} == {
        "my_method.py",
        "my_method.toml",
        "test_my_method.py",
        "pyproject.toml",
    }
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}

    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=folder, env=environment, capture_output=True, text=True
    )

    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "3 passed" in tested.stdout


def test_nothing_is_overwritten(here, capsys):
    assert fedkd("new", "strategy", "mine", "--folder", "there") == 0
    (here / "there" / "mine.py").write_text("precious")

    assert fedkd("new", "strategy", "mine", "--folder", "there") == 2

    assert "there already" in capsys.readouterr().err
    assert (here / "there" / "mine.py").read_text() == "precious"


def test_zero_coefficients_of_the_new_strategy_are_fedavg(here, capsys, monkeypatch):
    """The example keeps the rule that a method without its extra terms is FedAvg, to the bit."""
    fedkd("new", "strategy", "zero_method")
    monkeypatch.chdir(here / "zero_method")
    monkeypatch.setattr("sys.path", [*sys.path])
    mine = '{name = "zero_method:ZeroMethod", smoothing = 0.0, momentum = 0.0}'

    assert fedkd("run", here / "small.toml", "--set", f'sweep.strategy=["fedavg", {mine}]') == 0

    logs = [path.read_text().splitlines() for path in sorted(Path("runs/small").glob("*/metrics.jsonl"))]
    rounds = [[json.loads(line) for line in log if json.loads(line)["event"] == "round"] for log in logs]
    first, second = [[event["predictors"] for event in events] for events in rounds]
    assert first == second and len(first) == 2
