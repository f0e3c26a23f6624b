"""The fused ops that a layer in the logical form can become, and how each is written.

A form says which layers it takes, makes the tensors that its op reads, and calls the op. Forms for
a CPU read what is stored, or torch's own packing; those for a GPU the layouts of
`torchlathe.kernels.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit
from torchlathe.ir.provenance import info
from torchlathe.kernels import operators
from torchlathe.kernels.w4a8.op import pack as pack_w4a8
from torchlathe.kernels.w4a16 import cpu as w4_cpu
from torchlathe.kernels.w4a16.op import pack as pack_w4a16
from torchlathe.kernels.w8a8.op import pack as pack_w8a8
from torchlathe.kernels.w8a16.op import pack as pack_w8a16
from torchlathe.passes.rewrite.lowering.layers import Layer

__all__ = ["FORMS", "Form", "Maker", "forms_for"]

assert operators is not None
ops = torch.ops.torchlathe
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """One fused op.

    Attributes:
        name: Of the op.
        device: Type of device that it is for.
        refuses: Why it does not take a layer, or None.
        write: Makes the call that stands for the layer's last node.
    """

    name: str
    device: str
    refuses: Callable[[Layer], str | None]
    write: Callable[[Maker, Layer], fx.Node]


class Maker:
    """Makes tensors and nodes; what several layers read is made once.

    Args:
        edit: The edit.
    """

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._tensors: dict[tuple[fx.Node, str], list[fx.Node | None]] = {}
        self._tokens: dict[tuple[fx.Node, str], tuple[fx.Node, fx.Node]] = {}
        self._instead: dict[fx.Node, fx.Node] = {}

    def fuse(self, layer: Layer, form: Form) -> None:
        """Put a form in the place of a layer and what follows it."""
        new = form.write(self, layer)
        self.edit.replace(layer.last, new)
        self._instead[layer.last] = new

    def now(self, node: fx.Node | None) -> Any:
        """What stands for a node by now: layers were found before any was fused."""
        return None if node is None else self._instead.get(node, node)

    def tensors(
        self, layer: Layer, kind: str, make: Callable[[], Sequence[torch.Tensor | None]]
    ) -> list[fx.Node | None]:
        """Placeholders of the tensors that a form makes of a weight."""
        key = (layer.weight, kind)
        if key not in self._tensors:
            values = layer.node("values")
            assert values is not None
            stem = info(values).tensor
            self._tensors[key] = [
                None if tensor is None else self.edit.add_tensor(f"{stem}_{kind}{i or ''}", tensor)
                for i, tensor in enumerate(make())
            ]
        return self._tensors[key]

    def tokens(self, layer: Layer) -> tuple[fx.Node, fx.Node]:
        """Numbers and scales of a layer's input."""
        import operator

        assert layer.activations is not None
        data = self.now(layer.operand)
        key = (data, layer.activations)
        if key not in self._tokens:
            before = layer.call.args[0]
            assert isinstance(before, fx.Node)
            args = (data, layer.activations)
            like = layer.call
            pair = self.edit.call(ops.quantize_tokens.default, args, like=like, before=before)
            parts = [
                self.edit.call(operator.getitem, (pair, i), like=like, before=before)
                for i in (0, 1)
            ]
            self._tokens[key] = parts[0], parts[1]
        return self._tokens[key]

    def call(self, layer: Layer, target: Any, *args: Any) -> fx.Node:
        """A call in the place of the layer's last node."""
        return self.edit.call(target, args, like=layer.call, before=layer.last)


# -- which layers ----------------------------------------------------------------------------


def _only(layer: Layer, formats: Sequence[str], groups: Sequence[int] | None = None) -> str | None:
    """Why a layer is none of a linear layer with symmetric numbers of these formats and groups."""
    if layer.kind != "linear":
        return f"it is {layer.kind}, not a linear layer"
    if layer.format.name not in formats:
        return f"its numbers are {layer.format.name}"
    if groups is not None and layer.group not in groups:
        return f"it has groups of {layer.group or layer.shape[1]}"
    return None


def _plain(layer: Layer) -> str | None:
    return "its numbers have zero points" if layer.node("zeros") is not None else None


def _rounded(layer: Layer, wanted: str | None) -> str | None:
    if layer.activations == wanted:
        return None
    return f"its inputs are {layer.activations or 'not rounded'}"


def _half(layer: Layer) -> str | None:
    if layer.dtype in _HALVES:
        return None
    return f"its inputs are {str(layer.dtype).removeprefix('torch.')}"


def _w8a8(layer: Layer) -> str | None:
    return _only(layer, ("int8",), (0,)) or _plain(layer) or _rounded(layer, "int8")


def _w8a8_gpu(layer: Layer) -> str | None:
    return _only(layer, ("int8", "fp8"), (0,)) or _plain(layer) or _rounded(
        layer, layer.format.name
    )  # fmt: skip


def _w8a16_cpu(layer: Layer) -> str | None:
    return _only(layer, ("int8",), (0,)) or _plain(layer) or _rounded(layer, None) or _half(layer)


def _w8a16(layer: Layer) -> str | None:
    return (
        _only(layer, ("int8",), (0, 128)) or _plain(layer) or _rounded(layer, None) or _half(layer)
    )


def _w4a16_cpu(layer: Layer) -> str | None:
    reason = _only(layer, ("int4",)) or _rounded(layer, None)
    return reason or w4_cpu.supports(layer.shape[1], layer.group)


def _w4a16(layer: Layer) -> str | None:
    return _only(layer, ("int4",), (0, 32, 64, 128)) or _rounded(layer, None) or _half(layer)


def _w4a8(layer: Layer) -> str | None:
    return _only(layer, ("int4",), (0, 128)) or _plain(layer) or _rounded(layer, "int8")


# -- how each is written ---------------------------------------------------------------------


def _scales(maker: Maker, layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """(groups, outs), as kernels take them."""
    scales = layer.tensor(maker.edit.program, "scales")
    assert scales is not None
    return scales.t().to(dtype).contiguous()


def _zeros(maker: Maker, layer: Layer) -> torch.Tensor | None:
    zeros = layer.tensor(maker.edit.program, "zeros")
    return None if zeros is None else zeros.t().contiguous()


def _values(maker: Maker, layer: Layer) -> torch.Tensor:
    codes = layer.codes(maker.edit.program)
    return codes.view(torch.float8_e4m3fn) if layer.format.name == "fp8" else codes


def _write_int_mm(maker: Maker, layer: Layer) -> fx.Node:
    """The product of what is stored: no tensor is made but the scales as a vector."""
    numbers, token_scales = maker.tokens(layer)
    (scales,) = maker.tensors(
        layer, "scale_row", lambda: [_scales(maker, layer, torch.float32)[0].contiguous()]
    )
    return maker.call(
        layer, ops.w8a8_linear.default, numbers, token_scales, layer.node("values"), scales,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.dtype, layer.activation,
    )  # fmt: skip


def _write_w8a8(maker: Maker, layer: Layer) -> fx.Node:
    numbers, token_scales = maker.tokens(layer)
    weight = maker.tensors(
        layer, "rows",
        lambda: pack_w8a8(_values(maker, layer), _scales(maker, layer, torch.float32)[0]),
    )  # fmt: skip
    return maker.call(
        layer, ops.w8a8_linear.default, numbers, token_scales, *weight,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.dtype, layer.activation,
    )  # fmt: skip


def _write_int8pack(maker: Maker, layer: Layer) -> fx.Node:
    (scales,) = maker.tensors(
        layer, "scale_row", lambda: [_scales(maker, layer, layer.dtype)[0].contiguous()]
    )
    return maker.call(
        layer, ops.w8a16_cpu_linear.default, maker.now(layer.operand), layer.node("values"), scales,
        layer.bias, maker.now(layer.residual), layer.activation,
    )  # fmt: skip


def _write_int4pack(maker: Maker, layer: Layer) -> fx.Node:
    weight = maker.tensors(
        layer, "int4pack",
        lambda: w4_cpu.pack_for_cpu(
            _values(maker, layer), _scales(maker, layer, layer.dtype),
            _zeros(maker, layer), layer.group,
        ),
    )  # fmt: skip
    return maker.call(
        layer, ops.w4a16_cpu_linear.default, maker.now(layer.operand), *weight,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.group,
        w4_cpu.capability(), layer.activation,
    )  # fmt: skip


def _write_w8a16(maker: Maker, layer: Layer) -> fx.Node:
    weight = maker.tensors(
        layer, "hs8",
        lambda: pack_w8a16(
            _values(maker, layer), _scales(maker, layer, layer.dtype), layer.group
        ),
    )  # fmt: skip
    return maker.call(
        layer, ops.w8a16_linear.default, maker.now(layer.operand), *weight,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.activation,
    )  # fmt: skip


def _write_w4a16(maker: Maker, layer: Layer) -> fx.Node:
    weight = maker.tensors(
        layer, "qs4",
        lambda: pack_w4a16(
            _values(maker, layer), _scales(maker, layer, layer.dtype),
            _zeros(maker, layer), layer.group,
        ),
    )  # fmt: skip
    return maker.call(
        layer, ops.w4a16_linear.default, maker.now(layer.operand), *weight,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.group, layer.activation,
    )  # fmt: skip


def _write_w4a8(maker: Maker, layer: Layer) -> fx.Node:
    numbers, token_scales = maker.tokens(layer)
    weight = maker.tensors(
        layer, "hs4",
        lambda: pack_w4a8(
            (_values(maker, layer).to(torch.int8) - 8),
            _scales(maker, layer, torch.float32), layer.group,
        ),
    )  # fmt: skip
    return maker.call(
        layer, ops.w4a8_linear.default, numbers, token_scales, *weight,
        layer.bias, maker.now(layer.residual), layer.shape[0], layer.dtype, layer.activation,
    )  # fmt: skip


FORMS: tuple[Form, ...] = (
    Form("w8a8_linear", "cpu", _w8a8, _write_int_mm),
    Form("w8a16_cpu_linear", "cpu", _w8a16_cpu, _write_int8pack),
    Form("w4a16_cpu_linear", "cpu", _w4a16_cpu, _write_int4pack),
    Form("w4a8_linear", "cpu", _w4a8, _write_w4a8),
    Form("w8a8_linear", "cuda", _w8a8_gpu, _write_w8a8),
    Form("w8a16_linear", "cuda", _w8a16, _write_w8a16),
    Form("w4a16_linear", "cuda", _w4a16, _write_w4a16),
    Form("w4a8_linear", "cuda", _w4a8, _write_w4a8),
)


def forms_for(layer: Layer, device: str) -> tuple[list[Form], list[str]]:
    """The forms that take a layer on a device, and why the others do not."""
    taken, reasons = [], []
    for form in FORMS:
        if form.device != device:
            continue
        reason = form.refuses(layer)
        if reason is None:
            taken.append(form)
        else:
            reasons.append(f"{form.name}: {reason}")
    return taken, reasons
