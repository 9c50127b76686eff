"""What both grids promise."""

import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedkd.engine import InlineGrid, Nodes, RayGrid
from fedkd.engine.worker import private, unchanged

# Not in order, with gaps and two architectures; 40 clients make cohorts of three.
IDS = np.array([9, 5, 3, 2, 1, 0, *range(20, 54)])
NODES = Nodes(IDS, ("a", "b") * 20, IDS % 7)


@pytest.fixture(scope="module", params=["inline", "ray"])
def kept_grid(request, apps):
    if request.param == "inline":
        grid = InlineGrid(apps.counting_app, NODES, {"lr": 0.5})
    else:
        request.getfixturevalue("ray_started")()
        grid = RayGrid(apps.counting_app, NODES, {"lr": 0.5}, workers=2)
    yield grid
    grid.close()


@pytest.fixture
def grid(kept_grid):
    """A grid whose clients have no state yet."""
    kept_grid.load_state_dict({})
    return kept_grid


def test_replies_come_in_partition_order_with_ids(grid, apps):
    messages = apps.ask(grid, [9, 0, 5, 2, 1], arrays=ArrayRecord([np.zeros(2, np.float32)]))

    replies = list(grid.send_and_receive(messages))

    assert [grid.nodes.partition(r.metadata.src_node_id) for r in replies] == [0, 1, 2, 5, 9]
    sent = {m.metadata.dst_node_id: m.metadata.message_id for m in messages}
    assert all(r.metadata.reply_to_message_id == sent[r.metadata.src_node_id] for r in replies)
    assert all(r.metadata.dst_node_id == 1 and r.metadata.group_id == "1" for r in replies)
    ids = [m.metadata.message_id for m in [*messages, *replies]]
    assert len(set(ids)) == 10 and "" not in ids
    metrics = [r.content["metrics"] for r in replies]
    assert [m["partition"] for m in metrics] == [0, 1, 2, 5, 9]
    assert all(m["num-partitions"] == 40 and m["lr"] == 0.5 and m["threads"] == 1 for m in metrics)
    np.testing.assert_array_equal(replies[3].content["arrays"].to_numpy_ndarrays()[0], [5.0, 5.0])


def test_state_lives_from_call_to_call_and_is_restored(grid, apps):
    for _ in range(2):
        list(grid.send_and_receive(apps.ask(grid, [0, 1, 2])))

    saved = grid.state_dict()
    assert {p: state["calls"]["n"] for p, state in saved.items()} == {0: 2, 1: 2, 2: 2}

    list(grid.send_and_receive(apps.ask(grid, [1], kind="query.forget")))
    assert sorted(grid.state_dict()) == [0, 2]

    grid.load_state_dict(saved)
    replies = list(grid.send_and_receive(apps.ask(grid, [0, 1, 3])))
    assert [r.content["metrics"]["calls"] for r in replies] == [3, 3, 1]
    with pytest.raises(ValueError, match="partition id 77"):
        grid.load_state_dict({77: RecordDict()})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: no samples"),
        ("exit", "SystemExit: 3"),
        ("silent", "TypeError: the client returned NoneType and no Message"),
    ],
)
def test_a_client_that_fails_keeps_its_state_and_the_others_go_on(grid, apps, how, reason):
    list(grid.send_and_receive(apps.ask(grid, [0, 1, 2, 3, 5])))

    replies = list(grid.send_and_receive(apps.ask(grid, [0, 1, 2, 3, 5], **{how: 3})))

    assert [r.has_error() for r in replies] == [False, False, False, True, False]
    assert replies[3].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[3].error.reason.startswith(reason)
    assert replies[3].metadata.src_node_id == grid.nodes.node_id(3)
    assert [grid.state_dict()[p]["calls"]["n"] for p in [0, 1, 2, 3, 5]] == [2, 2, 2, 1, 2]


def test_nobody_reads_nobody_runs(grid, apps):
    replies = grid.send_and_receive(apps.ask(grid, range(3)))
    assert grid.state_dict() == {}

    next(iter(replies))
    replies.close()
    assert list(grid.state_dict()) == [0]  # those after the first reply count as never asked, on every engine


def test_contents_may_differ_and_shared_records_are_private_to_each_client(grid, apps):
    shared = ArrayRecord([np.ones(2, np.float32)])
    common = ConfigRecord({"list": [0]})
    messages = []
    for partition in range(20, 50):
        config = ConfigRecord({"list": [partition]}) if partition % 10 == 0 else common
        kind = "train" if partition == 29 else "query.vandal"
        records = RecordDict({"arrays": shared, "config": config})
        messages.append(Message(records, grid.nodes.node_id(partition), kind))

    replies = list(grid.send_and_receive(messages))

    assert not any(r.has_error() for r in replies)
    undisturbed = replies.pop(9).content["arrays"]
    np.testing.assert_array_equal(undisturbed.to_numpy_ndarrays()[0], [30.0, 30.0])
    lists = [r.content["config"]["list"] for r in replies]
    assert lists[0] == [20, 1] and lists[1] == [0, 1] and lists[19] == [40, 1]
    assert list(shared) == ["0"] and shared["0"].dtype == "float32" and common["list"] == [0]


def test_several_messages_to_one_client_are_answered_one_after_another(grid, apps):
    replies = list(grid.send_and_receive(apps.ask(grid, [1, 0, 1])))

    assert [grid.nodes.partition(r.metadata.src_node_id) for r in replies] == [0, 1, 1]
    assert [r.content["metrics"]["calls"] for r in replies] == [1, 1, 2]


def test_push_then_pull(grid, apps):
    ids = list(grid.push_messages(apps.ask(grid, [2, 0])))
    replies = list(grid.pull_messages(ids))

    assert {r.metadata.reply_to_message_id for r in replies} == set(ids)
    assert list(grid.pull_messages(ids)) == []


def test_deadline_turns_the_unfinished_into_errors(grid, apps):
    list(grid.send_and_receive(apps.ask(grid, range(3))))  # workers are up
    start = time.monotonic()

    messages = apps.ask(grid, range(3), sleep=1, seconds=1.5)
    replies = list(grid.send_and_receive(messages, timeout=0.7))

    assert time.monotonic() - start < 5
    assert len(replies) == 3
    late = [r for r in replies if r.has_error()]
    assert late and all(r.error.reason == "TimeoutError: not finished in time" for r in late)
    after = list(grid.send_and_receive(apps.ask(grid, range(3))))  # nobody hangs on
    assert not any(r.has_error() for r in after)


def test_errors_of_the_caller(grid, apps):
    with pytest.raises(ValueError, match="node id 5"):
        list(grid.send_and_receive([Message(RecordDict(), 5, "train")]))
    assert list(grid.send_and_receive([])) == []
    with pytest.raises(ValueError, match="not distinct"):
        Nodes(np.array([1, 1]), ("", ""), np.array([1, 1]))
    with pytest.raises(ValueError, match="different lengths"):
        Nodes(np.array([1, 2]), ("",), np.array([1, 1]))


def test_a_client_that_leaves_its_state_alone_has_no_new_one(grid, apps):
    list(grid.send_and_receive(apps.ask(grid, [0, 1])))
    grid.take_changed()
    list(grid.send_and_receive(apps.ask(grid, [0, 1, 2], kind="query.env")))
    assert dict(grid.take_changed()) == {} and grid.state_dict().keys() == {0, 1}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (0.0, -0.0, False),
        ([1], [1.0], False),
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        ([2.5], [2.5], True),
    ],
)
def test_a_state_is_unchanged_only_if_its_numbers_are_the_same_to_the_bit(before, after, same):
    kept, state = (RecordDict({"m": MetricRecord({"n": value})}) for value in (before, after))
    assert unchanged(kept, state) is same and unchanged(kept, private(kept))
