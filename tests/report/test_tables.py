import csv
import io

import numpy as np
import pytest
from rich.console import Console

from fedkd.report import (
    aggregate,
    console_table,
    human_bytes,
    to_csv,
    to_latex,
    to_markdown,
    write_tables,
)


def row(label, seed, best, alpha=0.1, **more):
    values = {"strategy.name": label, "partition.alpha": alpha, "run.seed": seed}
    return {"label": label, "values": values, "seed": seed, "whose": "server", "best": best, **more}


def printed(table, width=100, color=None):
    console = Console(width=width, file=io.StringIO(), force_terminal=bool(color), color_system=color)
    console.print(table)
    return console.file.getvalue()


def test_mean_and_sample_deviation_over_seeds():
    rows = [row("feddf", seed, best) for seed, best in enumerate([0.6, 0.7, 0.8])]

    (record,) = aggregate(rows, ["label"]).to_dict("records")

    assert record["seeds"] == 3
    assert record["best_mean"] == pytest.approx(0.7)
    assert record["best_sd"] == pytest.approx(0.1)  # sqrt((0.01 + 0 + 0.01) / 2)


def test_one_seed_shows_no_deviation():
    df = aggregate([row("feddf", 0, 0.6)])
    assert np.isnan(df["best_sd"][0])
    assert "60.0 |" in to_markdown(df)
    for text in (to_markdown(df), to_csv(df), to_latex(df)):
        assert "nan" not in text and "±" not in text and "pm" not in text


def test_cells_that_differ_in_more_than_the_seed_stay_apart():
    rows = [row("fd", s, 0.5 + a / 10 + s / 100, alpha=a) for a in (0.1, 1.0) for s in (0, 1)]

    df = aggregate(rows)

    assert list(df["partition.alpha"]) == [0.1, 1.0]
    assert list(df["seeds"]) == [2, 2]
    with pytest.raises(ValueError, match=r"partition\.alpha"):
        aggregate(rows, ["label"])


def test_a_key_that_only_names_the_label_gets_no_column():
    df = aggregate([row("fedavg", 0, 0.5), row("fd", 0, 0.4)])
    assert list(df.columns) == ["label", "whose", "seeds", "best_mean", "best_sd"]
    assert list(df["label"]) == ["fedavg", "fd"]  # as they came


def test_settings_that_are_lists_or_tables_can_be_swept():
    rows = [row("fd", 0, 0.5), row("fd", 0, 0.6)]
    rows[0]["values"]["models.student"], rows[1]["values"]["models.student"] = (
        ["cnn", "mlp"],
        {"cnn": 0.5, "mlp": 0.5},
    )
    assert list(aggregate(rows)["models.student"]) == ["cnn, mlp", "cnn: 0.5, mlp: 0.5"]


def test_accuracy_of_different_models_is_never_averaged():
    rows = [row("fd", 0, 0.5), row("fd", 1, 0.9) | {"whose": "clients"}]
    assert list(aggregate(rows, ["label"])["whose"]) == ["server", "clients"]


def test_bad_groups_are_refused():
    with pytest.raises(ValueError, match="one seed twice"):
        aggregate([row("fd", 0, 0.5), row("fd", 0, 0.5)])
    with pytest.raises(ValueError, match="'alpha'"):
        aggregate([row("fd", 0, 0.5)], ["alpha"])


def test_missing_metrics_are_left_out_and_rounds_may_be_text():
    rows = [
        row("fedavg", 0, 0.5, ensemble=None, accuracy_after={"10": 0.25, "2": 0.1}),
        row("fd", 0, 0.5, ensemble=0.75),
    ]

    df = aggregate(rows)

    assert [name for name in df.columns if name.endswith("_mean")] == [
        "best_mean", "after_2_mean", "after_10_mean", "ensemble_mean",
    ]  # fmt: skip
    assert np.isnan(df["ensemble_mean"][0]) and df["ensemble_mean"][1] == 0.75
    assert "–" in to_markdown(df)


def test_csv_has_plain_numbers():
    rows = [row("a,b", seed, 0.5, bytes_up=1_000_000 + seed) for seed in (0, 2)]
    (record,) = csv.DictReader(io.StringIO(to_csv(aggregate(rows))))
    assert record["label"] == "a,b"
    assert float(record["bytes_up_mean"]) == 1_000_001
    assert float(record["bytes_up_sd"]) == pytest.approx(2**0.5)


def test_markdown_and_latex_escape_what_they_must():
    df = aggregate([row("a|b_c & 50% {x} #1 $y\\", 0, 0.5)])
    assert r"a\|b_c & 50% {x} #1 $y\\ " in to_markdown(df)
    assert r"a|b\_c \& 50\% \{x\} \#1 \$y\textbackslash{} & server & 1 & 50.0 \\" in to_latex(df)


def test_markdown_columns_line_up():
    lines = to_markdown(aggregate([row("fedavg", 0, 0.5, seconds=1.0), row("fd", 0, 0.25, seconds=100.0)])).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1


def test_latex_is_booktabs_with_plus_minus():
    text = to_latex(aggregate([row("fd", s, b) for s, b in enumerate([0.6, 0.8])]))
    assert (
        text.index(r"\toprule") < text.index(r"\midrule") < text.index("70.0 $\\pm$ 14.1") < text.index(r"\bottomrule")
    )


def test_tables_are_written_whole(tmp_path):
    files = write_tables([row("fd", 0, 0.5)], tmp_path / "new", "results-0.1")
    assert [file.name for file in files] == ["results-0.1.md", "results-0.1.csv", "results-0.1.tex"]
    assert sorted(tmp_path.glob("new/*")) == sorted(files)  # no temporary file stays behind
    assert "50.0" in files[0].read_text()


def test_console_table_fits_80_columns_and_says_whose():
    rows = [
        row(
            "fedavg",
            s,
            0.5 + s / 100,
            final=0.5,
            ensemble=0.6,
            bytes_up=12_300_000,
            bytes_down=1_000,
            seconds=9.0,
        )
        for s in (0, 1, 2)
    ]
    text = printed(console_table(rows, "quickstart"), width=80)
    for part in ("quickstart", "fedavg", "server", "51.0±1.0", "60.0", "12.3 MB", "1.0 kB", "9.0", "3 seeds"):
        assert part in text
    assert "seeds" not in printed(console_table(rows[:1]))


def test_human_bytes_changes_unit_where_rounding_does():
    assert [human_bytes(n) for n in (1, 999.4, 999.6, 1_000, 999_949, 999_951, 10**12)] == [
        "1 B", "999 B", "1.0 kB", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 TB",
    ]  # fmt: skip
