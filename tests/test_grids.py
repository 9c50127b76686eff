from types import SimpleNamespace

import pytest

from fedkd import grids


@pytest.mark.parametrize(
    ("system", "remade"),
    [({"workers": 2, "address": "auto"}, True), ({"workers": 2}, False), ({"address": "auto"}, False)],
    ids=["cluster", "one machine", "all CPUs"],
)
def test_workers_that_were_asked_for_get_their_memory_on_a_cluster(small, monkeypatch, system, remade):
    scenario = small(system={"engine": "ray", **system})
    placement = SimpleNamespace(workers=2, gpu_fraction=0.0, worker_bytes=5_000)
    report = SimpleNamespace(scenario=scenario, placement=placement)
    before = SimpleNamespace(workers=2, close=lambda: None, cohort=0)
    monkeypatch.setattr(grids, "make_grid", lambda scenario, federation, worker_bytes: worker_bytes)
    after = grids.settle(before, scenario, report, None)
    assert after == 5_000 if remade else after is before


def test_a_resumed_run_sets_aside_what_was_planned_on_a_cluster(small):
    facts = {"worker": {"host_bytes": 1, "planned_bytes": 7}}
    cluster, alone = small(system={"engine": "ray", "address": "auto"}), small(system={"engine": "ray"})
    assert grids.planned_bytes(facts, cluster) == 7
    assert grids.planned_bytes(facts, alone) == grids.planned_bytes(None, cluster) == 0
    assert grids.planned_bytes({"worker": {"host_bytes": 1}}, cluster) == 0  # of an earlier version
