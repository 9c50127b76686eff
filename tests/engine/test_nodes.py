import tracemalloc

import numpy as np
import pytest

from fedkd.engine import Nodes


@pytest.mark.parametrize("ids", [np.arange(6), np.array([3, 9, 0, 4]), np.arange(5)[::-1], np.array([], dtype=int)])
def test_clients_are_found_by_partition_and_node_id(ids):
    nodes = Nodes(ids, ["a"] * len(ids), np.ones(len(ids)))

    assert [nodes.index(p) for p in ids] == list(range(len(ids)))
    assert [nodes.partition(node) for node in nodes.node_ids()] == ids.tolist()
    assert [nodes.node_id(p) for p in ids] == nodes.node_ids()
    for missing in {-1, 7, 10, 10**9} - set(ids.tolist()):
        with pytest.raises(ValueError, match=f"partition id {missing}"):
            nodes.index(missing)
        with pytest.raises(ValueError, match="node id"):
            nodes.partition(nodes.node_id(missing))


def test_a_million_nodes_are_an_array():
    tracemalloc.start()
    nodes = Nodes.alike(1_000_000)
    assert nodes.archs[999_999] == nodes.archs[0] == "" and nodes.num_examples[5] == 1
    assert nodes.index(999_999) == 999_999 and nodes.partition(nodes.node_id(0)) == 0
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert kept < 10e6 and peak < 30e6
