"""The README says what the repository holds."""

import re
from pathlib import Path

from fedkd import plugins
from fedkd.scenario_file import shipped

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_strategy_that_is_shown_is_the_one_that_runs():
    assert (ROOT / "strategies" / "fedntd.py").read_text().strip() in README


def test_every_method_and_scenario_is_named():
    table = README.partition("## Methods")[2]
    for name, cls in plugins.strategies().items():
        assert f"`{name}`" in table and cls.paper in table
    for name in shipped():
        assert f"`{name}`" in README


def test_every_toml_block_can_be_read():
    import tomllib

    for block in re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL):
        tomllib.loads(block)
