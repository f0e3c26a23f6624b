"""Group norm: whole groups, the same channel of every group, and groups that pieces cross."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.test_families import Net
from torchlathe.ir import Program
from torchlathe.passes import PassManager, ZeroInvariantGroups

PASSES = "structured-erase{sparsity=0.4},structured-erase{sparsity=0.3}"


def program_of(model: nn.Module, *shapes: tuple[int, ...]) -> Program:
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.3)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return tl.capture(model.double().eval(), inputs)


def exactness(program: Program) -> dict[str, str]:
    families = program.analysis(ZeroInvariantGroups).prunable
    return {f.name: f.exactness for f in families}


def check_twice(program: Program) -> Program:
    """The verifier compares with the zeroed model in float64, where rounding is below 1e-15."""
    after = PassManager(PASSES, verify="full").run(program)
    for record in after.history[-2:]:
        assert record.changed
        assert record.verification["max_rel_error"] < 1e-12
    return after


def net(groups: int, channels: int = 12, rank: int = 2, **options: Any) -> nn.Module:
    conv = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}[rank]
    size = (1,) if rank else ()
    return Net(
        lambda m, x: m.leave(m.norm(m.enter(x)).relu()),
        enter=conv(3, channels, *size),
        norm=nn.GroupNorm(groups, channels, **options),
        leave=conv(channels, 2, *size),
    )


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_groups_and_channels_in_them(groups: int, rank: int, affine: bool) -> None:
    program = program_of(net(groups, rank=rank, affine=affine), (2, 3, 5, 4)[: rank + 2])
    exact = {1: "exact-after-correction", 3: "exact", 12: "exact"}[groups]
    if groups == 3:
        inner = "exact-after-correction"
        assert exactness(program) == {"enter.weight:0/0": exact, "enter.weight:0/1": inner}
    else:
        assert exactness(program) == {"enter.weight:0": exact}
    check_twice(program)


def test_channels_that_are_not_zero_before_it_are_approximate() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(m.norm(m.enter(x).sigmoid()))

    model = Net(run, enter=nn.Conv2d(3, 12, 1), norm=nn.GroupNorm(3, 12), leave=nn.Conv2d(12, 2, 1))
    program = program_of(model, (2, 3, 4, 4))
    assert exactness(program) == {"enter.weight:0/0": "exact", "enter.weight:0/1": "approximate"}
    family = program.analysis(ZeroInvariantGroups).by_name("enter.weight:0/1")
    assert "normalises over indices that are not zero" in family.reasons[0]


def test_pieces_that_share_groups_evenly() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(m.norm(torch.cat((m.a(x), m.b(x)), 1)))

    model = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 4, 1), norm=nn.GroupNorm(3, 12),
                leave=nn.Conv2d(12, 2, 1))  # fmt: skip
    program = program_of(model, (2, 3, 4, 4))
    assert exactness(program) == {
        "a.weight:0/0": "exact", "a.weight:0/1": "exact-after-correction",
    }  # fmt: skip
    check_twice(program)


@pytest.mark.parametrize("positions", [(), (4,), (4, 3)], ids=["none", "one", "two"])
def test_pieces_that_cross_groups(positions: tuple[int, ...]) -> None:
    """The skip connections of a U-Net: groups of 6 over pieces of 8 and 4 channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(m.norm(torch.cat((m.a(x), m.b(x)), 1)))

    conv: Any = (nn.Linear, nn.Conv1d, nn.Conv2d)[len(positions)]
    size = (1,) if positions else ()
    model = Net(run, a=conv(3, 8, *size), b=conv(3, 4, *size), norm=nn.GroupNorm(2, 12),
                leave=conv(12, 2, *size))  # fmt: skip
    program = program_of(model, (5, 3, *positions))
    corrected = "exact-after-correction"
    assert exactness(program) == {"a.weight:0": corrected, "b.weight:0": corrected}
    after = check_twice(program)
    # A far mean does not cancel the variance: the moments of channels are taken first.
    (args, _) = program.example_inputs
    far = tuple(x + 1e6 for x in args)
    assert torch.isfinite(after.run(*far)).all()


class Block(nn.Module):
    """The residual block of a diffusion U-Net."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(groups, width), nn.GroupNorm(groups, out)
        self.up, self.down = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(5, out)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.up(nn.functional.silu(self.first(x)))
        y = y + self.time(t)[:, :, None, None]
        return self.skip(x) + self.down(nn.functional.silu(self.second(y)))


class UNet(nn.Module):
    """Down, middle and up, with residual streams under group norm everywhere."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = Block(8, 8, groups), Block(8, 16, groups)
        self.three, self.four = Block(24, 8, groups), Block(16, 8, groups)
        self.norm, self.leave = nn.GroupNorm(groups, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.one(a, t)
        c = self.two(nn.functional.avg_pool2d(b, 2), t)
        up = nn.functional.interpolate(c, scale_factor=2.0)
        d = self.three(torch.cat((up, b), 1), t)
        e = self.four(torch.cat((d, a), 1), t)
        return self.leave(nn.functional.silu(self.norm(e)))


def test_a_diffusion_unet_is_prunable_exactly() -> None:
    program = program_of(UNet(), (2, 3, 8, 8), (2, 5))
    families = program.analysis(ZeroInvariantGroups)
    hidden = families.of("two.up.weight", 0)
    assert {f.exactness for f in hidden} == {"exact", "exact-after-correction"}
    streams = families.of("enter.weight", 0)
    assert streams
    assert all(f.prunable and f.exactness.startswith("exact") for f in streams)
    before = sum(p.numel() for p in program.parameters.values())
    after = check_twice(program)
    assert sum(p.numel() for p in after.parameters.values()) < 0.5 * before


def test_half_precision_is_computed_as_the_fused_op_does() -> None:
    model = net(3).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 4, dtype=torch.bfloat16)
    compiled = tl.compile(model, "structured-erase{sparsity=0.4}", (x,), measure_latency=False)
    twin = compiled.zeroed_reference(model)
    # bfloat16 has 8 bits, and the last layer sums 12 products of them.
    torch.testing.assert_close(compiled(x), twin(x), rtol=0.05, atol=0.05)
