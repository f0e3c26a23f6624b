import pytest
import torch

from tests.kernels.making import relative, w4
from torchlathe.ir import OptionError
from torchlathe.kernels.w4a16 import cpu
from torchlathe.kernels.w4a16 import op as w4a16

SHAPES = [(1, 64, 128), (7, 100, 200), (17, 130, 512)]


def layer(n: int = 100, k: int = 200, group: int = 64, dtype: torch.dtype = torch.bfloat16):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = w4(n, k, group, True, dtype)
            for name, value in packed._asdict().items():
                self.register_buffer(name, value)
            self.bias = torch.nn.Parameter(torch.randn(n, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.torchlathe.w4a16_linear(
                x, self.words, self.scales, self.zeros, self.bias, None, n, group, "silu"
            )

    return Layer().eval()


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_reference_against_float64(m: int, n: int, k: int, group: int, zeros: bool) -> None:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = torch.rand(groups, n) + 0.1
    points = torch.randint(0, 16, (groups, n), dtype=torch.uint8) if zeros else None
    # Element by element, as the docstring of pack says it.
    of = torch.arange(k) // (group or k)
    centre = points[of].T.double() if points is not None else 8.0
    weight = (values.double() - centre) * scales[of].T.double()
    x, bias, residual = torch.randn(m, k), torch.randn(n), torch.randn(m, n)
    wanted = torch.nn.functional.gelu(x.double() @ weight.T + bias.double()) + residual.double()
    packed = w4a16.pack(values, scales, points, group)
    found = w4a16.reference(
        x, *packed, bias, residual, out_features=n, group=group, activation="gelu"
    )
    # fp32 sums of up to 512 terms; the measured errors are near 1e-7.
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_op_on_a_cpu(dtype: torch.dtype) -> None:
    packed = w4(130, 300, 64, True, dtype)
    x, bias = torch.randn(3, 5, 300).to(dtype), torch.randn(130).to(dtype)
    residual = torch.randn(3, 5, 130).to(dtype)
    found = w4a16.w4a16_linear(x, *packed, bias, residual, 130, 64, "relu")
    wanted = w4a16.reference(
        x.double(), *packed, bias, residual, out_features=130, group=64, activation="relu"
    )
    assert found.dtype == dtype
    assert found.shape == (3, 5, 130)
    # Weights, the product and the result are each rounded to the type once.
    assert relative(found, wanted) < 3 * torch.finfo(dtype).eps


def test_extreme_values() -> None:
    packed = w4a16.pack(
        torch.full((8, 128), 15, dtype=torch.uint8), torch.full((1, 8), 9e3).half(), None, 128
    )
    found = w4a16.w4a16_linear(torch.zeros(2, 128).half(), *packed, None, None, 8, 128)
    assert not found.any()
    x = torch.full((2, 128), 1e-4).half()
    wanted = w4a16.reference(x.double(), *packed, out_features=8, group=128)
    assert relative(w4a16.reference(x, *packed, out_features=8, group=128), wanted) < 1e-3


def test_an_unknown_activation_is_refused() -> None:
    packed = w4(8, 128, 128, False, torch.float16)
    with pytest.raises(OptionError, match="no activation 'tanh'"):
        w4a16.w4a16_linear(torch.zeros(2, 128).half(), *packed, None, None, 8, 128, "tanh")


def test_opcheck() -> None:
    packed = w4(100, 200, 64, True, torch.bfloat16)
    x, bias = torch.randn(4, 200).bfloat16(), torch.randn(100).bfloat16()
    torch.library.opcheck(
        torch.ops.torchlathe.w4a16_linear.default, (x, *packed, bias, None, 100, 64, "silu")
    )


def test_export_keeps_one_node(tmp_path) -> None:
    model = layer()
    x = torch.randn(5, 200).bfloat16()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.torchlathe.w4a16_linear.default]
    torch.export.save(exported, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    other = torch.randn(9, 200).bfloat16()
    assert torch.equal(loaded(other), model(other))


def test_low_rank_residual() -> None:
    packed = w4(100, 200, 64, True, torch.bfloat16)
    x, bias = torch.randn(4, 200).bfloat16(), torch.randn(100).bfloat16()
    down, up = torch.randn(9, 200).bfloat16() / 20, torch.randn(100, 9).bfloat16()
    wide_down, wide_up = w4a16.pad_rank(down, up)
    assert wide_down.shape == (16, 200)
    assert wide_up.shape == (128, 16)
    args = (x, *packed, wide_down, wide_up, bias, None, 100, 64, "silu")
    found = w4a16.w4a16_low_rank_linear(*args)
    wanted = w4a16.reference(x.double(), *packed, out_features=100, group=64)
    wanted = wanted + x.double() @ down.double().T @ up.double().T + bias.double()
    wanted = torch.nn.functional.silu(wanted)
    # As above, and the narrow product is rounded too.
    assert relative(found, wanted) < 4 * torch.finfo(torch.bfloat16).eps
    torch.library.opcheck(torch.ops.torchlathe.w4a16_low_rank_linear.default, args)
    with pytest.raises(OptionError, match="rank of 200"):
        w4a16.pad_rank(torch.ones(200, 8), torch.ones(8, 200))


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_torchs_packing_means_the_same(group: int, zeros: bool) -> None:
    values = torch.randint(0, 16, (100, 256), dtype=torch.uint8)
    scales = (torch.rand(256 // group, 100) + 0.1).bfloat16()
    points = torch.randint(0, 16, (256 // group, 100), dtype=torch.uint8) if zeros else None
    x = torch.randn(2, 3, 256).bfloat16()
    packed = cpu.pack_for_cpu(values, scales, points, group)
    found = cpu.linear_on_cpu(x, packed, group, 100)
    ours = w4a16.pack(values, scales, points, group)
    wanted = w4a16.reference(x.double(), *ours, out_features=100, group=group)
    assert found.shape == (2, 3, 100)
    # Zero points times scales are rounded to bf16, and count with the sums of x.
    assert relative(found, wanted) < 3 * torch.finfo(torch.bfloat16).eps


def test_what_torchs_kernel_cannot_take() -> None:
    values = torch.zeros(16, 100, dtype=torch.uint8)
    with pytest.raises(OptionError, match="100 columns are no whole groups of 32"):
        cpu.pack_for_cpu(values, torch.ones(4, 16), None, 32)
    with pytest.raises(OptionError, match="groups of 100: torch's kernel takes"):
        cpu.pack_for_cpu(values, torch.ones(1, 16), None, 0)
