"""Rounds on the simulated clock: how long they take, who is too late, and what it costs."""

import json

import numpy as np
import pytest
import torch
from flwr.app import Error, Message

from fedkd import run
from fedkd.client.faults import draw
from fedkd.errors import RunError
from fedkd.seeds import Purpose, rng

WEIGHTS = 4 * (12 * 16 + 16 + 16 * 4 + 4)  # bytes of the tiny MLP
UNIFORM = {"profile": "uniform", "samples_per_second": 20.0, "up": 1000.0, "down": 4000.0}
TRAVEL = WEIGHTS / 4000 + WEIGHTS / 1000


def named(events, event):
    return [e for e in events if e["event"] == event]


def refused(events):
    return [(e["round"], e["partition_id"], e["reason"]) for e in named(events, "refused")]


def timeless(events):
    """Round events without what was measured on this machine."""
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] in ("round", "refused")]


def same_models(one, other):
    return all(torch.equal(tensor, other.students["mlp"][name]) for name, tensor in one.students["mlp"].items())


@pytest.fixture
def sizes(small):
    """Training samples of each client."""
    from fedkd.data.federation import build_federation

    return build_federation(small()).sizes


@pytest.fixture
def without(federate, small):
    """Return a function that runs a scenario in which some (round, client) pairs upload nothing."""

    def make(pairs, **changes):
        def never(message, context, call_next):
            round = message.content["config"]["server-round"]
            if (round, context.node_config["partition-id"]) in pairs:
                return Message(Error(0, "none"), reply_to=message)
            return call_next(message, context)

        return federate(small(run__participation=1.0, **changes), mods=[never])[0]

    return make


# --- time ------------------------------------------------------------------------------------------------


def test_without_a_clock_there_is_no_simulated_time(small, federate):
    _, events = federate(small(), rounds=1)

    assert not [key for event in events for key in event if key.startswith("simulated")]


def test_a_clock_alone_changes_no_result(small, federate):
    plain, _ = federate(small())
    timed, events = federate(small(clock=UNIFORM))

    assert same_models(plain, timed)
    assert not refused(events)


def test_a_round_takes_as_long_as_its_slowest_client(small, federate, sizes):
    _, events = federate(small(clock=UNIFORM, client__epochs=2))

    began = 0.0
    for started, ended in zip(named(events, "started"), named(events, "round"), strict=True):
        expected = max(TRAVEL + 2 * sizes[p] / 20 for p in started["clients"])
        assert ended["simulated_seconds"] == pytest.approx(expected)
        assert ended["simulated_time"] == pytest.approx(began + expected)
        began = ended["simulated_time"]


def test_steps_instead_of_epochs_count_what_is_seen(small, federate, sizes):
    _, events = federate(small(clock=UNIFORM, client__steps=3, client__batch_size=8, run__participation=1.0), rounds=1)

    assert sizes.min() >= 8
    assert named(events, "round")[0]["simulated_seconds"] == pytest.approx(TRAVEL + 3 * 8 / 20)


def test_what_the_simulator_measures_takes_no_time(small, federate):
    settings = {"clock": UNIFORM | {"dropout": 0.5}, "partition__test": 0.2, "run__seed": 1}
    _, plain = federate(small(**settings), rounds=1)
    _, measured = federate(small(**settings, run__evaluate_clients="selected"), rounds=1)

    assert named(plain, "round")[0]["simulated_seconds"] == named(measured, "round")[0]["simulated_seconds"]
    assert refused(plain) == refused(measured)
    clients = named(measured, "round")[0]["predictors"]["clients-local"]["clients"]
    assert clients == len(named(measured, "started")[0]["clients"])


def test_digested_samples_are_seen_too(small, federate, sizes):
    scenario = small(
        {"name": "dsfl", "open_size": 30, "distill_epochs": 2}, clock=UNIFORM, run__participation=1.0, run__rounds=2
    )
    _, events = federate(scenario)

    ids, outputs = 4 * 30, 4 * 30 * 4 + 4 * 30
    first = ids / 4000 + sizes.max() / 20 + outputs / 1000
    second = (ids + outputs) / 4000 + (sizes.max() + 2 * 30) / 20 + outputs / 1000
    assert [e["simulated_seconds"] for e in named(events, "round")] == pytest.approx([first, second])


def test_stragglers_compute_longer(small, federate, sizes):
    faults = {"straggle": 0.5, "straggle_factor": 3.0}
    scenario = small(clock=UNIFORM, faults=faults, run__participation=1.0)
    strategy, events = federate(scenario)

    for event in named(events, "round"):
        slow = {
            p
            for p in strategy.server.federation.eligible
            if "straggle" in draw(scenario.faults, rng(0, Purpose.FAULT, event["round"], p))
        }
        seconds = [TRAVEL + sizes[p] / 20 * (3 if p in slow else 1) for p in strategy.server.federation.eligible]
        assert event["simulated_seconds"] == pytest.approx(max(seconds))
    plain, _ = federate(small(run__participation=1.0))
    assert same_models(strategy, plain)


# --- the deadline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", {"name": "feddf", "steps": 3, "batch_size": 16}, "flwr:FedAvg"])
def test_late_clients_are_left_out(small, federate, without, sizes, strategy):
    third = sorted(sizes[sizes > 0])[-3]
    deadline = float(TRAVEL + third / 20)
    deadline += 1e-9 * deadline  # rounding of the sum
    scenario = small(strategy, clock=UNIFORM | {"deadline": deadline}, run__participation=1.0)

    fused, events = federate(scenario)

    late = np.flatnonzero(sizes > third).tolist()
    assert len(late) == 2
    assert [(r, p) for r, p, _ in refused(events)] == [(r, p) for r in (1, 2, 3) for p in late]
    reasons = {p: reason for _, p, reason in refused(events)}
    for p in late:
        assert reasons[p].startswith(f"too late in simulated time: {TRAVEL + sizes[p] / 20:.6g} s, the deadline is ")
    in_time = int((sizes > 0).sum()) - 2
    for event in named(events, "round"):
        assert event["received"] == in_time
        assert event["simulated_seconds"] == deadline
        assert event["bytes_down"] == {"weights": WEIGHTS * (in_time + 2)}
        assert event["bytes_up"] == {"weights": WEIGHTS * in_time}
    others = without([(r, p) for r in (1, 2, 3) for p in late], strategy=strategy)
    assert same_models(fused, others)


def test_too_few_in_time_stop_the_run(small, federate):
    scenario = small(clock=UNIFORM | {"deadline": TRAVEL / 2})

    with pytest.raises(RunError, match="0 usable uploads, at least 1 are needed"):
        federate(scenario)


def test_who_sends_nonsense_in_time_is_not_waited_for(small, federate, sizes):
    clock = UNIFORM | {"deadline": 1000.0}
    _, nonsense = federate(small(clock=clock, faults={"nan": 0.4}, run__participation=1.0))
    _, silence = federate(small(clock=clock, faults={"silent": 0.4}, run__participation=1.0))

    assert all(e["simulated_seconds"] <= TRAVEL + sizes.max() / 20 for e in named(nonsense, "round"))
    lost = {e["round"] for e in named(silence, "refused")}
    assert lost and all((e["simulated_seconds"] == 1000) == (e["round"] in lost) for e in named(silence, "round"))


# --- over-selection --------------------------------------------------------------------------------------


def test_the_fastest_are_accepted_and_fused_in_partition_order(small, federate, sizes, monkeypatch):
    from strategies.fedavg import FedAvg

    fused = []
    average = FedAvg.fuse

    def fuse(self, uploads):
        fused.append(uploads := list(uploads))
        average(self, uploads)

    monkeypatch.setattr(FedAvg, "fuse", fuse)
    # Four of six clients, of whom the larger ones are slower; everybody is asked.
    scenario = small(clock=UNIFORM | {"over_selection": 1.5}, run__participation=2 / 3)

    _, events = federate(scenario)

    assert (sizes > 0).all()
    order = sorted(range(6), key=lambda p: (sizes[p], p))
    accepted = sorted(order[:4])
    assert accepted != order[:4]  # the order of arrival is another one
    for round, uploads in enumerate(fused, 1):
        assert [upload.partition_id for upload in uploads] == accepted
        assert sorted((p, reason) for r, p, reason in refused(events) if r == round) == sorted(
            (p, f"too late in simulated time: finished as number {k} of 4") for k, p in enumerate(order[4:], 5)
        )
    for event in named(events, "round"):
        assert (event["selected"], event["received"]) == (6, 4)
        assert event["simulated_seconds"] == pytest.approx(TRAVEL + sizes[order[3]] / 20)
        assert event["bytes_down"] == {"weights": 6 * WEIGHTS}
        assert event["bytes_up"] == {"weights": 4 * WEIGHTS}


def test_over_selected_clients_change_nothing_but_who_is_fused(small, federate, without, sizes):
    order = sorted(range(6), key=lambda p: (sizes[p], p))
    fused, _ = federate(small(clock=UNIFORM | {"over_selection": 1.5}, run__participation=2 / 3))

    assert same_models(fused, without([(r, p) for r in (1, 2, 3) for p in order[4:]]))


def test_an_unusable_upload_makes_room_for_the_next(small, federate, sizes):
    scenario = small(clock=UNIFORM | {"over_selection": 1.5}, faults={"nan": 0.3}, run__participation=2 / 3)

    _, events = federate(scenario)

    order = sorted(range(6), key=lambda p: (sizes[p], p))
    for event in named(events, "round"):
        round = event["round"]
        bad = {p for p in range(6) if "nan" in draw(scenario.faults, rng(0, Purpose.FAULT, round, p))}
        reasons = {p: reason for r, p, reason in refused(events) if r == round}
        usable = [p for p in order if p not in bad]
        last = order.index(usable[min(4, len(usable)) - 1])
        assert event["received"] == min(4, len(usable))
        assert {p for p, reason in reasons.items() if "NaN" in reason} == {
            p for p in bad if order.index(p) < last or len(usable) < 4
        }
        assert event["simulated_seconds"] == pytest.approx(TRAVEL + sizes[order[last]] / 20)
        assert event["bytes_up"]["weights"] == WEIGHTS * (6 if len(usable) < 4 else last + 1)
    assert refused(events)


# --- dropouts and availability ---------------------------------------------------------------------------


def test_who_drops_out_has_downloaded_and_uploads_nothing(small, federate, without):
    scenario = small(clock=UNIFORM | {"dropout": 0.3}, run__participation=1.0)

    fused, events = federate(scenario)

    gone = [(r, p) for r, p, reason in refused(events) if reason == "dropped out"]
    assert 2 <= len(gone) == len(refused(events))
    for event in named(events, "round"):
        left = event["selected"] - sum(r == event["round"] for r, _ in gone)
        assert event["bytes_down"] == {"weights": WEIGHTS * event["selected"]}
        assert event["bytes_up"] == {"weights": WEIGHTS * left}
    assert same_models(fused, without(gone))


def test_everybody_may_drop_out(small, federate):
    with pytest.raises(RunError, match="0 usable uploads"):
        federate(small(clock=UNIFORM | {"dropout": 0.999}))


def test_only_those_who_are_there_are_asked(small, federate, tmp_path):
    rows = ["0,0,5", "1,0,20000", "2,0,20000", "3,100,20000", "4,19999,20000", "5,0,20000"]
    (tmp_path / "trace.csv").write_text("\n".join(["client,start,end", *rows]))
    clock = UNIFORM | {"availability": f"trace:{tmp_path / 'trace.csv'}", "samples_per_second": 0.5}
    scenario = small(clock=clock, run__participation=1.0, system__min_replies=3)

    _, events = federate(scenario)

    asked = [e["clients"] for e in named(events, "started")]
    assert asked == [[0, 1, 2, 5], [1, 2, 3, 5], [1, 2, 3, 5]]


def test_a_server_that_waits_loses_time(small, federate, tmp_path, sizes):
    (tmp_path / "trace.csv").write_text("client,start,end\n1,90,1000\n2,150,1000\n")
    clock = UNIFORM | {"availability": f"trace:{tmp_path / 'trace.csv'}"}

    _, events = federate(small(clock=clock, system__min_replies=2, run__rounds=1))

    (event,) = named(events, "round")
    assert event["selected"] == 2
    assert event["simulated_seconds"] == pytest.approx(180 + TRAVEL + max(sizes[1], sizes[2]) / 20)


@pytest.mark.parametrize("availability", ["bernoulli", "diurnal"])
def test_selection_among_the_available_is_uniform(small, federate, availability):
    from fedkd.engine.clock import Bernoulli
    from fedkd.server.selection import draw as select

    there = Bernoulli(0.4, seed=3)
    counts = np.zeros(50)
    for round in range(1, 401):
        available = set(np.flatnonzero(there.available(round, 0.0, np.arange(50))).tolist())
        chosen = select(range(50), 8, seed=3, round=round, available=lambda ids, r=round: there.available(r, 0.0, ids))
        assert set(chosen) <= available and len(chosen) == min(8, len(available))
        counts[chosen] += 1
    assert counts.std() < 1.4 * (400 * 0.16 * 0.84) ** 0.5

    _, events = federate(small(clock=UNIFORM | {"availability": availability, "probability": 0.6, "day": 100.0}))
    assert len(named(events, "round")) == 3


# --- the same everywhere ---------------------------------------------------------------------------------

BUSY = {
    "clock": {
        "profile": "lognormal",
        "samples_per_second": 20.0,
        "up": 1000.0,
        "down": 4000.0,
        "availability": "diurnal",
        "probability": 1.0,
        "day": 40.0,
        "deadline": 8.0,
        "dropout": 0.1,
    },
    "faults": {"straggle": 0.2, "crash": 0.05, "silent": 0.05, "nan": 0.05, "shape": 0.05, "keys": 0.05},
    "partition__clients": 12,
    "run__rounds": 5,
    "run__seed": 2,
}
STRATEGIES = [
    {"name": "fedavg"},
    {"name": "feddf", "steps": 5, "batch_size": 16},
    {"name": "dsfl", "open_size": 40, "distill_epochs": 1},
    {"name": "fd"},
    {"name": "flwr:FedAdam"},
]


class StopAfter(run.Listener):
    """Presses Ctrl-C in the middle of a round."""

    def __init__(self, round):
        self.round = round

    def event(self, event):
        if event["event"] == "reply" and event["round"] == self.round + 1:
            raise KeyboardInterrupt


def busy(over_selection, **changes):
    return BUSY | {"clock": BUSY["clock"] | {"over_selection": over_selection}} | changes


def written(result):
    return timeless(run.read_metrics(result.folder))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy["name"])
def test_times_and_results_are_the_same_when_resumed(small, tmp_path, strategy):
    scenario = small(strategy, **busy(1.0 if strategy["name"] == "fedavg" else 1.4))
    whole = run.execute(scenario, out=tmp_path / "whole")
    reasons = {reason.partition(":")[0] for _, _, reason in refused(written(whole))}
    assert {"dropped out", "too late in simulated time"} <= reasons

    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "halves", listener=StopAfter(3))
    resumed = run.resume(stopped.value.folder)

    assert written(resumed) == written(whole)
    assert resumed.summary["simulated_seconds"] == whole.summary["simulated_seconds"] > 0


@pytest.mark.parametrize(
    ("strategy", "over_selection"), [(STRATEGIES[0], 1.0), (STRATEGIES[0], 1.4), (STRATEGIES[2], 1.0)]
)
def test_times_and_results_are_the_same_on_ray(small, tmp_path, ray_session, strategy, over_selection):
    changes = busy(over_selection)
    inline = run.execute(small(strategy, **changes), out=tmp_path / "inline")
    on_ray = run.execute(small(strategy, **changes, system__engine="ray", system__workers=2), out=tmp_path / "ray")

    assert written(on_ray) == written(inline)


def test_flowers_own_runtime_gives_the_same_times_and_faults(small, federate, ray_for_others):
    from flwr.simulation import run_simulation

    from fedkd.client.handlers import make_app as client_app
    from fedkd.server.handlers import make_app as server_app

    scenario = small(**BUSY)
    _, ours = federate(scenario)

    theirs = []
    # "local" keeps Flower from joining a Ray that another process has left behind.
    local = {"address": "local", "num_cpus": 2, "include_dashboard": False}
    run_simulation(
        server_app=server_app(scenario, theirs.append),
        client_app=client_app(scenario),
        num_supernodes=scenario.partition.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": local},
    )

    assert json.loads(json.dumps(timeless(named(theirs, "round")))) == json.loads(
        json.dumps(timeless(named(ours, "round")))
    )
    # Flower words what an app raises in its own way.
    without_words = [
        [(r, p, "crash" if "crash" in reason else reason) for r, p, reason in sorted(refused(events))]
        for events in (theirs, ours)
    ]
    assert without_words[0] == without_words[1]


# --- what is written -------------------------------------------------------------------------------------


def test_summary_row_and_figures_know_simulated_time_and_bytes(small, tmp_path):
    from rich.console import Console

    from fedkd.cli.screen import Screen

    result = run.execute(small(clock=UNIFORM, run__evaluate_every=2), out=tmp_path)
    rounds = named(run.read_metrics(result.folder), "round")

    assert result.summary["simulated_seconds"] == rounds[-1]["simulated_time"]
    assert result.row()["simulated_seconds"] == rounds[-1]["simulated_time"]
    assert [r for r, _ in result.summary["curve"]] == [2, 3]
    assert result.summary["curve_simulated_time"] == [e["simulated_time"] for e in rounds[1:]]
    sent = [sum(e["bytes_up"].values()) + sum(e["bytes_down"].values()) for e in rounds]
    assert result.summary["curve_bytes"] == [sum(sent[:2]), sum(sent)]
    Screen(Console(quiet=True)).conclude([(None, result)], tmp_path / "shown")
    assert {path.name for path in (tmp_path / "shown").glob("curves*.svg")} == {
        "curves.svg",
        "curves-bytes.svg",
        "curves-time.svg",
    }


def test_files_are_found_again_from_another_folder(small, tmp_path, monkeypatch):
    (tmp_path / "devices.csv").write_text("samples_per_second,up,down\n" + "20,1000,4000\n" * 6)
    monkeypatch.chdir(tmp_path)
    scenario = small(clock={"profile": "file:devices.csv"})
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "runs", listener=StopAfter(1))

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = run.resume(stopped.value.folder)

    same = run.execute(small(clock=UNIFORM), out=tmp_path / "runs")
    assert resumed.summary["simulated_seconds"] == same.summary["simulated_seconds"]
