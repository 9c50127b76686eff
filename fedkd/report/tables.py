"""Result tables: mean ± standard deviation over seeds, as Markdown, CSV, LaTeX and in the terminal.

A row is one finished cell of a sweep, a plain dictionary::

    {"label": "feddf", "values": {"strategy.name": "feddf", "run.seed": 0}, "seed": 0, "whose": "server",
     "best": 0.71, "final": 0.70, "accuracy_after": {10: 0.66}, "ensemble": 0.73,
     "bytes_up": 1_200_000, "bytes_down": 1_200_000, "seconds": 12.5}

Accuracies are fractions in [0, 1], volumes are bytes. Every further numeric entry becomes a column of its
own; an entry that is ``None`` or absent is left out of the mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from fedkd.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

_SEED = "run.seed"
_NOT_METRICS = {"label", "values", "seed", "whose", "accuracy_after"}
_ORDER = [
    "best", "final", "accuracy_after", "ensemble", "clients_accuracy", "clients_worst_accuracy", "own_accuracy",
    "own_worst_accuracy", "bytes_up", "bytes_down", "simulated_seconds", "seconds",
]  # fmt: skip
_TITLES = {
    "whose": "whose accuracy",
    "best": "best (%)",
    "final": "final (%)",
    "ensemble": "ensemble (%)",
    "clients_accuracy": "clients, global test (%)",
    "clients_worst_accuracy": "worst tenth, global test (%)",
    "own_accuracy": "clients, own test (%)",
    "own_worst_accuracy": "worst tenth, own test (%)",
    "bytes_up": "up",
    "bytes_down": "down",
    "simulated_seconds": "simulated seconds",
}
_UNITS = ["B", "kB", "MB", "GB", "TB", "PB"]
_MISSING = "–"
_NAME_WIDTH = 8


def human_bytes(n: float) -> str:
    """Return a number of bytes in the unit that suits it, in powers of 1000.

    Parameters
    ----------
    n : float
        Bytes, at least 0.

    Examples
    --------
    >>> human_bytes(0), human_bytes(999), human_bytes(12_345), human_bytes(999_960), human_bytes(2.5e9)
    ('0 B', '999 B', '12.3 kB', '1.0 MB', '2.5 GB')
    """
    factor, unit, digits = _byte_unit(n)
    return f"{n / factor:.{digits}f} {unit}"


def _byte_unit(n: float) -> tuple[int, str, int]:
    """Return the factor, the name and the decimals of the unit in which `n` bytes are shown."""
    power = 0
    # What would be rounded up to 1000.0 belongs to the next unit.
    while power < len(_UNITS) - 1 and round(n / 1000**power, 1 if power else 0) >= 1000:
        power += 1
    return 1000**power, _UNITS[power], 1 if power else 0


def aggregate(rows: Sequence[Mapping[str, Any]], by: Sequence[str] | None = None) -> pd.DataFrame:
    """Group cells that differ only in the seed.

    Parameters
    ----------
    rows : Sequence[Row]
        One row per finished cell.
    by : Sequence[str], optional
        Columns that name a group: entries of a row (``label``) or keys of the sweep (``partition.alpha``).
        Default: the label and every key of the sweep that varies within one label.

    Returns
    -------
    pandas.DataFrame
        In order of first appearance: the columns of `by`, ``whose`` if rows have it, ``seeds`` (how many),
        and for each metric ``<metric>_mean`` and ``<metric>_sd`` (sample standard deviation, NaN if there is
        one seed). ``accuracy_after`` becomes ``after_<rounds>``.

    Raises
    ------
    ValueError
        A name in `by` is in no row, a group mixes cells that differ in more than the seed, or a cell comes
        twice.

    Examples
    --------
    >>> rows = [{"label": "fedavg", "seed": s, "best": b} for s, b in enumerate([0.6, 0.7, 0.8])]
    >>> aggregate(rows).round(3).to_dict("records")
    [{'label': 'fedavg', 'seeds': 3, 'best_mean': 0.7, 'best_sd': 0.1}]
    """
    import pandas as pd

    keys = list(_varying(rows) if by is None else by)
    for key in keys:
        if rows and not any(key in row or key in row.get("values", {}) for row in rows):
            raise ValueError(f"no row has {key!r} to group by")
    if any("whose" in row for row in rows) and "whose" not in keys:
        keys.append("whose")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_text([_entry(row, key) for key in keys]), []).append(row)
    metrics = [name for name in _metrics(rows) if name not in keys]
    records = []
    for members in groups.values():
        _check_group(members, keys)
        record: dict[str, Any] = {key: _scalar(_entry(members[0], key)) for key in keys}
        record["seeds"] = len(members)
        for metric in metrics:
            known = [value for row in members if (value := _metric(row, metric)) is not None]
            record[f"{metric}_mean"] = float(np.mean(known)) if known else np.nan
            record[f"{metric}_sd"] = float(np.std(known, ddof=1)) if len(known) > 1 else np.nan
        records.append(record)
    columns = [*keys, "seeds", *(f"{metric}_{part}" for metric in metrics for part in ("mean", "sd"))]
    return pd.DataFrame(records, columns=columns)


def pivot(rows: Sequence[Mapping[str, Any]], across: str, metric: str = "final") -> pd.DataFrame:
    """Group cells as `aggregate` does, and lay the values of one key of the sweep side by side.

    Parameters
    ----------
    rows : Sequence[Row]
        One row per finished cell.
    across : str
        A key of the sweep whose values become columns.
    metric : str
        What the cells show.

    Returns
    -------
    pandas.DataFrame
        The other columns that name a group, and for each value ``<key> <value>: <metric>_mean`` and ``_sd``, NaN where
        there is no run. Headings of tables name the value alone.

    Raises
    ------
    ValueError
        No row has the key or the metric.

    Examples
    --------
    >>> rows = [{"label": "fd", "seed": 0, "final": a, "values": {"alpha": a}} for a in (0.5, 0.25)]
    >>> print(to_markdown(pivot(rows, "alpha")))
    | label | alpha 0.5 | alpha 0.25 |
    | :---- | --------: | ---------: |
    | fd    |      50.0 |       25.0 |
    <BLANKLINE>
    """
    import pandas as pd

    if metric not in (known := _metrics(rows)):
        raise ValueError(f"no row has the metric {metric!r}; there are {', '.join(known)}")
    keys = list(dict.fromkeys([*_varying(rows), across]))
    df = aggregate(rows, keys)
    named = [key for key in (*keys, "whose") if key in df.columns and key != across]
    name = across.rpartition(".")[2]
    records: dict[str, dict[str, Any]] = {}
    for line in df.to_dict("records"):
        record = records.setdefault(_text([line[key] for key in named]), {key: line[key] for key in named})
        for part in ("mean", "sd"):
            record[f"{name} {line[across]}: {metric}_{part}"] = line[f"{metric}_{part}"]
    columns = dict.fromkeys(f"{name} {value}: {metric}_{part}" for value in df[across] for part in ("mean", "sd"))
    return pd.DataFrame(list(records.values()), columns=[*named, *columns])


def to_markdown(df: pd.DataFrame) -> str:
    """Return an `aggregate` table in Markdown: mean ± sd, accuracies in per cent, bytes with units.

    Examples
    --------
    >>> print(to_markdown(aggregate([{"label": "fd", "seed": 0, "best": 0.5, "bytes_up": 4000}])))
    | label | seeds | best (%) |     up |
    | :---- | ----: | -------: | -----: |
    | fd    |     1 |     50.0 | 4.0 kB |
    <BLANKLINE>
    """
    titles, cells, numeric = _render(df)
    lines = [[_escape(cell, _MARKDOWN) for cell in line] for line in [titles, *cells]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(titles))]
    rule = ["-" * (w - 1) + ":" if right else ":" + "-" * (w - 1) for w, right in zip(widths, numeric)]
    lines.insert(1, rule)
    padded = [
        [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric)] for line in lines
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def to_csv(df: pd.DataFrame) -> str:
    """Return an `aggregate` table as CSV: mean and sd in separate columns of plain numbers, empty if unknown.

    Examples
    --------
    >>> print(to_csv(aggregate([{"label": "fd", "seed": 0, "best": 0.5, "bytes_up": 4000}])))
    label,seeds,best_mean,best_sd,bytes_up_mean,bytes_up_sd
    fd,1,0.5,,4000.0,
    <BLANKLINE>
    """
    return df.to_csv(index=False, lineterminator="\n")


def to_latex(df: pd.DataFrame) -> str:
    r"""Return an `aggregate` table as a LaTeX ``tabular`` for the package booktabs.

    Examples
    --------
    >>> rows = [{"label": "fed_df", "seed": s, "best": b} for s, b in enumerate([0.6, 0.8])]
    >>> print(to_latex(aggregate(rows)))
    % \usepackage{booktabs}
    \begin{tabular}{lrr}
    \toprule
    label & seeds & best (\%) \\
    \midrule
    fed\_df & 2 & 70.0 $\pm$ 14.1 \\
    \bottomrule
    \end{tabular}
    <BLANKLINE>
    """
    titles, cells, numeric = _render(df)
    head, *body = (" & ".join(_escape(cell, _LATEX) for cell in line) + r" \\" for line in [titles, *cells])
    columns = "".join("r" if right else "l" for right in numeric)
    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}", ""])


def write_tables(
    rows: Sequence[Mapping[str, Any]], folder: str | Path, stem: str, by: Sequence[str] | None = None
) -> list[Path]:
    """Write the table of `aggregate` as ``<stem>.md``, ``<stem>.csv`` and ``<stem>.tex``.

    Parameters
    ----------
    rows : Sequence[Row]
        One row per finished cell.
    folder : str or Path
        Where to; made if missing. Each file appears whole or not at all.
    stem : str
        Name of the files without suffix.
    by : Sequence[str], optional
        As for `aggregate`.

    Returns
    -------
    list[Path]
        The three files.
    """
    df = aggregate(rows, by)
    formats: dict[str, Callable[[pd.DataFrame], str]] = {".md": to_markdown, ".csv": to_csv, ".tex": to_latex}
    return [write_atomic(Path(folder) / f"{stem}{suffix}", text(df).encode()) for suffix, text in formats.items()]


def console_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Return the final table of a run or sweep for the terminal.

    Parameters
    ----------
    rows : Sequence[Row]
        One row per finished cell; cells that differ only in the seed share a line.
    title : str
        Heading; empty = none.

    Returns
    -------
    rich.table.Table
        Label, keys of the sweep that vary, whose accuracy, best, final, ensemble, bytes up and down, seconds
        (simulated ones too, if there is a clock).
        With several seeds, accuracies are mean ± sd, the others means.
    """
    df = aggregate(rows)
    shares = [name for name in ("best", "final", "ensemble") if f"{name}_mean" in df.columns]
    costs = ("bytes_up", "bytes_down", "simulated_seconds", "seconds")
    means = [name for name in costs if f"{name}_mean" in df.columns]
    # Without its deviation a mean is not joined with it, and the table fits into 80 columns.
    df[[f"{name}_sd" for name in means]] = np.nan
    keys = [name for name in df.columns if name != "seeds" and not name.endswith(("_mean", "_sd"))]
    keep = keys + [f"{name}_{part}" for name in shares + means for part in ("mean", "sd")]
    titles, cells, numeric = _render(df.loc[:, keep])
    seeds = np.asarray(df["seeds"], dtype=np.int64)
    several = seeds.size > 0 and seeds.max() > 1
    table = new_table(title)
    table.caption = f"mean ± standard deviation over {span(seeds)} seeds" if several else None
    for place, (heading, right) in enumerate(zip(titles, numeric)):
        # Numbers stay whole; in a narrow terminal the names give way, but not to single letters.
        wrapped = heading.rpartition(".")[2].replace(" ", "\n", 1)
        least = min(_NAME_WIDTH, max(len(line[place]) for line in cells)) if place == 0 and cells else None
        justify = "right" if right else "left"
        table.add_column(Text(wrapped), justify=justify, no_wrap=right, overflow="fold", min_width=least)
    for line in cells:
        short = [cell.replace(" ± ", "±") for cell in line]
        table.add_row(*(Text(cell, style="dim" if cell == _MISSING else "") for cell in short))
    return table


def new_table(title: str, *, gap: int = 2, footer: bool = False) -> Table:
    """Return an empty table with a rule below its head and `gap` spaces between columns."""
    return Table(
        title=Text(title, style="bold") if title else None,  # text, so that no bracket is taken for markup
        box=box.SIMPLE_HEAD,
        padding=(0, gap - 1, 0, 0),
        title_justify="left",
        caption_justify="left",
        show_footer=footer,
    )


def span(values: np.ndarray) -> str:
    """Return "3" or "3-9": the smallest and the largest value."""
    low, high = int(values.min()), int(values.max())
    return f"{low}" if low == high else f"{low}-{high}"


def _entry(row: Mapping[str, Any], key: str) -> Any:
    """Return an entry of the row, or of its sweep values."""
    return row[key] if key in row else row.get("values", {}).get(key)


def _text(value: Any) -> str:
    """Return a text that is equal for equal values, also where they are lists or tables."""
    return json.dumps(value, sort_keys=True, default=str)


def _scalar(value: Any) -> Any:
    """Return what a cell of a table can hold: lists and tables of a scenario become text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return "" if value is None else value


def _varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the label and the keys of the sweep that vary among cells of one label."""
    keys = dict.fromkeys(key for row in rows for key in row.get("values", {}) if key != _SEED)
    seen: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for key in keys:
            seen.setdefault((key, row.get("label", "")), set()).add(_text(_entry(row, key)))
    return ["label", *(key for key in keys if any(k == key and len(v) > 1 for (k, _), v in seen.items()))]


def _check_group(members: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Refuse a group whose mean would hide a setting, or count one cell twice."""
    name = ", ".join(str(_entry(members[0], key)) for key in keys)
    for key in dict.fromkeys(key for row in members for key in row.get("values", {}) if key != _SEED):
        if len({_text(row.get("values", {}).get(key)) for row in members}) > 1:
            raise ValueError(f"cells of {name!r} differ in {key!r} as well as in the seed: group by it")
    seeds = [_text(row.get("seed")) for row in members]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"rows of {name!r} hold one seed twice")


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that some row has: the usual ones first, then others as they come."""
    found = dict.fromkeys(
        name for row in rows for name, value in row.items() if name not in _NOT_METRICS and _is_number(value)
    )
    after = sorted({int(rounds) for row in rows for rounds in row.get("accuracy_after") or {}})
    names: list[str] = []
    for name in _ORDER:
        names += [f"after_{rounds}" for rounds in after] if name == "accuracy_after" else [name] * (name in found)
    return names + [name for name in found if name not in _ORDER]


def _metric(row: Mapping[str, Any], name: str) -> float | None:
    """Return a metric of the row, None where it has none."""
    if name in row:
        value = row[name]
    elif name.startswith("after_"):
        # JSON turns the round numbers into text.
        after = {int(rounds): accuracy for rounds, accuracy in (row.get("accuracy_after") or {}).items()}
        value = after.get(int(name.removeprefix("after_")))
    else:
        value = None
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _render(df: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool]]:
    """Return the titles, the cells and whether each column holds numbers, with mean and sd joined."""
    titles, columns, numeric = [], [], []
    for name in map(str, df.columns):
        metric = name.removesuffix("_mean")
        if metric != name and f"{metric}_sd" in df.columns:
            titles.append(title_of(metric))
            columns.append([_mean_sd(metric, m, s) for m, s in zip(df[name], df[f"{metric}_sd"])])
            numeric.append(True)
        elif not (name.endswith("_sd") and f"{name.removesuffix('_sd')}_mean" in df.columns):
            titles.append(_TITLES.get(name, name))
            columns.append([str(value) for value in df[name]])
            numeric.append(all(_is_number(value) for value in df[name]))
    return titles, [list(line) for line in zip(*columns)], numeric


def title_of(metric: str) -> str:
    """Return the heading of a metric, of one for a single value of a key (see `pivot`) that value."""
    if ": " in metric:
        return metric.partition(": ")[0]
    if metric in _TITLES:
        return _TITLES[metric]
    if metric.startswith("after_"):
        return f"after {metric.removeprefix('after_')} rounds (%)"
    return f"{metric.replace('_', ' ')} (%)" if _is_share(metric) else metric.replace("_", " ")


def _is_share(metric: str) -> bool:
    """Whether a metric is a fraction that is shown in per cent."""
    return metric in {"best", "final", "ensemble", "agreement"} or metric.startswith("after_") or "accuracy" in metric


def _mean_sd(metric: str, mean: float, sd: float) -> str:
    """Return "71.3 ± 1.2" in the unit of the metric; without a deviation if there is none to speak of."""
    if np.isnan(mean):
        return _MISSING
    metric, unit = metric.rpartition(": ")[2], ""
    if metric.startswith("bytes"):
        factor, name, digits = _byte_unit(mean)
        mean, sd, unit = mean / factor, sd / factor, f" {name}"
        sd = sd or np.nan  # volumes are counted, not measured: most are the same for every seed
    elif _is_share(metric):
        mean, sd, digits = 100 * mean, 100 * sd, 1
    else:
        digits = 1 if metric.endswith("seconds") else 0 if abs(mean) >= 100 or float(mean).is_integer() else 3
    spread = "" if np.isnan(sd) else f" ± {sd:.{digits}f}"
    return f"{mean:.{digits}f}{spread}{unit}"


_MARKDOWN = {character: f"\\{character}" for character in "\\|*`<"}
_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
}


def _escape(text: str, replacements: Mapping[str, str]) -> str:
    """Return one line of text with every special character replaced."""
    return "".join(replacements.get(character, character) for character in " ".join(text.split()))
