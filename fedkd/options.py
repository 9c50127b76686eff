"""Options by name: a function's keyword-only parameters, checked before it is called."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedkd.errors import ScenarioError
from fedkd.wording import allowed, did_you_mean

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def check_options(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    key: str,
    owner: str,
    reserved: Collection[str] = (),
) -> dict[str, Any]:
    """Return `options` as `function` wants them, lists made tuples and so on.

    The options are the function's keyword-only parameters; their annotations, which may hold pydantic
    constraints, are checked. Annotations that are strings (``from __future__ import annotations``) are not.

    Parameters
    ----------
    function : callable
        What will be called; one with ``**options`` takes any name.
    options : mapping
        What the scenario sets.
    key : str
        Key of the scenario to blame.
    owner : str
        Who has the options, such as ``model 'cnn'``.
    reserved : collection of str
        Keyword-only parameters that are not for the scenario to set.

    Raises
    ------
    ScenarioError
        For an unknown name, a value of the wrong type or out of range, and a missing value without default.

    Examples
    --------
    >>> def loss(x, *, layer: int = 0, margin: float = 1.0): ...
    >>> check_options(loss, {"layer": 2}, key="client.terms", owner="loss 'x'")
    {'layer': 2}
    >>> check_options(loss, {"layr": 2}, key="client.terms", owner="loss 'x'")
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: client.terms: loss 'x' has no option 'layr'
      did you mean 'layer'? options: layer, margin
    >>> check_options(loss, {"margin": "wide"}, key="client.terms", owner="loss 'x'")
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: client.terms: loss 'x': margin must be a number, is 'wide'
      Default: 1.0.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    declared = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}
    checked = {}
    for name, value in options.items():
        if name in reserved or (name not in declared and not takes_any):
            raise ScenarioError(
                f"{owner} has no option {name!r}", key=key, hint=did_you_mean(name, declared, "options")
            )
        checked[name] = _checked(declared[name], value, key, owner) if name in declared else value
    for name, parameter in declared.items():
        if parameter.default is parameter.empty and name not in checked:
            raise ScenarioError(f"{owner} needs the option {name!r}", key=key)
    return checked


def _checked(parameter: inspect.Parameter, value: Any, key: str, owner: str) -> Any:
    if parameter.annotation is parameter.empty or isinstance(parameter.annotation, str):
        return value
    try:
        # As JSON, because TOML's lists must do for tuples, too.
        return TypeAdapter(parameter.annotation, config=_STRICT).validate_json(json.dumps(value, default=str))
    except ValidationError:
        hint = "" if parameter.default is parameter.empty else f"Default: {parameter.default!r}."
        problem = f"{owner}: {parameter.name} must be {allowed(parameter.annotation)}, is {value!r}"
        raise ScenarioError(problem, key=key, hint=hint) from None
