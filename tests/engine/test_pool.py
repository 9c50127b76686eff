"""What workers are told between two calls, and in which order they get what."""

import pickle

import numpy as np
import pytest
import torch

from fedkd import graphs
from fedkd.cohorts import Costs
from fedkd.engine import Nodes, RayGrid
from fedkd.engine.worker import Worker
from fedkd.threads import one_thread


def test_workers_with_gpus_are_told_when_nobody_wants_anything_of_them(ray_session, apps, monkeypatch):
    with RayGrid(apps.counting_app, Nodes.alike(4), workers=2) as grid, monkeypatch.context() as patch:
        told, tell = [], grid._pool.tell
        patch.setattr(grid._pool, "tell", lambda method, *more: (told.append(method), tell(method, *more)))
        list(grid.send_and_receive(apps.ask(grid, range(4))))
        assert told == []  # they have no GPU

        patch.setattr(grid._pool, "_has_gpus", True)
        open_call = grid.send_and_receive(apps.ask(grid, range(4)))
        next(open_call)
        assert list(grid.compute(abs, [(-1,), (-2,)])) == [1, 2]
        assert told == []
        assert len(list(open_call)) == 3
        assert told == ["idle"]
        list(grid.compute(abs, [(-1,)]))
        assert told == ["idle"] * 2


@pytest.mark.parametrize("used", [True, False])
def test_an_idle_worker_gives_back_what_it_keeps_of_a_gpu_that_it_has_used(monkeypatch, used):
    given = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("what the allocator keeps"))
    monkeypatch.setattr(graphs, "let_go", lambda: given.append("graphs"))
    with one_thread():
        worker = Worker(lambda: None, 1, {})
    worker.idle()
    assert given == (["graphs", "what the allocator keeps"] if used else [])


def test_clients_that_turned_out_slow_go_first_and_alone(ray_session, apps, monkeypatch):
    """Client 4 has a tenth of the others' samples, and an architecture that takes much longer for each."""
    nodes = Nodes(np.arange(5), ("fast",) * 4 + ("slow",), np.array([100] * 4 + [10]))
    with RayGrid(apps.counting_app, nodes, workers=2) as grid, monkeypatch.context() as patch:
        tasks, dispatch = [], grid._pool.dispatch

        def noted(jobs, *more, **others):
            orders = [pickle.loads(job.arguments[0]) for job in jobs]
            tasks.append([[p for cohort in order.cohorts for p in cohort.partitions] for order in orders])
            return dispatch(jobs, *more, **others)

        patch.setattr(grid._pool, "dispatch", noted)
        list(grid.send_and_receive(apps.ask(grid, range(5), sleep=4, seconds=0.4)))
        assert tasks.pop() == [[0], [1], [2], [3], [4]]  # nothing is known: the more samples, the longer
        list(grid.send_and_receive(apps.ask(grid, range(5))))
        first, *others = tasks.pop()
        assert first == [4] and sorted(p for task in others for p in task) == [0, 1, 2, 3]
        list(grid.send_and_receive(apps.ask(grid, range(5), kind="query.env")))
        assert tasks.pop() == [[0], [1], [2], [3], [4]]  # of which nothing is known

        patch.setattr(grid, "_costs", Costs())
        grid.expect({"fast": 1e-3, "slow": 1.0})  # as measured before round 1
        list(grid.send_and_receive(apps.ask(grid, range(5))))
        assert tasks.pop()[0] == [4]
