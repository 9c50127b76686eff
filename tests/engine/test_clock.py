"""Simulated time: durations by hand, availability by its frequencies, files and what is wrong with them."""

import math
import pickle

import numpy as np
import pytest

from fedkd.checks import check
from fedkd.engine import clock as module
from fedkd.engine.clock import Bernoulli, Clock, Diurnal, Listed, LogNormal, Timing, Trace
from fedkd.errors import DataError, KnowledgeError, RunError, ScenarioError
from fedkd.parsing import parse
from fedkd.scenario import digest
from fedkd.seeds import rng

UNIFORM = LogNormal((50.0, 1e6, 4e6))  # samples per second, bytes per second up, down


def ids(*partitions):
    return np.array(partitions, dtype=np.int64)


# --- durations -------------------------------------------------------------------------------------------


def test_a_client_takes_download_plus_samples_plus_upload():
    timing = Clock(UNIFORM).timing({3: 8_000_000, 5: 0})

    assert timing.seconds(3, samples=500, up=3_000_000) == pytest.approx(2 + 10 + 3)
    assert timing.seconds(3, samples=500, up=3_000_000, slowdown=4) == pytest.approx(2 + 40 + 3)  # computing alone
    assert timing.seconds(5, samples=0, up=0) == 0


def test_each_client_has_its_own_rates():
    timing = Clock(Listed(np.array([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]]))).timing({0: 8, 1: 8})

    assert timing.seconds(0, samples=3, up=6) == 2 + 3 + 3
    assert timing.seconds(1, samples=3, up=6) == pytest.approx(0.2 + 0.3 + 0.3)


def test_who_is_exactly_in_time_is_in_time():
    timing = Timing({0: (10.0, 1.0, 1.0)}, deadline=60.0)

    timing.check(0, 60.0)
    with pytest.raises(KnowledgeError, match=r"^too late in simulated time: 73.2 s, the deadline is 60 s$"):
        timing.check(0, 73.2)
    with pytest.raises(KnowledgeError):
        timing.check(0, math.nextafter(60.0, 61))


HUGE = {"samples": 1e308, "slowdown": 1e10}  # finite, but their product is not


@pytest.mark.parametrize("reported", [{"samples": -1.0}, {"slowdown": -2.0}, {"slowdown": math.nan}, HUGE])
def test_no_duration_follows_from_nonsense(reported):
    with pytest.raises(KnowledgeError, match="no duration"):
        Timing({0: (1.0, 1.0, 1.0)}).seconds(0, **{"samples": 1.0, "up": 0.0} | reported)


def test_an_exchange_takes_as_long_as_its_slowest_client_or_the_deadline():
    patient, strict = Timing({}), Timing({}, deadline=60.0)

    assert patient.duration([3.0, 9.0, 5.0], missed=False) == 9
    assert strict.duration([3.0, 9.0, 5.0], missed=False) == 9
    assert strict.duration([3.0], missed=True) == 60
    assert patient.duration([3.0], missed=True) == 3  # who drops out is not waited for
    assert patient.duration([], missed=True) == 0


def test_timings_can_be_sent_to_workers():
    timing = Clock(UNIFORM, deadline=5).timing({1: 10, 2: 20})

    assert pickle.loads(pickle.dumps(timing)) == timing
    assert len(pickle.dumps(Clock(UNIFORM).timing(dict.fromkeys(range(100), 1)))) < 8_000


@pytest.mark.parametrize(("wanted", "factor", "asked"), [(10, 1.0, 10), (10, 1.1, 11), (8, 1.25, 10), (3, 1.3, 4)])
def test_over_selection_is_rounded_up(wanted, factor, asked):
    clock = Clock(UNIFORM, over_selection=factor)

    chosen = clock.select(1, wanted, lambda count, available: list(range(count)), least=1)

    assert len(chosen) == asked
    assert clock.waits_for(chosen) == wanted
    assert clock.waits_for(range(5)) == (wanted if asked == 5 else 5)  # another exchange of the round


def test_where_few_are_available_all_of_them_are_waited_for():
    clock = Clock(UNIFORM, over_selection=1.5)

    assert clock.select(1, 4, lambda count, available: [0, 1, 2], least=1) == [0, 1, 2]
    assert clock.waits_for([0, 1, 2]) == 3


# --- devices ---------------------------------------------------------------------------------------------


def test_drawn_devices_have_their_medians_and_spreads():
    rates = LogNormal((50.0, 1e6, 4e6), (0.5, 1.0, 0.0), seed=1).of(np.arange(20_000))

    logs = np.log(rates)
    assert np.median(rates, axis=0) == pytest.approx([50.0, 1e6, 4e6], rel=0.03)
    assert logs.std(axis=0) == pytest.approx([0.5, 1.0, 0.0], abs=0.02)
    assert abs(np.corrcoef(logs[:, 0], logs[:, 1])[0, 1]) < 0.03


def test_a_client_has_the_same_device_whoever_is_asked_with_it():
    devices = LogNormal((50.0, 1e6, 4e6), (0.5, 0.5, 0.5), seed=1)

    together = devices.of(np.arange(1000))

    assert (devices.of(ids(999, 0, 256)) == together[[999, 0, 256]]).all()
    assert (LogNormal((50.0, 1e6, 4e6), (0.5, 0.5, 0.5), seed=2).of(ids(7)) != together[7]).any()
    assert devices.of(ids()).shape == (0, 3)


def test_a_round_draws_for_the_clients_that_take_part_and_for_no_population(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "rng", lambda *key: seen.append(key) or rng(*key))
    million = np.random.default_rng(0).choice(1_000_000, 100, replace=False)

    clock = Clock(LogNormal((50.0, 1e6, 4e6), (0.5, 0.5, 0.5)), Bernoulli(0.5), dropout=0.1)
    clock.timing(dict.fromkeys(million.tolist(), 1000))
    clock.dropped(1, million.tolist())
    clock.availability.available(1, 0.0, million)  # pyright: ignore[reportOptionalMemberAccess]

    assert len(seen) <= 3 * len(million)


def test_profiles_are_read_from_csv_and_from_json_lines(tmp_path):
    table = tmp_path / "devices.csv"
    table.write_text("name, samples_per_second, up, down\nphone, 10, 2e5, 1e6\n\nserver, 500, 1e7, 1e8\n")
    lines = tmp_path / "devices.jsonl"
    lines.write_text(
        '{"samples_per_second": 10, "up": 2e5, "down": 1e6}\n{"samples_per_second": 500, "up": 1e7, "down": 1e8}\n'
    )

    for path in (table, lines):
        assert Listed.read(path).of(ids(1, 0)).tolist() == [[500, 1e7, 1e8], [10, 2e5, 1e6]]


# --- availability ----------------------------------------------------------------------------------------


def test_bernoulli_clients_are_there_as_often_as_they_should():
    often = Bernoulli(0.3, seed=4)
    everybody = np.arange(5000)

    rounds = np.array([often.available(r, 0.0, everybody) for r in range(1, 21)])

    assert rounds.mean() == pytest.approx(0.3, abs=0.01)
    assert rounds.mean(axis=0).std() == pytest.approx((0.3 * 0.7 / 20) ** 0.5, rel=0.05)  # clients are independent
    assert abs(np.corrcoef(rounds[0], rounds[1])[0, 1]) < 0.05  # and so are rounds
    assert (often.available(3, 99.0, ids(4999, 17)) == rounds[2][[4999, 17]]).all()
    assert (often.available(3, 0.0, everybody, again=1) != rounds[2]).any()
    assert Bernoulli(1.0).available(1, 0.0, everybody).all()


def test_the_chance_of_diurnal_clients_has_the_period_of_a_day():
    daily = Diurnal(0.8, seed=4, day=3600.0)
    everybody = np.arange(2000)

    at = {hour: daily.chance(900.0 * hour, everybody) for hour in range(9)}

    assert at[4] == pytest.approx(at[0]) and at[8] == pytest.approx(at[0])
    assert at[0] + at[2] == pytest.approx(0.8)  # half a day later it is the other half
    assert at[0].max() == pytest.approx(0.8, abs=0.001) and at[0].min() == pytest.approx(0, abs=0.001)
    assert at[1].mean() == pytest.approx(0.4, abs=0.02)  # phases are spread over the day
    there = np.mean([daily.available(r, 0.0, everybody) for r in range(1, 101)], axis=0)
    assert np.corrcoef(there, at[0])[0, 1] > 0.95


def test_traces_repeat_after_their_last_end():
    trace = Trace([(4, 30.0, 40.0), (2, 0.0, 10.0), (2, 5.0, 20.0), (2, 35.0, 36.0)])

    def there(time):
        return trace.available(1, time, ids(2, 3, 4)).tolist()

    assert trace.length == 40
    assert there(0) == there(19.9) == [True, False, False]  # two intervals that overlap are one
    assert there(20) == there(29.9) == [False, False, False]
    assert there(35) == [True, False, True]
    assert there(36) == [False, False, True]
    assert there(40) == there(80) == there(0)


def test_traces_are_read_from_csv_and_from_json_lines(tmp_path):
    table, lines = tmp_path / "trace.csv", tmp_path / "trace.jsonl"
    table.write_text("client,start,end\n1,0,5\n0,5,9.5\n")
    lines.write_text('{"client": 1, "start": 0, "end": 5}\n{"client": 0, "start": 5, "end": 9.5}\n')

    for path in (table, lines):
        assert [Trace.read(path).available(1, time, ids(0, 1)).tolist() for time in (1, 6)] == [
            [False, True],
            [True, False],
        ]


def test_a_large_trace_is_looked_up_at_once():
    clients = 20_000
    trace = Trace(
        [(k, float(d * 100 + k % 50), float(d * 100 + k % 50 + 10)) for k in range(clients) for d in range(5)]
    )

    for time in (0.0, 123.0, 433.5):
        expected = [0 <= time % 100 - k % 50 < 10 for k in range(clients)]
        assert trace.available(1, time % 459, np.arange(clients)).tolist() == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the columns must be client,start,end, are none"),
        ("client,start\n1,2\n", "line 1: the columns must be client,start,end, are client,start"),
        ("client,start,end\n", "holds no rows"),
        ("client,start,end\n1,2\n", "line 2: 2 values for 3 columns"),
        ("client,start,end\n1,2,3\n\n1,x,3\n", "line 4: start must be a number, is 'x'"),
        ("client,start,end\n1,2,nan\n", "line 2: end must be a number, is 'nan'"),
        ("client,start,end\n1.5,2,3\n", "line 2: client must be a partition id, is 1.5"),
        ("client,start,end\n-1,2,3\n", "line 2: client must be a partition id, is -1"),
        ("client,start,end\n1,3,3\n", "line 2: must be 0 <= start < end, is 3 and 3"),
        ('{"client": 1, "start": 0}\n', "line 1: must be an object with client, start, end"),
        ('{"client": 1, "start": 0, "end": 5}\n[1]\n', "line 2: must be an object"),
        ('{"client": 1, "start": 0, "end": 5}\n{"cli\n', "line 2: this is not JSON"),
        ('{"client": 1, "start": 0, "end": true}\n', "line 1: end must be a number, is True"),
    ],
)
def test_malformed_files_are_refused_with_the_line(tmp_path, text, problem):
    path = tmp_path / "trace.csv"
    path.write_text(text)

    with pytest.raises(DataError) as caught:
        Trace.read(path)

    assert str(caught.value).startswith(str(path)) and problem in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "trace.csv").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(DataError, match="cannot be read"):
        Trace.read(tmp_path / "trace.csv")
    with pytest.raises(DataError, match="cannot be read"):
        Trace.read(tmp_path)
    (tmp_path / "devices.csv").write_text("samples_per_second,up,down\n1,0,3\n")
    with pytest.raises(DataError, match="line 2: up must be > 0, is 0"):
        Listed.read(tmp_path / "devices.csv")


def everybody_there(count, available):
    return np.flatnonzero(available(np.arange(3))).tolist()


def test_the_server_waits_until_enough_clients_are_available():
    clock = Clock(UNIFORM, Trace([(0, 300.0, 400.0), (1, 0.0, 400.0), (2, 310.0, 400.0)]))

    assert clock.select(1, 3, everybody_there, least=1) == [1] and clock.time == 0
    assert clock.select(1, 3, everybody_there, least=2) == [0, 1] and clock.time == 300
    clock.time = 0.0
    assert clock.select(1, 3, everybody_there, least=3) == [0, 1, 2] and clock.time == 360
    assert Clock(UNIFORM).select(1, 3, lambda count, available: [] if available is None else [1], least=9) == []


def test_bernoulli_clients_are_drawn_again_while_the_server_waits():
    clock = Clock(UNIFORM, Bernoulli(0.05, seed=0))

    chosen = clock.select(2, 1, everybody_there, least=1)

    assert clock.time > 0 and clock.time % module.POLL == 0 and set(chosen) <= {0, 1, 2}


def test_the_server_gives_up_after_a_week(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 86400.0)
    clock = Clock(UNIFORM, Trace([(0, 0.0, 1.0)]))

    with pytest.raises(RunError, match="in 1 simulated days there were never 2 clients available at once"):
        clock.select(1, 3, everybody_there, least=2)


def test_dropouts_are_seeded_by_round_and_client():
    clock = Clock(UNIFORM, dropout=0.2, seed=5)
    everybody = list(range(5000))

    dropped = clock.dropped(1, everybody)

    assert len(dropped) == pytest.approx(1000, rel=0.1)
    assert clock.dropped(1, everybody[::7]) == dropped & set(everybody[::7])
    assert clock.dropped(2, everybody) != dropped != Clock(UNIFORM, dropout=0.2, seed=6).dropped(1, everybody)
    assert clock.dropped(1, []) == Clock(UNIFORM).dropped(1, everybody) == set()


# --- scenarios -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"over_selection": 0.5}, ["clock.over_selection: must be a number >= 1, is 0.5"]),
        ({"dropout": 1.0}, ["clock.dropout: must be a number in [0, 1), is 1"]),
        ({"deadline": 10.0}, ["clock.deadline: has no effect without a clock", 'clock.profile to "uniform"']),
        ({"profile": "unifrom"}, ["clock.profile", "is 'unifrom'", "did you mean 'uniform'?"]),
        ({"profile": "file:"}, ["clock.profile", "file:PATH"]),
        ({"profile": "file:gone.csv"}, ["clock.profile: no file 'gone.csv'", "data.folder"]),
        ({"profile": "file:two.csv"}, ["clock.profile: file:two.csv has 2 rows for 20 clients", "one row for each"]),
        ({"profile": "file:bad.csv"}, ["clock.profile", "bad.csv, line 2: down must be a number, is 'fast'"]),
        ({"profile": "uniform", "availability": "diurnl"}, ["clock.availability", "did you mean 'diurnal'?"]),
        ({"profile": "uniform", "availability": "trace:gone.csv"}, ["clock.availability: no file 'gone.csv'"]),
        ({"profile": "uniform", "availability": "trace:others.csv"}, ["clock.availability", "ids are 0 to 19"]),
    ],
)
def test_wrong_clocks_are_refused_with_advice(tmp_path, monkeypatch, settings, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.csv").write_text("samples_per_second,up,down\n1,2,3\n4,5,6\n")
    (tmp_path / "bad.csv").write_text("samples_per_second,up,down\n1,2,fast\n")
    (tmp_path / "others.csv").write_text("client,start,end\n20,0,5\n")

    with pytest.raises(ScenarioError) as caught:
        check(parse({"clock": settings}))

    for part in parts:
        assert part in str(caught.value)


def test_stragglers_need_a_clock():
    with pytest.raises(ScenarioError, match=r"faults.straggle: stragglers take simulated time"):
        check(parse({"faults": {"straggle": 0.1}}))
    check(parse({"faults": {"straggle": 0.1}, "clock": {"profile": "lognormal"}}))


def test_clock_and_faults_are_part_of_the_digest():
    settings = [{}, {"clock": {"profile": "uniform"}}, {"clock": {"profile": "lognormal"}}, {"faults": {"nan": 0.1}}]

    assert len({digest(parse(raw)) for raw in settings}) == len(settings)
