"""Which tests share a process: those of a file; in test_scripts.py, those of a script."""

import pytest
from helpers import make_podcast


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        group = item.path.stem
        script = getattr(item, "callspec", None) and item.callspec.params.get("script")
        if group == "test_scripts" and script:
            group = script.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def podcast(tmp_path_factory):
    """A podcast that no test changes."""
    return make_podcast(tmp_path_factory.mktemp("podcast") / "set")
