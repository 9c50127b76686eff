"""A population of a million: who does not take part costs next to nothing."""

import tracemalloc

import pytest

from fedkd import run


class Interrupt(run.Listener):
    def event(self, event):
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt


def rounds(folder):
    return [{**e, "seconds": None} for e in run.read_metrics(folder) if e["event"] == "round"]


def test_a_million_clients_run_are_interrupted_and_resumed(small, tmp_path):
    """With a state on the clients and a checkpoint every round."""
    scenario = small(
        partition={"name": "resampled", "clients": 1_000_000, "options": {"samples_per_client": 20}},
        client__terms=[{"teacher": "own"}],
        run__participation=1e-5,
        system__trainer="sequential",
    )
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "cut", listener=Interrupt())
    tracemalloc.start()
    resumed = run.resume(stopped.value.folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert rounds(resumed.folder) == rounds(whole.folder) and len(rounds(whole.folder)) == 3
    assert all(event["received"] == 10 for event in rounds(whole.folder))
    assert peak < 100e6
