"""The dispatcher by itself, on workers that do what the test says; nothing of Ray is started."""

import gc
import time
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from flwr.app import Error
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from fedkd.engine import dispatcher as module
from fedkd.engine.dispatcher import Dispatcher, Job, Pieces
from fedkd.errors import RunError


class Ref:
    """A reference to what a call returns some time."""

    def __init__(self):
        self.future_ = Future()

    def future(self):
        return self.future_


class Actor:
    """A worker whose calls are ended by the test."""

    def __init__(self, name):
        self.name, self.calls = name, []

    def __getattr__(self, method):
        def remote(*arguments):
            refs = [Ref(), Ref()]
            self.calls.append((arguments[0], refs))
            return refs

        return SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=remote))


class FakePool:
    """Workers that have loaded the app."""

    def __init__(self, count):
        self.actors, self.loading, self.gone = [Actor(n) for n in range(count)], {}, set()
        self.made, self.failure = count, None

    def replace(self, place, actor):
        if self.actors[place] is actor:
            self.actors[place] = Actor(self.made)
            self.made += 1

    def ask(self, place):
        self.loading[place] = Ref()

    def loaded(self, place):
        del self.loading[place]

    def died_loading(self, place, actor, error):
        self.replace(place, actor)
        self.loading[place] = Ref()  # which finds no CPU


@pytest.fixture
def dispatch():
    """Return a function that starts a dispatcher; it is stopped in the end."""
    started = []

    def start(workers, jobs):
        dispatcher = Dispatcher(FakePool(workers), jobs, range(len(jobs)), float("inf"), len(jobs))
        started.append(dispatcher)
        dispatcher.start()
        settle(dispatcher)
        return dispatcher

    yield start
    for dispatcher in started:
        dispatcher.stop()


def settle(dispatcher):
    """Wait until the dispatcher has dealt with everything that has happened."""
    done = Future()
    dispatcher._events.put(lambda: done.set_result(None))
    done.result(10)
    done = Future()  # what was handed out after the first event is there when the second one comes
    dispatcher._events.put(lambda: done.set_result(None))
    done.result(10)


def end(dispatcher, actor, outcome="fine"):
    """End the oldest call of a worker."""
    name, refs = actor.calls.pop(0)
    if isinstance(outcome, BaseException):
        refs[0].future_.set_exception(outcome)
    else:
        refs[0].future_.set_result(outcome)
    settle(dispatcher)
    return name


def job(name, **more):
    return Job("run", (name,), 2, **more)


def held(dispatcher):
    return [[name for name, _ in actor.calls] for actor in dispatcher._pool.actors]


def raised():
    return RayTaskError("run", "trace", ValueError("the fold raised"))


def test_each_worker_has_one_job_queued_ahead_but_the_last_ones_wait_for_who_is_free(dispatch):
    dispatcher = dispatch(2, [job(n) for n in range(7)])
    assert held(dispatcher) == [[0, 2], [1, 3]]
    end(dispatcher, dispatcher._pool.actors[1])
    assert held(dispatcher) == [[0, 2], [3, 4]]
    end(dispatcher, dispatcher._pool.actors[1])
    end(dispatcher, dispatcher._pool.actors[1])
    assert held(dispatcher) == [[0, 2], [5]]  # 6 is nobody's yet
    end(dispatcher, dispatcher._pool.actors[1])
    assert held(dispatcher) == [[0, 2], [6]]


def test_what_was_queued_on_a_dead_worker_is_not_to_blame(dispatch, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 1)
    dispatcher = dispatch(1, [job("guilty"), job("innocent"), job("last")])
    for _ in range(2):
        assert held(dispatcher) == [["guilty", "innocent"]]
        end(dispatcher, dispatcher._pool.actors[0], ActorDiedError())
    error = dispatcher.wait(0)
    assert isinstance(error, Error) and "a worker died, 2 times" in error.reason
    assert held(dispatcher) == [["innocent"]]
    end(dispatcher, dispatcher._pool.actors[0], "done")
    assert dispatcher.wait(1)[0] == "done"


def test_what_a_worker_had_that_ran_out_of_memory_is_done_by_another_one(dispatch):
    dispatcher = dispatch(1, [job("large"), job("next"), job("last")])
    starved = dispatcher._pool.actors[0]
    end(dispatcher, starved, OutOfMemoryError("Task was killed due to the node running low on memory"))
    assert dispatcher._pool.actors[0] is not starved
    assert held(dispatcher) == [["large", "next"]]
    end(dispatcher, starved, OutOfMemoryError("so was what was queued there"))  # of which nobody wants to hear
    assert held(dispatcher) == [["large", "next"]]
    for name in ("large", "next", "last"):
        assert end(dispatcher, dispatcher._pool.actors[0], f"{name} is done") == name
    assert [dispatcher.wait(number)[0] for number in range(3)] == ["large is done", "next is done", "last is done"]


@pytest.mark.parametrize("what", [ActorDiedError(), raised()], ids=["dies", "raises"])
def test_a_job_that_cannot_be_done_as_one_is_done_in_pieces_at_once(dispatch, what, monkeypatch):
    monkeypatch.setattr(module, "RETRIES", 0)
    whole = job("both", pieces=lambda: [job("first"), job("second")])
    dispatcher = dispatch(1, [whole, job("other")])
    end(dispatcher, dispatcher._pool.actors[0], what)
    pieces = dispatcher.wait(0)
    assert isinstance(pieces, Pieces) and pieces.numbers == [2, 3]
    done = []
    for outcome in ("fine", what, "fine"):
        done.append(end(dispatcher, dispatcher._pool.actors[0], outcome))
    assert sorted(done) == ["first", "other", "second"]
    results = [dispatcher.wait(number) for number in (1, 2, 3)]
    assert sum(isinstance(result, Error) for result in results) == 1  # one alone has failed


def test_workers_that_died_while_they_were_idle_get_no_jobs(dispatch):
    """A node has left with the workers 1 to 3, which nobody has noticed yet."""
    dispatcher = dispatch(4, [job("one"), job("other")])
    pool, lost = dispatcher._pool, {}
    assert held(dispatcher) == [["one"], ["other"], [], []]
    end(dispatcher, pool.actors[1], ActorDiedError())
    assert held(dispatcher) == [["one"], ["other"], [], []] and pool.loading.keys() == {2, 3}  # who are asked
    for place in (2, 3):
        lost[place] = pool.loading[place]
        lost[place].future_.set_exception(ActorDiedError())
    end(dispatcher, pool.actors[1], ActorDiedError())  # its replacement, in the same place
    settle(dispatcher)
    assert pool.loading.keys() == {2, 3} and all(pool.loading[place] is not lost[place] for place in lost)
    end(dispatcher, pool.actors[0])
    end(dispatcher, pool.actors[1])
    assert dispatcher.wait(0)[0] == dispatcher.wait(1)[0] == "fine"


def test_two_that_kill_their_workers_are_given_up(dispatch):
    dispatcher = dispatch(2, [job("one"), job("other")])
    pool = dispatcher._pool
    for _ in range(module.RETRIES + 1):
        for place in (0, 1):
            end(dispatcher, pool.actors[place], ActorDiedError())
    assert all(isinstance(dispatcher.wait(number), Error) for number in (0, 1))


def test_a_worker_that_never_loads_holds_nothing_of_a_call():
    class Argument:
        pass

    pool, held = FakePool(1), []
    pool.actors.append(Actor("pending"))
    pool.loading[1] = Ref()
    for _ in range(3):
        argument = Argument()
        held.append(weakref.ref(argument))
        dispatcher = Dispatcher(pool, [job(argument)], [0], float("inf"), 1)
        dispatcher.start()
        settle(dispatcher)
        end(dispatcher, pool.actors[0])
        dispatcher.stop()
        del dispatcher, argument
    gc.collect()
    assert [each() for each in held] == [None] * 3


def test_nobody_waits_for_a_worker_when_another_dispatcher_hears_that_none_is_left(dispatch):
    dispatcher = dispatch(1, [job("a")])
    pool = dispatcher._pool
    end(dispatcher, pool.actors[0], ActorDiedError())
    pool.loading[0] = ref = Ref()
    settle(dispatcher)  # which listens
    pool.loading.clear()
    pool.gone.add(0)
    pool.failure = RunError("nobody is left")
    ref.future_.set_exception(ActorDiedError())
    with pytest.raises(RunError, match="nobody is left"):
        dispatcher.wait(0)


def test_the_user_is_told_that_no_worker_can_be_started(monkeypatch, caplog):
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    pool = FakePool(1)
    pool.ask(0)  # Ray has no place for it
    dispatcher = Dispatcher(pool, [job("waits")], [0], float("inf"), 1)
    dispatcher.start()
    limit = time.monotonic() + 10
    while "no worker is there" not in caplog.text and time.monotonic() < limit:
        time.sleep(0.01)
    pool.loading[0].future_.set_result(None)  # a node has come
    settle(dispatcher)
    assert held(dispatcher) == [["waits"]] and "no worker is there" in caplog.text
    dispatcher.stop()
