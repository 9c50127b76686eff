"""Commands that write the start of something of one's own."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from fedkd.cli.terminal import console, print_path
from fedkd.errors import ScenarioError


def strategy(
    name: Annotated[str, typer.Argument(help="Name of the strategy, such as my_method.")],
    folder: Annotated[Path | None, typer.Option(help="Folder of the new package; the name, here, if empty.")] = None,
) -> None:
    """Write a package with a working strategy (both halves), a scenario, and a test that passes."""
    taken = {"test", "tests", "strategies", "scenarios", "fedkd", *sys.stdlib_module_names}
    if not name.isidentifier() or not name.isascii() or name != name.lower() or keyword.iskeyword(name):
        hint = "use small letters, digits and underscores, a letter first: my_method"
        raise ScenarioError(f"{name!r} cannot be the name of a Python module", hint=hint)
    if name in taken:
        raise ScenarioError(f"{name!r} is the name of another module", hint=f"such as {name}_method")
    target = folder or Path(name)
    names = {"name": name, "cls": "".join(part.capitalize() for part in name.split("_") if part) or "Method"}
    templates = Path(__file__).parents[1] / "templates"
    files = {
        target / Template(path.name.removesuffix(".template")).substitute(names): Template(
            path.read_text(encoding="utf-8")
        ).substitute(names)
        for path in sorted(templates.glob("*.template"))
    }
    for path in files:
        if path.exists():
            raise ScenarioError(f"{path} is there already", hint="choose another name, or another --folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScenarioError(f"cannot write to {target}: {error.strerror}", hint="choose another --folder") from None
    for path in files:
        print_path(path)
    steps = {
        f"cd {target}": "",
        f"fedkd run {name}.toml": "# runs it, by module:attribute",
        "pytest": "# its test",
        "pip install -e .": f'# then strategy = "{name}" works in any scenario',
    }
    width = max(map(len, steps))
    lines = [f"  {step:{width}}  {note}".rstrip() for step, note in steps.items()]
    console.print("\n" + "\n".join(lines), markup=False, highlight=False, soft_wrap=True)
