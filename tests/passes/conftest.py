from collections.abc import Iterator

import pytest
import torch

from tests.passes import sample_passes
from torchlathe.ir import Program, capture
from torchlathe.ir.axes import table
from torchlathe.passes import load_plugin, registry


@pytest.fixture(scope="module")
def samples() -> Iterator[None]:
    """The passes of ``sample_passes`` are known by their names."""
    before = dict(registry._plugins)
    load_plugin(sample_passes)
    yield
    registry._plugins.clear()
    registry._plugins.update(before)


@pytest.fixture
def own_registry() -> Iterator[None]:
    """The test begins without plugins, and what it loads is forgotten after it."""
    stores: list[dict] = [registry._plugins, table._registered]
    before = [dict(store) for store in stores]
    for store in stores:
        store.clear()
    yield
    for store, items in zip(stores, before, strict=True):
        store.clear()
        store.update(items)


@pytest.fixture
def program() -> Program:
    return capture(sample_passes.small_net(), (torch.randn(2, 4),), dynamic_shapes="auto")
