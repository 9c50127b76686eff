"""Calls that take turns and have their jobs done together."""

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context

import pytest
import torch

from fedkd.meeting import Dismissed, current, meet
from fedkd.threads import one_thread


def add(numbers):
    return [sum(numbers)] * len(numbers)


def test_jobs_are_done_together_and_calls_go_on_in_order():
    events = []

    def call(number):
        events.append(f"{number} comes")
        total = current().join(number, lambda_sum)
        events.append(f"{number} goes")
        return total

    def lambda_sum(numbers):
        events.append(f"sum of {numbers}")
        return [sum(numbers)] * len(numbers)

    assert meet([lambda n=n: call(n) for n in (1, 2, 3)]) == [6, 6, 6]
    assert events == ["1 comes", "2 comes", "3 comes", "sum of [1, 2, 3]", "1 goes", "2 goes", "3 goes"]


def test_nobody_runs_while_another_does():
    running, most = 0, 0

    def call():
        nonlocal running, most
        for _ in range(5):
            running += 1
            most = max(most, running)
            time.sleep(0.001)  # would let any other thread in
            running -= 1
            current().join(1, add)

    meet([call] * 8)
    assert most == 1


def test_a_call_that_ends_early_keeps_nobody_waiting():
    def long():
        return [current().join(1, add) for _ in range(3)]

    def failing():
        raise ValueError("no samples")

    def failing_later():
        current().join(1, add)
        raise ValueError("no more samples")

    first, none, error, later, last = meet([long, lambda: None, failing, failing_later, long])
    assert first == last == [3, 2, 2]
    assert none is None and str(error) == "no samples" and str(later) == "no more samples"


def test_different_work_is_done_apart():
    def call(job, work):
        return current().join(job, work)

    def longest(words):
        return [max(words, key=len)] * len(words)

    calls = [lambda: call(1, add), lambda: call("a", longest), lambda: call(2, add), lambda: call("bcd", longest)]
    assert meet(calls) == [3, "bcd", 3, "bcd"]


def test_an_error_in_the_work_is_raised_in_every_call_that_waits_for_it():
    def broken(jobs):
        raise RuntimeError("out of memory")

    def some(jobs):
        return [ValueError(f"not {job}") if job % 2 else job for job in jobs]

    def short(jobs):
        return jobs[1:]

    def call(job, work):
        try:
            return current().join(job, work)
        except Exception as error:
            return str(error)

    assert meet([lambda: call(1, broken), lambda: call(2, broken), lambda: call(3, add)]) == ["out of memory"] * 2 + [3]
    assert meet([lambda n=n: call(n, some) for n in range(3)]) == [0, "not 1", 2]
    assert meet([lambda n=n: call(n, short) for n in range(2)]) == ["1 results for 2 jobs"] * 2


@pytest.mark.parametrize("where", ["call", "work"])
def test_an_interrupt_ends_everybody(where):
    ended = []

    def work(jobs):
        raise KeyboardInterrupt

    def waiting():
        try:
            current().join(1, work)
        except BaseException as error:
            ended.append(type(error))
            current().join(1, work)  # whoever is dismissed cannot come back
        finally:
            ended.append("cleaned up")

    def interrupted():
        if where == "call":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meet([waiting, waiting, interrupted, lambda: ended.append("never begun")])
    expected = [Dismissed, "cleaned up"] * 2
    assert ended == (expected if where == "call" else ["never begun", *expected])


def test_a_meeting_leaves_nothing_behind():
    class Reply:
        pass

    def call():
        current().join(1, add)
        return Reply()

    gc.disable()  # a reply may hold gigabytes, of which the collector knows nothing
    try:
        replies = meet([call] * 100)
        held = [weakref.ref(reply) for reply in replies]
        del replies
        assert not any(reply() for reply in held)
    finally:
        gc.enable()
    assert meet([]) == []


def test_a_call_that_is_elsewhere_has_its_job_done_alone():
    def call():  # as a mod with asyncio.to_thread does
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy_context().run, lambda: current().join(1, add)).result()

    def failing():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy_context().run, lambda: current().join("one", add)).result()

    together, alone, error, last = meet([lambda: current().join(1, add), call, failing, lambda: current().join(1, add)])
    assert (together, alone, last) == (2, 1, 2)
    assert isinstance(error, TypeError)


def test_calls_see_the_callers_context_and_threads():
    name = ContextVar("name", default="nobody")
    token = name.set("caller")
    try:
        with one_thread():
            seen = meet([lambda: (name.get(), torch.get_num_threads(), torch.is_grad_enabled())] * 2)
    finally:
        name.reset(token)
    assert seen == [("caller", 1, True)] * 2
    assert current() is None


def test_a_meeting_inside_of_a_call_is_a_meeting_of_its_own():
    def inner(number):
        return current().join(number, add)

    def outer(number):
        return current().join(sum(meet([lambda: inner(number), lambda: inner(number)])), add)

    assert meet([lambda: outer(1), lambda: outer(10)]) == [44, 44]
