import math
import subprocess
import sys
import tomllib
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.checks import check
from fedkd.errors import ScenarioError
from fedkd.parsing import assign, merge, parse
from fedkd.scenario import Scenario, digest
from fedkd.scenario_file import dump, find, load, read, shipped
from fedkd.wording import did_you_mean


def message(raw, *overrides):
    with pytest.raises(ScenarioError) as caught:
        read(raw, overrides)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------------


def test_an_empty_file_is_a_scenario_named_after_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("")

    document = load(file)

    assert document.scenario == Scenario(name="mine")
    assert document.sweep is None
    assert document.file == str(file)


@pytest.mark.parametrize("name", shipped())
def test_installed_scenarios_are_read_and_say_what_they_show(name):
    document = load(name)

    assert document.scenario.name == name
    assert document.scenario.description
    assert find(name).read_text().startswith("# ")
    assert "Cost:" in find(name).read_text()


def test_reading_imports_no_heavy_library():
    code = "import sys, fedkd.cli; print({'torch', 'ray', 'flwr', 'matplotlib'} & {*sys.modules})"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "set()"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.rounds=3", "run", "rounds", 3),
        ("partition.alpha=1", "partition", "alpha", 1.0),
        ("models.student=mlp", "models", "student", "mlp"),
        ('models.student="mlp"', "models", "student", "mlp"),
        ('models.student=["cnn", "mlp"]', "models", "student", ["cnn", "mlp"]),
        ("models.student={cnn = 0.5, mlp = 0.5}", "models", "student", {"cnn": 0.5, "mlp": 0.5}),
        ("client.nesterov=true", "client", "nesterov", True),
        ("data.source=npz:a=b.npz", "data", "source", "npz:a=b.npz"),
        ("data.options.classes=3", "data", "options", {"classes": 3}),
    ],
)
def test_overrides_are_toml_or_else_strings(override, section, key, value):
    scenario = read({}, [override]).scenario

    assert getattr(getattr(scenario, section), key) == value


def test_overrides_reach_hyper_parameters_and_list_elements():
    raw = {"strategy": {"name": "feddf", "steps": 10}, "client": {"terms": [{"loss": "kd"}]}}

    scenario = read(raw, ["strategy.temperature=3", "client.terms.0.weight=0.5"]).scenario

    assert scenario.strategy.hyper == {"steps": 10, "temperature": 3}
    assert scenario.client.terms[0].weight == 0.5


def test_another_strategy_drops_the_old_ones_hyper_parameters():
    raw = {"strategy": {"name": "feddf", "steps": 10}}

    assert read(raw, ["strategy=fedprox", "strategy.mu=1"]).scenario.strategy.hyper == {"mu": 1}
    assert read(raw, ["strategy.name=feddf"]).scenario.strategy.hyper == {"steps": 10}


def test_sweep_tables_may_be_dotted_or_nested():
    raw = tomllib.loads('[sweep]\n"run.seed" = [0, 1]\npartition.alpha = [0.1]\ncases = [{strategy = "fedavg"}]')

    sweep = read(raw).sweep

    assert sweep is not None
    assert sweep.grid == {"run.seed": [0, 1], "partition.alpha": [0.1]}
    assert sweep.cases == ({"strategy": "fedavg"},)


def test_overrides_change_a_sweep_or_end_it():
    raw = {"sweep": {"run.seed": [0, 1]}}

    assert read(raw, ["sweep.run.seed=[5]"]).sweep.grid == {"run.seed": [5]}  # pyright: ignore
    assert read(raw, ["sweep={}"]).sweep is None
    fixed = read(raw, ["run.seed=7"])
    assert fixed.sweep is None and fixed.scenario.run.seed == 7


def test_what_is_read_is_not_shared():
    raw = {"data": {"options": {"classes": 3}}}
    document = read(raw, ["data.options.train=9"])

    assert raw == {"data": {"options": {"classes": 3}}}
    assert document.scenario.data.options == {"classes": 3, "train": 9}


# --- messages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"partition": {"alpha": -1}}, ["partition.alpha", "a number > 0", "is -1", "Dirichlet"]),
        ({"partition": {"alpha": 0}}, ["partition.alpha", "a number > 0", "is 0"]),
        ({"partition": {"alpha": math.nan}}, ["partition.alpha", "is nan"]),
        ({"partition": {"clients": 0}}, ["partition.clients", "a whole number >= 1", "is 0", "Default: 20"]),
        ({"run": {"participation": 0}}, ["run.participation", "a number in (0, 1]", "is 0"]),
        ({"run": {"participation": 1.5}}, ["run.participation", "a number in (0, 1]", "is 1.5"]),
        ({"run": {"rounds": True}}, ["run.rounds", "a whole number >= 1", "is True"]),
        ({"run": {"rounds": "many"}}, ["run.rounds", "is 'many'"]),
        ({"client": {"lr": math.inf}}, ["client.lr", "a number > 0", "is inf"]),
        ({"client": {"momentum": 1}}, ["client.momentum", "a number in [0, 1)", "is 1"]),
        ({"client": {"optimizer": "sdg"}}, ["client.optimizer", "one of 'sgd', 'adam'", "is 'sdg'"]),
        ({"client": {"terms": [{}, {"weight": -2}]}}, ["client.terms[1].weight", "is -2"]),
        (
            {"client": {"terms": [{"los": "kd"}]}},
            ["client.terms[0].los", "unknown key", "did you mean 'loss'"],
        ),
        ({"models": {"student": 3}}, ["models.student", "a string or a list of strings or a table", "is 3"]),
        ({"models": 3}, ["models", "a table", "is 3"]),
        ({"parttion": {}}, ["parttion", "unknown key", "did you mean 'partition'"]),
        ({"partition": {"alhpa": 1}}, ["partition.alhpa", "unknown key", "did you mean 'alpha'"]),
        ({"alpha": 1}, ["alpha", "unknown key", "did you mean partition.alpha?"]),
        ({"strategy": {"mu": math.nan}}, ["strategy.mu", "is nan"]),
        ({"data": {"options": {"a": [1.0, math.inf]}}}, ["data.options.a[1]", "is inf"]),
        ({"sweep": {"partition.alpha": [0.1, math.nan]}}, ["sweep.partition.alpha[1]", "is nan"]),
        ({"sweep": {"run.seed": 3}}, ["sweep.run.seed", "a list of values", "is 3"]),
        ({"sweep": {"run.seed": []}}, ["sweep.run.seed", "a list of values"]),
        ({"sweep": {"cases": [3]}}, ["sweep.cases", "a list of tables"]),
        ({"sweep": 3}, ["sweep", "a table", "is 3"]),
        ({"models": {"options": {"x": date(2026, 1, 2)}}}, ["models.options.x", "a date", "2026-01-02"]),
        ({"name": "../elsewhere"}, ["name", "one folder", "'../elsewhere'", "--out"]),
        ({"name": ""}, ["name", "one folder"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(raw, parts):
    printed = message(raw)

    for part in parts:
        assert part in printed
    assert "Input should" not in printed and "pydantic" not in printed


def test_all_mistakes_are_shown_one_a_line():
    lines = message({"run": {"rounds": 0, "seed": -1}, "partition": {"alhpa": 1}}).splitlines()

    assert lines[0] == "3 settings are wrong"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["partition.alhpa", "run.rounds", "run.seed"]


def test_mistakes_on_the_command_line_say_so():
    assert "(from --set)" in message({}, "run.rounds=0")
    assert "(from --set)" in message({}, "client.terms=[{weight=-1}]")
    assert "(from --set)" not in message({"run": {"seed": -1}}, "run.rounds=5")
    assert "key=value" in message({}, "run.rounds")
    assert "run.rounds is a value" in message({"run": {"rounds": 3}}, "run.rounds.more=1")
    assert "1 elements" in message({"client": {"terms": [{}]}}, "client.terms.4={}")
    assert "1 elements" in message({"client": {"terms": [{}]}}, "client.terms.4.weight=1")
    assert "no '²'" in message({"client": {"terms": [{}]}}, "client.terms.².weight=1")


def test_files_that_cannot_be_read(tmp_path):
    broken, binary = tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("[run\nrounds = 3")
    binary.write_bytes(b"\xff\xfe\x00")
    number, deep = tmp_path / "number.toml", tmp_path / "deep.toml"
    number.write_text(f"[run]\nseed = {'9' * 5000}")
    deep.write_text(f"x = {'[' * 3000}{']' * 3000}")
    for name, parts in {
        str(broken): ["broken.toml", "not TOML", "line 1"],
        str(binary): ["binary.toml", "cannot be read"],
        str(number): ["number.toml", "not TOML", "digits"],
        str(deep): ["deep.toml", "not TOML"],
        str(tmp_path): ["folder"],
        str(tmp_path / "quickstrt.toml"): ["no such file", "did you mean 'quickstart'"],
        "quickstrt": ["'quickstrt'", "did you mean 'quickstart'"],
    }.items():
        with pytest.raises(ScenarioError) as caught:
            load(name)
        for part in parts:
            assert part in str(caught.value)


def test_mistakes_in_a_file_name_it(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[partition]\nalpha = -1\n")

    with pytest.raises(ScenarioError, match=r"mine\.toml: partition\.alpha: must be a number > 0, is -1"):
        load(file)


def test_hints_for_names():
    assert did_you_mean("CNN", ["cnn", "mlp"]).startswith("did you mean 'cnn'?")
    assert did_you_mean("zzz", ["cnn", "mlp"]) == "known: cnn, mlp"
    assert did_you_mean("zzz", ["cnn"], "") == ""


# --- writing -------------------------------------------------------------------------------------------


@given(
    alpha=st.none() | st.floats(min_value=1e-3, max_value=1e3),
    student=st.sampled_from(["cnn", ["cnn", "mlp"], {"cnn": 0.25, "mlp": 0.75}]),
    text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"])),
    steps=st.integers(1, 10),
)
def test_a_dumped_scenario_is_read_back_equal(alpha, student, text, steps):
    partition = {} if alpha is None else {"alpha": alpha}
    scenario = parse(
        {
            "description": text,
            "partition": partition,
            "models": {"student": student},
            "strategy": {"name": "feddf", "steps": steps, "nested": {"a": [1, 2.5, "x"]}},
            "client": {"terms": [{"loss": "kd", "temperature": 2}]},
        }
    )

    again = parse(tomllib.loads(dump(scenario)))

    assert again == scenario
    assert digest(again) == digest(scenario)


def test_the_digest_ignores_what_cannot_change_a_result():
    base = digest(parse({}))
    same = [
        {"name": "a"},
        {"label": "a"},
        {"description": "a"},
        {"system": {"workers": 3, "engine": "inline", "address": "auto", "gpu_fraction": 0.5}},
        {"run": {"checkpoint_every": 5}},
        {"system": {"graphs": True}},  # which has the same bits
        {"partition": {"clients": 20}},  # the default, said aloud
    ]
    other = [
        {"run": {"seed": 1}},
        {"run": {"rounds": 11}},
        {"system": {"device": "cuda"}},
        {"system": {"server_threads": 1}},
        {"strategy": {"name": "feddf"}},
        {"strategy": {"mu": 1}},
        {"data": {"options": {"classes": 3}}},
    ]

    assert {digest(parse(raw)) for raw in same} == {base}
    assert len({base, *(digest(parse(raw)) for raw in other)}) == len(other) + 1
    assert len(base) == 8 and int(base, 16) >= 0
    assert digest(parse({"strategy": {"mu": 1}})) == digest(parse({"strategy": {"mu": 1.0}}))


# --- changing ------------------------------------------------------------------------------------------


def test_changes_replace_values_inside_sections():
    raw = {"models": {"student": {"cnn": 0.5, "mlp": 0.5}, "norm": "batch"}, "run": {"seed": 1}}

    merge(raw, {"models": {"student": {"cnn": 1.0}}, "run.rounds": 2})

    assert raw == {"models": {"student": {"cnn": 1.0}, "norm": "batch"}, "run": {"seed": 1, "rounds": 2}}


def test_a_new_strategy_name_comes_before_its_hyper_parameters():
    raw = {"strategy": {"name": "feddf", "steps": 10}}

    merge(raw, {"strategy": {"mu": 1.0, "name": "fedprox"}})

    assert raw == {"strategy": {"mu": 1.0, "name": "fedprox"}}


def test_assigned_values_are_copies():
    raw, value = {}, {"a": [1]}

    assign(raw, "data.options", value)
    value["a"].append(2)

    assert raw == {"data": {"options": {"a": [1]}}}


# --- checks without data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({"strategy": {"name": "feddff"}}, ["strategy.name", "'feddff'", "did you mean 'feddf'"]),
        ({"models": {"student": "resnet9"}}, ["models.student", "'resnet9'", "did you mean"]),
        ({"models": {"server": "resnet9"}}, ["models.server", "'resnet9'"]),
        ({"models": {"student": []}}, ["models.student", "at least one model"]),
        ({"models": {"student": {"cnn": -1.0}}}, ["models.student", "-1.0"]),
        ({"models": {"pretrained": "nowhere.safetensors"}}, ["models.pretrained", "nowhere.safetensors"]),
        ({"partition": {"name": "dirichlt"}}, ["partition.name", "'dirichlt'", "did you mean 'dirichlet'"]),
        ({"data": {"source": "digit"}}, ["data.source", "unknown data set 'digit'", "did you mean 'digits'"]),
        ({"data": {"source": "npz"}}, ["data.source", "npz:PATH"]),
        ({"data": {"source": "npz:nowhere.npz"}}, ["data.source", "nowhere.npz", "FEDKD_DATA"]),
        ({"proxy": {"source": "cifar"}}, ["proxy.source", "'cifar'", "held-out"]),
        ({"proxy": {"source": "noise", "labelled": True}}, ["proxy.labelled", "held-out"]),
        ({"proxy": {"size": 5}}, ["proxy.size", "no proxy set"]),
        ({"strategy": {"name": "feddf"}}, ["proxy.source", "feddf needs a proxy set", 'source = "held-out"']),
        ({"client": {"terms": [{"loss": "kdd"}]}}, ["client.terms", "'kdd'", "did you mean 'kd'"]),
        ({"client": {"terms": [{"teacher": "latest"}]}}, ["client.terms", "'latest'", "global"]),
        (
            {"models": {"norm": "batch"}, "client": {"batch_size": 1}},
            ["client.batch_size", "BatchNorm", "group"],
        ),
        ({"run": {"evaluate_clients": "all"}}, ["run.evaluate_clients", "partition", "test"]),
        ({"run": {"participation": 0.01}}, ["run.participation", "0.01 of 20 clients", "0.025"]),
        ({"system": {"min_replies": 21}}, ["system.min_replies", "at most 20", "is 21"]),
        ({"system": {"device": "gpu"}}, ["system.device", "'gpu'", "cuda"]),
        ({"system": {"device": "cuda:1", "engine": "ray"}}, ["system.device", "one GPU alone"]),
        ({"partition": {"test": 0.5, "validation": 0.5}}, ["partition.", "0.5", "below 1"]),
    ],
)
def test_cross_checks_name_key_value_and_way_out(raw, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ScenarioError) as caught:
        check(parse(raw))

    for part in parts:
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_cross_checks_find_several_mistakes_at_once():
    raw = {"strategy": {"name": "feddff"}, "models": {"student": "resnet9"}, "partition": {"name": "x"}}

    with pytest.raises(ScenarioError, match="3 settings are wrong"):
        check(parse(raw))


def test_the_default_scenario_passes():
    check(Scenario())
