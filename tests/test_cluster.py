"""Ray is started with what workers need, and only where there is something to run."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray

from fedkd import cluster
from fedkd.cluster import runtime_env, worker_env
from fedkd.errors import RunError
from fedkd.jobs import execute_sweep
from fedkd.run_folder import folder_of
from fedkd.scenario_file import dump
from fedkd.sweep import Cell
from fedkd.threads import cores

STARTED = """
import os, ray, torch
from fedkd.cluster import runtime_env, shared_engine, worker_env
from fedkd.scenario import Scenario

class Worker:
    def look(self):
        return dict(os.environ), torch.get_num_threads()

scenario = Scenario.model_validate({{"name": "t", "strategy": {{"name": "fedavg"}}, "system": {{"workers": 1}}}})
before = [os.environ.get(name) for name in worker_env()]
with shared_engine(scenario, meanwhile=lambda: "done") as value:
    assert value == "done" and [os.environ.get(name) for name in worker_env()] == before
    assert (runtime_env() is None) == {shortcut}
    found, threads = ray.get(ray.remote(Worker).options(num_cpus=1, runtime_env=runtime_env()).remote().look.remote())
    wrong = {{name: (value, found.get(name)) for name, value in worker_env().items() if found.get(name) != value}}
    if {shortcut}:
        wrong.pop("MKL_NUM_THREADS", None)  # which follows the other where it is not set
    assert not wrong and threads == 1, (wrong, threads)
assert not ray.is_initialized()
"""


FAILED = """
import ray
from fedkd import cluster
from fedkd.scenario import Scenario

def fails():
    raise KeyError("meanwhile")

scenario = Scenario.model_validate({"name": "t", "strategy": {"name": "fedavg"}, "system": {"workers": 1}})
try:
    with cluster.shared_engine(scenario, meanwhile=fails):
        assert False
except KeyError:
    assert not ray.is_initialized() and not cluster.is_there()
with cluster.shared_engine(scenario):
    assert ray.is_initialized() and cluster.is_there()
assert not ray.is_initialized() and not cluster.is_there()
"""


def workers_find_what_they_need(shortcut, **env):
    script = STARTED.format(shortcut=shortcut)
    kept = {name: value for name, value in os.environ.items() if name not in cluster.THREADS}
    done = subprocess.run([sys.executable, "-c", script], env=kept | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_who_fails_while_ray_starts_finds_none_afterwards():
    done = subprocess.run([sys.executable, "-c", FAILED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_start_that_fails_is_an_error_of_whoever_wants_it(small, monkeypatch):
    def fails(*_):
        raise RunError("Ray cannot be started: no")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "start_ray", fails)
    done = []
    with (
        pytest.raises(RunError, match="cannot be started: no"),
        cluster.shared_engine(small(system__engine="ray"), meanwhile=lambda: done.append("checked")),
    ):
        done.append("run")
    assert done == ["checked"] and not cluster.is_there()


def test_ray_starts_before_the_heavy_libraries_are_imported():
    code = """
    import sys
    from contextlib import contextmanager
    from pathlib import Path
    from fedkd import cluster, jobs
    from fedkd.cli.screen import Screen
    from fedkd.scenario_file import load
    from fedkd.sweep import expand

    @contextmanager
    def starts(scenario, meanwhile):
        assert scenario.system.engine == "ray" and not {"torch", "flwr"} & {*sys.modules}
        meanwhile()
        assert {"torch", "flwr"} < {*sys.modules}
        print("started")
        sys.exit()
        yield

    jobs.shared_engine = starts
    cells = expand(load("quickstart"), checked=False)
    jobs.execute_sweep(cells, out=Path("nowhere"), listener=Screen(None, cells))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "started\n" and not done.returncode, done.stderr


def test_workers_of_a_ray_that_is_started_here_find_their_environment_without_being_given_it():
    workers_find_what_they_need(True)


def test_workers_get_one_thread_whatever_the_user_set():
    workers_find_what_they_need(False, OMP_NUM_THREADS="2")


def test_workers_of_a_ray_that_somebody_else_started_are_given_their_environment(ray_session):
    assert runtime_env() == {"env_vars": worker_env()}


def test_ray_is_not_started_for_runs_that_are_finished(small, tmp_path, monkeypatch):
    inline, on_ray = small(system__engine="inline"), small(system__engine="ray")
    execute_sweep([Cell("one", {}, inline)], out=tmp_path)
    assert folder_of(inline, tmp_path, False) == folder_of(on_ray, tmp_path, False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "start_ray", lambda *_: pytest.fail("Ray was started"))
    [(_, result)], failed = execute_sweep([Cell("one", {}, on_ray)], out=tmp_path)
    assert result.skipped and not failed


# --- a cluster that somebody else has started --------------------------------------------------------------------

LOOK = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().get_job_id(), ray.cluster_resources()["CPU"], ray.available_resources()["CPU"])
"""


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


@pytest.fixture
def head(monkeypatch):
    """Start Ray as a user does, with a CPU more than there are; return where it is. Nothing of it is left."""
    home = tempfile.mkdtemp(prefix="fedkd")  # sockets lie there, and their paths must be short
    monkeypatch.setenv("RAY_TMPDIR", home)  # where `auto` looks for an address, so that nobody else finds this one
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ports = [f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *ports,
    ]
    with (Path(home) / "log").open("w") as log:
        started = subprocess.Popen([*command, f"--num-cpus={cores() + 1}"], stdout=log, stderr=log)
    file = Path(home) / "ray" / "ray_current_cluster"
    try:
        until = time.monotonic() + 60
        while not file.exists():
            assert started.poll() is None and time.monotonic() < until, (Path(home) / "log").read_text()
            time.sleep(0.1)
        yield file.read_text().strip()
    finally:
        children = psutil.Process(started.pid).children(recursive=True)
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(20)
        for process in (*children, started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait(10)
        psutil.wait_procs(children, timeout=10)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_a_command_with_the_address_auto_joins_the_cluster_of_this_machine_and_leaves_it_running(head, small, tmp_path):
    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "small.toml").write_text(dump(small("fedavg", system__engine="ray")))
    python("-m", "fedkd.cli", "run", "small.toml", "--address", "auto", "--cache", "cache")
    (summary,) = (tmp_path / "runs" / "small").glob("*/summary.json")
    assert json.loads(summary.read_text())["rounds"] == 3
    assert json.loads(summary.with_name("environment.json").read_text())["workers"] == cores() + 1
    # Whoever joins now is the second one, and finds all CPUs free.
    job, *cpus = python("-c", LOOK, head).split()
    assert job == "02000000" and [float(number) for number in cpus] == [cores() + 1] * 2
