import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def apps():
    """The module of test apps; not in sys.modules, so workers get its functions by value."""
    spec = importlib.util.spec_from_file_location("engine_test_apps", Path(__file__).with_name("apps.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
