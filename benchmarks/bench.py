"""Runs sides in turn, keeps what they say, and makes rows of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import workload as workload_of
from common import write_data
from harness import SideFailed, run_command, run_side

NO_PFL = "pfl is not installed; see README.md"


@dataclass
class Bench:
    """Runs sides, and collects rows.

    Parameters
    ----------
    folder : Path
        For data.
    rounds : int
        Rounds to measure, unless a part wants another number.
    turns : int
        How often each side is run, in a process of its own.
    quick : bool
        Tiny versions.
    device : str
        Of the GPU part.
    path : str
        Further folder of packages.
    pfl : bool
        Whether pfl is installed.
    """

    folder: Path
    rounds: int
    turns: int
    quick: bool = False
    device: str = "cuda"
    path: str = ""
    pfl: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    sides: dict[str, Any] = field(default_factory=dict)

    def data(self, workload: str) -> Path:
        """Return the folder with the data of a workload, written at the first call."""
        folder = self.folder / workload
        if not folder.exists():
            write_data(folder, workload_of(workload, self.quick))
        return folder

    def run(
        self, workload: str, *names: str, rounds: int | None = None, warmup: int = 3, label: str = "", **more: Any
    ) -> None:
        """Run sides once each, in turn, and keep what they say as ``self.sides["<workload>/<side>"]``.

        Parameters
        ----------
        workload : str
            The workload.
        *names : str
            The sides; ``command`` is ``fedkd run``, until its first round is over.
        rounds, warmup : int
            Rounds to measure (default: as the command line says), and before them.
        label : str
            Key of the result instead of workload and side.
        **more
            Options of the side.
        """
        wanted = self.rounds if rounds is None else rounds
        length = {"rounds": min(wanted, 2), "warmup": 1} if self.quick else {"rounds": wanted, "warmup": warmup}
        place = workload, self.data(workload)
        common = {"quick": self.quick, "path": self.path, "env": {"FEDKD_CACHE": str(self.folder / "cache")}}
        for name in names:
            key = label or f"{workload}/{name}"
            if "error" in self.sides.get(key, {}):
                continue
            try:
                if name == "pfl" and not self.pfl:
                    raise SideFailed(NO_PFL)
                if name == "command":
                    result = run_command(*place, **common, **more)
                else:
                    result = run_side(name, *place, **common, **length, **more)
            except SideFailed as failure:
                self.sides[key] = {"error": str(failure)}
                print(f"  {key}: {failure}", file=sys.stderr, flush=True)
                continue
            seconds = result.get("seconds")
            took = f"{median(seconds):.4f} s a round" if seconds else f"round 1 after {result.get('start', 0.0):.2f} s"
            spent = ", ".join(f"{kind} {value:.3f}" for kind, value in result.get("core_seconds", {}).items())
            print(f"  {key}: {took} (core seconds: {spent}); others used {result['others']} cores", flush=True)
            self._keep(key, result)

    def _keep(self, key: str, result: dict[str, Any]) -> None:
        kept = self.sides.setdefault(key, {"seconds": [], "start": [], "others": []})
        kept["seconds"] += [round(seconds, 5) for seconds in result.pop("seconds", [])]
        for name in ("start", "others"):
            if name in result:
                kept[name].append(round(result.pop(name), 3))
        kept |= {name: value for name, value in result.items() if name not in ("first", "window") and value != []}

    def compare(
        self,
        title: str,
        against: str,
        ours: str,
        theirs: str,
        *,
        at_least: float = 0.0,
        at_most: float = 0.0,
        of: str = "seconds",
    ) -> None:
        """Add a row: how many times faster ours is (`at_least`, or no bar), or its share of their time (`at_most`)."""
        missing = [key for key in (ours, theirs) if not self.sides.get(key, {}).get(of)]
        if missing:
            reason = self.sides.get(missing[0], {}).get("error", "not measured")
            self.row(title, against, None, None, at_least=at_least, at_most=at_most, note=f"{missing[0]}: {reason}")
            return
        mine, other = (median(self.sides[key][of]) for key in (ours, theirs))
        busy = max([*self.sides[ours]["others"], *self.sides[theirs]["others"]], default=0.0)
        self.row(title, against, mine, other, at_least=at_least, at_most=at_most, others=busy)

    def row(
        self,
        title: str,
        against: str,
        ours: float | None,
        theirs: float | None,
        *,
        at_least: float = 0.0,
        at_most: float = 0.0,
        **more: Any,
    ) -> None:
        """Add a row of two numbers."""
        ratio = None
        if ours is not None and theirs is not None:
            ratio = ours / theirs if at_most else theirs / ours
        met = None
        if ratio is not None and (at_least or at_most):
            met = ratio >= at_least if at_least else ratio <= at_most
        self.rows.append(
            {
                "workload": title,
                "against": against,
                "ours_s": rounded(ours),
                "theirs_s": rounded(theirs),
                "ratio": rounded(ratio),
                "bar": f">= {at_least:g}" if at_least else f"<= {at_most:g}" if at_most else None,
                "met": met,
                **more,
            }
        )


def rounded(value: float | None) -> float | None:
    """Return a number with four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    heads = ("workload", "against", "ours_s", "theirs_s", "ratio", "bar", "met")
    words = {"None": "-", "True": "yes", "False": "NO"}
    lines = [heads, *(tuple(words.get(str(row[head]), str(row[head])) for head in heads) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = ["", *("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)]
    notes = [f"{row['workload']} against {row['against']}: {row['note']}" for row in rows if row.get("note")]
    notes += [f"{row['workload']}: {_speeds(row)}" for row in rows if "ours_share_of_peak" in row]
    return "\n".join([*text, *notes])


def _speeds(row: dict[str, Any]) -> str:
    """Return what a row of the GPU part says beside its times."""
    shares = ((row[f"{whose}_clients_per_s"], row[f"{whose}_share_of_peak"]) for whose in ("ours", "theirs"))
    return " against ".join(f"{clients:g} clients a second, {share:.2%} of the peak" for clients, share in shares)
