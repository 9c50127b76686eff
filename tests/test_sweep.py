import pytest

from fedkd.errors import ScenarioError
from fedkd.scenario_file import load, read, shipped
from fedkd.sweep import expand

FEDDF = {"name": "feddf", "steps": 5}
HELD_OUT = {"proxy": {"source": "held-out"}}


def cells(raw, *overrides, checked=False):
    return expand(read(raw, overrides), checked=checked)


def test_without_a_sweep_there_is_one_cell():
    (cell,) = cells({"strategy": {"name": "fedprox"}})

    assert (cell.label, cell.title, cell.values) == ("fedprox", "fedprox", {})
    assert cell.scenario.label == "fedprox"


def test_cases_are_outermost_and_axes_in_written_order():
    sweep = {
        "cases": [{"strategy": "fedavg"}, {"label": "B", "strategy": FEDDF}],
        "partition.alpha": [1, 0.1],
        "run.seed": [0, 1],
    }

    found = cells({"sweep": sweep})

    assert [(c.label, c.scenario.partition.alpha, c.scenario.run.seed) for c in found] == [
        ("fedavg", 1, 0),
        ("fedavg", 1, 1),
        ("fedavg", 0.1, 0),
        ("fedavg", 0.1, 1),
        ("B", 1, 0),
        ("B", 1, 1),
        ("B", 0.1, 0),
        ("B", 0.1, 1),
    ]
    assert found[-1].values == {"case": "B", "partition.alpha": 0.1, "run.seed": 1}
    assert found[-1].title == "B, alpha 0.1"
    assert found[-1].scenario.strategy.hyper == {"steps": 5}


def test_an_axis_of_strategies():
    found = cells({"sweep": {"strategy": ["fedavg", FEDDF, {"name": "feddf", "steps": 9}]}})

    assert [c.label for c in found] == ["fedavg", "feddf steps 5", "feddf steps 9"]
    assert [c.scenario.strategy.hyper for c in found] == [{}, {"steps": 5}, {"steps": 9}]


def test_an_axis_over_a_hyper_parameter_keeps_the_others():
    base = {"strategy": {"name": "feddf", "steps": 5, "lr": 0.1}}

    found = cells({**base, "sweep": {"strategy.steps": [1, 2]}})

    assert [c.scenario.strategy.hyper for c in found] == [{"steps": 1, "lr": 0.1}, {"steps": 2, "lr": 0.1}]
    assert [c.title for c in found] == ["feddf, steps 1", "feddf, steps 2"]


def test_another_strategy_starts_from_its_own_defaults():
    base = {"strategy": FEDDF, "client": {"epochs": 3}}

    first, second = cells({**base, "sweep": {"cases": [{"strategy": "fedavg"}, {"strategy.lr": 0.1}]}})

    assert (first.scenario.strategy.name, first.scenario.strategy.hyper) == ("fedavg", {})
    assert second.scenario.strategy.hyper == {"steps": 5, "lr": 0.1}
    assert first.scenario.client.epochs == second.scenario.client.epochs == 3


def test_cases_may_be_nested_or_dotted():
    terms = [{"loss": "kd"}]

    nested, dotted = cells(
        {
            "sweep": {
                "cases": [
                    {"label": "a", "client": {"terms": terms}},
                    {"label": "b", "client.terms": terms, "run.seed": 1},
                ]
            }
        }
    )

    assert nested.scenario.client == dotted.scenario.client
    assert nested.scenario.client.terms[0].loss == "kd"


def test_overrides_have_the_last_word():
    sweep = {
        "cases": [{"strategy": "fedavg", "client.epochs": 5}, {"strategy": "fedprox"}],
        "run.seed": [0, 1],
    }

    found = cells({"sweep": sweep}, "client.epochs=2", "run.seed=4")

    assert [(c.scenario.client.epochs, c.scenario.run.seed) for c in found] == [(2, 4), (2, 4)]


@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        (
            {"run.seed": [0, 1, 0]},
            ["sweep", "'run.seed 0' and 'run.seed 0' are the same scenario", "leave one of them out"],
        ),
        (
            {"cases": [{"label": "x"}, {"label": "x", "run.seed": 1}]},
            ["sweep.cases", "two cases", "'x'", "label"],
        ),
        ({"partition.alhpa": [1]}, ["partition.alhpa", "unknown key", "did you mean 'alpha'", "alhpa 1"]),
        ({"partition.alpha": [0.1, -1]}, ["partition.alpha", "is -1", "in the sweep"]),
    ],
)
def test_sweeps_that_cannot_be_run(sweep, parts):
    with pytest.raises(ScenarioError) as caught:
        cells({"sweep": sweep})

    for part in parts:
        assert part in str(caught.value)


def test_every_cell_is_checked():
    sweep = {"strategy": ["fedavg", "feddf"]}

    with pytest.raises(ScenarioError, match=r"feddf needs a proxy set.*in the sweep, at 'feddf'"):
        cells({"sweep": sweep}, checked=True)
    assert len(cells({**HELD_OUT, "sweep": sweep}, checked=True)) == 2


def test_an_axis_may_run_over_tables_with_labels():
    attacks = [{"label": "none"}, {"label": "flip 10 %", "kind": "sign-flip", "share": 0.1}, {"kind": "random"}]

    found = cells({"attacks": {"share": 0.5}, "sweep": {"attacks": attacks, "strategy": [FEDDF | {"label": "A"}]}})

    assert [c.scenario.attacks.kind for c in found] == ["none", "sign-flip", "random"]
    assert [c.scenario.attacks.share for c in found] == [0.5, 0.1, 0.5]
    assert [c.values["attacks"] for c in found] == ["none", "flip 10 %", {"kind": "random"}]
    assert found[1].title == "A, attacks flip 10 %"
    assert found[0].scenario.strategy.hyper == {"steps": 5}


def test_some_cells_of_a_sweep():
    sweep = {"cases": [{"label": "A"}, {"label": "B", "client.epochs": 2}], "run.seed": [0, 1], "only": ["B"]}

    assert [c.title for c in cells({"sweep": sweep})] == ["B", "B"]
    assert [c.label for c in cells({"sweep": sweep}, 'sweep.only=["A"]')] == ["A", "A"]
    assert len(cells({"sweep": sweep}, "sweep.only=[]")) == 4
    with pytest.raises(ScenarioError, match=r"(?s)sweep.only: no cell is called 'C'.*labels: A, B"):
        cells({"sweep": sweep}, 'sweep.only=["B", "C"]')
    with pytest.raises(ScenarioError, match=r"sweep.only: must be a list of labels, is 'B'"):
        cells({"sweep": sweep}, "sweep.only=B")


# --- files that build on others ------------------------------------------------------------------------

BASE = """
description = "the base"
[run]
rounds = 30
participation = 0.4
[sweep]
"run.seed" = [0, 1, 2]
"partition.alpha" = [0.1, 1.0]
[[sweep.cases]]
label = "A"
strategy = { name = "feddf", steps = 500, lr = 0.1 }
"client.epochs" = 3
[[sweep.cases]]
label = "B"
strategy.name = "fedavg"
"""


def extended(folder, text, base=BASE):
    (folder / "base.toml").write_text(base)
    (folder / "small.toml").write_text('extends = "base.toml"\n' + text)
    return load(folder / "small.toml")


def test_a_file_says_only_what_differs(tmp_path):
    document = extended(
        tmp_path,
        """
        run.rounds = 5
        [sweep]
        "run.seed" = [7]
        [[sweep.cases]]
        label = "A"
        strategy.steps = 20
        client = { epochs = 1 }
        [[sweep.cases]]
        label = "C"
        strategy = "fedprox"
        """,
    )
    found = expand(document, checked=False)

    assert document.scenario.name == "small" and document.scenario.description == "the base"
    assert (document.scenario.run.rounds, document.scenario.run.participation) == (5, 0.4)
    assert [(c.label, c.scenario.partition.alpha) for c in found] == [
        ("A", 0.1), ("A", 1.0), ("B", 0.1), ("B", 1.0), ("C", 0.1), ("C", 1.0),
    ]  # fmt: skip
    assert {c.scenario.run.seed for c in found} == {7}
    assert found[0].scenario.strategy.hyper == {"steps": 20, "lr": 0.1}
    assert found[0].scenario.client.epochs == 1


def test_another_method_under_an_old_label_starts_from_its_own_defaults(tmp_path):
    document = extended(tmp_path, '[[sweep.cases]]\nlabel = "A"\nstrategy.name = "fedavg"\nclient.lr = 0.5')
    first = expand(document, checked=False)[0].scenario

    assert (first.strategy.name, first.strategy.hyper, first.client.epochs) == ("fedavg", {}, 3)


def test_files_can_be_extended_more_than_once(tmp_path):
    extended(tmp_path, "run.rounds = 5")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "tiny.toml").write_text('extends = "../small.toml"\nrun.participation = 1.0')

    run = load(tmp_path / "deep" / "tiny.toml").scenario.run

    assert (run.rounds, run.participation) == (5, 1.0)


@pytest.mark.parametrize(
    ("text", "base", "parts"),
    [
        ("", 'extends = "small.toml"', ["base.toml", "'small.toml' extends this file", "stand alone"]),
        ("", 'extends = "quikstart"', ["base.toml", "extends", "no scenario 'quikstart'", "did you mean 'quickstart'"]),
        ("", "extends = 3", ["extends: must be a string, is 3"]),
        ("run.rounds = 0", BASE, ["small.toml", "run.rounds", "is 0"]),
        ("run.cases = 0", BASE, ["run.cases: unknown key"]),
    ],
)
def test_files_that_cannot_be_extended(tmp_path, text, base, parts):
    with pytest.raises(ScenarioError) as caught:
        extended(tmp_path, text, base)

    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_installed_scenarios_can_be_run(name, tmp_path, monkeypatch):
    """All but their data are checked; empty files stand for the data."""
    for file in ("fashion_mnist", "mnist", "cifar10", "cifar100", "ag_news"):
        (tmp_path / f"{file}.npz").touch()
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))

    found = expand(load(name))

    assert len(found) >= 2
    assert len({cell.title + str(cell.scenario.run.seed) for cell in found}) == len(found)
