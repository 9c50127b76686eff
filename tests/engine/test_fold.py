"""Sums and computations where the clients ran: the same bits on every engine, and nothing more in the driver."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from fedkd.arrays import view
from fedkd.engine import InlineGrid, Nodes, RayGrid
from fedkd.errors import RunError


@pytest.fixture(params=["inline", "1 worker", "2 workers"])
def grid(request, ray_session, apps):
    nodes = Nodes.alike(40)
    if request.param == "inline":
        made = InlineGrid(apps.counting_app, nodes)
    else:
        made = RayGrid(apps.counting_app, nodes, workers=int(request.param[0]))
    with made:
        yield made


def asked(apps, grid, count=40, **config):
    return apps.ask(grid, range(count), arrays=ArrayRecord([np.full(3, 0.1, np.float32)]), **config)


def test_parts_come_by_cohort_and_replies_are_slim(grid, apps):
    folded = list(grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays))

    senders = [[grid.nodes.partition(r.metadata.src_node_id) for r in replies] for replies, _ in folded]
    assert senders == [list(range(start, min(start + 3, 40))) for start in range(0, 40, 3)]
    assert all(not reply.content.array_records for replies, _ in folded for reply in replies)
    for partitions, (_, part) in zip(senders, folded):
        expected = np.zeros(3)
        for partition in partitions:
            expected += (np.float32(0.1) + np.float32(partition)).astype(np.float64)
        assert part.tolist() == expected.tolist()  # bit for bit
    assert len(grid.state_dict()) == 40


def test_failures_are_error_replies_and_the_others_are_summed(grid, apps):
    (replies, part), *_ = grid.send_and_fold(asked(apps, grid, **{"raise": 1}), apps.sum_of_arrays)

    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert "no samples" in replies[1].error.reason
    assert part[0] == pytest.approx(0.1 + 2.1)


def test_whole_replies_can_be_had_if_they_are_kept(grid, apps):
    slim = [r for f in grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays, keep=True) for r in f.replies]

    whole = grid.whole(slim[7])
    assert view(whole.content["arrays"]["0"])[0] == np.float32(7.1)
    assert list(grid.compute(apps.first_number, [(reply, 2.0) for reply in slim[:3]])) == pytest.approx([0.2, 2.2, 4.2])


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

    assert [len(f.replies) for f in grid.send_and_fold(asked(apps, grid), apps.sum_of_arrays)] == [25, 15]


def test_content_that_differs_and_content_that_is_shared_arrive_alike(grid, apps):
    shared = ArrayRecord([np.full(3, 1.0, np.float32)])
    contents = [RecordDict({"arrays": shared, "config": apps.config(n=k)}) for k in range(3)]
    messages = [Message(contents[k % 3], grid.nodes.node_id(k), "train") for k in range(6)]

    replies = list(grid.send_and_receive(messages))
    assert [view(r.content["arrays"]["0"])[0] for r in replies] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
