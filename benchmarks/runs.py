"""Whole scenarios, as the command line runs them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import WORKERS, Clock, Side, told

from fedkd.run import Listener, execute
from fedkd.scenario import Scenario
from fedkd.server.runtime import Event


def settings_of(side: Side, rounds: int) -> dict[str, Any]:
    """Return the settings of the scenario that is a workload: FedAvg, without evaluation and checkpoints."""
    load = side.load
    return {
        "name": side.name,
        "data": {"source": f"npz:{side.folder / 'data.npz'}"},
        "partition": {"name": "iid", "clients": load.clients},
        "models": {"student": load.model, "norm": "none", "options": dict(load.options)},
        "strategy": {"name": "fedavg"},
        "client": {"steps": load.steps, "batch_size": load.batch, "lr": load.lr},
        "system": {"workers": WORKERS, "device": "cpu"},
        "run": {
            "rounds": rounds,
            "participation": load.selected / load.clients,
            "evaluate_every": rounds,
            "evaluate_ensemble": False,
            "checkpoint_every": rounds,
        },
    }


def run_until(settings: dict[str, Any], heard: Callable[[Event], bool]) -> dict[str, Any]:
    """Run a scenario as the command line does, until `heard`, which gets the event of every round, says so.

    Returns
    -------
    dict
        What the run says it was computed with.
    """

    class Ear(Listener):
        def event(self, event: Event) -> None:
            if event["event"] == "round" and heard(event):
                raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as out:
        with suppress(KeyboardInterrupt):
            execute(Scenario.model_validate(settings), out=Path(out), listener=Ear())
        (environment,) = Path(out).rglob("environment.json")
        return json.loads(environment.read_text())


def scenario(side: Side, clock: Clock) -> dict[str, Any]:
    """Rounds of a scenario: selection, training, checks, sums, events."""
    settings = settings_of(side, clock.total + 1)  # the last round would be evaluated
    for section in ("system", "client"):
        settings[section] |= told().get(section, {})

    def heard(event: Event) -> bool:
        clock.tick()
        return clock.over

    environment = run_until(settings, heard)
    return clock.result(trainer=environment["trainer"])
