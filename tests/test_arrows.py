"""Who may import whom, and what no file of the package may contain."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOOR = {
    "errors",
    "seeds",
    "files",
    "threads",
    "wording",
    "arrays",
    "cohorts",
    "meeting",
    "optimizers",
    "caches",
    "graphs",
    "tapes",
    "garbage",
}
BASE = FLOOR | {"codecs", "scenario", "options", "payloads", "plugins", "models", "losses", "data"}
HALVES = BASE | {"students", "flower", "client", "server"}
WIRED = HALVES | {
    "cluster",
    "listening",
    "scenario_file",
    "sweep",
    "engine",
    "checkpoint",
    "checkpoints",
    "checks",
    "environment",
    "privacy",
    "preflight",
    "grids",
    "run",
    "run_folder",
}

# Package or module of fedkd -> what it may import of fedkd, beside itself.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "seeds": set(),
    "files": set(),
    "threads": set(),
    "wording": set(),
    "arrays": set(),
    "cohorts": set(),
    "meeting": set(),
    "codecs": FLOOR,
    "payloads": FLOOR | {"codecs"},
    "scenario": FLOOR,
    "parsing": FLOOR | {"scenario"},
    "scenario_file": FLOOR | {"scenario", "parsing"},
    "options": FLOOR,
    "plugins": FLOOR | {"scenario", "options"},
    "methods": FLOOR | {"plugins"},
    "optimizers": set(),
    "caches": set(),
    "graphs": set(),
    "tapes": set(),
    "garbage": set(),
    "kept": set(),
    "libraries": {"garbage"},
    "cluster": {"errors", "threads", "scenario", "kept"},
    "listening": HALVES | {"preflight"},
    "models": BASE,
    "losses": BASE,
    "data": BASE,
    "students": BASE,
    "sweep": FLOOR | {"scenario", "parsing", "scenario_file"},
    "flower": FLOOR | {"scenario", "scenario_file", "sweep"},
    "client": HALVES - {"server"},
    "server": HALVES | {"engine"},  # a strategy names the client half it goes with
    "privacy": HALVES,
    # Flower and Ray, nothing of distillation.
    "engine": {
        "errors",
        "seeds",
        "threads",
        "arrays",
        "cohorts",
        "meeting",
        "cluster",
        "kept",
        "caches",
        "graphs",
        "garbage",
    },
    "checkpoint": FLOOR | {"payloads"},
    "environment": BASE | {"students"},
    "checks": HALVES | {"engine"},
    "checkpoints": WIRED,
    "run_folder": WIRED,
    "preflight": WIRED - {"run", "grids"},
    "grids": HALVES | {"engine", "preflight"},
    "jobs": WIRED | {"libraries"},
    "run": WIRED,
    "report": {"errors", "files"},
    "results": WIRED | {"report"},
    "cli": WIRED | {"jobs", "libraries", "report", "results", "methods"},
}
STRATEGIES = HALVES - {"flower"} | {"privacy"}


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the dotted names that `source`, a module of `package`, imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = [*parts[: len(parts) - node.level + 1], node.module] if node.level else [node.module]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "templates" not in path.parts)


def unit(path: Path) -> str:
    """Return the package or module of fedkd that a file belongs to."""
    return path.relative_to(ROOT / "fedkd").with_suffix("").parts[0]


def imported_by(path: Path) -> set[str]:
    return set(imports(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)))


def units_of(names: set[str]) -> set[str]:
    # `from fedkd import __version__` names the package itself.
    return {part for name in names if name.startswith("fedkd.") and (part := name.split(".")[1]) != "__version__"}


@pytest.mark.parametrize("name", sorted({unit(path) for path in modules("fedkd")}))
def test_arrows_of_fedkd_point_down(name):
    assert name in ARROWS, f"fedkd/{name} is new: say in ARROWS what it may import"
    for path in modules("fedkd"):
        if unit(path) == name:
            beyond = units_of(imported_by(path)) - ARROWS[name] - {name}
            assert not beyond, f"{path.relative_to(ROOT)} must not import {sorted(beyond)}"


def test_nothing_in_fedkd_imports_strategies():
    for path in modules("fedkd"):
        assert not {n for n in imported_by(path) if n.split(".")[0] in {"strategies", "scenarios"}}, path


@pytest.mark.parametrize("path", modules("strategies"), ids=lambda path: path.stem)
def test_strategies_build_on_both_halves_alone(path):
    assert units_of(imported_by(path)) <= STRATEGIES


def test_no_circle_between_packages():
    """Models, losses and data may know each other in one direction; so may everything else."""
    edges: dict[str, set[str]] = {}
    for path in modules("fedkd"):
        edges.setdefault(unit(path), set()).update(units_of(imported_by(path)) - {unit(path)})
    while leaves := [name for name, down in edges.items() if not down & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"these import each other: {sorted(edges)}"


def test_every_form_of_import_is_seen():
    source = "import a.b\nfrom c import d as e\ndef f():\n    from . import g\n    from ..h import i, j\n"
    assert list(imports(source, "p.q")) == ["a.b", "c.d", "p.q.g", "p.h.i", "p.h.j"]


MACHINE_PATH = re.compile(
    r"""(?:^|[\s"'`=(\[:])(?:/(?:home|root|work|Users|mnt|opt|tmp|workspace)/|[A-Z]:\\\w)""", re.M
)
LEFT_OVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
TEXT = {".py", ".toml", ".md", ".yml", ".yaml", ".txt", ".typed", ""}


def test_no_machine_paths_and_nothing_left_to_do():
    folders = [ROOT / name for name in ("fedkd", "strategies", "scenarios", "docs", "benchmarks", ".ci", ".github")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
    for path in files:
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            for pattern in (MACHINE_PATH, LEFT_OVER):
                found = pattern.search(text)
                assert not found, f"{path.relative_to(ROOT)}: {found.group().strip()}"
