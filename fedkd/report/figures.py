"""Learning curves and partition figures, as PNG and SVG: the same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision; without its yellow, lost on white.
_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_DASHES = ["-", (0, (4, 1.5)), (0, (1, 1.2))]
_INK = "#333333"

Curve = Sequence[tuple[int, float] | tuple[int, float, float]]

ROUNDS = "communication round"


def learning_curves(
    curves: Mapping[str, Curve | Sequence[Curve]],
    path: str | Path,
    title: str = "",
    ylabel: str = "test accuracy",
    *,
    xlabel: str = ROUNDS,
    percent: bool = True,
) -> list[Path]:
    """Draw one line per label, named at its end.

    Parameters
    ----------
    curves : Mapping[str, Curve | Sequence[Curve]]
        For each label a list of (round, value), or one such list per seed: then the line is the mean over
        seeds and the band is one sample standard deviation to each side. With a third number a point is drawn
        there instead of at its round, such as (round, value, simulated seconds).
    path : str or Path
        Where to; ``.png`` and ``.svg`` are appended (or replace either of them).
    title : str
        Heading; empty = none.
    ylabel : str
        What the values are.
    xlabel : str
        What the third numbers are.
    percent : bool
        Show fractions in per cent; False for losses.

    Returns
    -------
    list[Path]
        The PNG and the SVG.

    Raises
    ------
    ValueError
        No curve has a point.
    """
    lines = {label: _mean_and_sd(curve) for label, curve in curves.items()}
    lines = {label: line for label, line in lines.items() if len(line[0])}
    if not lines:
        raise ValueError("no curve has a point to draw")
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

        height = max(3.6, 0.8 + 0.22 * len(lines))  # room for all names, one above the other
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.subplots()
        for i, (places, mean, sd) in enumerate(lines.values()):
            color, dashes = _PALETTE[i % len(_PALETTE)], _DASHES[i // len(_PALETTE) % len(_DASHES)]
            axes.fill_between(places, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
            axes.plot(places, mean, color=color, linestyle=dashes, linewidth=1.8, solid_capstyle="round")
            axes.plot(places[-1:], mean[-1:], color=color, marker="o", markersize=4, clip_on=False)
        first, last = min(line[0][0] for line in lines.values()), max(line[0][-1] for line in lines.values())
        axes.set_xlim(first - (0.02 * (last - first) or 0.5), last)
        if xlabel == ROUNDS:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_xlabel(xlabel, parse_math=False)
        axes.set_ylabel(ylabel, parse_math=False)
        axes.set_title(title, parse_math=False, loc="left")
        axes.grid(axis="y")
        _name_ends(figure, axes, lines)
        return _save(figure, path)


def partition_figure(counts: np.ndarray, classes: Sequence[str], path: str | Path, title: str = "") -> list[Path]:
    """Draw how many samples of each class each client has.

    Bubbles, whose area is the number of samples, for up to 40 clients and 20 classes; a heat map beyond.

    Parameters
    ----------
    counts : np.ndarray
        Samples, integers [clients, C].
    classes : Sequence[str]
        Names of the C classes.
    path : str or Path
        Where to; ``.png`` and ``.svg`` are appended (or replace either of them).
    title : str
        Heading; empty = none.

    Returns
    -------
    list[Path]
        The PNG and the SVG.

    Raises
    ------
    ValueError
        `counts` is not [clients, C] for the C names in `classes`, or has no client.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != len(classes) or not counts.size:
        raise ValueError(f"counts have shape {counts.shape}, expected [clients >= 1, {len(classes)}]")
    with _style():
        draw = _bubbles if counts.shape[0] <= 40 and counts.shape[1] <= 20 else _heat_map
        figure, axes = draw(counts)
        _ticks(axes, counts, classes)
        axes.set_xlabel("client")
        axes.set_ylabel("class")
        axes.set_title(title, parse_math=False, loc="left")
        return _save(figure, path)


def _mean_and_sd(curve: Curve | Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where points are drawn, and mean and sample standard deviation over seeds (0 for one), each [R]."""
    nested: Any = curve
    several = len(nested) > 0 and (len(nested[0]) == 0 or not np.isscalar(nested[0][0]))
    seeds: Sequence[Curve] = nested if several else [nested]
    found: dict[int, list[tuple[float, float]]] = {}
    for seed in seeds:
        for step, value, *place in seed:
            if value is not None and np.isfinite(value):
                found.setdefault(int(step), []).append((float(place[0] if place else step), float(value)))
    points = [np.array(found[step]) for step in sorted(found)]
    places = np.array([each[:, 0].mean() for each in points])
    mean = np.array([each[:, 1].mean() for each in points])
    sd = np.array([each[:, 1].std(ddof=1) if len(each) > 1 else 0.0 for each in points])
    return places, mean, sd


def _name_ends(figure: Figure, axes: Axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Write every label to the right of the plot, level with its line's end where labels do not collide."""
    low, high = axes.get_ylim()
    inches = figure.get_figheight() - 0.8
    gap = 0.2 / inches  # of the axes' height: one line of text
    ends = [(line[1][-1] - low) / (high - low) for line in lines.values()]
    heights = _spread(ends, gap)
    last = max(line[0][-1] for line in lines.values())
    for i, ((label, (places, mean, _)), height) in enumerate(zip(lines.items(), heights)):
        axes.annotate(
            label,
            xy=(places[-1], mean[-1]),
            xycoords="data",
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            ha="left",
            color=_INK,
            parse_math=False,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0.0, 0.5),  # to the left end of the name, not under it
                "color": _PALETTE[i % len(_PALETTE)],
                "linewidth": 0.9,
                "shrinkA": 2,
                "shrinkB": 2,
                # A line that ends early is led to its name by dots, so that nobody reads the leader as data.
                "linestyle": "-" if places[-1] == last else ":",
            },
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights in [0, 1] near the wanted ones, in their order and at least `gap` apart where that fits.

    Examples
    --------
    >>> [round(h, 2) for h in _spread([0.5, 0.52, 0.9], 0.1)]
    [0.46, 0.56, 0.9]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Blocks of names that touch: [sum of the heights wanted for the lowest member, size]; it gets their mean.
    blocks: list[list[float]] = []
    for i in order:
        blocks.append([wanted[i], 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] + blocks[-2][1] * gap > blocks[-1][0] / blocks[-1][1]:
            total, size = blocks.pop()
            blocks[-1][0] += total - size * blocks[-1][1] * gap
            blocks[-1][1] += size
    heights = [total / size + k * gap for total, size in blocks for k in range(int(size))]
    # Names at the rims are pushed back inside, upper ones first.
    for k in range(len(heights) - 1, -1, -1):
        heights[k] = min(heights[k], 1.0 if k == len(heights) - 1 else heights[k + 1] - gap)
    for k in range(len(heights)):
        heights[k] = max(heights[k], 0.0 if k == 0 else heights[k - 1] + gap)
    result = [0.0] * len(wanted)
    for i, height in zip(order, heights):
        result[i] = height
    return result


def _bubbles(counts: np.ndarray) -> tuple[Figure, Axes]:
    """Draw circles whose area is the number of samples; the largest one fills its place in the grid."""
    from matplotlib.figure import Figure

    clients, num_classes = counts.shape
    cell = 0.3  # inches from one client, or class, to the next
    figure = Figure(figsize=(max(clients * cell, 2.4) + 2.4, max(num_classes * cell, 1.5) + 1.1), layout="constrained")
    axes = figure.subplots()
    peak = max(int(counts.max()), 1)
    area = (0.92 * cell * 72) ** 2  # of the largest circle, square points
    x, y = np.nonzero(counts)
    axes.scatter(x, y, s=area * counts[x, y] / peak, color=_PALETTE[0], alpha=0.85, linewidths=0)
    for client in np.flatnonzero(counts.sum(axis=1) == 0):
        axes.axvspan(client - 0.5, client + 0.5, color="#eeeeee", linewidth=0)
    axes.set_xlim(-0.6, clients - 0.4)
    axes.set_ylim(num_classes - 0.4, -0.6)  # first class on top, as in a table
    axes.set_aspect("equal")
    axes.grid(True)
    sizes = sorted({n for n in (_round_number(peak * share) for share in (0.05, 0.3, 1.0)) if n > 0})
    handles = [
        axes.scatter([], [], s=area * n / peak, color=_PALETTE[0], alpha=0.85, linewidths=0, label=f"{n:,}")
        for n in sizes
    ]
    axes.legend(
        handles=handles, title="samples", loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False,
        labelspacing=1.0, handletextpad=0.9, borderaxespad=0, alignment="left",
    )  # fmt: skip
    return figure, axes


def _round_number(value: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, … that does not exceed `value`; 0 below 1.

    Examples
    --------
    >>> [_round_number(v) for v in (0.4, 3, 49, 50, 999)]
    [0, 2, 20, 50, 500]
    """
    if value < 1:
        return 0
    power = 10 ** int(np.floor(np.log10(value)))
    return int(max(step * power for step in (1, 2, 5) if step * power <= value))


def _heat_map(counts: np.ndarray) -> tuple[Figure, Axes]:
    """Draw one coloured cell per client and class; cells without samples stay grey."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    clients, num_classes = counts.shape
    figure = Figure(
        figsize=(
            float(np.clip(clients * 0.08, 5, 12)) + 1.2,
            float(np.clip(num_classes * 0.2, 2.4, 9)) + 0.9,
        ),
        layout="constrained",
    )
    axes = figure.subplots()
    # The square root keeps small counts apart where one client is very large.
    norm = PowerNorm(0.5, vmin=0, vmax=max(int(counts.max()), 1))
    cells = np.ma.masked_equal(counts.T, 0)
    image = axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        norm=norm,
        cmap=colormaps["viridis_r"].with_extremes(bad="#eeeeee"),
    )
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30)
    bar.set_label("samples (grey: none)")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure, axes


def _ticks(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Name as many clients and classes as can be read."""
    clients, num_classes = counts.shape
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if clients <= 25 * step or step == 10**9)
    axes.set_xticks(range(0, clients, every), [str(i) for i in range(0, clients, every)])
    every = max(1, -(-num_classes // 45))
    shown = range(0, num_classes, every)
    axes.set_yticks(shown, [_short(classes[i]) for i in shown], parse_math=False)
    axes.tick_params(length=0)


def _short(name: str, width: int = 18) -> str:
    """Return the name, cut to `width` characters."""
    return name if len(name) <= width else name[: width - 1] + "…"


@contextmanager
def _style() -> Iterator[None]:
    """Draw with matplotlib's defaults and ours, whatever the user's own settings say, and restore those."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "fedkd",  # ids in the SVG are random without it
                "font.size": 10,
                "axes.titlesize": 11,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": "#999999",
                "axes.labelcolor": _INK,
                "axes.titlecolor": _INK,
                "axes.axisbelow": True,
                "xtick.color": _INK,
                "ytick.color": _INK,
                "grid.color": "#e4e4e4",
                "grid.linewidth": 0.7,
            }
        )
        yield


def _save(figure: Figure, path: str | Path) -> list[Path]:
    """Write PNG and SVG without dates or versions; without pyplot a figure needs no window system (Agg)."""
    path = Path(path)
    # Not `with_suffix`: a stem such as "alpha-0.1" has a dot of its own.
    stem = path.name.removesuffix(".png").removesuffix(".svg")
    files = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        files.append(write_atomic(path.with_name(f"{stem}.{kind}"), buffer.getvalue()))
    return files
