"""Sums and computations where the clients ran: the same bits on every engine, and nothing more in the driver."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict

from fedkd.arrays import view
from fedkd.engine import InlineGrid, Nodes, RayGrid, ray_grid
from fedkd.engine.parcels import Parcel, unpack
from fedkd.errors import RunError


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
