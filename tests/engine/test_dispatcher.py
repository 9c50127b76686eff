"""The dispatcher with workers that are none: which job goes where when some of them have died unnoticed."""

import gc
import time
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from flwr.app import Error
from ray.exceptions import ActorDiedError

from fedkd.engine.dispatcher import RETRIES, Dispatcher, Job


class Ref:
    """What a call of an actor returns."""

    def __init__(self):
        self.ended = Future()

    def future(self):
        return self.ended


class Actor:
    """Takes calls, and answers them when it is told to; a dead one fails at once."""

    def __init__(self, dead=False):
        self.dead, self.calls = dead, []

    def __getattr__(self, method):
        def remote(*arguments):
            self.calls.append((arguments[0], ref := Ref()))
            if self.dead:
                ref.ended.set_exception(ActorDiedError())
            return ref

        return SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=remote))

    def answer(self):
        while self.calls:
            number, ref = self.calls.pop(0)
            if not self.dead:
                ref.ended.set_result(number)


class Pool:
    """Workers of which some have died while they were idle; in their place come others that never load."""

    def __init__(self, living, dead):
        self.actors = [*(Actor(dead=True) for _ in range(dead)), *(Actor() for _ in range(living))]
        self.loading, self.gone = {}, set()

    def replace(self, place, actor):
        if self.actors[place] is actor:
            self.actors[place], self.loading[place] = Actor(), Ref()

    def loaded(self, place):
        del self.loading[place]


def finished(dispatcher, pool, jobs, seconds=10.0):
    """Let workers answer until all jobs have ended; return what came of them."""
    limit = time.monotonic() + seconds
    while len(dispatcher._results) < jobs:
        assert time.monotonic() < limit, "waited in vain"
        for actor in list(pool.actors):
            actor.answer()
        time.sleep(0.005)
    return [dispatcher.wait(number) for number in range(jobs)]


@pytest.mark.parametrize(("living", "dead", "jobs"), [(8, 8, 10), (4, 4, 40), (1, 4, 2), (1, 9, 1)])
def test_nobody_is_blamed_for_workers_that_died_while_they_were_idle(living, dead, jobs):
    pool = Pool(living, dead)
    dispatcher = Dispatcher(pool, [Job("run", (n,)) for n in range(jobs)], range(jobs), float("inf"), jobs)
    dispatcher.start()
    results = finished(dispatcher, pool, jobs)
    dispatcher.stop()
    assert [first for first, _ in results] == list(range(jobs))


def test_a_job_that_kills_whoever_runs_it_is_given_up():
    pool = Pool(2, 0)
    kills = 0
    dispatcher = Dispatcher(pool, [Job("run", (n,)) for n in range(3)], range(3), float("inf"), 3)
    dispatcher.start()
    limit = time.monotonic() + 10
    while len(dispatcher._results) < 3:
        assert time.monotonic() < limit, "waited in vain"
        for actor in list(pool.actors):
            if not actor.calls:
                continue
            number, ref = actor.calls.pop(0)
            if number:
                ref.ended.set_result(number)
                continue
            kills += 1
            for _, orphan in [(number, ref), *actor.calls]:
                orphan.ended.set_exception(ActorDiedError())
        for ref in [ref for ref in pool.loading.values() if not ref.ended.done()]:
            ref.ended.set_result(None)
        time.sleep(0.005)
    assert isinstance(dispatcher.wait(0), Error) and [dispatcher.wait(n)[0] for n in (1, 2)] == [1, 2]
    assert RETRIES < kills <= RETRIES + 1 + 2  # two of them may have been dead before
    dispatcher.stop()


def test_a_worker_that_never_loads_holds_nothing_of_a_call():
    class Argument:
        pass

    pool, held = Pool(1, 0), []
    pool.actors.append(Actor())
    pool.loading[1] = Ref()
    for _ in range(3):
        argument = Argument()
        held.append(weakref.ref(argument))
        dispatcher = Dispatcher(pool, [Job("run", (argument,))], [0], float("inf"), 1)
        dispatcher.start()
        finished(dispatcher, pool, 1)
        dispatcher.stop()
        del dispatcher, argument
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
