"""Workers that are kept from one grid to the next."""

import os
import signal

import pytest
import ray

from fedkd import kept
from fedkd.engine import Nodes, RayGrid
from fedkd.errors import RunError


def broken():
    raise ValueError("cannot be read")


class Unreadable:
    """An app factory that can be sent, and not be received."""

    def __call__(self):
        raise AssertionError

    def __reduce__(self):
        return broken, ()


@pytest.fixture
def grid_of(ray_session, apps):
    """Return a function that opens a grid whose workers count a client's calls."""

    def make(app=apps.counting_app, **options):
        return RayGrid(app, Nodes.alike(8), **{"workers": 2, **options})

    with kept.kept_workers():
        yield make


@pytest.fixture
def replies(apps):
    """Return a function that asks all clients of a grid, and returns their metrics."""

    def ask(grid, **config):
        return [dict(reply.content["metrics"]) for reply in grid.send_and_receive(apps.ask(grid, range(8), **config))]

    return ask


def processes(grid):
    """Return the process ids of a grid's workers."""
    return set(ray.get([actor.compute.remote(os.getpid, []) for actor in grid._pool.actors]))


def test_the_next_grid_of_the_kind_takes_the_workers_and_nothing_else(grid_of, replies):
    with grid_of(run_config={"lr": 0.5}) as grid:
        replies(grid)
        first, before = processes(grid), replies(grid)
    with grid_of(run_config={"lr": 0.25}) as grid:
        after = replies(grid)
        assert processes(grid) == first and len(first) == 2

    assert {each["pid"] for each in after} <= first
    assert {each["lr"] for each in after} == {0.25}  # not the app, the run or the states of the one before
    assert {each["calls"] for each in before} == {2} and {each["calls"] for each in after} == {1}


def test_another_app_is_loaded(grid_of, replies):
    with grid_of() as grid:
        replies(grid)

    def other():
        from flwr.app import Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp

        app = ClientApp()

        @app.train()
        def train(message, context):
            return Message(RecordDict({"metrics": MetricRecord({"other": 1})}), reply_to=message)

        return app

    with grid_of(app=other) as grid:
        assert replies(grid) == [{"other": 1}] * 8


def test_workers_that_rest_have_let_go_of_everything(grid_of, replies):
    def held():
        import gc

        from fedkd.caches import cached
        from fedkd.engine.worker import CohortRunner

        cached(maxsize=1)(list)(())  # something of the run, which is gone when this is asked again
        from fedkd import caches

        gc.unfreeze()  # frozen objects are not listed
        full = [clear.__self__.cache_info().currsize for clear in caches._forgetting]
        return sum(isinstance(each, CohortRunner) for each in gc.get_objects()), sum(full)

    with grid_of() as grid:
        replies(grid)
        actor = grid._pool.actors[0]
        assert ray.get(actor.compute.remote(held, [])) == (1, 1)
    assert ray.get(actor.compute.remote(held, [])) == (0, 1)  # the first entry is gone, the second has come
    with grid_of() as grid:
        replies(grid)


def test_an_app_that_cannot_be_had_is_an_error_and_not_the_one_before(grid_of, replies):
    with grid_of() as grid:
        replies(grid)
    with grid_of(app=Unreadable()) as grid, pytest.raises(RunError, match="cannot be read"):
        replies(grid)


def test_workers_that_are_busy_are_not_kept(grid_of, replies, apps):
    with grid_of(cohort=1) as grid:
        replies(grid)
        first = processes(grid)
        asked = apps.ask(grid, range(8), sleep=7, seconds=30)
        next(iter(grid.send_and_receive(asked)))  # nobody waits for the rest
    with grid_of() as grid:
        assert not processes(grid) & first


def test_a_kept_worker_that_has_died_is_replaced(grid_of, replies):
    with grid_of() as grid:
        replies(grid)
        victim, other = processes(grid)
    os.kill(victim, signal.SIGKILL)
    with grid_of() as grid:
        assert len(replies(grid)) == 8
        ray.get(list(grid._pool.loading.values()))
        now = processes(grid)
        assert other in now and victim not in now and len(now) == 2


def test_the_kind_is_all_that_workers_are_started_with(grid_of, monkeypatch, tmp_path):
    kinds = []

    def refuse(kind):
        kinds.append(kind)
        raise RunError("seen")

    monkeypatch.setattr(kept, "take", refuse)

    def kind(**options):
        with pytest.raises(RunError, match="seen"):
            grid_of(**options)
        return kinds[-1]

    usual = kind()
    assert kind(run_config={"lr": 1.0}, cohort=3) == usual
    others = [kind(workers=1), kind(worker_bytes=1 << 20)]
    monkeypatch.syspath_prepend(str(tmp_path))
    others.append(kind())  # which finds other modules, plugins say
    assert usual not in others and others[0] != others[1] != others[2]


class Resting:
    """Stands for a worker; says what becomes of it."""

    def __init__(self, name, log):
        self.name, self.rest = name, self
        self.remote = lambda: log.append(f"{name} rests")


@pytest.fixture
def log(monkeypatch, ray_session):
    """What became of stand-ins for workers; nothing is kept before, nor after."""
    told = []
    monkeypatch.setattr(kept, "_keeping", False)
    monkeypatch.setattr(kept, "_kept", None)
    monkeypatch.setattr(ray, "kill", lambda worker, no_restart: told.append(f"{worker.name} ends"))
    return told


def test_nobody_keeps_workers_unless_told_to_nor_longer(log):
    kind, one = kept.kind_of(2, "fast"), [Resting("one", log)]
    assert not kept.keep(kind, one) and kept.take(kind) == [] and log == []
    with kept.kept_workers():
        assert kept.keep(kind, one) and kept.take(kind) == one
        assert kept.take(kind) == []  # they were kept once
        with kept.kept_workers():
            kept.keep(kind, one)
        assert log == ["one rests"] * 2
    assert log[2:] == ["one ends"] and kept.take(kind) == []


def test_others_have_to_make_room(log):
    one, two = [Resting("one", log)], [Resting("two", log)]
    with kept.kept_workers():
        kept.keep(kept.kind_of(1, "fast"), one)
        assert kept.take(kept.kind_of(2, "fast")) == [] and log == ["one rests", "one ends"]
        kept.keep(kept.kind_of(2, "fast"), one)
        kept.keep(kept.kind_of(1, "fast"), two)
        assert log[2:] == ["one rests", "one ends", "two rests"]
        assert kept.take(kept.kind_of(1, "fast")) == two


def test_those_of_a_ray_that_is_gone_are_forgotten(log, monkeypatch):
    with kept.kept_workers():
        kept.keep(("another node", "01", 1), [Resting("one", log)])
        assert kept.take(kept.kind_of(1)) == [] and log == ["one rests"]
