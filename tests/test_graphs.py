"""Work that is recorded and replayed: the same as work that is done, wherever it pays and wherever it does not."""

import pytest
import torch

from fedkd import graphs
from fedkd.graphs import REPLAYS, Graph, Recorder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def sums(keys):
    """Add numbers 1, 2, ... to totals by key, each as a piece of work."""
    recorder, totals = Recorder(CPU, True), {key: torch.zeros(2) for key in keys}
    for number, key in enumerate(keys):
        values = [torch.full((2,), 1.0 + number)]
        recorder.do(key, lambda x, key=key: totals[key].add_(x), values, keys[number:].count(key))
    return {key: total.tolist() for key, total in totals.items()}


def test_what_comes_often_enough_is_recorded_once_and_replayed(taped):
    keys = ["often", "rare"] * 3 + ["often"] * REPLAYS
    before = sums(keys)
    with taped() as tapes:
        assert sums(keys) == before
    assert [tape.replays for tape in tapes] == [2 + REPLAYS]  # all but the first


def test_a_gpu_that_does_not_wait_for_python_is_asked_as_before(taped, monkeypatch):
    with taped() as tapes:
        monkeypatch.setattr(Recorder, "_waits", lambda self: False)
        sums(["often"] * 20)
    assert not tapes


@pytest.mark.gpu
def test_a_graph_does_the_work_when_it_is_replayed_and_not_before():
    total = torch.zeros(3, device=CUDA)
    graph = Graph(lambda x: total.add_(x * 2), [torch.ones(3, device=CUDA)])
    assert total.tolist() == [0, 0, 0]
    for value in (1.0, 5.0):
        graph.replay([torch.full((3,), value, device=CUDA)])
    assert total.tolist() == [12, 12, 12]


@pytest.mark.gpu
def test_work_that_waits_for_the_gpu_is_done_without_a_graph(caplog, monkeypatch):
    monkeypatch.setattr(graphs, "_given_up", [])
    total = torch.zeros(1, device=CUDA)

    def work(x):
        total.add_(x * float(x.sum()))  # the CPU needs the number

    recorder = Recorder(CUDA, True)
    for number in range(10):
        torch.cuda.synchronize()
        recorder.do("key", work, [torch.tensor([float(number)], device=CUDA)], 10 - number)
    assert total.item() == sum(number**2 for number in range(10))
    assert not recorder.able and not Recorder(CUDA, True).able and "no longer recorded" in caplog.text
    assert torch.nn.functional.dropout(torch.ones(1000, device=CUDA)).count_nonzero() < 1000  # draws as before
