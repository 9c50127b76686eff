"""Inline against Ray, and what only one of them does."""

import gc
import random
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg
from ray.exceptions import ActorDiedError, OutOfMemoryError

from fedkd.engine import InlineGrid, Nodes, RayGrid, dispatcher, pool
from fedkd.errors import RunError


@pytest.fixture
def ray_grid(ray_session, apps):
    with RayGrid(apps.counting_app, Nodes.alike(20), workers=2) as grid:
        yield grid


def test_stock_fedavg_gives_the_same_bits_everywhere(ray_session, apps):
    def run(grid):
        random.seed(7)  # stock Flower samples clients from the global generator
        start = torch.nn.Linear(8, 1)
        torch.nn.init.constant_(start.weight, 0.1)
        torch.nn.init.zeros_(start.bias)
        strategy = FedAvg(fraction_train=0.5, fraction_evaluate=1.0)
        result = strategy.start(grid, ArrayRecord(start.state_dict()), num_rounds=3)
        grid.close()
        bits = [array.data for array in result.arrays.values()]
        return bits, result.train_metrics_clientapp, result.evaluate_metrics_clientapp

    nodes = Nodes.alike(40)
    inline = run(InlineGrid(apps.learning_app, nodes))
    assert inline[2][3]["eval_loss"] < inline[2][1]["eval_loss"]
    assert run(RayGrid(apps.learning_app, nodes, workers=1)) == inline
    assert run(RayGrid(apps.learning_app, nodes, workers=2)) == inline


def test_inline_restores_threads_whenever_the_server_has_control(apps):
    def threads_app():
        app = ClientApp()

        @app.train()
        def train(message, context):
            assert torch.get_num_threads() == 1
            if context.node_config["partition-id"] == 1:
                raise KeyboardInterrupt
            return Message(RecordDict(), reply_to=message)

        return app

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grid = InlineGrid(threads_app, Nodes.alike(2))
        replies = grid.send_and_receive(apps.ask(grid, range(2)))
        assert not next(replies).has_error()
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyboardInterrupt):
            next(replies)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_workers_stay_and_know_their_environment(ray_grid, apps):
    first = list(ray_grid.send_and_receive(apps.ask(ray_grid, range(20))))
    second = list(ray_grid.send_and_receive(apps.ask(ray_grid, range(20))))
    env = next(iter(ray_grid.send_and_receive(apps.ask(ray_grid, [0], kind="query.env")))).content["env"]

    pids = [{r.content["metrics"]["pid"] for r in replies} for replies in (first, second)]
    assert len(pids[0] | pids[1]) <= 2
    assert env["OMP_NUM_THREADS"] == "1" and env["MALLOC_MMAP_THRESHOLD_"] == "33554432"
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert str(Path.cwd()) in env["PYTHONPATH"].split(":")


def test_what_messages_share_is_put_into_the_store_once(ray_grid, apps, monkeypatch):
    put = []
    monkeypatch.setattr(ray_grid._pool, "put", lambda value, put_=ray_grid._pool.put: put.append(value) or put_(value))
    arrays = ArrayRecord([np.ones(3, np.float32)])
    assert len(apps.facts(ray_grid.send_and_receive(apps.ask(ray_grid, range(20), arrays=arrays)))) == 20
    assert [type(value) for value in put].count(ArrayRecord) + [type(value) for value in put].count(RecordDict) == 1


def test_the_app_is_loaded_once_by_each_worker(ray_session, apps, tmp_path):
    log, counting_app = str(tmp_path / "loads"), apps.counting_app

    def logged():
        import os

        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return counting_app()

    with RayGrid(logged, Nodes.alike(20), workers=2) as grid:
        for _ in range(3):
            list(grid.send_and_receive(apps.ask(grid, range(20))))
    loads = Path(log).read_text().split()
    assert len(loads) == len(set(loads)) <= 2


def test_a_worker_that_dies_changes_no_bit(ray_grid, tmp_path, apps):
    marker = str(tmp_path / "died")
    inline = InlineGrid(apps.counting_app, ray_grid.nodes)
    arrays = ArrayRecord([np.ones(3, np.float32)])
    for grid in (inline, ray_grid):
        list(grid.send_and_receive(apps.ask(grid, range(20), arrays=arrays)))

    expected = apps.facts(inline.send_and_receive(apps.ask(inline, range(20), arrays=arrays)))
    messages = apps.ask(ray_grid, range(20), arrays=arrays, die=2, marker=marker, always=False)
    replies = apps.facts(ray_grid.send_and_receive(messages))

    assert Path(marker).exists()
    assert replies == expected
    assert ray_grid.state_dict() == inline.state_dict()


def test_a_worker_that_runs_out_of_memory_changes_no_bit(ray_grid, tmp_path, apps, monkeypatch, caplog):
    """It is killed as by Ray's monitor of the memory; as there, Ray answers so whenever that worker is asked."""
    told, starved = dispatcher.Dispatcher._ended, OutOfMemoryError("killed due to the node running low on memory")

    def ended(self, number, place, actor, future, refs):
        if isinstance(future.exception(), ActorDiedError):
            future = Future()
            future.set_exception(starved)
        told(self, number, place, actor, future, refs)

    monkeypatch.setattr(dispatcher.Dispatcher, "_ended", ended)
    inline = InlineGrid(apps.counting_app, ray_grid.nodes)
    expected = apps.facts(inline.send_and_receive(apps.ask(inline, range(20))))
    messages = apps.ask(ray_grid, range(20), die=4, marker=str(tmp_path / "died"), always=False)

    assert apps.facts(ray_grid.send_and_receive(messages)) == expected
    assert "a worker died (OutOfMemoryError); its clients are run again elsewhere" in caplog.text
    assert ray_grid.state_dict() == inline.state_dict()


def test_a_client_that_always_kills_its_worker_ends_as_an_error(ray_grid, tmp_path, apps, monkeypatch):
    monkeypatch.setattr(dispatcher, "RETRIES", 1)
    for _ in range(3):  # cohorts have been measured, and are so short that a task holds several
        list(ray_grid.send_and_receive(apps.ask(ray_grid, range(20))))
    before = ray_grid.state_dict()
    messages = apps.ask(ray_grid, range(20), die=3, marker=str(tmp_path / "died"), always=True)
    replies = list(ray_grid.send_and_receive(messages))

    failed = [p for p, reply in enumerate(replies) if reply.has_error()]
    assert failed == [3, 4]  # the cohort of the culprit
    assert replies[3].error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "a worker died, 2 times" in replies[3].error.reason
    after = ray_grid.state_dict()
    assert [p for p in range(20) if after[p] == before[p]] == failed


def test_workers_that_die_while_they_load_end_as_one_clear_error(ray_session, apps, monkeypatch, caplog):
    monkeypatch.setattr(pool, "RETRIES", 1)

    def deadly():
        import os

        os._exit(1)

    with (
        RayGrid(deadly, Nodes.alike(2), workers=1) as grid,
        pytest.raises(RunError, match="die while they load the client app, 2 times"),
    ):
        list(grid.send_and_receive(apps.ask(grid, [0])))
    assert "another one is started" in caplog.text


def test_workers_that_come_in_the_place_of_dead_ones_and_die_themselves(ray_session, apps, tmp_path, monkeypatch):
    """The first two load; whoever comes after them does not, until nobody is left."""
    monkeypatch.setattr(pool, "RETRIES", 1)
    places = [str(tmp_path / name) for name in ("a", "b")]
    counting_app = apps.counting_app

    def scarce():
        import os

        for place in places:
            try:
                os.close(os.open(place, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return counting_app()
        os._exit(1)

    with RayGrid(scarce, Nodes.alike(20), workers=2) as grid:
        list(grid.send_and_receive(apps.ask(grid, range(20))))
        messages = apps.ask(grid, range(20), die=3, marker=str(tmp_path / "died"), always=False)
        replies = list(grid.send_and_receive(messages))
        assert not any(reply.has_error() for reply in replies)  # one is left, and does it all
        assert len(grid._pool.gone) <= 1
        with pytest.raises(RunError, match="die while they load the client app"):
            list(grid.send_and_receive(apps.ask(grid, range(20), die=3, marker=str(tmp_path / "x"), always=True)))


def test_an_app_that_cannot_be_loaded_is_one_clear_error(ray_session, apps):
    def broken():
        raise OSError("no such data set")

    with (
        RayGrid(broken, Nodes.alike(2), workers=1) as grid,
        pytest.raises(RunError, match="could not load the client app: OSError: no such data set"),
    ):
        list(grid.send_and_receive(apps.ask(grid, [0])))
    with pytest.raises(OSError):
        InlineGrid(broken, Nodes.alike(2))


def test_more_workers_than_ray_has_is_refused(ray_session, apps):
    with pytest.raises(RunError, match="3 workers need 3 CPUs, Ray has 2"):
        RayGrid(apps.counting_app, Nodes.alike(2), workers=3)
    with pytest.raises(RunError, match="need 1 GPUs, Ray has 0"):
        RayGrid(apps.counting_app, Nodes.alike(2), workers=2, gpus_per_worker=0.5)


def test_a_closed_grid_says_so(ray_session, apps):
    grid = RayGrid(apps.counting_app, Nodes.alike(2), workers=1)
    grid.close()
    grid.close()
    with pytest.raises(RunError, match="closed"):
        list(grid.send_and_receive(apps.ask(grid, [0])))


def test_grid_starts_ray_finds_plugins_and_stops_ray(tmp_path):
    (tmp_path / "my_plugin.py").write_text(
        textwrap.dedent(
            """
            from flwr.app import Message, RecordDict
            from flwr.clientapp import ClientApp

            app = ClientApp()

            @app.train()
            def train(message, context):
                return Message(RecordDict(), reply_to=message)

            def make():
                return app
            """
        )
    )
    script = """
        import ray
        from flwr.app import Message, RecordDict
        from fedkd.engine import Nodes, RayGrid
        import my_plugin

        with RayGrid(my_plugin.make, Nodes.alike(2), workers=1) as grid:
            assert ray.is_initialized()
            messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
            assert [r.has_error() for r in grid.send_and_receive(messages)] == [False, False]
        assert not ray.is_initialized()
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("ttl", [None, 5.0])
def test_messages_are_those_that_flower_itself_makes(ttl):
    with InlineGrid(ClientApp, Nodes.alike(3)) as grid:
        content, node = RecordDict(), grid.nodes.node_id(1)
        ours = grid.create_message(content, "train", node, "7", ttl)
        theirs = Message(content, node, "train", group_id="7", ttl=ttl)
    mine, flowers = ({**vars(each.metadata), "_created_at": 0.0} for each in (ours, theirs))
    assert mine == flowers
    assert ours.content is theirs.content
    assert abs(ours.metadata.created_at - theirs.metadata.created_at) < 5


def test_a_call_holds_nothing_when_it_is_over(ray_grid, apps):
    """Weights of a round must not wait for the garbage collector."""
    messages = apps.ask(ray_grid, range(8))
    content = weakref.ref(messages[0].content)
    gc.disable()
    try:
        list(ray_grid.send_and_receive(messages))
        del messages
        deadline = time.monotonic() + 10
        while content() is not None and time.monotonic() < deadline:  # the dispatcher's thread lets go last
            time.sleep(0.01)
        assert content() is None
    finally:
        gc.enable()
