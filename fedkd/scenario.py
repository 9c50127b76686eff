"""The typed scenario: one experiment as a TOML file. The only place where a setting is declared.

A scenario is read by `load`, checked as far as that needs no data by `check` and with data by `check_data`,
written by `dump` and told apart from others by `digest`. Whatever is wrong becomes a `ScenarioError` that
names file, dotted key, value, what is allowed, and the way out.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fedkd.errors import ScenarioError


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN and infinities are refused, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Where training and test data come from."""

    source: str = Field(
        default="digits",
        description="digits | npz:PATH | torchvision:NAME | hub:NAME | synthetic. "
        "A relative npz path is looked up below `folder`.",
    )
    folder: str = Field(
        default="", description="Folder of npz files or torchvision downloads; also $FEDKD_DATA."
    )
    train_samples: int = Field(
        default=0, ge=0, description="Use only the first so many training samples; 0 = all."
    )
    test_samples: int = Field(
        default=0, ge=0, description="Use only the first so many test samples; 0 = all."
    )
    augment: Literal["none", "flip", "crop-flip"] = Field(
        default="none", description="Random changes to private training images, drawn per batch."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Parameters of the source, such as classes and dimensions of `synthetic`.",
    )


class Partition(Section):
    """How training data are divided among clients."""

    name: str = Field(default="dirichlet", description="A partitioner; see `fedkd list partitioners`.")
    clients: int = Field(default=20, ge=1, description="Number of clients in the federation.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Concentration of the Dirichlet partitioners; small = skewed; default 0.5.",
    )
    min_samples: int = Field(
        default=0, ge=0, description="Fewest samples a client may have; 0 allows empty clients."
    )
    validation: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each client's data kept for validation."
    )
    test: float = Field(
        default=0.0, ge=0, lt=1, description="Share of each client's data kept for its own test."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further parameters of the flwr-datasets partitioner, by its own names.",
    )


class Proxy(Section):
    """Data that the server (and for some methods every client) may use for distillation."""

    source: str = Field(
        default="none",
        description="none | held-out (from training data) | noise | any data source; classes are ignored.",
    )
    size: int = Field(
        default=0,
        ge=0,
        description="Samples in the proxy set; 0 = a tenth of the training data, or all of another set.",
    )
    labelled: bool = Field(default=False, description="Whether methods may see labels (held-out only).")
    server_labels: int = Field(
        default=0,
        ge=0,
        description="Labelled samples cut from the training data for the server (early stopping).",
    )


class Models(Section):
    """Students of the clients, and of the server where it differs."""

    student: str | list[str] | dict[str, float] = Field(
        default="cnn",
        description="One model for all; a list, dealt out in turn; or shares: {cnn = 0.5, mlp = 0.5}.",
    )
    server: str = Field(
        default="", description="Model of the server where a method wants another one; empty = the student."
    )
    norm: Literal["group", "batch", "none"] = Field(default="group", description="Normalisation layers.")
    buffers: Literal["all", "params_only"] = Field(
        default="all", description="Whether running statistics of norm layers travel and are averaged."
    )
    pretrained: str = Field(
        default="", description="Safetensors file that students start from; empty = random weights."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further parameters of the models, such as width."
    )


class Strategy(Section):
    """The method. Every other key of the table is a hyper-parameter of it (`fedkd describe NAME`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(default="fedavg", description="Built-in, entry point, module:attribute, or flwr:CLASS.")
    preset: str = Field(
        default="paper",
        description="paper (default) or code: the authors' released settings where they differ.",
    )

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters that the scenario sets."""
        return dict(self.model_extra or {})


class Term(Section):
    """One distillation term that is added to the client's loss, whatever the strategy."""

    loss: str = Field(default="kd", description="A loss of `fedkd list losses`, or module:attribute.")
    weight: float = Field(default=0.1, ge=0, description="Coefficient of the term.")
    teacher: str = Field(
        default="global", description="global | last:M | ema:DECAY | own | module:attribute."
    )
    temperature: float = Field(default=1.0, gt=0, description="Softmax temperature of teacher and student.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further parameters of the loss.")


class Client(Section):
    """How a client trains."""

    epochs: int = Field(default=1, ge=1, description="Local epochs a round.")
    steps: int = Field(default=0, ge=0, description="Local steps a round instead of epochs; 0 = use epochs.")
    batch_size: int = Field(default=32, ge=1, description="Samples a step.")
    optimizer: Literal["sgd", "adam"] = Field(
        default="sgd", description="Local optimiser, fresh every round."
    )
    lr: float = Field(default=0.05, gt=0, description="Learning rate in round 1.")
    lr_decay: float = Field(default=1.0, gt=0, le=1, description="Factor on the learning rate per round.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Schedule within a round."
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="SGD momentum.")
    nesterov: bool = Field(default=False, description="Nesterov momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 weight decay.")
    clip: float = Field(default=0.0, ge=0, description="Gradient-norm clip; 0 = off.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="Arithmetic of forward passes.")
    channels_last: bool = Field(default=True, description="Memory layout of image batches and convolutions.")
    terms: list[Term] = Field(
        default_factory=list, description="Distillation terms added to the client's loss."
    )


class System(Section):
    """What computes the federation."""

    engine: Literal["ray", "inline"] = Field(default="ray", description="Ray workers, or this process.")
    workers: int = Field(default=0, ge=0, description="Worker processes; 0 = one per core (or four per GPU).")
    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:N.")
    gpu_fraction: float = Field(
        default=0.0, ge=0, le=1, description="GPU share of one worker; 0 = GPUs / workers."
    )
    server_threads: int = Field(
        default=0, ge=0, description="Torch threads of the server; 0 = all cores. Results depend on it."
    )
    min_replies: int = Field(default=1, ge=1, description="Fewest valid uploads with which a round goes on.")
    address: str = Field(default="", description="Ray cluster to join; empty = start one here.")


class Run(Section):
    """How long, how often, from which seed."""

    rounds: int = Field(default=10, ge=1, description="Communication rounds.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    participation: float = Field(
        default=1.0, gt=0, le=1, description="Share of the clients that take part in a round."
    )
    evaluate_every: int = Field(
        default=1, ge=1, description="Rounds between evaluations; the last round is always evaluated."
    )
    evaluate_clients: Literal["none", "selected", "all"] = Field(
        default="none",
        description="Which clients report accuracy on their own test data; needs partition.test > 0.",
    )
    evaluate_ensemble: bool = Field(
        default=True, description="Whether the ensemble of uploads is evaluated beside the student."
    )
    checkpoint_every: int = Field(default=1, ge=1, description="Rounds between checkpoints.")


class Scenario(Section):
    """One experiment."""

    name: str = Field(default="scenario", description="Name of the scenario; the folder of its runs.")
    label: str = Field(default="", description="Name of this cell in tables; empty = the strategy's name.")
    description: str = Field(default="", description="One line about what it shows.")
    data: Data = Field(default_factory=Data)
    partition: Partition = Field(default_factory=Partition)
    proxy: Proxy = Field(default_factory=Proxy)
    models: Models = Field(default_factory=Models)
    strategy: Strategy = Field(default_factory=Strategy)
    client: Client = Field(default_factory=Client)
    system: System = Field(default_factory=System)
    run: Run = Field(default_factory=Run)


# --- reading -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """The ``[sweep]`` table: variants of the scenario that are run side by side (see `fedkd.sweep`).

    Parameters
    ----------
    cases : tuple of dict
        Each a set of changes to the base: nested tables or dotted keys, and perhaps a ``label``.
    grid : dict of str to list
        Values of each dotted key; every combination is run, for every case.
    """

    cases: tuple[dict[str, Any], ...] = ()
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A scenario file, read.

    Parameters
    ----------
    scenario : Scenario
        The base scenario, overrides included.
    sweep : Sweep or None
        Its ``[sweep]`` table.
    file : str
        Where it was read from, for messages.
    overrides : tuple of (str, value)
        What ``--set`` said, by dotted key; in a sweep it also has the last word in every cell.
    """

    scenario: Scenario
    sweep: Sweep | None = None
    file: str = ""
    overrides: tuple[tuple[str, Any], ...] = ()


def shipped() -> dict[str, Path]:
    """Return the installed scenarios: file by name."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "scenarios").glob("*.toml"))}


def find(path_or_name: str | Path) -> Path:
    """Return the file of a scenario.

    Parameters
    ----------
    path_or_name : str or Path
        A bare name means an installed scenario, or else a file of that name here; anything that ends in
        ``.toml`` or holds a slash is a path.

    Raises
    ------
    ScenarioError
        There is no such scenario.
    """
    text = str(path_or_name)
    path = Path(text).expanduser()
    known = shipped()
    if text in known:
        return known[text]
    if path.is_file():
        return path
    if path.is_dir():
        raise ScenarioError(
            "this is a folder, not a scenario file", file=text, hint="name the .toml file in it"
        )
    if path.suffix == ".toml" or "/" in text:
        raise ScenarioError(
            "there is no such file", file=text, hint=did_you_mean(path.stem, known, "installed scenarios")
        )
    raise ScenarioError(
        f"no scenario is called {text!r}", hint=did_you_mean(text, known, "installed scenarios")
    )


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Document:
    """Read a scenario.

    Parameters
    ----------
    path_or_name : str or Path
        An installed scenario's name or a TOML file (see `find`).
    overrides : sequence of str
        ``key=value`` with a dotted key; the value is read as TOML, or else taken as a string.

    Returns
    -------
    Document
        Values are checked one by one; what concerns several of them is left to `check`.

    Raises
    ------
    ScenarioError
        With every mistake that was found.

    Examples
    --------
    >>> load("quickstart", ["run.rounds=3"]).scenario.run.rounds
    3
    """
    path = find(path_or_name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(
            f"this is not TOML: {error}", file=str(path), hint="see https://toml.io"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot be read: {error}", file=str(path)) from None
    with errors_in(str(path)):
        return read({"name": path.stem} | raw, overrides, str(path))


def read(raw: Mapping[str, Any], overrides: Sequence[str] = (), file: str = "") -> Document:
    """Make a document of a table as `load` does of a file; same parameters, returns and errors."""
    table = copy.deepcopy(dict(raw))
    sweep = _read_sweep(table.pop("sweep", {}))
    pairs = [_parse_override(text) for text in overrides]
    for key, value in pairs:
        if key == "sweep":
            sweep = _read_sweep(value)
        elif key.startswith("sweep."):
            name = key.removeprefix("sweep.")
            changes = {"cases": value} if name == "cases" else {name: value}
            sweep = _read_sweep({"cases": list(sweep.cases)} | sweep.grid | changes)
        else:
            assign(table, key, value)
    pairs = [(key, value) for key, value in pairs if not (key + ".").startswith("sweep.")]
    # A grid over a key that --set fixes is that one value.
    grid = {key: values for key, values in sweep.grid.items() if key not in dict(pairs)}
    scenario = parse(table, said_by_set=[key for key, _ in pairs])
    has_sweep = bool(sweep.cases or grid)
    return Document(scenario, Sweep(sweep.cases, grid) if has_sweep else None, file, tuple(pairs))


def parse(raw: Mapping[str, Any], said_by_set: Sequence[str] = ()) -> Scenario:
    """Make a scenario of nested tables.

    Parameters
    ----------
    raw : mapping
        Sections by name.
    said_by_set : sequence of str
        Dotted keys that came from the command line, so that a message can say so.

    Raises
    ------
    ScenarioError
        With every mistake that was found, in one message.

    Examples
    --------
    >>> parse({"run": {"participation": 1.5}})
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: run.participation: must be a number in (0, 1], is 1.5
      Share of the clients that take part in a round. Default: 1.0.
    """
    errors = {key: _not_finite(key, value) for key, value in _leaves(raw) if _is_not_finite(value)}
    try:
        scenario = Scenario.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            translated = _translate(detail, raw)
            errors[translated.key] = translated
        scenario = None
    for key, error in errors.items():
        if any(key == said or key.startswith((f"{said}.", f"{said}[")) for said in said_by_set):
            error.problem += " (from --set)"
    raise_all(errors.values())
    assert scenario is not None  # whatever pydantic refused is among the errors
    return scenario


def assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested tables, in place.

    ``strategy = "feddf"`` is short for ``strategy.name``; another ``strategy.name`` drops the
    hyper-parameters that were meant for the old one. A number in the key picks an element of a list:
    ``client.terms.0.weight``.

    Raises
    ------
    ScenarioError
        The path runs through something that is no table.

    Examples
    --------
    >>> raw = {"strategy": {"name": "feddf", "steps": 10}}
    >>> assign(raw, "strategy.name", "fedavg"); raw
    {'strategy': {'name': 'fedavg'}}
    """
    if key == "strategy" and isinstance(value, str):
        key = "strategy.name"
    strategy = raw.get("strategy")
    if key == "strategy.name" and isinstance(strategy, dict) and strategy.get("name", "fedavg") != value:
        raw["strategy"] = {}
    parts = key.split(".")
    node: Any = raw
    for position, part in enumerate(parts[:-1]):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            node = None
        if not isinstance(node, dict | list):
            place = ".".join(parts[: position + 1])
            raise ScenarioError(f"{place} is a value, not a table", key=key, hint=f"set {place} itself")
    last = parts[-1]
    if isinstance(node, dict):
        node[last] = copy.deepcopy(value)
    elif last.isdigit() and int(last) < len(node):
        node[int(last)] = copy.deepcopy(value)
    else:
        raise ScenarioError(f"the list has {len(node)} elements, numbered from 0", key=key)


def merge(raw: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay changes over nested tables, in place: section by section, values inside a section are replaced.

    Parameters
    ----------
    raw : dict
        Sections by name.
    changes : mapping
        Sections by name, dotted keys, or both.
    """
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        if isinstance(value, Mapping) and key in Scenario.model_fields:
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    # The strategy's name first: another one drops the old hyper-parameters.
    for key in sorted(flat, key=lambda key: key not in ("strategy", "strategy.name")):
        assign(raw, key, flat[key])


def as_tables(scenario: Scenario) -> dict[str, Any]:
    """Return nested tables of what the scenario sets, without defaults, to be changed and parsed."""
    return scenario.model_dump(exclude_unset=True)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ScenarioError(
            f"--set wants key=value, got {text!r}", hint="for example --set partition.alpha=0.1"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return key, value.strip()
    plain = parsed.keys() == {"value"} and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return key, parsed["value"] if plain else value.strip()


def _read_sweep(raw: Any) -> Sweep:
    if not isinstance(raw, dict):
        raise ScenarioError(
            f"must be a table, is {raw!r}", key="sweep", hint='such as "run.seed" = [0, 1, 2]'
        )
    bad = [_not_finite(f"sweep.{key}", value) for key, value in _leaves(raw) if _is_not_finite(value)]
    cases = raw.get("cases", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) and case for case in cases):
        hint = 'cases = [{label = "FedAvg", strategy = "fedavg"}, …]'
        bad.append(ScenarioError(f"must be a list of tables, is {cases!r}", key="sweep.cases", hint=hint))
    grid: dict[str, list[Any]] = {}

    def collect(prefix: str, node: Mapping[str, Any]) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                collect(f"{name}.", value)
            elif not isinstance(value, list) or not value:
                hint = f'"{name}" = [first, second, …]'
                error = ScenarioError(
                    f"must be a list of values, is {value!r}", key=f"sweep.{name}", hint=hint
                )
                bad.append(error)
            else:
                grid[name] = value

    collect("", {key: value for key, value in raw.items() if key != "cases"})
    raise_all(bad)
    return Sweep(tuple(cases), grid)


# --- messages ------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str], what: str = "known") -> str:
    """Return a hint for a name that nobody knows: the nearest ones, and all there are.

    Parameters
    ----------
    word : str
        The name that was given.
    known : iterable of str
        The names there are.
    what : str
        What they are, in the plural; empty to list none of them.

    Examples
    --------
    >>> did_you_mean("alhpa", ["alpha", "clients"])
    "did you mean 'alpha'? known: alpha, clients"
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    near = near or [name for name in names if name.lower() == word.lower()]
    guess = f"did you mean {near[0]!r}?" if near else ""
    listing = f"{what}: {', '.join(names) or 'none'}" if what else ""
    return f"{guess} {listing}".strip()


def allowed(annotation: Any, bounds: Mapping[str, Any] | None = None) -> str:
    """Say in words what a setting may be.

    Parameters
    ----------
    annotation : type
        Type of the setting.
    bounds : mapping
        Any of ``gt``, ``ge``, ``lt``, ``le``.

    Examples
    --------
    >>> allowed(float, {"gt": 0, "le": 1})
    'a number in (0, 1]'
    >>> allowed(int | None, {"ge": 1})
    'a whole number >= 1'
    """
    bounds = {key: value for key, value in (bounds or {}).items() if value is not None}
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        parts = [allowed(part, bounds) for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        word = "a whole number" if annotation is int else "a number"
        low = f"({bounds['gt']:g}" if "gt" in bounds else f"[{bounds['ge']:g}" if "ge" in bounds else ""
        high = f"{bounds['lt']:g})" if "lt" in bounds else f"{bounds['le']:g}]" if "le" in bounds else ""
        if low and high:
            return f"{word} in {low}, {high}"
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        return " ".join([word, *(f"{signs[key]} {value:g}" for key, value in bounds.items() if key in signs)])
    if annotation is str:
        return "a string"
    if origin in (list, tuple, set, frozenset) or annotation in (list, tuple):
        return "a list"
    if (
        origin is dict
        or annotation is dict
        or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
    ):
        return "a table"
    return f"of type {getattr(annotation, '__name__', annotation)}"


def bounds_of(info: FieldInfo) -> dict[str, Any]:
    """Return the bounds of a field of a section: any of ``gt``, ``ge``, ``lt``, ``le``."""
    return {
        key: getattr(constraint, key)
        for constraint in info.metadata
        for key in ("gt", "ge", "lt", "le")
        if getattr(constraint, key, None) is not None
    }


@contextmanager
def errors_in(file: str) -> Iterator[None]:
    """Put the file's name into scenario errors raised inside that do not know it."""
    try:
        yield
    except ScenarioError as error:
        error.file = error.file or file
        raise


def raise_all(errors: Iterable[ScenarioError]) -> None:
    """Raise errors as one: none raises nothing, one raises itself, several become a list, one per line."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = [
            "  "
            + (f"{e.key}: " if e.key else "")
            + e.problem
            + (f"  [{' '.join(e.hint.split())}]" if e.hint else "")
            for e in found
        ]
        raise ScenarioError("\n".join([f"{len(found)} settings are wrong", *lines]))


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value of nested tables and lists with its dotted key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for position, value in enumerate(node):
            yield from _leaves(value, f"{prefix}[{position}]")
    else:
        yield prefix, node


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_finite(key: str, value: Any) -> ScenarioError:
    return ScenarioError(
        f"must be a finite number, is {value}", key=key, hint="NaN and infinity are never settings"
    )


def _section_of(annotation: Any) -> type[Section] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _translate(detail: Mapping[str, Any], raw: Any) -> ScenarioError:
    """Turn one of pydantic's findings into our own words."""
    key, node, info = "", raw, None
    section: type[Section] | None = Scenario
    for part in detail["loc"]:
        if isinstance(part, int) and isinstance(node, list) and part < len(node):
            key, node = f"{key}[{part}]", node[part]
        elif section is not None and isinstance(node, Mapping) and part in node:
            key, node = f"{key}.{part}" if key else str(part), node[part]
            info = section.model_fields.get(str(part))
            if info is None:
                return _unknown(key, str(part), section)
            section = _section_of(info.annotation)
        else:  # a branch of a union
            break
    if info is None:
        return ScenarioError(f"must be a table, is {node!r}", key=key)
    default = info.get_default(call_default_factory=True, validated_data={})
    hint = info.description or ""
    if default is not None and not isinstance(default, Section) and default not in ("", [], {}):
        hint += f" Default: {default}."
    return ScenarioError(
        f"must be {allowed(info.annotation, bounds_of(info))}, is {node!r}", key=key, hint=hint
    )


def _unknown(key: str, name: str, section: type[Section]) -> ScenarioError:
    known = [*section.model_fields, *(["sweep"] if section is Scenario else [])]
    hint = did_you_mean(name, known)
    elsewhere = _way_to(name)
    if not hint.startswith("did") and elsewhere:
        hint = elsewhere
    return ScenarioError("unknown key", key=key, hint=hint)


def _way_to(name: str) -> str:
    """Return a hint to the sections that have a key of this name."""
    places = [
        f"{title}.{name}"
        for title, info in Scenario.model_fields.items()
        if (section := _section_of(info.annotation)) and name in section.model_fields
    ]
    return f"did you mean {' or '.join(places)}?" if places else did_you_mean(name, Scenario.model_fields)


# --- writing -------------------------------------------------------------------------------------------


def dump(scenario: Scenario) -> str:
    """Return the resolved scenario, defaults included, as TOML that `load` reads back to an equal one."""
    return tomli_w.dumps(scenario.model_dump(exclude_none=True))


# Settings that say how something is called or computed, and cannot change a result.
_IDLE: dict[str, Any] = {
    "name": True,
    "label": True,
    "description": True,
    "system": {"workers", "engine", "address", "gpu_fraction"},
    "run": {"checkpoint_every"},
}


def digest(scenario: Scenario) -> str:
    """Return eight hexadecimal digits that stand for everything in the scenario that can change a result.

    Examples
    --------
    >>> a = parse({"name": "a", "system": {"workers": 2}, "strategy": {"mu": 1}})
    >>> b = parse({"name": "b", "strategy": {"mu": 1.0}})
    >>> digest(a) == digest(b) != digest(parse({"strategy": {"mu": 2}}))
    True
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps(plain(scenario.model_dump(exclude=_IDLE)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- checks --------------------------------------------------------------------------------------------


def check(scenario: Scenario) -> None:
    """Check what concerns several settings, without loading data: see `fedkd.checks.check`."""
    importlib.import_module("fedkd.checks").check(scenario)


def check_data(scenario: Scenario, federation: Any) -> None:
    """Check a scenario against its resolved federation: see `fedkd.checks.check_data`."""
    importlib.import_module("fedkd.checks").check_data(scenario, federation)
