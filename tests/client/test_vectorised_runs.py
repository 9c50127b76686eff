"""Whole runs whose students are trained together: the same bits wherever cohorts run, and whatever happens to them."""

import os
from functools import partial

import pytest

from fedkd import grids, run
from fedkd.client.handlers import make_app

CLIENTS = 6


class Counts(run.Listener):
    """Begins to count when clients have been measured, and presses Ctrl-C in the middle of a round."""

    def __init__(self, trained, stop_in=0):
        self.trained, self.stop_in = trained, stop_in

    def preflight(self, report):
        self.trained.clear()

    def event(self, event):
        if event["event"] == "reply" and event["round"] == self.stop_in:
            raise KeyboardInterrupt


def outcome(result):
    """Return the rounds of a run without what depends on the clock, and its model."""
    rounds = [event | {"seconds": 0} for event in run.read_metrics(result.folder) if event["event"] == "round"]
    return rounds, (result.folder / "model.safetensors").read_bytes()


def test_cohorts_have_the_same_bits_on_workers_that_may_die_and_when_resumed(
    small, tmp_path, trained, monkeypatch, ray_session
):
    def scenario(**system):
        system = {"trainer": "vectorised", "cohort": 3, "device": "cpu", "server_threads": 1, **system}
        keeping = {"client__terms": [{"teacher": "own"}]}  # clients have something to remember
        return small("fedprox", run__participation=1.0, system=system, **keeping)

    died = tmp_path / "died"

    def die(message, context, call_next):
        reply = call_next(message, context)
        late = message.metadata.message_type == "train" and message.content["config"]["server-round"] == 2
        if late and context.node_config["partition-id"] == 4 and not died.exists():
            died.touch()
            os._exit(1)  # all of its cohort have been trained
        return reply

    inline = run.execute(scenario(engine="inline"), out=tmp_path / "inline", listener=Counts(trained))
    assert trained == {"together": 3 * CLIENTS}
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario(engine="inline"), out=tmp_path / "halves", listener=Counts(trained, stop_in=3))
    trained.clear()
    resumed = run.resume(stopped.value.folder)
    assert trained == {"together": CLIENTS}  # the last round alone
    two = run.execute(scenario(engine="ray", workers=2), out=tmp_path / "two")
    with monkeypatch.context() as patch:
        patch.setattr(grids, "make_app", partial(make_app, mods=[die]))
        retried = run.execute(scenario(engine="ray", workers=2), out=tmp_path / "retried")
    one = run.execute(scenario(engine="ray", workers=1), out=tmp_path / "one")

    assert died.exists() and retried.summary["refused"] == 0
    expected = outcome(inline)
    assert len(expected[0]) == 3 and "kd" in expected[0][-1]["train"]
    assert [outcome(other) == expected for other in (resumed, one, two, retried)] == [True] * 4
