"""The main function of the Flower ServerApp: bind the strategy to the grid and run its rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd import flower, plugins
from fedkd.files import plain
from fedkd.scenario import Scenario
from fedkd.server.runtime import LIVE_ONLY, Event, ServerRuntime
from fedkd.threads import cores


def make_app(scenario: Scenario | None = None, on_event: Callable[[Event], None] | None = None) -> ServerApp:
    """Return the ServerApp of a scenario.

    Parameters
    ----------
    scenario : Scenario, optional
        The resolved scenario; without one, the run config of Flower's runtime names it.
    on_event : callable, optional
        Receives every event. Default: rounds are printed, and refusals.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        resolved = scenario if scenario is not None else flower.scenario_of(context.run_config)
        if not resolved.system.server_threads:
            system = resolved.system.model_copy(update={"server_threads": cores()})
            resolved = resolved.model_copy(update={"system": system})
        strategy = plugins.make_strategy(resolved)
        listener = on_event or _listener(str(context.run_config.get("out", "")))
        strategy.bind(ServerRuntime(resolved, grid, listener))
        strategy.start(grid)

    return app


def _listener(out: str) -> Callable[[Event], None]:
    """Print events, and append them to ``metrics.jsonl`` in a folder if one is named."""
    if not out:
        return _print
    path = Path(out) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def listen(event: Event) -> None:
        _print(event)
        if event["event"] not in LIVE_ONLY:
            with path.open("a") as file:
                file.write(json.dumps(plain(event), allow_nan=False) + "\n")

    return listen


def _print(event: dict[str, Any]) -> None:
    if event["event"] == "round":
        accuracy = f", accuracy {event['accuracy']:.4f} ({event['whose']})" if "accuracy" in event else ""
        print(
            f"round {event['round']}: {event['received']} of {event['selected']} uploads{accuracy}",
            flush=True,
        )
    elif event["event"] == "refused":
        print(f"round {event['round']}: refused client {event['partition_id']}: {event['reason']}", flush=True)
