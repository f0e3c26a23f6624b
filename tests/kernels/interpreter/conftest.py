"""These run in a process of their own: TRITON_INTERPRET must be set before Triton is imported."""

import importlib.util
import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and bool(importlib.util.find_spec("triton"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not INTERPRETED:
            reason = "needs Triton and TRITON_INTERPRET=1, as tools/test sets it"
            item.add_marker(pytest.mark.skip(reason=reason))


def _take_scalars_of_newer_numpy() -> None:
    # Triton 3.6 keeps scalars as arrays of one element, which NumPy 2.4 does not make integers.
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    from tests.kernels.interpreter import ptx

    ptx.install()
    _take_scalars_of_newer_numpy()
