"""These need Triton as a compiler, in a process where it is not the interpreter; no GPU."""

import importlib.util
import os
from pathlib import Path

import pytest

COMPILED = os.environ.get("TRITON_INTERPRET") != "1" and bool(importlib.util.find_spec("triton"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not COMPILED:
            item.add_marker(pytest.mark.skip(reason="needs Triton, as tools/test brings it"))
