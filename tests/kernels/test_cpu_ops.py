"""The ops on torch's own packings for processors: nothing is unpacked at a call."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import relative
from torchlathe.ir import OptionError
from torchlathe.kernels.w4a16 import cpu
from torchlathe.kernels.w8a16 import cpu as eight

BRAIN = torch.bfloat16
ops = torch.ops.torchlathe
# The result is rounded to bf16 before and after what follows it.
TOLERANCE = 3 * torch.finfo(BRAIN).eps


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_four_bits(group: int, zeros: bool) -> None:
    n, k = 40, 256  # rows that the packing pads
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = 1 if group == 0 else k // group
    scales = (torch.rand(groups, n) * 0.05 + 0.01).to(BRAIN)
    points = torch.randint(0, 16, (groups, n), dtype=torch.uint8) if zeros else None
    packed = cpu.pack_for_cpu(values, scales, points, group)
    x, bias, residual = torch.randn(2, 3, k).to(BRAIN), torch.randn(n), torch.randn(2, 3, n)
    ends = (bias.to(BRAIN), residual.to(BRAIN))
    rest = (n, cpu.group_for(k, group), cpu.capability(), "silu")
    found = ops.w4a16_cpu_linear(x, *packed, *ends, *rest)
    of = torch.arange(k) // (group or k)
    centre = 8.0 if points is None else points.double()[of].T
    weight = (values.double() - centre) * scales.double()[of].T
    wanted = F.silu(F.linear(x.double(), weight, ends[0].double())) + ends[1].double()
    assert relative(found, wanted) < TOLERANCE
    torch.library.opcheck(ops.w4a16_cpu_linear.default, (x, *packed, *ends, *rest))


@pytest.mark.parametrize(
    ("columns", "group", "used"),
    [(256, 0, 128), (192, 0, 64), (96, 0, 32), (100, 0, 0), (256, 64, 64)],
)
def test_groups_of_a_whole_row(columns: int, group: int, used: int) -> None:
    assert cpu.group_for(columns, group) == used
    assert (cpu.supports(columns, group) is None) == (used > 0)


def test_columns_that_are_no_groups() -> None:
    values, scales = torch.zeros(16, 100, dtype=torch.uint8), torch.ones(1, 16)
    with pytest.raises(OptionError, match="no packing for a CPU: groups of 100"):
        cpu.pack_for_cpu(values, scales, None, 0)


def test_eight_bits() -> None:
    n, k = 41, 208
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = (torch.rand(n) * 0.01).to(BRAIN)
    x = torch.randn(5, k).to(BRAIN)
    args = (x, values, scales, None, None, "relu")
    found = ops.w8a16_cpu_linear(*args)
    weight = values.double() * scales.double()[:, None]
    assert relative(found, F.linear(x.double(), weight).relu()) < TOLERANCE
    torch.library.opcheck(ops.w8a16_cpu_linear.default, args)


def test_columns_that_torch_reads_past() -> None:
    """Its kernel crashes, or is wrong, where columns are no multiple of 16."""
    assert eight.supports(208) is None
    values, x = torch.zeros(8, 200, dtype=torch.int8), torch.zeros(3, 200, dtype=BRAIN)
    with pytest.raises(OptionError, match="200 columns: torch's kernel takes multiples of 16"):
        eight.w8a16_cpu_linear(x, values, torch.ones(8, dtype=BRAIN), None, None)
