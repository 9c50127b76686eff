"""What is heard of runs while they go on, and what is left of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from fedkd.data.federation import Federation
    from fedkd.preflight import Report
    from fedkd.scenario import Scenario
    from fedkd.server.runtime import Event


class Listener:
    """Hears what happens during runs; the command line draws tables and progress bars from it."""

    def run_started(self, folder: Path, scenario: Scenario, federation: Federation, done: int) -> None:
        """A run of a scenario, as it was asked for, begins or goes on after `done` rounds."""

    def preflight(self, report: Report) -> None:
        """What clients take was measured, and where and how they are computed is decided."""

    def event(self, event: Event) -> None:
        """Something happened: ``started``, ``reply``, ``refused``, ``round``."""

    def run_ended(self, result: Result) -> None:
        """A run is finished, or was before."""

    def beside(self) -> Self:
        """Return what hears of one of several runs at once; this one, if it keeps nothing of a run."""
        return self


@dataclass(frozen=True)
class Result:
    """A finished run.

    Parameters
    ----------
    folder : Path
        Where its files are.
    summary : dict
        Contents of ``summary.json``.
    skipped : bool
        Whether it had been finished before and nothing was computed.
    """

    folder: Path
    summary: dict[str, Any] = field(repr=False)
    skipped: bool = False

    def row(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the row that tables are made of (see `fedkd.report.tables`)."""
        keys = ("label", "seed", "whose", "best", "final", "accuracy_after", "ensemble", "agreement")
        row = {key: self.summary[key] for key in keys if self.summary.get(key) is not None}
        for name, predictor in (("clients", "clients"), ("own", "clients-local")):
            scored = self.summary["predictors"].get(predictor) or {}
            for metric, key in (("accuracy", "accuracy"), ("worst_accuracy", "worst_decile")):
                if scored.get(key) is not None:
                    row[f"{name}_{metric}"] = scored[key]
        row["bytes_up"] = sum(self.summary["bytes_up"].values())
        row["bytes_down"] = sum(self.summary["bytes_down"].values())
        for key in ("simulated_seconds", "seconds"):
            if self.summary.get(key) is not None:
                row[key] = self.summary[key]
        return {**row, "values": dict(values or {})}
