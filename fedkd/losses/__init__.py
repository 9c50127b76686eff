"""Losses: pure functions of tensors, and the terms that a scenario can add to a client's loss.

The functions are in `response`, `feature`, `relation` and `information`; `terms` gives them the common
signature ``term(out, teacher_out, batch, *, temperature, **options)``, and this module finds them by name.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from fedkd.errors import ScenarioError
from fedkd.losses import terms
from fedkd.losses.response import cross_entropy, kd, not_true_mask
from fedkd.options import check_options
from fedkd.plugins import load_object
from fedkd.wording import did_you_mean

__all__ = ["check_term", "cross_entropy", "describe", "kd", "names", "not_true_mask", "term"]

_TERMS: dict[str, Callable[..., Tensor]] = {
    "kd": terms.kd,
    "ntd": terms.ntd,
    "mse": terms.mse,
    "mae": terms.mae,
    "dkd": terms.dkd,
    "dist": terms.dist,
    "hint": terms.hint,
    "attention": terms.attention,
    "rkd": terms.rkd,
    "sp": terms.sp,
    "cc": terms.cc,
    "pkt": terms.pkt,
}


def names() -> dict[str, str]:
    """Return every built-in term with one line about it.

    Examples
    --------
    >>> names()["kd"]
    'KL divergence of softened outputs, times T²; options reduction, t_squared, direction.'
    """
    return {name: describe(name) for name in _TERMS}


def describe(name: str) -> str:
    """Return the first line of a term's docstring.

    Raises
    ------
    ScenarioError
        With the key ``client.terms`` if there is no such term.
    """
    return (inspect.getdoc(term(name)) or name).splitlines()[0]


def term(name: str) -> Callable[..., Tensor]:
    """Return the term of a name, called as ``term(out, teacher_out, batch, temperature=T, **options)``.

    Parameters
    ----------
    name : str
        A name of `names`, or ``module:attribute`` of a function with the same signature.

    Raises
    ------
    ScenarioError
        With the key ``client.terms`` if there is no such term.

    Examples
    --------
    >>> term("nt")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: client.terms: unknown loss 'nt'
      did you mean 'ntd'? ...
    """
    if name in _TERMS:
        return _TERMS[name]
    if ":" not in name:
        raise ScenarioError(
            f"unknown loss {name!r}",
            key="client.terms",
            hint=f"{did_you_mean(name, _TERMS, 'losses')}; or module:attribute",
        )
    found = load_object(name, key="client.terms")
    if not callable(found):
        raise ScenarioError(f"loss {name!r} is not a function", key="client.terms")
    return cast("Callable[..., Tensor]", found)


def check_term(name: str, options: Mapping[str, Any]) -> None:
    """Refuse, before training, a term that does not exist or does not take these options.

    Parameters
    ----------
    name : str
        See `term`.
    options : mapping
        The term's options as the scenario sets them.

    Raises
    ------
    ScenarioError
        With the key ``client.terms``.

    Examples
    --------
    >>> check_term("kd", {"direction": "reverse"})
    >>> check_term("kd", {"direction": "backward"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: client.terms: loss 'kd': direction must be one of 'forward', ..., is 'backward'
      Default: 'forward'.
    """
    function = term(name)
    problem = f"loss {name!r} cannot be called as a term"
    hint = "its signature must be (out, teacher_out, batch, *, temperature, **options)"
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions written in C
        raise ScenarioError(problem, key="client.terms", hint=hint) from None
    checked = check_options(function, options, key="client.terms", owner=f"loss {name!r}", reserved=("temperature",))
    try:
        signature.bind(None, None, None, temperature=1.0, **checked)
    except TypeError as error:
        raise ScenarioError(f"{problem}: {error}", key="client.terms", hint=hint) from None
