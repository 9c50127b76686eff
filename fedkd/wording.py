"""The words of messages: what a setting may be, and which name was meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo


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
        Type of the setting; it may be annotated with pydantic constraints.
    bounds : mapping
        Any of ``gt``, ``ge``, ``lt``, ``le``, for numbers and for those in lists; ``min_length`` for lists.

    Examples
    --------
    >>> allowed(float, {"gt": 0, "le": 1})
    'a number in (0, 1]'
    >>> allowed(int | None, {"ge": 1})
    'a whole number >= 1'
    >>> allowed(tuple[int, ...], {"ge": 1})
    'a list of whole numbers >= 1'
    """
    bounds = {key: value for key, value in (bounds or {}).items() if value is not None}
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *notes = typing.get_args(annotation)
        return allowed(inner, bounds | _bounds(notes))
    if origin is Literal:
        values = typing.get_args(annotation)
        return ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
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
        return _list(typing.get_args(annotation), bounds)
    if origin is dict or annotation is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "a table"
    return f"of type {getattr(annotation, '__name__', annotation)}"


def bounds_of(info: FieldInfo) -> dict[str, Any]:
    """Return the bounds of a field of a section: any of ``gt``, ``ge``, ``lt``, ``le``, ``min_length``."""
    return _bounds(info.metadata)


def _bounds(constraints: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for constraint in constraints:
        if isinstance(constraint, FieldInfo):
            found |= bounds_of(constraint)
        else:
            named = {key: getattr(constraint, key, None) for key in ("gt", "ge", "lt", "le", "min_length")}
            found |= {key: value for key, value in named.items() if value is not None}
    return found


def _list(elements: tuple[Any, ...], bounds: Mapping[str, Any]) -> str:
    """Say what a list may be; of its elements only where they are of one simple type."""
    noun = ""
    if len(elements) == 1 or elements[1:] == (...,):
        one = allowed(elements[0], {key: value for key, value in bounds.items() if key != "min_length"})
        for singular in ("a whole number", "a number", "a string"):
            if one.startswith(singular) and " or " not in one:
                noun = f"{singular.removeprefix('a ')}s{one.removeprefix(singular)}"
    if least := bounds.get("min_length"):
        return f"a list of {least} or more {noun or 'values'}"
    return f"a list of {noun}" if noun else "a list"
