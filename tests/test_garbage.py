"""The garbage collector looks at what is new, and at everything again once nobody wants it to be spared."""

import gc
import weakref

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkd.engine.worker import Worker
from fedkd.garbage import paused, spared


class Ring:
    """Something that only the collector can free."""

    def __init__(self):
        self.itself = self


def test_what_was_there_is_spared_and_what_is_new_is_not():
    old, new = Ring(), None
    with spared():
        with spared():
            pass
        assert gc.get_freeze_count() > 10_000
        new = Ring()
        seen = [weakref.ref(old), weakref.ref(new)]
        del old, new
        gc.collect()
        assert [ring() is None for ring in seen] == [False, True]
    gc.collect()
    assert seen[0]() is None


def test_an_error_ends_it():
    with pytest.raises(ValueError), spared():
        raise ValueError
    assert gc.get_freeze_count() == 0


def test_while_it_is_paused_nothing_is_collected_and_then_what_is_there_is_old():
    with paused():
        with paused():
            pass
        assert not gc.isenabled()
        rings = [Ring() for _ in range(2 * gc.get_threshold()[0])]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert any(each is rings[0] for each in gc.get_objects(generation=2))


def test_who_has_no_collector_gets_none_and_what_is_frozen_stays_so():
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with spared():
        frozen = gc.get_freeze_count()
        with pytest.raises(ValueError), paused():
            raise ValueError
        assert gc.isenabled() and gc.get_freeze_count() == frozen


@pytest.mark.parametrize("end", [Worker.rest, lambda worker: worker.replace_app(ClientApp)], ids=["rest", "replace"])
def test_an_app_that_a_worker_lets_go_of_is_freed(end):
    rings = []

    def factory():
        app, ring = ClientApp(), Ring()
        rings.append(weakref.ref(ring))

        @app.train()
        def train(message: Message, context: Context) -> Message:
            assert ring
            return Message(message.content, reply_to=message)

        return app

    worker = Worker(factory, 1, {})
    worker.load()
    try:
        assert gc.get_freeze_count() > 10_000 and rings[0]() is not None
    finally:
        end(worker)
    gc.collect()
    assert gc.get_freeze_count() == 0 and rings[0]() is None
