"""The benchmark runs, and its JSON has the form that is promised. How fast anything is, is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = Path(__file__).resolve().parents[1] / "benchmarks" / "engine.py"


def run(tmp_path, *options):
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(ENGINE), "--quick", "--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def check_form(report):
    assert {"date", "machine", "versions", "rows", "sides"} <= report.keys()
    assert report["machine"]["cores"] >= 1 and len(report["machine"]["load_average_before"]) == 3
    assert report["versions"]["torch"] and report["versions"]["flwr"]
    for row in report["rows"]:
        assert {"workload", "against", "ours_s", "theirs_s", "ratio", "bar", "met"} <= row.keys()
        if row["ours_s"] is not None and row["theirs_s"] is not None and "unit" not in row:
            exact = (
                row["ours_s"] / row["theirs_s"] if str(row["bar"]).startswith("<=") else row["theirs_s"] / row["ours_s"]
            )
            assert row["ratio"] == pytest.approx(exact, rel=5e-3)


@pytest.mark.slow
def test_a_workload_with_and_without_frameworks(tmp_path):
    report, text = run(tmp_path, "--only", "W2")
    check_form(report)
    rows = {row["against"]: row for row in report["rows"] if row["workload"] == "W2"}
    assert set(rows) == {"stock Flower", "bare loop in 2 processes", "pfl-research"}
    assert rows["stock Flower"]["ratio"] > 0 and rows["bare loop in 2 processes"]["ratio"] > 0
    if report["versions"]["pfl"] is None:
        assert rows["pfl-research"]["met"] is None and "not installed" in rows["pfl-research"]["note"]
    scenario = report["sides"]["W2/scenario"]
    assert len(scenario["seconds"]) == 2 and scenario["start"][0] > 0 and scenario["others"][0] >= 0
    assert report["sides"]["W2/sequential"]["trainer"] == "sequential"
    assert "stock Flower" in text


@pytest.mark.slow
@pytest.mark.parametrize("part", ["W1", "W5", "W6", "start"])
def test_the_other_parts(tmp_path, part):
    report, _ = run(tmp_path, "--only", part)
    check_form(report)
    failed = {name: side["error"] for name, side in report["sides"].items() if "error" in side}
    assert set(failed) <= {"W1/pfl"}, failed


@pytest.mark.slow
def test_the_part_for_gpus_on_a_cpu(tmp_path):
    report, _ = run(tmp_path, "--gpu", "--device", "cpu", "--only", "GPU-W2,GPU-W5")
    check_form(report)
    assert len(report["rows"]) == 6 and all(row["ratio"] > 0 for row in report["rows"])
    trainers = [row for row in report["rows"] if row["against"] == "sequential trainer"]
    assert len(trainers) == 2 and all(row["ours_clients_per_s"] > 0 for row in trainers)
    assert all(row["theirs_share_of_peak"] > 0 for row in trainers)


def test_without_a_gpu_the_part_for_gpus_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(ENGINE), "--gpu"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3 and "no GPU here" in done.stderr


def test_a_workload_that_is_not_there(tmp_path):
    done = subprocess.run([sys.executable, str(ENGINE), "--only", "W9"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "W9" in done.stderr
