"""Measuring cohorts: what it says, and that it leaves no trace."""

import os
import random

import numpy as np
import pytest
import torch

from fedkd.engine import InlineGrid, Nodes, RayGrid
from fedkd.engine.measure import Measured, measure, median
from fedkd.errors import RunError


@pytest.fixture(params=["inline", "ray"])
def grid(request, apps):
    if request.param == "inline":
        grid = InlineGrid(apps.counting_app, Nodes.alike(6))
    else:
        request.getfixturevalue("ray_session")
        grid = RayGrid(apps.counting_app, Nodes.alike(6), workers=1)
    with grid:
        yield grid


def test_clients_are_run_and_leave_no_state(grid, apps):
    list(grid.send_and_receive(apps.ask(grid, [0])))

    first, second = grid.measure([apps.ask(grid, [0]), apps.ask(grid, [0, 1], sleep=1, seconds=0.2)])

    assert first.errors == second.errors == ()
    assert second.seconds > 0.19
    assert {p: state["calls"]["n"] for p, state in grid.state_dict().items()} == {0: 1}


def test_the_median_of_workers_counts_and_the_most_memory():
    runs = [Measured(1.0, 5, 0, 7, 0), Measured(4.0, 3, 2, 9, 1), Measured(2.0, 4, 1, 8, 0, ("late",))]
    assert median(runs) == Measured(2.0, 5, 2, 9, 1, ("late",))
    assert median(runs[:2]).seconds == 2.5


def test_clients_that_fail_are_named(grid, apps):
    good, bad = grid.measure([apps.ask(grid, [1]), apps.ask(grid, [1, 2], **{"raise": 2})])
    assert good.errors == () and len(bad.errors) == 1
    assert "ValueError: no samples" in bad.errors[0]


def test_machines_and_workers(grid):
    (node,) = grid.machines(gpus=False)
    assert node.gpus == 0 and int(node.cpus) == max(1, 2 * grid.workers)


def test_a_client_that_kills_its_worker_is_an_error(ray_session, apps, tmp_path, monkeypatch):
    from fedkd.engine import dispatcher

    monkeypatch.setattr(dispatcher, "RETRIES", 0)
    with RayGrid(apps.counting_app, Nodes.alike(3), workers=1) as grid:
        with pytest.raises(RunError, match="worker died"):
            grid.measure([apps.ask(grid, [1], die=1, marker=str(tmp_path / "died"), always=True)])
        (reply,) = grid.send_and_receive(apps.ask(grid, [0]))  # there is a new worker
        assert not reply.has_error()


def test_random_generators_are_left_as_they_were():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def work():
        random.random(), np.random.rand(), torch.rand(1)
        return ()

    assert measure(work, memory=False).seconds > 0
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells the peak")
def test_memory_at_the_peak_counts_what_was_freed_before():
    def work():
        np.ones(8_000_000)  # 64 MB
        return ()

    for _ in range(2):
        measured = measure(work, memory=True)
        assert 60e6 < measured.host_bytes < 80e6
    assert measured.held_host_bytes > 0 and measured.gpu_bytes == 0


def test_all_workers_measure_at_once(ray_session, apps, tmp_path):
    # The last one here: those before take one worker, which is kept from test to test.
    with RayGrid(apps.meeting_app, Nodes.alike(2), workers=2) as grid:
        (took,) = grid.measure([apps.ask(grid, [0, 1], folder=str(tmp_path), wanted=2)], everywhere=True)
        assert took.errors == () and len(list(tmp_path.iterdir())) == 2
