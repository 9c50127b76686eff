"""The main function of the Flower ServerApp: bind the strategy to the grid and run its rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd import flower, plugins
from fedkd.scenario import Scenario
from fedkd.server.runtime import Event, ServerRuntime


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
        strategy = plugins.make_strategy(resolved)
        strategy.bind(ServerRuntime(resolved, grid, on_event or _print))
        strategy.start(grid)

    return app


def _print(event: dict[str, Any]) -> None:
    if event["event"] == "round":
        accuracy = f", accuracy {event['accuracy']:.4f} ({event['whose']})" if "accuracy" in event else ""
        print(
            f"round {event['round']}: {event['received']} of {event['selected']} uploads{accuracy}",
            flush=True,
        )
    elif event["event"] == "refused":
        print(
            f"round {event['round']}: refused client {event['partition_id']}: {event['reason']}", flush=True
        )
