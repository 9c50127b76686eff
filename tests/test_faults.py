"""Real faults of real processes: workers and drivers that are killed, nodes that leave with what they hold, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fedkd import grids, run
from fedkd.errors import LostError, RunError
from fedkd.scenario_file import dump


def metrics(folder):
    """Return the round events without what depends on the clock."""
    rounds = [e for e in run.read_metrics(folder) if e["event"] == "round"]
    return [{k: v for k, v in e.items() if k != "seconds"} for e in rounds]


def processes(title, session=None):
    """Return the ids of processes whose title starts so, of one session (process group leader) if it is named."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes().decode(errors="replace")
            if title in text and (session is None or os.getsid(int(path.name)) == session):
                found.append(int(path.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def wait_until(true, seconds=90.0):
    """Wait for something that happens in another process."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def status(pid):
    """Return the state and the parent of a process; the state is empty if it has ended."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return state, int(parent)


def computing():
    """Return the ids of workers of this process's Ray, whose raylet it has started, that are doing a task."""
    return [pid for pid in processes("ray::Worker.run") if status(status(pid)[1])[1] == os.getpid()]


def kill_a_busy_one():
    """End a worker with SIGKILL in the middle of a task and return its id, or None if all have just finished."""
    for pid in computing():
        os.kill(pid, signal.SIGSTOP)  # it can no longer finish while it is looked at
        wait_until(lambda pid=pid: status(pid)[0] in ("T", ""))
        if pid in computing():
            os.kill(pid, signal.SIGKILL)
            return pid
        os.kill(pid, signal.SIGCONT)
    return None


class KillsAWorker(run.Listener):
    """Kills a busy worker when a reply of a round arrives: others are then being computed."""

    def __init__(self, round):
        self.round, self.killed = round, None

    def event(self, event):
        if event["event"] == "reply" and event["round"] == self.round and self.killed is None:
            self.killed = kill_a_busy_one()


# FedAvg sums on the workers, FedDF keeps uploads there and computes on them, FD's clients have memory of their own.
@pytest.mark.parametrize("strategy", ["fedavg", {"name": "feddf", "steps": 5}, "fd"], ids=["fedavg", "feddf", "fd"])
def test_a_worker_that_is_killed_changes_no_bit(small, tmp_path, ray_session, caplog, strategy):
    many = {"partition__clients": 40, "run__participation": 1.0, "data__options": {"classes": 4, "train": 2_000}}
    # A trainer that is measured may be another one in the second run, and then the bits are.
    settings = many | {"client__epochs": 20, "partition__alpha": 10.0, "system__trainer": "sequential"}
    undisturbed = run.execute(small(strategy, **settings), out=tmp_path / "inline")

    killer = KillsAWorker(round=2)
    on_ray = small(strategy, **settings, system__engine="ray", system__workers=2)
    killed = run.execute(on_ray, out=tmp_path / "ray", listener=killer)

    assert killer.killed is not None
    wait_until(lambda: not os.path.exists(f"/proc/{killer.killed}"))
    told = [record.getMessage() for record in caplog.records if record.name == "fedkd.engine.dispatcher"]
    assert len(told) == 1 and "a worker died" in told[0] and "run again elsewhere" in told[0]
    assert metrics(killed.folder) == metrics(undisturbed.folder)
    assert killed.summary["refused"] == 0


def start(folder, scenario, *, session, after=""):
    """Run a scenario as a user does, in a session of its own; maybe after some code in the same process."""
    (folder / "scenario.toml").write_text(dump(scenario))
    (folder / "command.py").write_text(f"{textwrap.dedent(after)}\nimport sys, fedkd.cli\nsys.exit(fedkd.cli.main())\n")
    command = [sys.executable, "command.py", "run", "scenario.toml", "--out", "runs"]
    # The default handler of Ctrl-C, which a shell's background jobs do not have.
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=session,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def alive(driver):
    """Fail, with what it said, if a process has ended that should be running."""
    assert driver.poll() is None, driver.stdout.read()
    return True


def log_of(folder):
    """Return the rounds that a running process has finished."""
    found = list(folder.glob("runs/*/*/metrics.jsonl"))
    text = found[0].read_text() if found else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and '"round"' in line]


def test_a_driver_that_is_killed_leaves_no_worker_and_is_resumed(small, tmp_path):
    settings = {"client__epochs": 20, "run__rounds": 30}
    on_ray = small("fedavg", **settings, system__engine="ray", system__workers=2)
    driver = start(tmp_path, on_ray, session=True)
    wait_until(lambda: len([e for e in log_of(tmp_path) if e["event"] == "round"]) >= 2)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()

    for title in ("ray::Worker", "raylet/raylet", "gcs_server"):
        wait_until(lambda title=title: not processes(title, session=driver.pid), seconds=30)
    for pid in processes("", session=driver.pid):  # Ray's own agents outlive it: nobody is left to stop them
        os.kill(pid, signal.SIGKILL)
    [folder] = tmp_path.glob("runs/*/*")
    assert not (folder / "summary.json").exists()
    resumed = run.resume(folder)
    expected = run.execute(small("fedavg", **settings), out=tmp_path / "inline")
    assert metrics(resumed.folder) == metrics(expected.folder)


def test_ctrl_c_stops_within_seconds_and_leaves_no_process(small, tmp_path):
    slow = small("fedavg", client__epochs=3_000, run__rounds=50, system__engine="ray", system__workers=2)
    driver = start(tmp_path, slow, session=True)
    wait_until(lambda: alive(driver) and processes("ray::Worker.run", session=driver.pid), seconds=180)
    began = time.monotonic()
    os.kill(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=30)

    assert driver.returncode == 130 and "fedkd resume" in output
    assert time.monotonic() - began < 15  # seconds on a busy machine, against minutes for the cohorts
    wait_until(lambda: not processes("", session=driver.pid), seconds=15)


def nothing_is_left(driver, folder):
    wait_until(lambda: not processes("", session=driver.pid), seconds=15)
    assert not (folder / "runs").exists()


def test_an_interrupt_while_ray_starts_leaves_no_process(small, tmp_path):
    driver = start(tmp_path, small("fedavg", system__engine="ray", system__workers=2), session=True)
    wait_until(lambda: alive(driver) and processes("raylet/raylet", session=driver.pid))
    os.kill(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=30)

    assert driver.returncode == 130 and "go on with: the same command" in output
    nothing_is_left(driver, tmp_path)


def test_a_mistake_that_is_found_while_ray_starts_leaves_no_process(small, tmp_path):
    wrong = small({"name": "fedavg", "mu": 1.0}, system__engine="ray", system__workers=2)
    driver = start(tmp_path, wrong, session=True)
    wait_until(lambda: alive(driver) and processes("gcs_server", session=driver.pid))
    output, _ = driver.communicate(timeout=90)

    assert driver.returncode == 2 and "scenario.toml: strategy.mu: fedavg has no hyper-parameter 'mu'" in output
    nothing_is_left(driver, tmp_path)


CHECKS = """
import fedkd.jobs, ray, time

def check(*_, **__):
    while not ray.is_initialized():
        time.sleep(0.05)
    {then}

fedkd.jobs._check = check
"""


def test_a_fault_of_ours_is_told_and_leaves_no_process(small, tmp_path):
    on_ray = small("fedavg", system__engine="ray", system__workers=2)
    driver = start(tmp_path, on_ray, session=True, after=CHECKS.format(then="raise TypeError('ours')"))
    output, _ = driver.communicate(timeout=90)

    assert driver.returncode == 1 and "TypeError: ours" in output
    nothing_is_left(driver, tmp_path)


def test_sigterm_is_heard_when_ray_is_there_and_the_data_are_not_yet(small, tmp_path):
    on_ray = small("fedavg", system__engine="ray", system__workers=2)
    then = "time.sleep(0.5); print('up', flush=True); time.sleep(60)"
    driver = start(tmp_path, on_ray, session=True, after=CHECKS.format(then=then))
    assert driver.stdout.readline() == "up\n"
    os.kill(driver.pid, signal.SIGTERM)
    output, _ = driver.communicate(timeout=30)

    assert driver.returncode == 130 and output.startswith("interrupted; go on with"), output  # no dump of Ray's
    nothing_is_left(driver, tmp_path)


def test_a_node_that_leaves_takes_states_with_it_that_come_from_the_checkpoint(tmp_path):
    """Ray's local cluster of two nodes; the second one is removed between two calls, with all that it holds."""
    script = """
        import logging, ray
        from flwr.app import Message, RecordDict
        from ray.cluster_utils import Cluster
        from fedkd.engine import Nodes, RayGrid

        def app():
            import time
            import numpy as np
            from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
            from flwr.clientapp import ClientApp

            app = ClientApp()

            @app.train()
            def train(message, context):
                time.sleep(0.01)  # so that the clients are not handed to one worker alone
                kept = context.state.array_records.get("kept")
                calls = int(kept["0"].numpy()[0]) + 1 if kept else 1
                # Large enough to stay on the node that computed it.
                context.state["kept"] = ArrayRecord([np.full(50_000, calls, np.float32)])
                return Message(RecordDict({"metrics": MetricRecord({"calls": calls})}), reply_to=message)

            return app

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="CRITICAL", log_to_driver=False)
        grid = RayGrid(app, Nodes.alike(20), workers=2)
        ray.get(list(grid._pool.loading.values()))  # both workers take part from the first call on

        def calls():
            messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            return [reply.content["metrics"]["calls"] for reply in grid.send_and_receive(messages)]

        assert calls() == [1] * 20
        checkpoint, lost = grid.state_dict(), []

        def on_lost(partition):
            lost.append(partition)
            return checkpoint[partition] if partition % 2 else None

        grid.on_lost = on_lost
        assert calls() == [2] * 20
        cluster.remove_node(second, allow_graceful=False)
        third = calls()
        assert lost and len(lost) < 20, lost
        # From the checkpoint: 1 + 1; without one, the client starts anew; the others went on.
        assert third == [3 if p not in lost else 2 if p % 2 else 1 for p in range(20)], (third, lost)
        assert calls() == [n + 1 for n in third]
        grid.close()
        print("done")
    """
    path = tmp_path / "cluster.py"
    path.write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.strip().endswith("done"), done.stdout[-2_000:] + done.stderr[-2_000:]
    assert "the state of client" in done.stderr  # a warning for each


class Loses(run.Listener):
    """Does something when a round begins, as often as it is told."""

    def __init__(self, times, lose):
        self.left, self.lose = dict(times), lose

    def event(self, event):
        if event["event"] == "started" and self.left.get(event["round"], 0):
            self.left[event["round"]] -= 1
            self.lose()


def notes(folder):
    """Return what a run has noted beside its rounds."""
    return [event for event in run.read_metrics(folder) if event["event"] != "round"]


@pytest.mark.parametrize(("every", "ran_again"), [(1, []), (2, [{"event": "resumed", "after_round": 0}])])
def test_a_lost_state_comes_from_the_checkpoint_only_if_it_is_the_one_that_was_saved(
    small, tmp_path, monkeypatch, ray_session, every, ran_again
):
    from ray._private.internal_api import free

    all_remember = {"client__terms": [{"teacher": "own"}], "run__participation": 1.0, "run__checkpoint_every": every}

    def scenario(**system):
        return small("fedavg", **all_remember, system={"trainer": "sequential", "server_threads": 1, **system})

    made, make = [], grids.RayGrid
    monkeypatch.setattr(grids, "RayGrid", lambda *given, **more: made.append(make(*given, **more)) or made[-1])
    loses = Loses({2: 1}, lambda: free([made[-1]._states[client] for client in (1, 3)]))  # as if their node had left
    inline = run.execute(scenario(engine="inline"), out=tmp_path / "inline")
    on_ray = run.execute(scenario(engine="ray", workers=2), out=tmp_path / "ray", listener=loses)

    restored = [{"event": "state-lost", "round": 2, "partition_id": n, "restored_from": 1} for n in (1, 3)]
    lost = sorted(notes(on_ray.folder), key=lambda event: event.get("partition_id", 0))
    assert lost == (ran_again or restored)
    assert on_ray.summary["states_lost"] == (0 if ran_again else 2) and inline.summary["states_lost"] == 0
    assert metrics(on_ray.folder) == metrics(inline.folder)


def test_a_run_goes_on_from_a_checkpoint_three_times_and_then_stops_resumably(small, tmp_path):
    def lose():
        raise LostError("uploads were lost with their node")

    scenario = small("fedgkd")
    whole = run.execute(scenario, out=tmp_path / "whole")
    often = run.execute(scenario, out=tmp_path / "often", listener=Loses({2: 3, 3: 3}, lose))
    assert [event["after_round"] for event in notes(often.folder)] == [1, 1, 1, 2, 2, 2]
    assert metrics(often.folder) == metrics(whole.folder)

    too_often = Loses({2: 9}, lose)
    with pytest.raises(RunError, match=r"uploads were lost with their node[\s\S]*fedkd resume"):
        run.execute(scenario, out=tmp_path / "too often", listener=too_often)
    assert too_often.left == {2: 5}
    (folder,) = (tmp_path / "too often" / "small").iterdir()
    assert metrics(run.resume(folder).folder) == metrics(whole.folder)
