"""What is checked before a scenario runs, beyond each setting by itself (see `fedkd.parsing` for that)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fedkd import losses, models, plugins
from fedkd.client.terms import check_teacher
from fedkd.data import sources
from fedkd.data.local import find_file
from fedkd.data.partition import check as check_partition
from fedkd.engine.clock import Listed, Trace
from fedkd.errors import DataError, ScenarioError, raise_all
from fedkd.scenario import Attacks, Clock, Scenario
from fedkd.server.clock import make_availability, make_devices
from fedkd.students import build_student
from fedkd.wording import did_you_mean

if TYPE_CHECKING:
    from fedkd.data.federation import Federation

_BUILT: set[tuple[str, str, str]] = set()  # models that have been built once in this process, to check them

EVERYBODY = 10_000  # clients that an evaluation may ask


def check(scenario: Scenario) -> None:
    """Check what concerns several settings, or names things, without loading data.

    Raises
    ------
    ScenarioError
        With every mistake that was found, in one message.
    """
    checks: list[Callable[[Scenario], Any]] = [
        _data,
        lambda s: check_partition(s.partition),
        _local_splits,
        _proxy,
        _models,
        _strategy,
        _terms,
        _batches,
        _buffers,
        _device,
        _participation,
        _clock,
        _faults,
        _attacks,
        _everybody,
    ]
    errors: dict[tuple[str, str], ScenarioError] = {}
    for one in checks:
        try:
            one(scenario)
        except ScenarioError as error:
            errors.setdefault((error.key, error.problem), error)
    raise_all(errors.values())


def check_data(scenario: Scenario, federation: Federation) -> None:
    """Check a scenario against its resolved federation.

    Parameters
    ----------
    scenario : Scenario
        As it was read.
    federation : Federation
        What `fedkd.data.federation.build_federation` made of it.

    Raises
    ------
    ScenarioError
        With every mistake that was found, in one message.
    """
    errors: list[ScenarioError] = []
    if len(federation.eligible) == 0:
        hint = "use fewer clients, or keep less for validation and test"
        errors.append(ScenarioError("no client has a training sample", key="partition.clients", hint=hint))
    proxy = federation.proxy
    if proxy is not None and scenario.proxy.size > len(proxy):
        problem = f"must be at most {len(proxy)}, what {scenario.proxy.source} holds, is {scenario.proxy.size}"
        errors.append(ScenarioError(problem, key="proxy.size", hint="0 takes all there is"))
    needs = plugins.make_strategy(scenario).needs()
    if proxy is not None and "same-shape" in needs - proxy.capabilities:
        problem = f"{scenario.strategy.name} needs a proxy set of the task's shape; {proxy.source} has another"
        errors.append(ScenarioError(problem, key="proxy.source", hint='use source = "held-out"'))
    for key, name in _names(scenario):
        try:
            models.check(name, federation.dataset.kind, key)
        except ScenarioError as error:
            errors.append(error)
    raise_all(errors)
    # Only when a model is built is it known that its options, sizes and pretrained weights fit.
    for arch in sorted({*federation.archs.names, scenario.models.server} - {""}):
        case = (arch, scenario.models.model_dump_json(), federation.dataset.identity)
        if case not in _BUILT:
            build_student(scenario, federation.dataset, arch)
            _BUILT.add(case)


def students(scenario: Scenario) -> list[str]:
    """Return the architectures that a scenario names for its clients, in order, each once."""
    student = scenario.models.student
    return [student] if isinstance(student, str) else list(dict.fromkeys(student))


def _names(scenario: Scenario) -> list[tuple[str, str]]:
    server = [("models.server", scenario.models.server)] if scenario.models.server else []
    return [("models.student", name) for name in students(scenario)] + server


def _data(scenario: Scenario) -> None:
    _source(scenario.data.source, "data.source", scenario.data.folder)


def _source(source: str, key: str, folder: str, more: tuple[str, ...] = ()) -> None:
    kind, _, name = source.partition(":")
    patterns = {pattern.partition(":")[0]: pattern for pattern in sources.names()}
    if kind not in patterns:
        guess = did_you_mean(kind, [*more, *patterns], "")
        hint = f"{guess} known: {', '.join([*more, *patterns.values()])}".strip()
        raise ScenarioError(f"unknown data set {source!r}", key=key, hint=hint)
    if (":" in patterns[kind]) != bool(name):
        raise ScenarioError(f"{source!r} should read {patterns[kind]!r}", key=key, hint="see fedkd list datasets")
    if kind == "npz":
        _read(lambda: find_file(name, folder), key)


def _local_splits(scenario: Scenario) -> None:
    if scenario.run.evaluate_clients != "none" and scenario.partition.test == 0:
        problem = f"{scenario.run.evaluate_clients!r} needs test data on the clients, and they have none"
        raise ScenarioError(problem, key="run.evaluate_clients", hint="add [partition] test = 0.2, say")


def _proxy(scenario: Scenario) -> None:
    spec = scenario.proxy
    if spec.source == "none":
        for key in ("size", "labelled"):
            if getattr(spec, key):
                hint = 'add source = "held-out", or leave it out'
                raise ScenarioError("there is no proxy set that it could apply to", key=f"proxy.{key}", hint=hint)
        return
    if spec.labelled and spec.source != "held-out":
        problem = f"must be false for {spec.source!r}, whose labels are not the task's, is true"
        raise ScenarioError(problem, key="proxy.labelled", hint='labels come with source = "held-out" alone')
    if spec.source not in ("held-out", "noise"):
        _source(spec.source, "proxy.source", scenario.data.folder, more=("none", "held-out", "noise"))


def _models(scenario: Scenario) -> None:
    student = scenario.models.student
    if not student:
        raise ScenarioError(f"must name at least one model, is {student!r}", key="models.student", hint='such as "cnn"')
    if isinstance(student, dict) and (min(student.values()) < 0 or sum(student.values()) <= 0):
        raise ScenarioError(f"shares must be >= 0 and not all 0, are {student!r}", key="models.student")
    errors = []
    for key, name in _names(scenario):
        try:
            models.check(name, key=key)
        except ScenarioError as error:
            errors.append(error)
    raise_all(errors)
    if scenario.models.pretrained and not os.path.isfile(os.path.expanduser(scenario.models.pretrained)):
        problem = f"there is no file {scenario.models.pretrained!r}"
        raise ScenarioError(problem, key="models.pretrained", hint="a safetensors file; empty = random weights")


def _strategy(scenario: Scenario) -> None:
    strategy = plugins.make_strategy(scenario)
    archs = students(scenario)
    if len(archs) > 1 and not getattr(strategy, "heterogeneous", True):
        problem = f"{scenario.strategy.name} needs one model for all clients, the scenario has {', '.join(archs)}"
        raise ScenarioError(problem, key="models.student", hint="name one model, or use feddf, dsfl or fd")


def _terms(scenario: Scenario) -> None:
    errors = []
    for term in scenario.client.terms:
        try:
            losses.check_term(term.loss, term.options)
        except ScenarioError as error:
            errors.append(error)
    raise_all(errors)
    if scenario.client.terms:
        shares_weights = getattr(plugins.strategy_class(scenario.strategy.name), "shares_weights", True)
        for term in scenario.client.terms:
            check_teacher(term.teacher, shares_weights=shares_weights)


def _batches(scenario: Scenario) -> None:
    if scenario.models.norm == "batch" and scenario.client.batch_size == 1:
        hint = 'use client.batch_size >= 2, or models.norm = "group"'
        raise ScenarioError("BatchNorm cannot train on batches of 1", key="client.batch_size", hint=hint)


def _buffers(scenario: Scenario) -> None:
    stays_home = scenario.models.norm == "batch" and scenario.models.buffers == "params_only"
    shares = getattr(plugins.strategy_class(scenario.strategy.name), "shares_weights", True)
    if stays_home and shares and scenario.proxy.source == "none":
        raise ScenarioError(
            "the running statistics of BatchNorm stay on the clients, and the server has no data to estimate its own",
            key="models.buffers",
            hint='add [proxy] with source = "held-out", or use buffers = "all" or norm = "group"',
        )


def _device(scenario: Scenario) -> None:
    device = scenario.system.device
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ScenarioError(
            f"must be auto, cpu, cuda or cuda:N, is {device!r}",
            key="system.device",
            hint="auto takes a GPU if there is one",
        )
    if scenario.system.engine == "ray" and device.startswith("cuda:") and device != "cuda:0":
        raise ScenarioError(
            f"is {device!r}, but on Ray a worker sees one GPU alone",
            key="system.device",
            hint='use "cuda" with CUDA_VISIBLE_DEVICES set, or engine = "inline"',
        )


def _participation(scenario: Scenario) -> None:
    clients, share = scenario.partition.clients, scenario.run.participation
    selected = math.floor(share * clients + 0.5)
    if selected < 1:
        problem = f"{share:g} of {clients} clients is nobody"
        raise ScenarioError(problem, key="run.participation", hint=f"must be at least {0.5 / clients:g} here")
    if scenario.system.min_replies > selected:
        problem = f"must be at most {selected}, the clients of a round, is {scenario.system.min_replies}"
        raise ScenarioError(problem, key="system.min_replies", hint="raise run.participation, or lower it")


def _everybody(scenario: Scenario) -> None:
    """Refuse evaluations that would cost more than the training of a population which is mostly at rest."""
    if scenario.partition.clients <= EVERYBODY:
        return
    if scenario.run.evaluate_clients == "all":
        problem = f"evaluates {scenario.partition.clients:,} clients, more than {EVERYBODY:,}"
        raise ScenarioError(problem, key="run.evaluate_clients", hint='use "selected"')
    name = scenario.strategy.name
    if not plugins.strategy_class(name).shares_weights:
        problem = f"{name} has no global model: all {scenario.partition.clients:,} clients would evaluate their own"
        raise ScenarioError(problem, key="partition.clients", hint=f"use at most {EVERYBODY:,} clients")


def _clock(scenario: Scenario) -> None:
    spec, clients = scenario.clock, scenario.partition.clients
    if spec.profile == "none":
        changed = [name for name, value in Clock() if getattr(spec, name) != value]
        if changed:
            hint = 'set clock.profile to "uniform", "lognormal" or "file:PATH", or leave it out'
            raise ScenarioError("has no effect without a clock", key=f"clock.{changed[0]}", hint=hint)
        return
    _one_of(spec.profile, "clock.profile", ("none", "uniform", "lognormal", "file:PATH"))
    _one_of(spec.availability, "clock.availability", ("always", "bernoulli", "diurnal", "trace:PATH"))
    devices = _read(partial(make_devices, scenario), "clock.profile")
    if isinstance(devices, Listed) and len(devices.table) < clients:
        problem = f"{spec.profile} has {len(devices.table)} rows for {clients} clients"
        raise ScenarioError(problem, key="clock.profile", hint="one row for each client, in the order of their ids")
    availability = _read(partial(make_availability, scenario), "clock.availability")
    if isinstance(availability, Trace) and availability.clients.min() >= clients:
        problem = f"{spec.availability} has no client of the federation, whose ids are 0 to {clients - 1}"
        raise ScenarioError(problem, key="clock.availability", hint="the column client holds partition ids, from 0")


def _one_of(value: str, key: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is none of the known ones, of which some end in a path."""
    kind, _, path = value.partition(":")
    if not any(kind == name.partition(":")[0] and (":" in name) == bool(path) for name in known):
        problem = f"must be one of {', '.join(known)}, is {value!r}"
        raise ScenarioError(problem, key=key, hint=did_you_mean(kind, known, ""))


def _read(read: Callable[[], Any], key: str) -> Any:
    """Return what `read` does; an error in data becomes one of the setting `key`."""
    try:
        return read()
    except DataError as error:
        problem, *rest = str(error).splitlines()
        raise ScenarioError(problem, key=key, hint="\n  ".join(line.strip() for line in rest)) from None


def _faults(scenario: Scenario) -> None:
    if scenario.faults.straggle and scenario.clock.profile == "none":
        hint = 'add [clock] profile = "uniform", say'
        raise ScenarioError("stragglers take simulated time, and there is no clock", key="faults.straggle", hint=hint)


def _attacks(scenario: Scenario) -> None:
    spec, clients = scenario.attacks, scenario.partition.clients
    if spec.kind == "none":
        if spec.share:
            hint = 'set attacks.kind to "label-flip", "sign-flip" or "random", or leave it out'
            raise ScenarioError("has no effect without a kind of attack", key="attacks.share", hint=hint)
    elif math.floor(spec.share * clients + 0.5) < 1:
        problem = f"{spec.share:g} of {clients} clients is nobody"
        raise ScenarioError(problem, key="attacks.share", hint=f"must be at least {0.5 / clients:g} here")
    if spec.kind != "label-flip" and spec.flip != Attacks().flip:
        raise ScenarioError('has no effect without kind = "label-flip"', key="attacks.flip", hint="leave it out")
