"""Runs of a sweep beside each other, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedkd import run
from fedkd.errors import ScenarioError
from fedkd.jobs import execute_sweep
from fedkd.run import Listener
from fedkd.scenario_file import read
from fedkd.sweep import expand

DEADLY = """
import os, signal
from strategies.fedavg import FedAvg

class Deadly(FedAvg):
    def fuse(self, uploads):
        if self.round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().fuse(uploads)
"""


def cells_of(small, *cases, **changes):
    raw = small(**changes).model_dump(exclude_defaults=True)
    return expand(read({**raw, "sweep": {"cases": list(cases), "run.seed": [0, 1]}}, []))


def metrics(folder):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in run.read_metrics(folder)]


def wait_until(condition, seconds=120):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


class Bars(Listener):
    """Hears of every run apart, as a screen does."""

    def __init__(self):
        self.heard = [[]]

    def beside(self):
        twin = Bars()
        twin.heard = self.heard
        twin.heard.append([])
        twin.event = lambda event, own=self.heard[-1]: own.append((event["event"], event.get("round")))
        return twin


def test_runs_beside_each_other_have_the_results_of_runs_one_after_another(small, tmp_path):
    cells = cells_of(small, {"strategy": "fedavg"}, {"strategy": {"name": "feddf", "steps": 5}})
    alone, failed = execute_sweep(cells, out=tmp_path / "alone")
    bars = Bars()
    beside, failed_beside = execute_sweep(cells, out=tmp_path / "beside", jobs=2, listener=bars)

    assert [cell for cell, _ in beside] == [cell for cell, _ in alone] == cells and not failed + failed_beside
    for (_, one), (_, other) in zip(alone, beside):
        assert metrics(one.folder) == metrics(other.folder)
        assert one.summary["curve"] == other.summary["curve"]
    for heard in bars.heard[1:5]:  # nobody hears of another run's rounds
        assert [round for event, round in heard if event == "round"] == [1, 2, 3]
    again, _ = execute_sweep(cells, out=tmp_path / "beside", jobs=2)
    assert all(result.skipped for _, result in again)


def test_a_run_whose_process_dies_is_reported_and_the_others_are_finished(small, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cells = cells_of(small, {"strategy": "deadly:Deadly"}, {"strategy": "fedavg"})
    finished, failed = execute_sweep(cells, out=tmp_path, jobs=2)

    assert [cell.scenario.strategy.name for cell, _ in finished] == ["fedavg"] * 2
    assert [cell.scenario.run.seed for cell, _ in failed] == [0, 1]
    assert "exit code -9" in str(failed[0][1]) and "same command" in str(failed[0][1])


def test_a_folder_that_cannot_be_written_ends_it_with_one_error(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ScenarioError, match="cannot be written") as refused:
        execute_sweep(cells_of(small, {"strategy": "fedavg"}), out=tmp_path / "file", jobs=2)

    assert refused.value.key == "--out" and refused.value.hint


def test_several_runs_at_once_need_the_inline_engine(small, tmp_path):
    with pytest.raises(ScenarioError, match="inline"):
        execute_sweep(cells_of(small, {"strategy": "fedavg"}, system__engine="ray"), out=tmp_path, jobs=2)

    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_all_runs_and_the_same_command_goes_on(small, tmp_path):
    from fedkd.scenario_file import dump

    scenario = small("fedavg", client__epochs=40, run__rounds=12)
    sweep = '[sweep]\n"run.seed" = [0, 1]\n'
    (tmp_path / "slow.toml").write_text(dump(scenario) + sweep)
    command = [sys.executable, "-c", "import sys; from fedkd.cli import main; sys.exit(main())", "run", "slow.toml"]
    command += ["--jobs", "2"]
    driver = subprocess.Popen(
        command,
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    wait_until(lambda: len([f for f in tmp_path.glob("runs/*/*/metrics.jsonl") if '"round"' in f.read_text()]) == 2)
    started = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    os.kill(driver.pid, signal.SIGINT)
    _, said = driver.communicate(timeout=60)

    assert driver.returncode == 130 and "same command" in said
    wait_until(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])
    assert not list(tmp_path.glob("runs/*/*/summary.json"))
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for folder in tmp_path.glob("runs/*/*/"):
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {"interrupted", "resumed"} <= {event["event"] for event in events}
    assert len(list(tmp_path.glob("runs/*/*/summary.json"))) == 2
