"""Attention that is written out for the inductor."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.small_models import lowerable
from torchlathe.backends import CompiledModel
from torchlathe.backends.attention import write_out_attention
from torchlathe.ir import capture

fused = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def tensors(*shape: int, keys: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Queries, keys and values; values are one wider."""
    batch, heads, _, width = shape
    others = ((batch, heads, keys, width), (batch, heads, keys, width + 1))
    return tuple(torch.randn(s, dtype=dtype) for s in (shape, *others))


def floating(*shape: int) -> torch.Tensor:
    mask = torch.zeros(shape)
    mask[..., -2:] = torch.finfo(torch.float32).min
    return mask


def hiding(*shape: int) -> torch.Tensor:
    """All keys of the first row are hidden."""
    mask = torch.rand(shape) > 0.4
    mask[..., 0, :] = False
    return mask


def nothing(*shape: int) -> torch.Tensor:
    return torch.full(shape, -torch.inf)


CASES = {
    "plain": (Attention(), tensors(2, 3, 5, 4)),
    "scale": (Attention(scale=0.3), tensors(2, 3, 5, 4)),
    "floating mask": (Attention(), (*tensors(2, 3, 5, 4), floating(2, 1, 5, 7))),
    "mask of one sample": (Attention(), (*tensors(2, 3, 5, 4), floating(1, 3, 1, 7))),
    "mask of two axes": (Attention(), (*tensors(2, 3, 5, 4), floating(5, 7))),
    "rows of which all is hidden": (Attention(), (*tensors(2, 3, 5, 4), hiding(2, 1, 5, 7))),
    "everything hidden": (Attention(), (*tensors(2, 3, 5, 4), nothing(2, 3, 5, 7))),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_fused_op_does(name: str) -> None:
    model, inputs = CASES[name]
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    want = model(*wide).float()
    module = lowerable(capture(model, inputs)).graph_module()
    assert write_out_attention(module) == 1
    assert not module.graph.find_nodes(op="call_function", target=fused)
    (got,) = module(*inputs)
    # Sums over seven keys in float32.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """Two layers with one mask."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x


def test_layers_share_the_mask_that_is_added() -> None:
    inputs = (torch.randn(2, 3, 5, 4), hiding(2, 1, 5, 5))
    module = lowerable(capture(Two(), inputs)).graph_module()
    assert write_out_attention(module) == 2
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)) == 1
    (got,) = module(*inputs)
    torch.testing.assert_close(got, Two()(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_fused_op(name: str) -> None:
    model, inputs = CASES[name]
    module = lowerable(capture(model, inputs)).graph_module()
    write_out_attention(module)
    leaves = [x.clone().requires_grad_() if i < 3 else x for i, x in enumerate(inputs)]
    want = torch.autograd.grad(model(*leaves).square().sum(), leaves[:3])
    got = torch.autograd.grad(module(*leaves)[0].square().sum(), leaves[:3])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class MaskFirst(nn.Module):
    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("backend", ["inductor", "inductor{freezing=true}", "aoti"])
def test_the_compilers_agree_on_rows_of_which_all_is_hidden(backend: str) -> None:
    inputs = (hiding(2, 1, 5, 5), torch.randn(2, 3, 5, 4))
    compiled = CompiledModel(capture(MaskFirst(), inputs), backend)
    torch.testing.assert_close(compiled(*inputs), MaskFirst()(*inputs), rtol=1e-5, atol=1e-6)


LEFT = {
    "long": (Attention(), tensors(1, 2, 5, 4, keys=129)),
    "large": (Attention(), tensors(40, 2, 128, 4, keys=128)),
    "causal": (Attention(is_causal=True), tensors(2, 3, 5, 4)),
    "grouped": (
        Attention(enable_gqa=True),
        (torch.randn(1, 4, 5, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)),
    ),
    "no keys": (Attention(), tensors(2, 3, 5, 4, keys=0)),
    "no queries": (Attention(), tensors(2, 3, 0, 4)),
    "float64": (Attention(), tensors(2, 3, 5, 4, dtype=torch.float64)),
    "without heads": (Attention(), tuple(torch.randn(2, 5, 4) for _ in range(3))),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_gains_nothing_is_left(name: str) -> None:
    model, inputs = LEFT[name]
    module = lowerable(capture(model, inputs)).graph_module()
    assert write_out_attention(module) == 0


def test_what_has_no_fixed_shape_is_left() -> None:
    program = capture(Attention(), tensors(2, 3, 5, 4), dynamic_shapes="auto")
    module = lowerable(program).graph_module()
    assert write_out_attention(module) == 0


def test_the_backend_can_leave_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CASES["floating mask"]
    seen = []

    def watched(module: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        seen.append(len(module.graph.find_nodes(op="call_function", target=fused)))
        return module

    monkeypatch.setattr(torch, "compile", watched)
    for options in ("", "{short-attention=6}", "{short-attention=0}"):
        CompiledModel(capture(model, inputs), f"inductor{options}")
    assert seen == [0, 1, 1]
