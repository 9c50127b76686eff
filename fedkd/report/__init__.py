"""Tables and figures of finished runs, made from plain rows and arrays, never from run folders."""

from fedkd.report.figures import ROUNDS, learning_curves, partition_figure
from fedkd.report.partitions import partition_table
from fedkd.report.tables import (
    Row,
    aggregate,
    console_table,
    human_bytes,
    pivot,
    title_of,
    to_csv,
    to_latex,
    to_markdown,
    write_tables,
)

__all__ = [
    "ROUNDS",
    "Row",
    "aggregate",
    "console_table",
    "human_bytes",
    "learning_curves",
    "partition_figure",
    "partition_table",
    "pivot",
    "title_of",
    "to_csv",
    "to_latex",
    "to_markdown",
    "write_tables",
]
