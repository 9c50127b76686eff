"""``flwr run .`` on Flower's own runtime: slow, because it starts a SuperLink and installs nothing but itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedkd import run
from fedkd.scenario_file import load
from fedkd.sweep import expand

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = [
    "run.rounds=2",
    "partition.clients=4",
    "run.participation=0.5",
    "client.epochs=1",
    "system.server_threads=1",
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flwr_run_gives_our_metrics(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    for name in ("fedkd", "strategies", "scenarios"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app)
    flwr = str(Path(sys.executable).parent / "flwr")
    env = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    out = tmp_path / "out"
    config = f'overrides="{";".join(OVERRIDES)}" out="{out}"'

    def call(*arguments):
        return subprocess.run([flwr, *arguments], cwd=app, env=env, capture_output=True, text=True, timeout=300)

    try:
        call("federation", "simulation-config", "--num-supernodes", "4", "--client-resources-num-cpus", "1")
        done = call("run", ".", "--stream", "-c", config)
    finally:
        subprocess.run(["pkill", "-f", str(tmp_path / "home")], check=False)

    assert (out / "metrics.jsonl").exists(), done.stdout + done.stderr
    theirs = [e for e in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if e["event"] == "round"]
    cell = expand(load("quickstart", [*OVERRIDES, "system.engine=inline"]))[0].scenario
    ours = [e for e in run.read_metrics(run.execute(cell, out=tmp_path / "ours").folder) if e["event"] == "round"]
    assert [e["accuracy"] for e in theirs] == [e["accuracy"] for e in ours]
    assert [e["train"] for e in theirs] == [e["train"] for e in ours]
