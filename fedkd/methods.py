"""What methods say about themselves, in words: for ``fedkd describe``, docs/methods.md and the README's table."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedkd import plugins
from fedkd.errors import ScenarioError
from fedkd.files import write_atomic

COMMAND = "fedkd methods --write ."
PAGE = Path("docs/methods.md")
README = Path("README.md")
BEGIN, END = f"<!-- methods: made by {COMMAND} -->", "<!-- methods: end -->"

DISTILS = {"": "–", "clients": "on clients", "server": "on the server", "both": "on both"}

_INTRODUCTION = f"""\
<!-- Made by `{COMMAND}` from the classes in strategies/: change those. -->

# Methods

Every built-in method, as its class describes it; `fedkd describe NAME` prints the same with all hyper-parameters.
Defaults are the paper's; `preset = "code"` takes the authors' released settings where they differ.

Formulas are bytes for one client in one round: |θ| is the number of scalars of a model that travel, C of classes, |P|
of samples of the proxy set, n of a client's training samples. Ids of samples travel as 32-bit integers, other numbers
as float32 unless a method says otherwise.
"""


def built_in() -> dict[str, type]:
    """Return the classes of the methods that come with this package, by name, in the order of where they distil."""
    found = {n: c for n, c in plugins.strategies().items() if c.__module__.split(".")[0] == plugins.BUILT_IN}
    places = list(DISTILS)
    return dict(sorted(found.items(), key=lambda item: (places.index(item[1].distils_on), item[1].year, item[0])))


# --- one method ------------------------------------------------------------------------------------------------------


def paragraphs(cls: type) -> list[str]:
    """Return a method's docstring as paragraphs without line breaks, up to its first section; a title comes first."""
    found = []
    for part in (inspect.getdoc(cls) or "").split("\n\n"):
        lines = part.strip().splitlines()
        if len(lines) > 1 and set(lines[1].strip()) == {"-"}:
            break
        if lines:
            found.append(" ".join(line.strip() for line in lines).replace("``", "`"))
    return found


def different_models(cls: Any) -> str:
    """Return whether clients may have different models, and what becomes of them."""
    if not cls.heterogeneous:
        return "no"
    # Who averages weights and distils nothing on the server has no way from one architecture to another.
    return "averaged within each" if cls.shares_weights and cls.distils_on in ("", "clients") else "yes"


def presets(cls: Any) -> dict[str, str]:
    """Return what each preset sets, in words; the paper's are the defaults."""
    return {
        name: ", ".join(f"{key} = {value}" for key, value in values.items()) or "the defaults"
        for name, values in ({"paper": {}} | dict(cls.presets)).items()
    }


def facts(cls: Any) -> dict[str, str]:
    """Return what a method says about itself, but for its hyper-parameters, by topic."""
    title = paragraphs(cls)[:1]
    rows = {
        "paper" if cls.paper else "about": " ".join([*title, cls.paper]).strip(),
        "year": str(cls.year or ""),
        "distils": "nowhere" if not cls.distils_on else DISTILS[cls.distils_on],
        "sends up": cls.travels_up,
        "sends down": cls.travels_down,
        "requires": ", ".join(sorted(cls.requires)) or "nothing",
        "server data": cls.server_data or "none",
        "client data": cls.client_data or "none but their own",
        "different models": different_models(cls),
        "presets": "; ".join(f"{name}: {values}" for name, values in presets(cls).items()),
        "paper and code": cls.differences,
        "pitfalls": cls.pitfalls,
        "verified": cls.verified,
    }
    return {topic: text for topic, text in rows.items() if text}


# --- all of them -----------------------------------------------------------------------------------------------------


def citation(cls: Any) -> str:
    """Return who wrote a method's paper and when, as a Markdown link to it; nothing without a paper.

    Examples
    --------
    >>> class TreeKD:
    ...     __doc__ = "Ash, Birch, Cedar, Trees That Learn, 2031."
    ...     paper, year = "https://trees.org", 2031
    >>> citation(TreeKD)
    '[Ash et al. 2031](https://trees.org)'
    """
    parts = (paragraphs(cls) or [""])[0].split(", ")
    names = list(itertools.takewhile(lambda part: " " not in part, parts))
    authors = f"{names[0]} et al." if len(names) > 1 else parts[0]
    return f"[{authors} {cls.year}]({cls.paper})" if cls.paper else ""


_WHERE: dict[str, Callable[[Any], str]] = {
    "distils": lambda cls: DISTILS[cls.distils_on],
    "server data": lambda cls: cls.server_data,
    "client data": lambda cls: cls.client_data,
    "different models": different_models,
}
_SHORT = {"paper": citation, **_WHERE}
_LONG: dict[str, Callable[[Any], str]] = {
    **_WHERE,
    "up": lambda cls: cls.travels_up,
    "down": lambda cls: cls.travels_down,
    "presets": lambda cls: ", ".join(presets(cls)),
    "verified by": lambda cls: cls.verified,
}


def short_table(methods: Mapping[str, Any]) -> str:
    """Return a Markdown table of who, where and with what; `page` has the rest."""
    return _table(_SHORT, {f"`{name}`": cls for name, cls in methods.items()})


def page(methods: Mapping[str, Any]) -> str:
    """Return a Markdown page: a table of all methods, and an account of each."""
    table = _table(_LONG, {f"[{name}](#{name})": cls for name, cls in methods.items()})
    return "\n".join([_INTRODUCTION, table, *(_account(name, cls) for name, cls in methods.items())])


def write(folder: Path, methods: Mapping[str, Any]) -> list[Path]:
    """Write the page and the README's table in a working tree of this project.

    Parameters
    ----------
    folder : Path
        The tree.
    methods : mapping of str to type
        Classes by name.

    Raises
    ------
    ScenarioError
        The folder holds no README with a place for the table.
    """
    readme = folder / README
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ScenarioError(f"{readme} has no lines {BEGIN} and {END}", key="--write", hint="name the project's folder")
    return [
        write_atomic(folder / PAGE, page(methods).encode()),
        write_atomic(readme, f"{before}{begin}\n\n{short_table(methods)}\n{end}{after}".encode()),
    ]


def _account(name: str, cls: Any) -> str:
    title, *body = paragraphs(cls) or [name]
    link = f" [Paper]({cls.paper})" if cls.paper else ""
    changed = [f"`{preset}`: {values}" for preset, values in presets(cls).items() if preset != "paper"]
    points = {
        "Paper and code": cls.differences,
        "Presets": "; ".join(changed),
        "Pitfalls": cls.pitfalls,
        "Verified by": cls.verified,
    }
    lines = [f"## {name}\n", f"{title}{link}\n", *(f"{paragraph}\n" for paragraph in body[:1])]
    lines += [f"- *{topic}:* {text}" for topic, text in points.items() if text]
    return "\n".join(lines) + "\n"


def _table(columns: Mapping[str, Callable[[Any], str]], methods: Mapping[str, Any]) -> str:
    lines = [("method", *columns), ("---",) * (1 + len(columns))]
    lines += [(name, *(tell(cls) for tell in columns.values())) for name, cls in methods.items()]
    escaped = [[cell.replace("|", "\\|") or "–" for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
