"""How fast the engine is, every figure a ratio measured side by side.

    python benchmarks/engine.py [--only W1,W2] [--rounds N] [--repeat N] [--quick] [--gpu [--device cpu]] [--pfl FOLDER]
                                [--out FILE]

Every side (ours, stock Flower, pfl-research, bare PyTorch loops) runs in a fresh process of its own; the sides of a
workload take turns. See README.md here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import Bench, rounded, table
from common import workload as workload_of
from harness import machine, versions

from fedkd.environment import git_commit

HERE = Path(__file__).resolve().parent
SAME = 0.005
"""Accuracies that differ by no more count as equal."""

GPU_WORKLOADS = ("GPU-W2", "GPU-W3", "GPU-ResNet-8")

FLOWER, PFL, BARE = "stock Flower", "pfl-research", "bare loop in 2 processes"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the side that runs is stopped too
    chosen = GPU_PARTS if options.gpu else PARTS
    names = options.only.split(",") if options.only else list(chosen)
    if unknown := [name for name in names if name not in chosen]:
        print(f"there is no workload {unknown[0]}; there are {', '.join(chosen)}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(options.pfl),
        "git_commit": git_commit(),
        "rounds": options.rounds,
        "quick": options.quick,
    }
    print(json.dumps({key: report[key] for key in ("machine", "versions")}, indent=2), flush=True)
    if options.gpu and not report["machine"]["gpu"] and not options.device:
        print("no GPU here: the GPU part has not been run", file=sys.stderr)
        return 3
    began = time.monotonic()
    name = f"engine-{'gpu-' if options.gpu else ''}{report['date']}.json"
    out = Path(options.out) if options.out else HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedkd-benchmark-") as folder:
        bench = Bench(
            Path(folder),
            rounds=options.rounds,
            turns=1 if options.quick else options.repeat,
            quick=options.quick,
            device=options.device or "cuda",
            path=options.pfl,
            pfl=report["versions"]["pfl"] is not None,
        )
        for name in names:
            chosen[name](bench)
            report |= {"minutes": round((time.monotonic() - began) / 60, 1), "rows": bench.rows, "sides": bench.sides}
            out.write_text(json.dumps(report, indent=1) + "\n")  # part by part, should the rest be stopped
    print(table(bench.rows))
    print(f"\nwritten to {out}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the engine side by side with others.")
    parser.add_argument("--only", default="", help=f"some of {', '.join(PARTS)}; with --gpu of {', '.join(GPU_PARTS)}")
    parser.add_argument("--rounds", type=int, default=10, help="rounds to measure, of each side and repetition")
    parser.add_argument("--repeat", type=int, default=2, help="fresh processes of each side, taking turns")
    parser.add_argument("--quick", action="store_true", help="tiny versions: shows that it works, measures nothing")
    parser.add_argument("--gpu", action="store_true", help="the part for a machine with a GPU, instead of the rest")
    parser.add_argument("--device", default="", help="with --gpu: another torch device, such as cpu to try the code")
    parser.add_argument("--pfl", default="", help="folder into which pfl was installed (pip install --target)")
    parser.add_argument("--out", default="", help="JSON file to write instead of results/engine-<date>.json")
    return parser.parse_args(arguments)


# --- the parts -----------------------------------------------------------------------------------------------


def w1(bench: Bench) -> None:
    for _ in range(bench.turns):
        # Rounds of milliseconds: many of them, and after the first ones, in which processes map the object store.
        bench.run("W1", "flower", "replies", "sums", "apps", "bare", "pfl", rounds=4 * bench.rounds, warmup=20)
    bench.compare("W1, every reply", FLOWER, "W1/replies", "W1/flower", at_least=10)
    bench.compare("W1, sums on the worker", FLOWER, "W1/sums", "W1/flower", at_least=25)
    bench.compare("W1, Flower's FedAvg on this engine", FLOWER, "W1/apps", "W1/flower")
    bench.compare("W1, every reply", BARE, "W1/replies", "W1/bare")
    bench.compare("W1, sums on the worker", BARE, "W1/sums", "W1/bare")
    bench.compare("W1, sums on the worker", PFL, "W1/sums", "W1/pfl", at_least=1)


def w1_large(bench: Bench) -> None:
    bench.run("W1-45MB", "flower", rounds=3, warmup=1)
    bench.run("W1-45MB", "replies", "sums", rounds=18, warmup=2, memory=True)
    bench.compare("W1 with 45 MB, every reply", FLOWER, "W1-45MB/replies", "W1-45MB/flower", at_least=5)
    bench.compare("W1 with 45 MB, sums on the worker", FLOWER, "W1-45MB/sums", "W1-45MB/flower", at_least=15)
    flat(bench, "W1 with 45 MB, every reply", "W1-45MB/replies")
    flat(bench, "W1 with 45 MB, sums on the worker", "W1-45MB/sums")


def w2(bench: Bench) -> None:
    for _ in range(bench.turns):
        bench.run("W2", "flower", "scenario")
        bench.run("W2", "scenario", label="W2/sequential", system={"trainer": "sequential"})
        bench.run("W2", "bare", "pfl")
    bench.compare("W2", FLOWER, "W2/scenario", "W2/flower", at_least=3.5)
    bench.compare("W2", BARE, "W2/scenario", "W2/bare", at_most=1.15)
    bench.compare("W2", PFL, "W2/scenario", "W2/pfl", at_least=1)
    for against, side in ((FLOWER, "flower"), (BARE, "bare"), (PFL, "pfl")):
        bench.compare("W2, one by one", against, "W2/sequential", f"W2/{side}")


def w3(bench: Bench) -> None:
    for _ in range(bench.turns):
        bench.run("W3", "flower", "scenario", "bare")
    bench.compare("W3", FLOWER, "W3/scenario", "W3/flower", at_least=1.7)
    bench.compare("W3", BARE, "W3/scenario", "W3/bare", at_most=0.8)


def w4(bench: Bench) -> None:
    for _ in range(bench.turns):
        bench.run("W4", "flower", "scenario", "bare")
    bench.compare("W4", FLOWER, "W4/scenario", "W4/flower", at_least=8)
    bench.compare("W4", BARE, "W4/scenario", "W4/bare", at_most=1.15)


def w5(bench: Bench) -> None:
    against = "teachers run on every batch"
    bench.run("W5", "reevaluated", rounds=2, warmup=1)
    bench.run("W5", "distilled", rounds=2, warmup=1)
    bench.run("W5", "distilled", rounds=2, warmup=1, label="W5/bf16", precision="bf16")
    for kind, key, bar in (("float32", "W5/distilled", 6), ("bf16", "W5/bf16", 8)):
        bench.compare(f"W5, {kind}", against, key, "W5/reevaluated", at_least=bar)
        found = [bench.sides.get(each, {}) for each in (key, "W5/reevaluated")]
        if all(side.get("real") for side in found):
            ours, theirs = (median(side["accuracy"]) for side in found)
            more = {"unit": "accuracy", "ratio": rounded(ours / theirs), "bar": f">= theirs - {SAME}"}
            title = f"W5, {kind}, accuracy on Fashion-MNIST"
            bench.row(title, against, ours, theirs, met=ours >= theirs - SAME, **more)


def w6(bench: Bench) -> None:
    few, many = "W6-10000/scenario", "W6-1000000/scenario"
    for _ in range(2 * bench.turns):  # rounds of less than a tenth of a second
        for workload in ("W6-10000", "W6-1000000"):
            bench.run(workload, "scenario", rounds=2 * bench.rounds, memory=True)
    bench.compare("W6, 1,000,000 clients", "10,000 clients", many, few, at_most=1.1)
    if all("peaks" in bench.sides.get(key, {}) for key in (few, many)):
        before, after = (max(p["driver"] + p["store"] for p in bench.sides[key]["peaks"]) for key in (few, many))
        more = {"unit": "MB, peak", "ratio": rounded(after / before), "bar": "< 200 MB more"}
        title = "W6, 1,000,000 clients: memory of the driver"
        bench.row(title, "10,000 clients", after, before, met=after - before < 200, **more)


def start(bench: Bench) -> None:
    for _ in range(bench.turns + 1):
        bench.run("W2", "flower", rounds=0, warmup=1, label="start/flower")
        for engine in ("ray", "inline"):
            bench.run("W2", "command", label=f"start/{engine}", system={"engine": engine})
    title, inline = "start to end of round 1, W2", "start/inline"
    bench.compare(title, FLOWER, "start/ray", "start/flower", at_most=0.65, of="start")
    if bench.sides.get(inline, {}).get("start"):
        bench.row(f"{title}, inline", "3 s", median(bench.sides[inline]["start"]), 3.0, at_most=1)


def memory(bench: Bench) -> None:
    bench.run("W2", "scenario", rounds=18, warmup=2, label="memory/W2", memory=True)
    flat(bench, "W2", "memory/W2")


def flat(bench: Bench, title: str, key: str) -> None:
    """Add rows that say whether memory is in the second half of twenty rounds as in the first, but for two rounds.

    Halves, because a round's peak depends on what happens to come home at the same time.
    """
    peaks = bench.sides.get(key, {}).get("peaks", [])
    for place in ("driver", "workers") if len(peaks) == 20 else ():
        before, after = (max(peak[place] for peak in part) for part in (peaks[2:10], peaks[10:]))
        row = f"{title}: memory of the {place}, rounds 11 to 20"
        bench.row(row, "rounds 3 to 10", after, before, at_most=1.05, unit="MB, peak")


PARTS: dict[str, Callable[[Bench], None]] = {
    "W1": w1,
    "W1-45MB": w1_large,
    "W2": w2,
    "W3": w3,
    "W4": w4,
    "W5": w5,
    "W6": w6,
    "start": start,
    "memory": memory,
}


def gpu(bench: Bench, workload: str) -> None:
    limits = "GPU/limits"
    if limits not in bench.sides:
        bench.run(workload, "limits", rounds=0, label=limits, device=bench.device, workloads=list(GPU_WORKLOADS))
    trainers = {
        "sequential": {"trainer": "sequential"},
        "vectorised": {"trainer": "vectorised"},
        "graphs": {"trainer": "vectorised", "graphs": True},
    }
    for precision in ("fp32", "bf16"):
        keys = {trainer: f"{workload}/{precision}/{trainer}" for trainer in trainers}
        for _ in range(bench.turns):
            for trainer, settings in trainers.items():
                system = {"engine": "inline", "device": bench.device, "cohort": 100} | settings
                client = {"precision": precision}
                bench.run(workload, "scenario", label=keys[trainer], system=system, client=client)
        bar = 10 if (workload, precision) == ("GPU-W2", "fp32") else 0
        title = f"{workload}, {precision}, vectorised"
        bench.compare(title, "sequential trainer", keys["vectorised"], keys["sequential"], at_least=bar)
        if bench.rows[-1]["ratio"] and "peak" in bench.sides[limits]:
            for whose, trainer in (("ours", "vectorised"), ("theirs", "sequential")):
                bench.rows[-1] |= speed(bench, whose, workload, keys[trainer], precision)
        bench.compare(f"{title}, CUDA graphs", "without graphs", keys["graphs"], keys["vectorised"])


def gpu_distillation(bench: Bench) -> None:
    for precision in ("fp32", "bf16"):
        keys = {graphs: f"GPU-W5/{precision}/{'graphs' if graphs else 'plain'}" for graphs in (False, True)}
        for graphs, key in keys.items():
            system = {"engine": "inline", "device": bench.device, "graphs": graphs}
            bench.run("W5", "distilled", rounds=2, warmup=1, label=key, precision=precision, system=system)
        bench.compare(f"GPU-W5, {precision}, CUDA graphs", "without graphs", keys[True], keys[False])


def speed(bench: Bench, whose: str, workload: str, key: str, precision: str) -> dict[str, Any]:
    """Return clients per second, and the share of the device's peak that they are."""
    limits = bench.sides["GPU/limits"]
    per_second = workload_of(workload, bench.quick).selected / median(bench.sides[key]["seconds"])
    share = per_second * limits["operations"][workload] / limits["peak"][precision]
    return {f"{whose}_clients_per_s": rounded(per_second), f"{whose}_share_of_peak": rounded(share)}


GPU_PARTS: dict[str, Callable[[Bench], None]] = {
    **{name: partial(gpu, workload=name) for name in GPU_WORKLOADS},
    "GPU-W5": gpu_distillation,
}

if __name__ == "__main__":
    sys.exit(main())
