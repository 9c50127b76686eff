from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from fedkd import plugins
from fedkd.errors import ScenarioError
from fedkd.parsing import parse
from fedkd.server.strategy import DistillationStrategy

BUILT_IN = {"fedavg", "fedprox", "feddf", "fedgkd", "fedntd", "dsfl", "fd"}


@dataclass(kw_only=True)
class Odd(DistillationStrategy):
    """A strategy with hyper-parameters of all sorts."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"code": {"rate": 0.5, "layers": [3]}}

    rate: float = field(default=0.1, metadata={"gt": 0, "le": 1, "help": "how fast"})
    steps: int = field(default=5, metadata={"ge": 1})
    mode: Literal["a", "b"] = "a"
    layers: tuple[int, ...] = field(default=(1, 2), metadata={"ge": 0})
    bound: float | None = None
    secret: int = field(default=1, metadata={"hidden": True})
    found: int = field(default=0, init=False)

    def validate(self) -> None:
        if self.steps == 13:
            raise ScenarioError("13 is unlucky", key="strategy.steps")


@pytest.fixture
def odd(monkeypatch):
    original = plugins.strategy_class
    monkeypatch.setattr(plugins, "strategy_class", lambda name: Odd if name == "odd" else original(name))


def make(**hyper):
    return plugins.make_strategy(parse({"strategy": {"name": "odd", **hyper}}))


def problem(**hyper):
    with pytest.raises(ScenarioError) as caught:
        make(**hyper)
    return str(caught.value)


# --- names ---------------------------------------------------------------------------------------------


def test_built_in_strategies_are_found_by_name():
    found = plugins.strategies()

    assert found.keys() >= BUILT_IN
    assert found["feddf"].__name__ == "FedDF"
    assert all(issubclass(cls, DistillationStrategy) for cls in found.values())


def test_summaries_quote_the_paper_without_importing():
    summaries = plugins.summaries()

    assert summaries.keys() == set(plugins.strategy_names())
    assert "Ensemble Distillation" in summaries["feddf"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("feddff", ["unknown strategy 'feddff'", "did you mean 'feddf'", "flwr:NAME"]),
        ("no_such_module:X", ["no module 'no_such_module'", "folder"]),
        ("math:pii", ["'math' has no 'pii'", "did you mean 'pi'"]),
        ("math:pi", ["not a strategy", "DistillationStrategy"]),
        ("math:", ["not of the form module:attribute"]),
        ("flwr:FedNothing", ["FedNothing", "flwr:FedAdam"]),
    ],
)
def test_names_that_lead_nowhere(name, parts):
    with pytest.raises(ScenarioError) as caught:
        plugins.strategy_class(name)

    assert caught.value.key == "strategy.name"
    for part in parts:
        assert part in str(caught.value)


def test_modules_of_the_working_folder_are_found_last(tmp_path, monkeypatch):
    (tmp_path / "my_own_method.py").write_text("value = 3\n")
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])

    assert plugins.load_object("my_own_method:value") == 3
    assert plugins.strategy_class("fedavg").__name__ == "FedAvg"


def test_a_module_that_fails_says_how(tmp_path, monkeypatch):
    (tmp_path / "failing_method.py").write_text("import no_such_library\n")
    (tmp_path / "raising_method.py").write_text("1 / 0\n")
    (tmp_path / "leaving_method.py").write_text("import sys; sys.exit(7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])

    with pytest.raises(ScenarioError, match="'failing_method' cannot be imported: ModuleNotFoundError"):
        plugins.load_object("failing_method:x")
    with pytest.raises(ScenarioError, match="'raising_method' cannot be imported: ZeroDivisionError"):
        plugins.load_object("raising_method:x")
    with pytest.raises(ScenarioError, match="'leaving_method' cannot be imported: SystemExit: 7"):
        plugins.load_object("leaving_method:x")


def test_an_entry_point_of_another_package_is_a_name(monkeypatch):
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("odd", f"{__name__}:Odd", plugins.GROUP),
        EntryPoint("fedavg", "strategies.fedavg:FedAvg", plugins.GROUP),
        EntryPoint("fedavg", "math:pi", plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "_installed", lambda: points)
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(Odd=Odd))

    assert "odd" in plugins.strategy_names()
    assert plugins.strategy_class("odd") is Odd
    assert plugins.strategy_class("fedavg").__name__ == "FedAvg"


def test_without_installation_methods_are_found_by_their_modules_and_variants_in_those_of_their_methods(monkeypatch):
    monkeypatch.setattr(plugins, "_installed", list)

    for name, cls in {"fedgkd": "FedGKD", "fedgkd_vote": "FedGKDVote", "local": "Local"}.items():
        assert plugins.strategy_class(name).__name__ == cls
    with pytest.raises(ScenarioError, match="unknown strategy 'fedgkd_vot'"):
        plugins.strategy_class("fedgkd_vot")


# --- hyper-parameters ----------------------------------------------------------------------------------


def test_hyper_parameters_are_the_open_fields():
    found = plugins.hyper_parameters(Odd)

    assert list(found) == ["rate", "steps", "mode", "layers", "bound"]
    assert found["rate"].allowed == "a number in (0, 1]"
    assert found["rate"].help == "how fast"
    assert found["mode"].annotation == Literal["a", "b"]


def test_values_come_from_defaults_preset_and_scenario(odd):
    assert (make().rate, make().layers) == (0.1, (1, 2))
    assert (make(preset="code").rate, make(preset="code").layers) == (0.5, (3,))
    assert make(preset="code", rate=0.25).rate == 0.25
    assert make(layers=[4, 5]).layers == (4, 5)
    assert make(rate=1).rate == 1.0 and isinstance(make(rate=1).rate, float)


@pytest.mark.parametrize(
    ("hyper", "parts"),
    [
        ({"rte": 1}, ["strategy.rte", "no hyper-parameter 'rte'", "did you mean 'rate'"]),
        ({"secret": 1}, ["strategy.secret", "no hyper-parameter"]),
        ({"found": 1}, ["strategy.found", "no hyper-parameter"]),
        ({"rate": 0}, ["strategy.rate", "a number in (0, 1]", "is 0", "how fast", "Default: 0.1"]),
        ({"rate": "fast"}, ["strategy.rate", "is 'fast'"]),
        ({"rate": True}, ["strategy.rate", "is True"]),
        ({"steps": 1.5}, ["strategy.steps", "a whole number >= 1", "is 1.5"]),
        ({"steps": 0}, ["strategy.steps", "is 0"]),
        ({"mode": "c"}, ["strategy.mode", "one of 'a', 'b'", "is 'c'"]),
        ({"layers": [1, -1]}, ["strategy.layers", "-1"]),
        ({"layers": 3}, ["strategy.layers", "a list", "is 3"]),
        ({"preset": "papr"}, ["strategy.preset", "'papr'", "did you mean 'paper'"]),
        ({"steps": 13}, ["strategy.steps", "unlucky"]),
        ({"rate": 0, "mode": "c"}, ["2 settings are wrong", "strategy.rate", "strategy.mode"]),
    ],
)
def test_wrong_hyper_parameters(odd, hyper, parts):
    printed = problem(**hyper)

    for part in parts:
        assert part in printed


def test_none_is_a_value_where_it_is_allowed(odd):
    assert make().bound is None
    assert make(bound=2.0).bound == 2.0


# --- requirements --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requirement", "proxy", "way_out"),
    [
        ("proxy", {"source": "held-out"}, 'source = "held-out"'),
        ("proxy-labels", {"source": "held-out", "labelled": True}, "labelled = true"),
        ("server-labels", {"server_labels": 10}, "server_labels"),
        ("same-shape", {"source": "held-out"}, 'source = "held-out"'),
    ],
)
def test_requirements_name_what_to_add(odd, monkeypatch, requirement, proxy, way_out):
    monkeypatch.setattr(Odd, "requires", frozenset({requirement}))

    printed = problem()

    assert "odd needs" in printed and way_out in printed and printed.startswith("proxy.")
    assert plugins.make_strategy(parse({"strategy": {"name": "odd"}, "proxy": proxy})) is not None


def test_a_requirement_that_nobody_knows(odd, monkeypatch):
    monkeypatch.setattr(Odd, "requires", frozenset({"proxi"}))

    assert "did you mean 'proxy'" in problem()
