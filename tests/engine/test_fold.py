"""Sums and computations where the clients ran: the same bits on every engine, and nothing more in the driver."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from flwr.app import ArrayRecord, Error, Message, RecordDict
from ray import cloudpickle
from ray.exceptions import RayError

from fedkd.arrays import view
from fedkd.engine import InlineGrid, Nodes, RayGrid, pool, ray_grid
from fedkd.engine.dispatcher import Done
from fedkd.engine.parcels import Parcel, unpack
from fedkd.engine.worker import CohortRunner, Worker
from fedkd.errors import RunError
from fedkd.threads import one_thread


@pytest.fixture(scope="module", params=["inline", "1 worker", "2 workers"])
def where(request):
    """Where clients run; for the whole module, so that workers are kept from test to test."""
    return request.param


@pytest.fixture
def grid(where, ray_session, apps):
    nodes = Nodes.alike(40)
    if where == "inline":
        made = InlineGrid(apps.counting_app, nodes)
    else:
        made = RayGrid(apps.counting_app, nodes, workers=int(where[0]))
    with made:
        yield made


def asked(apps, grid, count=40, size=3, **config):
    return apps.ask(grid, range(count), arrays=ArrayRecord([np.full(size, 0.1, np.float32)]), **config)


def test_parts_of_cohorts_are_merged_pairwise(grid, apps):
    folded = list(grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays))

    cohorts = [list(range(5 * k // 2, 5 * (k + 1) // 2)) for k in range(16)]
    assert [each.partitions for each in folded] == cohorts
    assert [each.results for each in folded] == [[1] * len(cohort) for cohort in cohorts]
    sums = []
    for cohort in cohorts:
        sums.append(np.zeros(3))
        for partition in cohort:
            sums[-1] += (np.float32(0.1) + np.float32(partition)).astype(np.float64)
    while len(sums) > 1:
        sums = [sum(sums[at : at + 2]) for at in range(0, len(sums), 2)]
    total, tree = folded[-1].part
    assert total.tolist() == sums[0].tolist()  # bit for bit
    assert tree == "((((1 4) (6 9)) ((11 14) (16 19))) (((21 24) (26 29)) ((31 34) (36 39))))"
    assert all(each.part is None for each in folded[:-1])
    assert len(grid.state_dict()) == 40
    # With states that are known beforehand, and those of the round before, it is the same.
    again = list(grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays))
    assert [each.results for each in again] == [[2] * len(cohort) for cohort in cohorts]


def sums(apps, grid, **config):
    """Run a round on arrays of many numbers; return what came of each cohort, and the bits and the order of the sum."""
    arrays = ArrayRecord([np.linspace(0, 1, 500, dtype=np.float32)])
    folded = list(grid.send_and_fold(apps.ask(grid, range(40), arrays=arrays, **config), apps.sum_of_roots))
    total, tree = folded[-1].part
    return [(each.partitions, each.results) for each in folded], total.tobytes(), tree


def begin(apps, grid):
    """Call every third client, so that not all have the same state; return the grid."""
    list(grid.send_and_receive(apps.ask(grid, range(0, 40, 3))))
    return grid


def test_a_worker_that_is_killed_in_a_cohort_changes_no_bit_of_the_sum(ray_session, apps, tmp_path):
    """First in a task of one cohort, then, when cohorts have been measured, in a task of several; each has three."""
    nodes, markers = Nodes.alike(40), [tmp_path / name for name in ("first", "then")]
    inline = InlineGrid(apps.counting_app, nodes)
    expected = [sums(apps, inline), sums(apps, begin(apps, inline)), sums(apps, inline)]
    with RayGrid(apps.counting_app, nodes, workers=2) as grid:
        found = [sums(apps, grid, die=3, marker=str(markers[0]), always=False), sums(apps, begin(apps, grid))]
        found.append(sums(apps, grid, die=23, marker=str(markers[1]), always=False))

        assert all(marker.exists() for marker in markers)
        assert found == expected
        calls = [n for _, results in found[2][0] for n in results]
        assert calls == [4, 3, 3] * 13 + [4]  # each client has been called once in each of the rounds
        assert grid.state_dict() == inline.state_dict()


class Crew:
    """Stands for workers of which one does all the work, in some order; nothing of Ray is started."""

    LOST = RayError

    def __init__(self, parts, *, workers, **_):
        factory, *rest = parts
        self._runner = CohortRunner(factory(), *rest)
        self.actors, self.tasks = list(range(workers)), []

    def get(self, refs):
        return refs

    def put(self, value):
        return value

    def pickled(self, value):
        return cloudpickle.dumps(value)

    @contextmanager
    def dispatch(self, jobs, deadline):
        with one_thread():
            worker = Worker(*[None] * 3)
            worker._runner = self._runner
            done = {number: getattr(worker, job.method)(*job.arguments) for number, job in reversed([*enumerate(jobs)])}
        self.tasks.append(len(jobs))

        def result(number):
            refs = done[number] if jobs[number].returns > 1 else [done[number]]
            return Done(refs[0], [refs[k] for k in jobs[number].reads], refs)

        yield result

    def close(self):
        pass


def test_eight_workers_come_to_the_bits_of_one_and_of_two(apps, monkeypatch):
    """Who makes which part of a sum depends on their number."""
    monkeypatch.setattr(pool, "Pool", Crew)
    inline, tasks = begin(apps, InlineGrid(apps.counting_app, Nodes.alike(40))), []
    expected = [sums(apps, inline) for _ in range(3)]
    for workers in (1, 2, 8):
        with RayGrid(apps.counting_app, Nodes.alike(40), workers=workers) as grid:
            grid._costs = SimpleNamespace(of=lambda kind, samples: 0.015 * samples, learn=lambda *_: None)
            begin(apps, grid)
            assert [sums(apps, grid) for _ in range(3)] == expected
            assert grid.state_dict() == inline.state_dict()
            tasks.append(grid._pool.tasks[1:])
    assert tasks == [[4] * 3, [6] * 3, [8] * 3]  # in each round so many tasks of the 16 cohorts


@pytest.mark.slow
def test_eight_processes_come_to_the_bits_of_this_one(ray_session, apps, monkeypatch):
    """More than there are cores, so workers are started without asking Ray for one."""

    class Crowded(SimpleNamespace):
        def options(self, num_cpus, **others):
            return ray.remote(Worker).options(num_cpus=0, **others)

    monkeypatch.setattr(pool, "_check_room", lambda *_: None)
    inline = InlineGrid(apps.counting_app, Nodes.alike(40))
    with monkeypatch.context() as patch:
        patch.setattr(pool, "ray", SimpleNamespace(**{**vars(ray), "remote": lambda _: Crowded()}))
        made = RayGrid(apps.counting_app, Nodes.alike(40), workers=8)
    with made as grid:
        ray.get(list(grid._pool.loading.values()))  # all of them take part
        begin(apps, grid), begin(apps, inline)
        assert [sums(apps, grid) for _ in range(3)] == [sums(apps, inline) for _ in range(3)]
        asked = apps.ask(grid, range(40), sleep=3, seconds=1.0)
        assert len({reply.content["metrics"]["pid"] for reply in grid.send_and_receive(asked)}) == 8


def test_failures_are_told_and_the_others_are_summed(grid, apps):
    folded = list(grid.send_and_fold(asked(apps, grid, 3, **{"raise": 1}), apps.sum_of_arrays))

    assert [each.results[0] for each in folded][::2] == [1, 1]
    assert "no samples" in folded[1].results[0]
    assert folded[-1].part[0][0] == pytest.approx(0.1 + 2.1)


def test_a_cohort_that_fails_leaves_the_parts_of_the_others(grid, apps):
    folded = list(grid.send_and_fold(asked(apps, grid, 6), apps.FailsFor(2)))
    assert [isinstance(each.results[0], Error) for each in folded] == [False, False, True, False, False, False]
    assert "out of luck" in folded[2].results[0].reason
    assert folded[-1].part[1] == "(((0 1) 3) (4 5))"
    assert grid.state_dict().keys() == {0, 1, 3, 4, 5}


def test_states_that_appear_late_are_kept(ray_session, apps):
    with RayGrid(apps.late_app, Nodes.alike(6), workers=2) as grid:
        for calls in ([], [], range(6), range(6)):
            replies = list(grid.send_and_receive(apps.ask(grid, range(6), remember=int(bool(calls)))))
            assert not any(reply.has_error() for reply in replies)
            assert sorted(grid.state_dict()) == list(calls)
        assert [state["m"]["calls"] for state in grid.state_dict().values()] == [2] * 6


def test_whole_replies_can_be_had_if_they_are_kept(grid, apps):
    kept = [m for f in grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays, keep=True) for m in f.kept]

    whole = grid.whole(kept[7])
    assert view(whole.content["arrays"]["0"])[0] == np.float32(7.1)
    assert list(grid.compute(apps.first_number, [(reply, 2.0) for reply in kept[:3]])) == pytest.approx([0.2, 2.2, 4.2])


@pytest.mark.parametrize("keep", [False, True])
def test_sums_of_any_size_come_home(grid, where, apps, keep, monkeypatch):
    taken, by_packets = [], []
    monkeypatch.setattr(ray_grid, "unpack", lambda first, *rest: taken.append(type(first)) or unpack(first, *rest))
    expected = sum(np.float64(np.float32(0.1) + np.float32(p)) for p in range(40))

    for size in (3, 40_000, 40_000, 20_000, 3, 300_000, 3):
        taken.clear()
        folded = list(grid.send_and_fold(asked(apps, grid, size=size), apps.sum_of_arrays, keep=keep))
        by_packets += [size] if Parcel in taken else []
        np.testing.assert_allclose(folded[-1].part[0], np.full(size, expected))
        expected += 40  # the clients count
        if keep:
            assert view(grid.whole(folded[-1].kept[-1]).content["arrays"]["0"]).shape == (size,)
    # A round goes by what the last one would have taken; 300,000 numbers are too many.
    assert by_packets == ([] if where == "inline" else [40_000, 20_000, 3])


def test_compute_reads_delivered_replies_where_they_are(grid, apps):
    replies = list(grid.send_and_receive(asked(apps, grid)))

    assert list(grid.compute(apps.first_number, [(reply, 1.0) for reply in replies])) == pytest.approx(
        [p + 0.1 for p in range(40)]
    )


def test_compute_keeps_order_shares_arguments_and_computes_a_bounded_number_ahead(ray_session, apps, tmp_path):
    table = np.arange(100_000.0)
    with RayGrid(apps.counting_app, Nodes.alike(2), workers=2) as grid:
        results = grid.compute(apps.note_and_add, [(table, k, str(tmp_path)) for k in range(50)])
        assert next(results) == 0.0
        first = sorted(int(path.name) for path in tmp_path.iterdir())
        assert first[0] == 0 and first[-1] <= 5  # one was read; 2 workers x 2 ahead
        assert list(results) == [float(k) for k in range(1, 50)]
        assert len(list(tmp_path.iterdir())) == 50


def test_a_computation_that_raises_is_one_clear_error(grid, apps):
    with pytest.raises(RunError, match=r"computation.*failed: .*ZeroDivisionError"):
        list(grid.compute(apps.divide, [(1, 0)]))


def test_a_worker_that_dies_in_a_computation_is_replaced(ray_session, apps, tmp_path):
    with RayGrid(apps.counting_app, Nodes.alike(2), workers=2) as grid:
        assert list(grid.compute(apps.die_once, [(k, str(tmp_path / "died")) for k in range(8)])) == list(range(8))
    assert (tmp_path / "died").exists()


def test_two_messages_to_one_client_cannot_be_folded(grid, apps):
    messages = [*asked(apps, grid, 2), *asked(apps, grid, 1)]

    with pytest.raises(ValueError, match="two messages to one client"):
        list(grid.send_and_fold(messages, apps.sum_of_arrays))


def test_width_of_cohorts_can_be_set(apps):
    grid = InlineGrid(apps.counting_app, Nodes.alike(40), cohort=25)

    assert [len(f.results) for f in grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays)] == [20, 20]


def test_content_that_differs_and_content_that_is_shared_arrive_alike(grid, apps):
    shared = ArrayRecord([np.full(3, 1.0, np.float32)])
    contents = [RecordDict({"arrays": shared, "config": apps.config(n=k)}) for k in range(3)]
    messages = [Message(contents[k % 3], grid.nodes.node_id(k), "train") for k in range(6)]

    replies = list(grid.send_and_receive(messages))
    assert [view(r.content["arrays"]["0"])[0] for r in replies] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
