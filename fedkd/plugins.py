"""Names → objects: built-in strategies, those of other packages, and anything as ``module:attribute``.

A strategy is found by its name in the entry-point group ``fedkd.strategies``, in the package of built-in
ones where the project is not installed (as under ``flwr run``), as ``module:attribute`` on the import path
or in the working folder, or as ``flwr:NAME`` among Flower's own.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

from fedkd.errors import ScenarioError, raise_all
from fedkd.scenario import Scenario
from fedkd.wording import allowed, did_you_mean

GROUP = "fedkd.strategies"
BUILT_IN = "strategies"  # the package of built-in strategies, beside this one

_REQUIREMENTS = {
    "proxy": (
        lambda s: s.proxy.source != "none",
        "proxy.source",
        "a proxy set",
        'add [proxy] with source = "held-out" (cut from the training data) or another data set',
    ),
    "proxy-labels": (
        lambda s: s.proxy.labelled,
        "proxy.labelled",
        "a labelled proxy set",
        'add [proxy] with source = "held-out" and labelled = true',
    ),
    "server-labels": (
        lambda s: s.proxy.server_labels > 0,
        "proxy.server_labels",
        "labelled samples on the server",
        "add [proxy] with server_labels = 500, say; they are cut from the training data",
    ),
    # Whether the shapes really agree is known once the data are there: see `fedkd.checks.check_data`.
    "same-shape": (
        lambda s: s.proxy.source != "none",
        "proxy.source",
        "a proxy set of the task's shape",
        'add [proxy] with source = "held-out"',
    ),
}


# --- names -> objects ----------------------------------------------------------------------------------


def load_object(name: str, key: str = "") -> Any:
    """Import ``module:attribute``.

    Parameters
    ----------
    name : str
        Such as ``my_package.losses:my_loss``. The working folder is searched last.
    key : str
        Dotted key of the setting, for messages.

    Raises
    ------
    ScenarioError
        No such module or attribute, or the module fails while it is imported.

    Examples
    --------
    >>> load_object("math:pi")
    3.141592653589793
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ScenarioError(
            f"{name!r} is not of the form module:attribute", key=key, hint="such as my_methods:MyMethod"
        )
    target = _import(module_name, key)
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n in vars(target) if not n.startswith("_")] if hasattr(target, "__dict__") else []
            raise ScenarioError(
                f"module {module_name!r} has no {attribute!r}",
                key=key,
                hint=did_you_mean(part, names, "it has"),
            )
        target = getattr(target, part)
    return target


def _import(module_name: str, key: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nobody's folders hide installed packages
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(module_name, key, error) from error
        hint = f"run from the folder that holds {module_name.split('.')[0]}.py, or install its package"
        raise ScenarioError(f"there is no module {module_name!r}", key=key, hint=hint) from None
    except (Exception, SystemExit) as error:  # a script that calls sys.exit is no reason to stop silently
        raise _broken(module_name, key, error) from error


def _broken(module: str, key: str, error: BaseException) -> ScenarioError:
    return ScenarioError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}", key=key)


@cache  # a look through all that is installed reads the metadata of every package
def _installed() -> EntryPoints:
    return entry_points(group=GROUP)


def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in _installed():
        # A name of ours stays ours, whoever else claims it.
        if point.name not in found or point.module.split(".")[0] == BUILT_IN:
            found[point.name] = point
    return found


def _built_in_modules() -> list[str]:
    folder = Path(__file__).parents[1] / BUILT_IN
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def strategy_names() -> list[str]:
    """Return the names of all strategies that are installed, without importing them."""
    return sorted({*_built_in_modules(), *_entry_points()})


def strategy_class(name: str) -> type:
    """Return the class of a strategy.

    Parameters
    ----------
    name : str
        A name of `strategy_names`, ``module:attribute``, or ``flwr:NAME`` for one of Flower's strategies.

    Raises
    ------
    ScenarioError
        There is no such strategy, or it cannot be imported.
    """
    key = "strategy.name"
    if name.startswith("flwr:"):
        return importlib.import_module("fedkd.server.stock").stock_class(name.removeprefix("flwr:"))
    if ":" in name:
        found = load_object(name, key)
    elif (point := _entry_points().get(name)) is not None:
        found = load_object(point.value, key)
    elif name in _built_in_modules():
        found = _only_strategy_in(_import(f"{BUILT_IN}.{name}", key), name)
    elif (found := _variant(name)) is None:
        hint = did_you_mean(name, strategy_names(), "known")
        raise ScenarioError(
            f"unknown strategy {name!r}",
            key=key,
            hint=f"{hint}; or module:attribute, or flwr:NAME for Flower's own",
        )
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or not hasattr(found, "local"):
        raise ScenarioError(
            f"{name!r} is {found!r}, not a strategy",
            key=key,
            hint="it must be a DistillationStrategy (fedkd.server.strategy) with @dataclass(kw_only=True)",
        )
    return found


def _only_strategy_in(module: types.ModuleType, name: str) -> type:
    candidates = _strategies_in(module)
    named = [value for value in candidates if _is_called(value, name)]
    if len(named or candidates) != 1:
        raise ScenarioError(f"module {module.__name__} does not hold exactly one strategy", key="strategy.name")
    return (named or candidates)[0]


def _variant(name: str) -> type | None:
    """Return a variant that is in the built-in module of its method: ``fedgkd_vote`` in that of ``fedgkd``."""
    home = name.rpartition("_")[0]
    if home not in _built_in_modules():
        return None
    found = _strategies_in(_import(f"{BUILT_IN}.{home}", "strategy.name"))
    return next((value for value in found if _is_called(value, name)), None)


def _strategies_in(module: types.ModuleType) -> list[type]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and dataclasses.is_dataclass(value)
        and hasattr(value, "local")
    ]


def _is_called(cls: type, name: str) -> bool:
    return cls.__name__.lower() == name.replace("_", "")


def strategies() -> dict[str, type]:
    """Return the classes of all strategies that are installed, by name."""
    return {name: strategy_class(name) for name in strategy_names()}


def summaries() -> dict[str, str]:
    """Return the first docstring line of every installed strategy, by name, without importing it."""
    points = _entry_points()
    lines = {}
    for name in strategy_names():
        module, _, attribute = points[name].value.partition(":") if name in points else (f"{BUILT_IN}.{name}", "", "")
        lines[name] = _first_line(module, attribute, name)
    return lines


def _first_line(module: str, attribute: str, name: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return f"(cannot be read: {error})"
    wanted = (attribute or name).lower()
    nodes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == wanted]
    return next((doc.splitlines()[0] for node in [*nodes, tree] if (doc := ast.get_docstring(node))), "")


# --- hyper-parameters ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter of a strategy.

    Parameters
    ----------
    name : str
        Key in the scenario's ``[strategy]`` table.
    annotation : type
        Its type.
    default : object
        The paper's value; `dataclasses.MISSING` where the scenario must give one.
    metadata : mapping
        ``gt``, ``ge``, ``lt``, ``le`` bound its values; ``help`` says what it is.
    """

    name: str
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        return allowed(self.annotation, self.metadata)

    @property
    def help(self) -> str:
        """What it is."""
        return str(self.metadata.get("help", ""))


def hyper_parameters(cls: type) -> dict[str, Hyper]:
    """Return the hyper-parameters of a strategy: the fields of its dataclass that are not hidden, by name."""
    found = {}
    for item in dataclasses.fields(cls):
        if not item.init or item.metadata.get("hidden") or item.name.startswith("_"):
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        found[item.name] = Hyper(item.name, _annotation(cls, item), default, item.metadata)
    return found


def _annotation(cls: type, item: dataclasses.Field[Any]) -> Any:
    if not isinstance(item.type, str):
        return item.type
    owner = next((base for base in cls.__mro__ if item.name in vars(base).get("__annotations__", {})), cls)
    holder = types.SimpleNamespace(__annotations__={item.name: item.type})
    try:
        return typing.get_type_hints(holder, vars(sys.modules[owner.__module__]))[item.name]
    except NameError:  # imported for type checkers alone
        return Any


def make_strategy(scenario: Scenario) -> Any:
    """Build the strategy of a scenario from its preset and hyper-parameters.

    Parameters
    ----------
    scenario : Scenario
        Its ``strategy`` table is validated, and what the strategy requires is looked for.

    Returns
    -------
    DistillationStrategy
        Ready to be started.

    Raises
    ------
    ScenarioError
        Unknown strategy, preset or hyper-parameter, a value that is not allowed, or a requirement not met.
    """
    name = scenario.strategy.name
    cls = strategy_class(name)
    known = hyper_parameters(cls)
    errors: list[ScenarioError] = []
    values: dict[str, Any] = {}
    for key, value in (preset(cls, scenario.strategy.preset) | scenario.strategy.hyper).items():
        try:
            if key not in known:
                hint = did_you_mean(key, [*known, "name", "preset"], f"hyper-parameters of {name}")
                raise ScenarioError(f"{name} has no hyper-parameter {key!r}", key=f"strategy.{key}", hint=hint)
            values[key] = _value(known[key], value)
        except ScenarioError as error:
            errors.append(error)
    for key, hyper in known.items():
        if hyper.default is MISSING and key not in values and not errors:
            hint = f"{hyper.allowed}. {hyper.help}"
            errors.append(ScenarioError(f"{name} needs a value", key=f"strategy.{key}", hint=hint))
    raise_all(errors)
    try:
        strategy = cls(**values)
        if callable(validate := getattr(strategy, "validate", None)):
            validate()
    except (TypeError, ValueError) as error:
        raise ScenarioError(f"{name} refuses its hyper-parameters: {error}", key="strategy") from error
    raise_all(_unmet(strategy, scenario))
    return strategy


def preset(cls: type, name: str) -> dict[str, Any]:
    """Return the settings of a preset: none for ``paper``, else those in the class's ``presets``.

    Raises
    ------
    ScenarioError
        The strategy has no such preset.
    """
    presets: Mapping[str, Mapping[str, Any]] = {"paper": {}} | dict(getattr(cls, "presets", {}))
    if name not in presets:
        hint = did_you_mean(name, presets, "presets")
        raise ScenarioError(f"{cls.__name__} has no preset {name!r}", key="strategy.preset", hint=hint)
    return dict(presets[name])


def _value(hyper: Hyper, value: Any) -> Any:
    """Return a hyper-parameter's value in its own type, or refuse it."""
    try:
        try:
            adapter = TypeAdapter(hyper.annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
        except PydanticUserError:  # a type with a configuration of its own
            adapter = TypeAdapter(hyper.annotation)
        except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
            return value
        # As JSON, because TOML's lists must do for tuples, too.
        value = adapter.validate_json(json.dumps(value, default=str), strict=True)
        fits = all(_within(number, hyper.metadata) for number in _numbers(value))
    except ValidationError:
        fits = False
    if not fits:
        hint = hyper.help + ("" if hyper.default is MISSING else f" Default: {hyper.default!r}.")
        raise ScenarioError(f"must be {hyper.allowed}, is {value!r}", key=f"strategy.{hyper.name}", hint=hint.strip())
    return value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _within(number: float, bounds: Mapping[str, Any]) -> bool:
    return (
        number > bounds.get("gt", -float("inf"))
        and number >= bounds.get("ge", -float("inf"))
        and number < bounds.get("lt", float("inf"))
        and number <= bounds.get("le", float("inf"))
    )


def _unmet(strategy: Any, scenario: Scenario) -> list[ScenarioError]:
    errors: dict[str, ScenarioError] = {}
    for requirement in sorted(strategy.needs()):
        if requirement not in _REQUIREMENTS:
            problem = f"{scenario.strategy.name} requires {requirement!r}, which nothing provides"
            hint = did_you_mean(requirement, _REQUIREMENTS, "requirements")
            errors.setdefault(requirement, ScenarioError(problem, key="strategy.name", hint=hint))
            continue
        is_met, key, what, hint = _REQUIREMENTS[requirement]
        if not is_met(scenario):
            problem = f"{scenario.strategy.name} needs {what}, and the scenario has none"
            errors.setdefault(key, ScenarioError(problem, key=key, hint=hint))
    return list(errors.values())
