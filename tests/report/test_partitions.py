import io

import numpy as np
import pytest
from rich.console import Console

from fedkd.report import partition_table

COUNTS = np.array([[3, 0], [0, 0], [40, 7]])


def printed(table, color=None):
    console = Console(width=100, file=io.StringIO(), force_terminal=bool(color), color_system=color)
    console.print(table)
    return console.file.getvalue()


def test_partition_table_has_counts_totals_and_shading():
    text = printed(partition_table(COUNTS, ["cat", "dog"]))
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "3", "·", "3"] in lines
    assert ["1", "·", "·", "0"] in lines
    assert ["2", "40", "7", "47"] in lines
    assert ["all", "43", "7", "50"] in lines
    assert "48;2;" in printed(partition_table(COUNTS, ["cat", "dog"]), color="truecolor")


def test_partition_table_of_many_clients_sums_up_the_rest():
    text = printed(partition_table(np.repeat(COUNTS, 20, axis=0), ["cat", "dog"], max_clients=40))
    assert "and 20 more: 47 samples, 2 classes each, 0 without samples" in " ".join(text.split())
    assert ["all", "860", "140", "1000"] in [line.split() for line in text.splitlines()]


def test_partition_table_of_many_classes_names_the_largest():
    counts = np.zeros((2, 30), dtype=int)
    counts[0, [4, 9, 2, 7]] = 5, 8, 1, 2
    text = printed(partition_table(counts, [f"k{i}" for i in range(30)]))
    assert "k9 (8), k4 (5), k7 (2) and 1 more" in text
    assert "4 of 30" in text


def test_partition_table_does_not_take_class_names_for_markup():
    text = printed(partition_table(COUNTS, ["[bold]", "dog"], title="npz:[a].npz"))
    assert "[bold]" in text and "npz:[a].npz" in text


def test_partition_table_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        partition_table(COUNTS, ["cat"])
