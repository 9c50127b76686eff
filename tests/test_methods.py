"""What methods say about themselves: each says all that it must, and the documentation says the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from fedkd import cli, methods
from fedkd.client.local import LocalTraining
from fedkd.errors import ScenarioError
from fedkd.server.strategy import DistillationStrategy

ROOT = Path(__file__).resolve().parents[1]
BASELINES = {"centralized", "local"}  # without a paper
NOWHERE = BASELINES | {"fedavg", "fedprox"}  # distil nothing


@dataclass(kw_only=True)
class Forest(DistillationStrategy):
    """Ash, Birch, Forests That Learn, 2031.

    Trees whisper
    to ``their`` neighbours.

    Second thoughts.

    Notes
    -----
    Nobody hears them.
    """

    paper: ClassVar[str] = "https://trees.org/a|b"
    year: ClassVar[int] = 2031
    travels_up: ClassVar[str] = "leaves: 4·|L|"
    presets: ClassVar[dict] = {"code": {"roots": 3, "rings": 0.5}}
    differences: ClassVar[str] = "The code has roots."
    verified: ClassVar[str] = "rings by hand"


def lacking(name, cls):
    """Return what a method does not say."""
    missing = [
        key for key in ("travels_up", "travels_down", "verified", "differences") if not getattr(cls, key).strip()
    ]
    # What a method inherits from another one was said of that one.
    missing += [f"{key} of its own" for key in ("distils_on", "verified", "differences") if key not in vars(cls)]
    if not cls.distils_on and name not in NOWHERE:
        missing.append("distils_on (one that distils nothing is named in NOWHERE)")
    if name not in BASELINES:
        missing += [f"{key} of its own" for key in ("paper", "year") if not vars(cls).get(key)]
    if cls.requires & {"proxy", "proxy-labels", "server-labels"} and not (cls.server_data or cls.client_data):
        missing.append("server_data or client_data, as it requires " + ", ".join(sorted(cls.requires)))
    if cls.local.sees_proxy and not cls.client_data:
        missing.append("client_data, as its clients see the proxy set")
    if len(methods.paragraphs(cls)) < 2:
        missing.append("a docstring with the paper and, below it, the idea")
    return missing


def test_every_method_says_what_it_does_and_how_it_was_checked():
    found = {name: missing for name, cls in methods.built_in().items() if (missing := lacking(name, cls))}
    assert not found, "\n".join(f"{name} lacks: {'; '.join(missing)}" for name, missing in found.items())


def test_one_that_says_nothing_is_found_out():
    class Proxied(LocalTraining):
        sees_proxy = True

    class Silent(Forest):
        requires: ClassVar[frozenset[str]] = frozenset({"proxy"})
        local = Proxied

    missing = lacking("silent", Silent)
    assert "verified of its own" in missing and "client_data, as its clients see the proxy set" in missing
    assert any(text.startswith("distils_on") for text in missing)
    assert not [text for text in missing if text.startswith("travels")]


@pytest.mark.parametrize(("file", "made"), [("docs/methods.md", methods.page), ("README.md", methods.short_table)])
def test_the_documentation_is_what_the_command_writes(file, made):
    text = (ROOT / file).read_text(encoding="utf-8")
    if file == "README.md":
        text = text.partition(methods.BEGIN + "\n\n")[2].partition("\n" + methods.END)[0]
    assert text == made(methods.built_in()), f"{file} is old: run {methods.COMMAND}"


def test_a_page_has_a_row_and_an_account_of_each_method():
    page = methods.page({"forest": Forest})
    cells = [
        "[forest](#forest)",
        "–",
        "–",
        "–",
        "no",
        r"leaves: 4·\|L\|",
        r"weights: 4·\|θ\|",
        "paper, code",
        "rings by hand",
    ]
    assert f"| {' | '.join(cells)} |\n" in page
    account = page.partition("\n## forest\n")[2]
    assert account == (
        "\nAsh, Birch, Forests That Learn, 2031. [Paper](https://trees.org/a|b)\n\n"
        "Trees whisper to `their` neighbours.\n\n"
        "- *Paper and code:* The code has roots.\n"
        "- *Presets:* `code`: roots = 3, rings = 0.5\n"
        "- *Verified by:* rings by hand\n"
    )


def test_facts_are_in_words():
    facts = methods.facts(Forest)
    assert facts["paper"] == "Ash, Birch, Forests That Learn, 2031. https://trees.org/a|b"
    assert facts["presets"] == "paper: the defaults; code: roots = 3, rings = 0.5"
    assert facts["distils"] == "nowhere" and facts["client data"] == "none but their own"
    assert "pitfalls" not in facts


@pytest.mark.parametrize(
    ("heterogeneous", "shares_weights", "distils_on", "said"),
    [
        (False, True, "server", "no"),
        (True, True, "", "averaged within each"),
        (True, True, "clients", "averaged within each"),
        (True, True, "server", "yes"),
        (True, False, "clients", "yes"),
    ],
)
def test_different_models(heterogeneous, shares_weights, distils_on, said):
    facts = {"heterogeneous": heterogeneous, "shares_weights": shares_weights, "distils_on": distils_on}
    assert methods.different_models(type("Some", (Forest,), facts)) == said


def test_writing_replaces_what_was_made_before_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{methods.BEGIN}\nold\n{methods.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert methods.write(tmp_path, {"forest": Forest}) == [tmp_path / "docs" / "methods.md", readme]
        table = methods.short_table({"forest": Forest})
        assert readme.read_text(encoding="utf-8") == f"before\n{methods.BEGIN}\n\n{table}\n{methods.END}\nafter\n"
    assert "[Ash et al. 2031](https://trees.org/a\\|b)" in table
    assert (tmp_path / "docs" / "methods.md").read_text(encoding="utf-8") == methods.page({"forest": Forest})


def test_a_folder_without_a_place_for_the_table_is_left_alone(tmp_path):
    with pytest.raises(ScenarioError, match="methods: made by"):
        methods.write(tmp_path, {"forest": Forest})
    assert not list(tmp_path.iterdir())


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert cli.main(["methods"]) == 0
    assert capsys.readouterr().out == methods.page(methods.built_in())
    assert cli.main(["methods", "--short"]) == 0
    assert capsys.readouterr().out == methods.short_table(methods.built_in())
    assert cli.main(["methods", "--write", str(tmp_path)]) == 2
    (tmp_path / "README.md").write_text(f"{methods.BEGIN}\n{methods.END}\n", encoding="utf-8")
    assert cli.main(["methods", "--write", str(tmp_path)]) == 0
    assert (tmp_path / "docs" / "methods.md").read_text(encoding="utf-8") == methods.page(methods.built_in())
