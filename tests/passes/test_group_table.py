"""Work on groups in pieces: sums along axes, and rows that are few."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.tune.optim import reducing
from torchlathe.passes.tune.optim.groups import GroupTable, named_tensors
from torchlathe.passes.tune.optim.reducing import Scratch, sums_along


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=0, max_size=4), st.integers(0, 3), st.data())
def test_sums_along_an_axis(shape: list[int], axis: int, data: st.DataObject) -> None:
    axis = min(axis, max(0, len(shape) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x, after = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducing, "_PIECE", data.draw(st.sampled_from([1, 7, 2**18])))
        found = sums_along(x, after, axis, Scratch())
        alone = sums_along(x, None, axis, Scratch())
    wide, moved = x.double(), after.double()
    others = [d for d in range(x.dim()) if d != axis]
    products = [wide * wide, wide * (wide - moved), (wide - moved).square()]
    want = torch.stack([p.sum(others) if others else p.reshape(-1) for p in products])
    # Sums of up to a few thousand products in float32.
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, found[:1])


class Wide(nn.Module):
    """Weights that are large enough for rows to be taken by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(160, 200), nn.Linear(200, 3)
        self.conv = nn.Conv2d(3, 50, 5, stride=2)
        self.last = nn.Conv2d(50, 40, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.relu(self.up(x))), self.last(torch.relu(self.conv(y)))


@pytest.mark.parametrize("share", [0.05, 0.19, 0.6])
def test_few_rows_and_many_are_multiplied_alike(share: float) -> None:
    torch.manual_seed(0)
    model = Wide().eval()
    inputs = (torch.randn(2, 160), torch.randn(2, 3, 16, 16))
    families = tl.capture(model, inputs).analysis(ZeroInvariantGroups)
    table = GroupTable(families, families.prunable, named_tensors(model))
    chosen = torch.rand(table.count) < share
    factors = torch.where(chosen, torch.rand(table.count, dtype=torch.float64), 1.0)
    want = {}
    for place in table.places:
        every = torch.cat([factors, torch.ones(1, dtype=torch.float64)])[place.owners].amin(1)
        # Factors are taken in float32, and 1 leaves a weight as it is.
        want[place.name] = place.tensor.detach() * every.float().view(place.shape)
    table.watch(chosen)
    table.multiply(factors)
    for place in table.places:
        assert torch.equal(place.tensor.detach(), want[place.name]), place.name
    rows = [rows for found in table._factors.values() for rows in found.rows.values()]
    assert any(r is not None for r in rows) == (share < 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table.watch(torch.zeros_like(chosen))
    table.multiply(torch.zeros(table.count, dtype=torch.float64))  # nothing is watched
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
