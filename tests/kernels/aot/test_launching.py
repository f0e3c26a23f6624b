"""What launches do, with a driver that stands in for a GPU: tracing, and what is compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.making import blocks, eight_bits, routed, w4, w4_signed, w8, w8_rows
from torchlathe.kernels import operators as _registers  # noqa: F401
from torchlathe.kernels.aot.assembly import main_loop, whole
from torchlathe.kernels.aot.compiling import ARCHITECTURES, Binary, read_binary
from torchlathe.kernels.block_sparse import op as block_sparse
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.norm_quantise import op as norm
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a8_experts import op as w8a8_experts
from torchlathe.kernels.w8a16 import op as w8a16

HALF = torch.float16


class Driver:
    """Enough of a driver for Triton to specialise and compile as it would on an H100."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0


@pytest.fixture(autouse=True)
def _driver() -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Driver())
    yield
    driver._active = before


class Compiled:
    """Stands for a kernel: compiles what would be launched, and keeps it."""

    def __init__(self) -> None:
        self.binaries: dict[str, Binary] = {}

    def __call__(self, kernel):
        self.kernel = kernel
        return self

    def __getitem__(self, grid):
        def launch(*args, **options):
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.binaries[self.kernel.__name__] = read_binary(compiled, ARCHITECTURES["sm_90"])

        return launch


def launches(name: str, wrap: Compiled) -> None:
    x, numbers, tile = torch.randn(9, 512).half(), eight_bits(9, 512), Tile(16, 128, 2)
    bias, scales = torch.randn(100).half(), torch.rand(9)
    rest: dict[str, Any] = {"out_features": 100, "bias": bias, "wrap": wrap}
    if name == "w4a16":
        w4a16.launch(x, w4(100, 512, 128, True, HALF), tile, group=128, **rest)
    elif name == "w8a16":
        w8a16.launch(x, w8(100, 512, 128, HALF), tile, **rest)
    elif name == "w4a8":
        w4a8.launch(numbers, scales, w4_signed(100, 512, 128), tile, dtype=HALF, **rest)
    elif name == "w8a8":
        w8a8.launch(numbers, scales, w8_rows(100, 512), tile, dtype=HALF, **rest)
    elif name == "w8a8_experts":
        offsets, numbers, order, places, weights = routed([3, 0, 9], 512, torch.int8)
        values = eight_bits(3 * 100, 512).view(3, 100, 512)
        experts = w8a8_experts.pack_experts(values, torch.rand(3, 100))
        rest = {"weights": weights, "places": places, "out_features": 100, "dtype": HALF}
        w8a8_experts.launch(
            numbers, torch.rand(6), order, offsets, experts, Tile(16, 128), **rest, wrap=wrap
        )
    elif name == "block_sparse":
        block_sparse.launch(x, blocks(100, 512, 64, HALF), Tile(16, 64, 2), **rest)
    elif name == "low_rank":
        factors = low_rank.pack(torch.randn(64, 512).half(), torch.randn(100, 64).half())
        low_rank.launch(x, factors, tile, **rest)
    else:
        weight = torch.rand(512).half()
        norm.launch(x, x, weight, None, 0.0, mean=False, dtype=torch.int8, wrap=wrap)


# The kernel that each op launches, and whether one adds up parts.
KERNELS = {
    "w4a16": ("product", True),
    "w8a16": ("product", True),
    "w4a8": ("product", True),
    "w8a8": ("product", True),
    "w8a8_experts": ("product", False),
    "block_sparse": ("block_sparse", True),
    "low_rank": ("narrowed", False),
    "norm_quantise": ("norm_quantise", False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_launches_are_specialised_as_the_check_assumes(name: str) -> None:
    """Strides and pointers that are not known to be multiples of 16 would show as narrow loads."""
    wrap = Compiled()
    launches(name, wrap)
    kernel, adds = KERNELS[name]
    binary = wrap.binaries[kernel]
    loop = main_loop(binary) if name != "norm_quantise" else whole(binary)
    assert loop is not None
    assert loop.load_bytes == 16
    assert binary.stack == 0
    assert ("sum_parts" in wrap.binaries) == adds
    if name != "norm_quantise":
        assert min(width for width in loop.loaded if loop.loaded[width] >= 32) == 16


def test_traces_into_kernels_that_write_their_results_only() -> None:
    """What Inductor and AOTInductor do for a GPU, up to the compiler."""

    class Model(torch.nn.Module):
        def forward(self, x, words, scales, weight, packed, packed_scales):
            ops = torch.ops.torchlathe
            q, s, y = ops.add_norm_quantise(x, x, weight, None, 1e-5, False, torch.int8)
            z = ops.w4a8_linear(q, s, packed, packed_scales, None, None, 100, HALF, "relu")
            return (z + ops.w4a16_linear(y, words, scales, None, None, None, 100, 64, "silu"),)

    def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    with FakeTensorMode():
        inputs = (
            empty(4, 256),
            empty(128, 64, dtype=torch.int16),
            empty(4, 128),
            empty(256),
            empty(128, 128, dtype=torch.int8),
            empty(1, 128, dtype=torch.float32),
        )
        graph: Any
        graph, _ = aot_export_module(Model(), inputs, trace_joint=False)
    kernels = torch.ops.higher_order.triton_kernel_wrapper_functional
    launched = [node for node in graph.graph.nodes if node.target is kernels]
    assert [node.kwargs["tensors_to_clone"] for node in launched] == [
        ["out_ptr", "scales_ptr", "summed_ptr"],
        ["out_ptr"],
        ["out_ptr"],
    ]


def test_further_ops_trace_into_kernels() -> None:
    """Gates, low-rank terms, experts and blocks, on fake tensors of a GPU."""

    class Model(torch.nn.Module):
        def forward(
            self, x, rows, row_scales, narrow, up, values, columns, offsets, down, gain, ends
        ):
            ops = torch.ops.torchlathe
            y = ops.block_sparse_linear(x, values, columns, offsets, None, None, 256, "none")
            y = ops.low_rank_linear(y, down, up, None, None, 256, "relu")
            q, s = ops.norm_quantise(y, gain, None, 1e-5, False, torch.int8)
            z = ops.w8a8_low_rank_linear(
                q, s, rows, row_scales, narrow, up, None, None, 128, HALF, "swiglu"
            )
            experts = torch.stack((rows, rows, rows))
            scales = torch.stack((row_scales, row_scales, row_scales))
            return z, ops.w8a8_experts_linear(
                q, s, None, ends, experts, scales, None, 256, HALF, "none", None
            )

    def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    with FakeTensorMode():
        inputs = (
            empty(4, 256),
            empty(256, 256, dtype=torch.int8),
            empty(256, dtype=torch.float32),
            empty(4, 64),
            empty(256, 64),
            empty(7, 64, 64),
            empty(7, dtype=torch.int32),
            empty(5, dtype=torch.int32),
            empty(64, 256),
            empty(256),
            empty(4, dtype=torch.int32),
        )
        graph: Any
        graph, _ = aot_export_module(Model(), inputs, trace_joint=False)
    kernels = torch.ops.higher_order.triton_kernel_wrapper_functional
    launched = [node for node in graph.graph.nodes if node.target is kernels]
    written = [node.kwargs["tensors_to_clone"] for node in launched]
    split = [["out_ptr"]]  # the sums of few rows are split, and added up by another kernel
    assert written == [
        *split,
        ["parts_ptr"],
        ["out_ptr"],
        ["out_ptr", "scales_ptr"],
        *split,
        ["out_ptr"],
    ]


def test_a_convolution_traces_into_kernels() -> None:
    class Model(torch.nn.Module):
        def forward(self, x, weight, scales):
            ops = torch.ops.torchlathe
            numbers, of = ops.quantize_tokens(x.flatten(1), "int8")
            sizes = [3, 3], [2, 2], [1, 1], [1, 1]
            y = ops.w8a8_conv2d(numbers.view_as(x), of, weight, scales, None, *sizes, 24, HALF)
            return (y,)

    def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    with FakeTensorMode():
        inputs = (
            empty(2, 16, 8, 8),
            empty(128, 256, dtype=torch.int8),
            empty(128, dtype=torch.float32),
        )
        graph: Any
        graph, _ = aot_export_module(Model(), inputs, trace_joint=False)
    kernels = torch.ops.higher_order.triton_kernel_wrapper_functional
    launched = [node for node in graph.graph.nodes if node.target is kernels]
    written = [node.kwargs["tensors_to_clone"] for node in launched]
    assert written == [["out_ptr", "scales_ptr"], ["out_ptr"]]


def test_runs_on_fake_tensors_of_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 4, 200, device="cuda", dtype=HALF)
        words = torch.empty(128, 64, device="cuda", dtype=torch.int16)
        scales = torch.empty(4, 128, device="cuda", dtype=HALF)
        out = torch.ops.torchlathe.w4a16_linear(x, words, scales, None, None, None, 100, 64)
    assert out.shape == (3, 4, 100)
    assert out.device.type == "cuda"
