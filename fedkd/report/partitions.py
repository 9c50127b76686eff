"""Who has which classes: the client × class table of a federation for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table
from rich.text import Text

from fedkd.report.tables import new_table, span


def partition_table(
    counts: np.ndarray,
    classes: Sequence[str],
    *,
    title: str = "",
    max_clients: int = 40,
    max_classes: int = 20,
) -> Table:
    """Return the client × class table of a federation for the terminal, shaded by number of samples.

    Parameters
    ----------
    counts : np.ndarray
        Samples, integers [clients, C].
    classes : Sequence[str]
        Names of the C classes.
    title : str
        Heading; empty = none.
    max_clients : int
        With more clients only the first so many have a row; a line below sums up the others.
    max_classes : int
        With more classes a client has its number of classes and its largest ones, not a column per class.

    Raises
    ------
    ValueError
        `counts` is not [clients, C] for the C names in `classes`.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != len(classes):
        raise ValueError(f"counts have shape {counts.shape}, expected [clients, {len(classes)}]")
    shown, rest = counts[:max_clients], counts[max_clients:]
    summarised = len(classes) > max_classes
    table = new_table(title, gap=2 if summarised or len(classes) <= 12 else 1, footer=True)
    (_add_class_summary if summarised else _add_class_columns)(table, counts, shown, classes)
    if len(rest):
        sizes, kinds = rest.sum(axis=1), (rest > 0).sum(axis=1)
        table.caption = (
            f"and {len(rest)} more: {span(sizes)} samples, {span(kinds)} classes each, "
            f"{int((sizes == 0).sum())} without samples"
        )
    return table


def _add_class_columns(table: Table, counts: np.ndarray, shown: np.ndarray, classes: Sequence[str]) -> None:
    """Fill `table` with one column per class and the totals."""
    totals = counts.sum(axis=0)
    table.add_column("client", footer="all", justify="right", no_wrap=True)
    room = (80 - 15) // len(classes) - 2  # columns of the terminal for one class beside client and total
    for name, total in zip(classes, totals):
        width = max(len(str(total)), room)  # numbers stay whole, long names are cut
        table.add_column(Text(_short(name, width)), footer=str(total), justify="right", no_wrap=True)
    table.add_column("total", footer=str(counts.sum()), justify="right", no_wrap=True, style="bold")
    peak = max(int(counts.max(initial=0)), 1)
    for client, row in enumerate(shown):
        cells = [Text(str(n), style=_shade(n / peak)) if n else Text("·", style="dim") for n in row]
        table.add_row(str(client), *cells, str(row.sum()), style="" if row.any() else "dim")


def _add_class_summary(table: Table, counts: np.ndarray, shown: np.ndarray, classes: Sequence[str]) -> None:
    """Fill `table` with samples, number of classes and the largest classes of each client."""
    present = f"{int((counts.sum(axis=0) > 0).sum())} of {len(classes)}"
    table.add_column("client", footer="all", justify="right", no_wrap=True)
    table.add_column("samples", footer=str(counts.sum()), justify="right", no_wrap=True, style="bold")
    table.add_column("classes", footer=present, justify="right", no_wrap=True)
    table.add_column("largest classes")
    peak = max(int(shown.sum(axis=1).max(initial=0)), 1)
    for client, row in enumerate(shown):
        order = [int(c) for c in np.argsort(-row, kind="stable") if row[c]]
        largest = ", ".join(f"{classes[c]} ({row[c]})" for c in order[:3])
        more = f" and {len(order) - 3} more" if len(order) > 3 else ""
        total = int(row.sum())
        samples = Text(str(total), style=_shade(total / peak) if total else "dim")
        table.add_row(str(client), samples, str(len(order)), Text(largest + more or "·"), style="" if total else "dim")


def _shade(share: float) -> str:
    """Return the rich style of a cell that holds `share` of the largest one: from pale to dark blue."""
    depth = float(share) ** 0.5  # small clients stay visible beside large ones
    pale, dark = (222, 235, 247), (8, 69, 148)
    red, green, blue = (round(a + (b - a) * depth) for a, b in zip(pale, dark))
    return f"{'white' if depth > 0.7 else 'black'} on rgb({red},{green},{blue})"


def _short(name: str, width: int) -> str:
    """Return the name, cut to `width` characters."""
    return name if len(name) <= width else name[: max(width - 1, 0)] + "…"
