"""Signals that come while libraries are imported are heard afterwards."""

import signal

import pytest

from fedkd.libraries import import_libraries


def test_an_interrupt_waits_until_the_import_is_done(monkeypatch):
    done = []

    def imported(_):
        signal.raise_signal(signal.SIGINT)
        done.append("imported")

    monkeypatch.setattr("importlib.import_module", imported)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_libraries()
        assert done == ["imported"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_raises_nothing_is_left_alone(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seen = []
    monkeypatch.setattr("importlib.import_module", lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    try:
        import_libraries()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIG_DFL]
