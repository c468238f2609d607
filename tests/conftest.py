"""Which tests share a process: those of a file; in test_scripts.py, those of a script."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        group = item.path.stem
        script = getattr(item, "callspec", None) and item.callspec.params.get("script")
        if group == "test_scripts" and script:
            group = script.name
        item.add_marker(pytest.mark.xdist_group(group))
