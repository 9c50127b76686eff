"""Tables of sweeps from the runs there are."""

import csv
import io
import json
import shutil

import pytest

from fedkd import run
from fedkd.cli import main
from fedkd.errors import RunError, ScenarioError
from fedkd.results import collect, gaps, read_tables, write
from fedkd.run_folder import folder_of
from fedkd.scenario_file import load
from fedkd.sweep import expand

SCENARIO = """
description = "two methods"
[data]
source = "synthetic"
options = { classes = 4, dimensions = 12, train = 300, test = 60, separation = 3.0 }
[partition]
clients = 5
alpha = 0.5
test = 0.2
[models]
student = "mlp"
options = { hidden = [8] }
[system]
engine = "inline"
server_threads = 1
trainer = "sequential"
[run]
rounds = 2
evaluate_clients = "all"
[sweep]
"partition.alpha" = [0.5, 5.0]
"run.seed" = [0, 1]
[[sweep.cases]]
label = "FedAvg"
strategy.name = "fedavg"
[[sweep.cases]]
label = "FD"
strategy.name = "fd"
"""


class Stop(run.Listener):
    """Fails or interrupts a run after its first round."""

    def __init__(self, error):
        self.error = error

    def event(self, event):
        if event["event"] == "round":
            raise self.error


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory):
    """A sweep of eight cells: one is missing, one has failed, one was stopped."""
    folder = tmp_path_factory.mktemp("swept")
    path, out = folder / "two.toml", folder / "runs"
    path.write_text(SCENARIO)
    cells = expand(load(path))
    for number, cell in enumerate(cells):
        if number == 3:
            with pytest.raises(RunError):
                run.execute(cell.scenario, out=out, listener=Stop(ValueError("no luck")))
        elif number == 5:
            with pytest.raises(KeyboardInterrupt):
                run.execute(cell.scenario, out=out, listener=Stop(KeyboardInterrupt()))
        elif number != 6:
            run.execute(cell.scenario, out=out)
    return folder


@pytest.fixture
def swept(swept_once, tmp_path):
    """A copy of that sweep, to be changed."""
    shutil.copytree(swept_once, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "two.toml"
    return path, expand(load(path)), tmp_path / "runs"


def test_every_run_is_found_with_its_state(swept):
    _, cells, out = swept

    found = collect(cells, out)

    states = ["finished", "finished", "finished", "failed", "finished", "stopped", "missing", "finished"]
    assert [one.state for one in found] == states
    assert gaps(found) == [
        "FedAvg, alpha 5.0, seed 1: failed after round 1: ValueError: no luck",
        "FD, alpha 0.5, seed 1: stopped after round 1 of 2",
        "FD, alpha 5.0, seed 0: not run",
    ]
    assert found[0].row["values"] == {"case": "FedAvg", "partition.alpha": 0.5, "run.seed": 0}


def test_tables_say_which_runs_are_not_in_them(swept, tmp_path):
    _, cells, out = swept

    files = write(collect(cells, out), tmp_path / "docs", "two", across="partition.alpha", about="two methods")

    assert [file.name for file in files] == ["two.md", "two.csv", "two.tex", "two-alpha.md", "two.json"]
    text = files[0].read_text()
    assert "5 of 8 runs are finished. Not in the table:\n\n- FedAvg, alpha 5.0, seed 1: failed" in text
    lines = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [(line["label"], line["partition.alpha"], line["seeds"]) for line in lines] == [
        ("FedAvg", "0.5", "2"),
        ("FedAvg", "5.0", "1"),
        ("FD", "0.5", "1"),
        ("FD", "5.0", "1"),
    ]
    content = json.loads(files[4].read_text())
    assert (content["scenario"], content["about"], len(content["table"])) == ("two", "two methods", 4)
    assert [one["state"] for one in content["runs"]].count("finished") == 5
    assert content["runs"][3]["reason"].endswith("ValueError: no luck")
    assert content["runs"][0]["curve"][-1][1] == content["runs"][0]["final"]
    assert sum(one["runs"] for one in content["conditions"]) == 5
    assert content["conditions"][0]["packages"]["torch"]


def test_columns_say_whose_accuracy_they_show(swept, tmp_path):
    _, cells, out = swept

    (md, *_), found = write(collect(cells, out), tmp_path, "two"), collect(cells, out)

    head = md.read_text().splitlines()[0]
    for title in (
        "whose accuracy", "best (%)", "final (%)", "ensemble (%)", "clients, global test (%)",
        "worst tenth, global test (%)", "clients, own test (%)", "worst tenth, own test (%)", "up", "down", "seconds",
    ):  # fmt: skip
        assert title in head
    average, distilled = found[0], found[4]
    local = average.result.summary["predictors"]["clients-local"]
    assert (average.row["own_accuracy"], average.row["own_worst_accuracy"]) == (
        local["accuracy"],
        local["worst_decile"],
    )
    assert "clients_accuracy" not in average.row
    assert distilled.row["clients_accuracy"] == distilled.row["final"] and distilled.row["whose"] == "clients"
    assert distilled.row["clients_worst_accuracy"] <= distilled.row["clients_accuracy"]


def test_one_key_of_the_sweep_side_by_side(swept, tmp_path):
    _, cells, out = swept

    write(collect(cells, out), tmp_path, "two", across="partition.alpha", metric="own_accuracy")

    lines = (tmp_path / "two-alpha.md").read_text().splitlines()
    assert lines[0] == "clients, own test (%), mean ± standard deviation over seeds:"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "label", "whose accuracy", "alpha 0.5", "alpha 5.0",
    ]  # fmt: skip
    assert " ± " in lines[4] and len(lines) == 6


def test_a_run_that_was_made_again_counts_once(swept):
    _, cells, out = swept
    again = run.execute(cells[0].scenario, out=out, fresh=True)
    first = folder_of(cells[0].scenario, out, fresh=False)

    assert again.folder.name == f"{first.name}-2"
    assert collect(cells, out)[0].result.folder == again.folder
    (again.folder / "summary.json").unlink()
    assert collect(cells, out)[0].result.folder == first


def test_the_command_makes_a_table_of_what_there_is(swept, tmp_path, capsys):
    path, _, out = swept

    code = main(["table", str(path), "--out", str(out), "--to", str(tmp_path / "docs"), "--across", "partition.alpha"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "no result: FedAvg, alpha 5.0, seed 1: failed after round 1: ValueError: no luck" in printed
    assert "5 of 8 runs" in printed and (tmp_path / "docs" / "two-alpha.md").exists()


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--across", "partition.alhpa"], ["no row has 'partition.alhpa'", "--across"]),
        (["--across", "partition.alpha", "--metric", "acuracy"], ["no row has the metric 'acuracy'; there are best"]),
        (["--set", "run.rounds=9"], ["no run of two is finished", "those of the runs"]),
    ],
)
def test_what_there_is_no_table_of(swept, capsys, more, parts):
    path, _, out = swept

    assert main(["table", str(path), "--out", str(out), *more]) == 2

    errors = capsys.readouterr().err
    for part in parts:
        assert part in errors


def test_runs_of_an_earlier_table_count_as_if_they_were_here(swept, tmp_path):
    _, cells, out = swept
    first = write(collect(cells, out), tmp_path / "first", "two")
    earlier = read_tables([first[-1]])

    assert [one.state for one in collect(cells, tmp_path / "elsewhere")] == ["missing"] * 8
    again = write(collect(cells, tmp_path / "elsewhere", earlier), tmp_path / "again", "two")

    ours, theirs = (json.loads(files[-1].read_text()) for files in (again, first))
    assert [one for one in ours["runs"] if one["state"] == "finished"] == [
        one for one in theirs["runs"] if one["state"] == "finished"
    ]
    assert (ours["table"], ours["conditions"]) == (theirs["table"], theirs["conditions"])
    assert again[1].read_text() == first[1].read_text()


def test_what_lacks_in_an_earlier_table_is_added_to_it(swept, tmp_path):
    _, cells, out = swept
    first = write(collect(cells, out), tmp_path / "first", "two")
    more = tmp_path / "more"
    new = run.execute(cells[6].scenario, out=more)
    own = run.execute(cells[0].scenario, out=more, fresh=True)

    found = collect(cells, more, read_tables([first[-1]]))

    assert [one.finished for one in found] == [True, True, True, False, True, False, True, True]
    assert (found[6].result.folder, found[0].result.folder) == (new.folder, own.folder)  # folders come first
    assert found[1].result is None and found[1].row["bytes_up"] > 0


def test_tables_from_before_runs_told_their_surroundings_can_be_added(swept, tmp_path):
    _, cells, out = swept
    file = write(collect(cells, out), tmp_path, "two")[-1]
    content = json.loads(file.read_text())
    for one in content["runs"]:
        one.pop("conditions", None)
    content["conditions"] = [{"cores": 2, "git_commit": "aaa"}, {"cores": 2, "git_commit": "bbb"}]
    file.write_text(json.dumps(content))

    found = collect(cells, tmp_path / "elsewhere", read_tables([file]))

    assert found[0].environment == {"cores": 2, "git_commit": "aaa or bbb"}


def test_of_a_run_in_several_tables_the_last_counts(swept, tmp_path):
    _, cells, out = swept
    files = []
    for number, suffix in enumerate(["-10", "-2", "", ""]):
        content = json.loads(write(collect(cells[:1], out), tmp_path / str(number), "two")[-1].read_text())
        content["runs"][0] |= {"folder": content["runs"][0]["folder"] + suffix, "final": number / 10}
        files.append(tmp_path / str(number) / "two.json")
        files[-1].write_text(json.dumps(content))

    def final(*chosen):
        [one] = collect(cells[:1], tmp_path / "elsewhere", read_tables(chosen))
        return one.row["final"]

    assert final(*files[:3]) == final(*files[2::-1]) == 0.0  # the tenth time that it was made
    assert final(*files[2:]) == 0.3  # the same run twice: the later file


def test_a_run_without_accuracy_can_be_added(swept, tmp_path):
    _, cells, out = swept
    file = write(collect(cells[:1], out), tmp_path, "two")[-1]
    file.write_text(file.read_text().replace('"best": ', '"best": null, "was": '))

    assert collect(cells[:1], tmp_path / "elsewhere", read_tables([file]))[0].finished


@pytest.mark.parametrize(
    "text", [None, "no json", "[]", '{"conditions": [], "runs": [{"state": "finished"}]}', "[" * 99_999]
)
def test_other_files_cannot_be_added(swept, tmp_path, capsys, text):
    path, _, out = swept
    other = tmp_path / "other.json"
    if text is not None:
        other.write_text(text)

    assert main(["table", str(path), "--out", str(out), "--add", str(other)]) == 2

    errors = " ".join(capsys.readouterr().err.split())
    assert "other.json" in errors and "--add" in errors and "fedkd table has written" in errors


def test_a_scenario_without_runs(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(SCENARIO)
    found = collect(expand(load(path)), tmp_path / "nowhere")

    assert {one.state for one in found} == {"missing"}
    assert gaps(found)[0] == "FedAvg, alpha 0.5, seeds 0, 1: not run"
    with pytest.raises(ScenarioError, match="is finished below"):
        from fedkd.cli.looking import table

        table(str(path), out=tmp_path / "nowhere")
