"""Runs: one execution of a scenario and its folder of results; wiring, events, checkpoints, resume.

A run lives in ``<out>/<scenario>/<label>-seed<seed>-<digest>/``::

    scenario.toml      the resolved scenario
    environment.json   versions, machine, git commit
    metrics.jsonl      one object per event, append-only
    checkpoints/       the last complete round (safetensors and JSON)
    model*.safetensors the final model, one for each architecture
    summary.json       written last: its presence means that the run is finished
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedkd import plugins
from fedkd.checkpoints import Checkpoints, restore
from fedkd.checks import check, check_data
from fedkd.cluster import shared_engine
from fedkd.data.federation import Federation, build_federation
from fedkd.data.local import find_file
from fedkd.engine.grid import SimulationGrid
from fedkd.environment import environment
from fedkd.errors import FedKDError, LostError, RunError, ScenarioError, errors_in
from fedkd.files import plain, write_atomic
from fedkd.garbage import spared
from fedkd.grids import make_grid, planned_bytes, settle
from fedkd.listening import Listener, Result
from fedkd.preflight import preflight
from fedkd.run_folder import (
    drop_partial_line,
    folder_of,
    is_finished,
    locked,
    read_metrics,
    write_model,
)
from fedkd.scenario import Scenario
from fedkd.scenario_file import dump, load
from fedkd.server.runtime import LIVE_ONLY, Event, ServerRuntime
from fedkd.server.strategy import DistillationStrategy
from fedkd.students import keep_freed_memory
from fedkd.threads import cores

LOSSES = 3  # how often a run goes on from the same checkpoint after something was lost with a node
ACCURACY_AFTER = (10, 50, 100)  # rounds at which summaries quote the accuracy


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C during a run: everything up to the last checkpoint is on disk.

    Parameters
    ----------
    folder : Path
        The run, for ``fedkd resume``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


def prepare(scenario: Scenario) -> tuple[Federation, DistillationStrategy]:
    """Check a scenario as far as possible without writing anything.

    Parameters
    ----------
    scenario : Scenario
        The scenario.

    Returns
    -------
    Federation, DistillationStrategy
        The resolved clients, and the strategy with its hyper-parameters.

    Raises
    ------
    ScenarioError, DataError
        The scenario cannot be run as written.
    """
    check(scenario)
    strategy = plugins.make_strategy(scenario)
    federation = build_federation(scenario)
    check_data(scenario, federation)
    return federation, strategy


def execute(
    scenario: Scenario, *, out: Path, file: str = "", fresh: bool = False, listener: Listener | None = None
) -> Result:
    """Run a scenario, go on with it where it was interrupted, or return its result if it is finished.

    Parameters
    ----------
    scenario : Scenario
        The scenario.
    out : Path
        Folder of all runs.
    file : str
        Where the scenario comes from, for messages.
    fresh : bool
        Start anew in another folder even if there is a finished or interrupted run.
    listener : Listener, optional
        Hears what happens.

    Raises
    ------
    ScenarioError, DataError
        Before anything is written.
    RunError
        The run failed; it can be resumed.
    RunInterrupted
        Ctrl-C.
    """
    listener = listener or Listener()
    folder = folder_of(scenario, out, fresh)
    with errors_in(file):
        check(scenario)
        if (result := _finished(folder, listener)) is not None:
            return result
        with shared_engine(scenario, meanwhile=partial(prepare, scenario)) as (federation, strategy):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = f"results cannot be written to {folder}: {error.strerror}"
                raise ScenarioError(problem, key="--out", hint="name another folder with --out") from error
            return _run(folder, scenario, federation, strategy, listener)


def resume(folder: Path, *, listener: Listener | None = None) -> Result:
    """Go on with an interrupted run; finished ones are returned as they are.

    Parameters
    ----------
    folder : Path
        The run's folder.
    listener : Listener, optional
        Hears what happens.

    Raises
    ------
    ScenarioError
        The folder holds no run.
    """
    path = folder / "scenario.toml"
    if not path.exists():
        raise ScenarioError(
            f"{folder} holds no run",
            key="resume",
            hint="name a folder with a scenario.toml, as `fedkd run` prints it",
        )
    listener = listener or Listener()
    if (result := _finished(folder, listener)) is not None:
        return result
    scenario = load(str(path)).scenario
    with (
        errors_in(str(path)),
        shared_engine(scenario, meanwhile=partial(prepare, scenario)) as (federation, strategy),
    ):
        return _run(folder, scenario, federation, strategy, listener)


def resolve(scenario: Scenario) -> Scenario:
    """Fill in what depends on this machine: the server's threads, and where files are, as absolute paths."""
    system, data, proxy, clock = scenario.system, scenario.data, scenario.proxy, scenario.clock
    if not system.server_threads:
        system = system.model_copy(update={"server_threads": cores()})
    folder = os.path.abspath(os.path.expanduser(data.folder)) if data.folder else os.environ.get("FEDKD_DATA", "")
    data = data.model_copy(update={"source": _absolute(data.source, data.folder), "folder": folder})
    proxy = proxy.model_copy(update={"source": _absolute(proxy.source, data.folder)})
    files = {key: _absolute(getattr(clock, key), data.folder) for key in ("profile", "availability")}
    clock = clock.model_copy(update=files)
    return scenario.model_copy(update={"system": system, "data": data, "proxy": proxy, "clock": clock})


def _absolute(source: str, folder: str) -> str:
    kind, _, name = source.partition(":")
    return f"{kind}:{find_file(name, folder)}" if kind in ("npz", "file", "trace") else source


# --- one run -------------------------------------------------------------------------------------------------


def _finished(folder: Path, listener: Listener) -> Result | None:
    if not is_finished(folder):
        return None
    result = Result(folder, json.loads((folder / "summary.json").read_text()), skipped=True)
    listener.run_ended(result)
    return result


def _run(
    folder: Path,
    scenario: Scenario,
    federation: Federation,
    strategy: DistillationStrategy,
    listener: Listener,
) -> Result:
    with locked(folder):  # before anything in the folder is read or written
        return _run_locked(folder, scenario, federation, strategy, listener)


def _run_locked(
    folder: Path,
    scenario: Scenario,
    federation: Federation,
    strategy: DistillationStrategy,
    listener: Listener,
) -> Result:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    keep_freed_memory()
    asked, scenario = scenario, resolve(scenario)
    if (folder / "scenario.toml").exists():
        scenario = _as_recorded(scenario, load(str(folder / "scenario.toml")).scenario)
    write_atomic(folder / "scenario.toml", dump(scenario).encode())
    known = _known_preflight(folder)
    checkpoints = Checkpoints(folder)
    saved = checkpoints.load()
    began, spent = time.perf_counter(), float(saved[0]["seconds"]) if saved else 0.0
    drop_partial_line(folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as log:

        def write(event: Event) -> None:
            if event["event"] not in LIVE_ONLY:
                log.write(json.dumps(plain(event), allow_nan=False) + "\n")
                log.flush()
            listener.event(event)

        grid = None
        try:
            grid = make_grid(scenario, federation, probe=known is None, worker_bytes=planned_bytes(known, scenario))
            server = ServerRuntime(scenario, grid, write)
            strategy.bind(server)
            listener.run_started(folder, asked, federation, int(saved[0]["round"]) if saved else 0)
            if known is None:
                report = preflight(server, strategy)
                listener.preflight(report)
                grid = settle(grid, scenario, report, federation)
                scenario, known = report.scenario, report.facts
                server.scenario, server.grid = scenario, grid
                write_atomic(folder / "scenario.toml", dump(scenario).encode())
            grid.expect(known.get("seconds_per_sample", {}))
            facts = environment(scenario, grid.workers, known)
            write_atomic(folder / "environment.json", json.dumps(facts, indent=2).encode())
            if saved is not None:
                restore(*saved, strategy, server, grid)
            _announce(server, strategy.round if saved is not None else 0, again=log.tell() > 0)
            with spared():
                strategy, server = _rounds(
                    strategy, server, grid, checkpoints, lambda: spent + time.perf_counter() - began
                )
            seconds = spent + time.perf_counter() - began
            summary = summarise(folder, scenario, strategy, server, federation, seconds)
            for name, state in strategy.students.items():
                stem = "model" if len(strategy.students) == 1 else f"model-{re.sub(r'[^A-Za-z0-9]+', '-', name)}"
                write_model(folder / f"{stem}.safetensors", server.complete(name, state), name)
            write_atomic(folder / "summary.json", json.dumps(plain(summary), indent=2).encode())
        except KeyboardInterrupt:
            write({"event": "interrupted", "round": strategy.__dict__.get("round", 0)})
            raise RunInterrupted(folder) from None
        except Exception as error:
            write({"event": "failed", "error": f"{type(error).__name__}: {error}"})
            write_atomic(folder / "error.txt", traceback.format_exc().encode())
            where = f"{error}\n  what was finished is kept: fedkd resume {folder}"
            if not isinstance(error, FedKDError):
                where = f"{type(error).__name__}: {where}\n  the traceback is in {folder / 'error.txt'}"
            raise RunError(where) from error
        finally:
            if grid is not None:
                grid.close()
    (folder / "error.txt").unlink(missing_ok=True)
    result = Result(folder, summary)
    listener.run_ended(result)
    return result


def _announce(server: ServerRuntime, after: int, *, again: bool) -> None:
    """Write what stands before the rounds: after which round the run goes on, or who attacks."""
    if again:
        server.on_event({"event": "resumed", "after_round": after})
    attackers = server.federation.attackers.tolist()
    if attackers and not after:
        server.on_event({"event": "attackers", "kind": server.scenario.attacks.kind, "clients": attackers})


def _rounds(
    strategy: DistillationStrategy,
    server: ServerRuntime,
    grid: SimulationGrid,
    checkpoints: Checkpoints,
    seconds: Callable[[], float],
) -> tuple[DistillationStrategy, ServerRuntime]:
    """Run the rounds that are left, and return who has run the last one.

    If uploads or clients' states are lost with their node, the run goes on from its last checkpoint, as a resumed one
    does; so not even then a bit of the result changes.
    """
    run = server.scenario.run
    losses = Counter[int]()  # by the round that was saved last
    while True:

        def after_round(strategy: DistillationStrategy = strategy, server: ServerRuntime = server) -> None:
            if strategy.round % run.checkpoint_every == 0 or strategy.round == run.rounds:
                checkpoints.save(strategy, server, grid, seconds())

        grid.on_lost = partial(_recover, checkpoints, strategy, server, grid)
        try:
            strategy.start(grid, after_round=after_round)
            return strategy, server
        except LostError as error:
            saved = checkpoints.load()
            at = int(saved[0]["round"]) if saved is not None else 0
            losses[at] += 1
            if losses[at] > LOSSES:
                raise
            logging.getLogger(__name__).warning("%s; the run goes on from its checkpoint of round %d", error, at)
            strategy, server = (
                plugins.make_strategy(server.scenario),
                ServerRuntime(server.scenario, grid, server.on_event),
            )
            strategy.bind(server)
            grid.load_state_dict({})
            if saved is not None:
                restore(*saved, strategy, server, grid)
            _announce(server, at, again=True)


def _as_recorded(scenario: Scenario, recorded: Scenario) -> Scenario:
    """Return a scenario with what was settled when its run began, and what results depend on."""
    old, system = recorded.system, scenario.system
    settled: dict[str, Any] = {name: getattr(old, name) for name in ("server_threads", "trainer", "cohort")}
    if not system.gpu_fraction and system.workers in (0, old.workers):
        settled |= {"workers": old.workers, "gpu_fraction": old.gpu_fraction}
    return scenario.model_copy(update={"system": system.model_copy(update=settled)})


def _known_preflight(folder: Path) -> dict[str, Any] | None:
    """Return what was measured when the run began; None if it has not come so far."""
    try:
        return json.loads((folder / "environment.json").read_text())["preflight"]
    except (OSError, ValueError, KeyError):
        return None


def _recover(
    checkpoints: Checkpoints,
    strategy: DistillationStrategy,
    server: ServerRuntime,
    grid: SimulationGrid,
    partition_id: int,
) -> RecordDict | None:
    """Return the saved state of a client, for one that was lost with its node; report the loss.

    Raises
    ------
    LostError
        The client has had a newer one since.
    """
    if grid.has_changed(partition_id):
        raise LostError(f"a state of client {partition_id} that had not been saved was lost with its node")
    at, state = checkpoints.state_of(partition_id)
    event = {"event": "state-lost", "round": strategy.round, "partition_id": partition_id, "restored_from": at}
    server.on_event(event)
    return state


def summarise(
    folder: Path,
    scenario: Scenario,
    strategy: DistillationStrategy,
    server: ServerRuntime,
    federation: Federation,
    seconds: float,
) -> dict[str, Any]:
    """Return what ``summary.json`` says about a finished run, from its events."""
    events = read_metrics(folder)
    rounds = [e for e in events if e["event"] == "round"]
    measured = {e["round"]: e for e in rounds if "accuracy" in e}
    last = measured[max(measured)] if measured else {}
    best = max(measured.values(), key=lambda e: e["accuracy"], default={})
    predictors = last.get("predictors", {})
    so_far: dict[int, int] = {}
    total = sum(kinds.total() for kinds in server.traffic.values())
    for event in reversed(rounds):  # what travelled before round 1 is in none of them
        so_far[event["round"]] = total
        total -= sum(event["bytes_up"].values()) + sum(event["bytes_down"].values())
    return {
        "label": scenario.label or scenario.strategy.name,
        "strategy": scenario.strategy.name,
        "seed": scenario.run.seed,
        "rounds": strategy.round,
        "whose": last.get("whose"),
        "final": last.get("accuracy"),
        "best": best.get("accuracy"),
        "best_round": best.get("round"),
        "accuracy_after": {str(r): measured[r]["accuracy"] for r in ACCURACY_AFTER if r in measured},
        "ensemble": predictors.get("ensemble", {}).get("accuracy"),
        "agreement": last.get("agreement"),
        "clients": (predictors.get("clients") or {}).get("accuracy"),
        "predictors": predictors,
        "bytes_up": dict(server.traffic["up"]),
        "bytes_down": dict(server.traffic["down"]),
        "seconds": round(seconds, 3),
        "simulated_seconds": None if server.clock is None else server.clock.time,
        "seconds_by_verb": {
            verb: round(sum(e["seconds"][verb] for e in rounds), 3) for verb in ("train", "distill", "evaluate")
        },
        "attackers": federation.attackers.tolist(),
        "refused": sum(e["event"] == "refused" for e in events),
        "states_lost": sum(e["event"] == "state-lost" for e in events),
        "skew": {
            "jensen_shannon": federation.skew.jensen_shannon,
            "effective_classes": federation.skew.effective_classes,
        },
        "curve": [[r, measured[r]["accuracy"]] for r in sorted(measured)],
        "curve_bytes": [so_far[r] for r in sorted(measured)],
        "curve_simulated_time": [measured[r]["simulated_time"] for r in sorted(measured) if server.clock is not None],
    }
