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
from torchlathe.kernels.blocks.launching import pad_rank
from torchlathe.kernels.w4a8.op import pack as pack_w4a8
from torchlathe.kernels.w4a8.op import pack_centred
from torchlathe.kernels.w4a16 import cpu as w4_cpu
from torchlathe.kernels.w4a16.op import pack as pack_w4a16
from torchlathe.kernels.w8a8.op import pack as pack_w8a8
from torchlathe.kernels.w8a16 import cpu as w8_cpu
from torchlathe.kernels.w8a16.op import pack as pack_w8a16
from torchlathe.passes.rewrite.lowering.layers import Layer

__all__ = ["FORMS", "Form", "Maker", "forms_for"]

assert operators is not None
ops = torch.ops.torchlathe
_HALVES = (torch.float16, torch.bfloat16)
_OTHERS = ("its numbers are ", "its inputs are not rounded", "its inputs are int8")


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
        self._tensors: dict[tuple[fx.Node, fx.Node | None, str], list[fx.Node | None]] = {}
        self._tokens: dict[tuple[fx.Node, str], tuple[fx.Node, fx.Node]] = {}
        self._instead: dict[fx.Node, fx.Node] = {}

    def fuse(self, layer: Layer, form: Form) -> None:
        """Put a form in the place of a layer and what follows it."""
        self.stands(layer.last, form.write(self, layer))

    def now(self, node: fx.Node | None) -> Any:
        """What stands for a node by now: layers were found before any was fused."""
        return None if node is None else self._instead.get(node, node)

    def stands(self, old: fx.Node, new: fx.Node) -> None:
        """Put a node in the place of another."""
        self.edit.replace(old, new)
        self._instead[old] = new

    def tensors(
        self, layer: Layer, kind: str, make: Callable[[], Sequence[torch.Tensor | None]]
    ) -> list[fx.Node | None]:
        """Placeholders of the tensors that a form makes of a weight."""
        key = (layer.weight, layer.gated.weight if layer.gated is not None else None, kind)
        if key not in self._tensors:
            values = layer.node("values")
            assert values is not None
            self._tensors[key] = [
                None if tensor is None else self.add(f"{info(values).tensor}_{kind}", tensor)
                for tensor in make()
            ]
        return self._tensors[key]

    def add(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """The placeholder of a new tensor, whose name gets a number if it is taken."""
        program, count = self.edit.program, 0
        taken = (program.entries, program.aliases, program.carried)
        stem = name
        while any(name in names for names in taken):
            count += 1
            name = f"{stem}{count}"
        return self.edit.add_tensor(name, tensor)

    def bias(self, layer: Layer) -> fx.Node | None:
        """The bias, in the order of rows that the op wants."""
        if layer.gated is None and not layer.halves:
            return layer.bias
        (bias,) = self.tensors(layer, "bias", lambda: [layer.biases(self.edit.program)])
        return bias

    def factors(self, layer: Layer) -> tuple[fx.Node, fx.Node]:
        """The factors of the low-rank term, padded as the kernels want them."""
        assert layer.low_rank is not None
        program, (down, up) = self.edit.program, layer.low_rank
        names = str(info(down).tensor), str(info(up).tensor)
        key = (down, up, "factors")
        if key not in self._tensors:
            padded = pad_rank(*(program.tensor(name).detach().to(layer.dtype) for name in names))
            self._tensors[key] = [
                self.add(f"{name}_padded", tensor)
                for name, tensor in zip(names, padded, strict=True)
            ]
        wide, tall = self._tensors[key]
        assert wide is not None
        assert tall is not None
        return wide, tall

    def narrow(self, layer: Layer, down: fx.Node) -> fx.Node:
        """The input times ``down``, before the input is rounded."""
        data = self.now(layer.operand)
        return self.call(layer, torch.ops.aten.linear.default, data, down)

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


def _term(layer: Layer) -> str | None:
    """Kernels take low-rank terms in 16 bits."""
    if layer.low_rank is None or layer.dtype in _HALVES:
        return None
    return "its low-rank term has more than 16 bits"


def _w8a8(layer: Layer) -> str | None:
    return _only(layer, ("int8",), (0,)) or _plain(layer) or _rounded(layer, "int8")


def _w8a8_gpu(layer: Layer) -> str | None:
    reason = _only(layer, ("int8", "fp8"), (0,)) or _plain(layer)
    return reason or _rounded(layer, layer.format.name) or _term(layer)


def _w8a16_cpu(layer: Layer) -> str | None:
    reason = _only(layer, ("int8",), (0,)) or _plain(layer) or _rounded(layer, None)
    return reason or _half(layer) or w8_cpu.supports(layer.shape[1])


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
    return _only(layer, ("int4",), (0, 128)) or _rounded(layer, "int8") or _term(layer)


# -- how each is written ---------------------------------------------------------------------


def _values(maker: Maker, layer: Layer) -> torch.Tensor:
    codes = layer.codes(maker.edit.program)
    return codes.view(torch.float8_e4m3fn) if layer.format.name == "fp8" else codes


def _scales(maker: Maker, layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    return layer.scales(maker.edit.program, dtype)


def _zeros(maker: Maker, layer: Layer) -> torch.Tensor | None:
    return layer.zeros(maker.edit.program)


def _ends(maker: Maker, layer: Layer) -> tuple[Any, Any, int]:
    """Bias, residual and features of the result."""
    return maker.bias(layer), maker.now(layer.residual), layer.shape[0]


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
    rest = (*_ends(maker, layer), layer.dtype, layer.activation)
    if layer.low_rank is None:
        op = ops.w8a8_linear.default
        return maker.call(layer, op, numbers, token_scales, *weight, *rest)
    down, up = maker.factors(layer)
    narrow = maker.narrow(layer, down)
    op = ops.w8a8_low_rank_linear.default
    return maker.call(layer, op, numbers, token_scales, *weight, narrow, up, *rest)


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
    group = w4_cpu.group_for(layer.shape[1], layer.group)
    return maker.call(
        layer, ops.w4a16_cpu_linear.default, maker.now(layer.operand), *weight,
        *_ends(maker, layer), group, w4_cpu.capability(), layer.activation,
    )  # fmt: skip


def _write_w8a16(maker: Maker, layer: Layer) -> fx.Node:
    weight = maker.tensors(
        layer, "hs8",
        lambda: pack_w8a16(
            _values(maker, layer), _scales(maker, layer, layer.dtype), layer.group
        ),
    )  # fmt: skip
    data, rest = maker.now(layer.operand), (*_ends(maker, layer), layer.activation)
    if layer.low_rank is None:
        return maker.call(layer, ops.w8a16_linear.default, data, *weight, *rest)
    factors = maker.factors(layer)
    return maker.call(layer, ops.w8a16_low_rank_linear.default, data, *weight, *factors, *rest)


def _write_w4a16(maker: Maker, layer: Layer) -> fx.Node:
    weight = maker.tensors(
        layer, "qs4",
        lambda: pack_w4a16(
            _values(maker, layer), _scales(maker, layer, layer.dtype),
            _zeros(maker, layer), layer.group,
        ),
    )  # fmt: skip
    data = maker.now(layer.operand)
    rest = (*_ends(maker, layer), layer.group, layer.activation)
    if layer.low_rank is None:
        return maker.call(layer, ops.w4a16_linear.default, data, *weight, *rest)
    factors = maker.factors(layer)
    return maker.call(layer, ops.w4a16_low_rank_linear.default, data, *weight, *factors, *rest)


def _packed_w4a8(maker: Maker, layer: Layer) -> Sequence[torch.Tensor | None]:
    codes, scales = _values(maker, layer), _scales(maker, layer, torch.float32)
    zeros = _zeros(maker, layer)
    if zeros is not None:
        return pack_centred(codes, scales, zeros, layer.group)
    return (*pack_w4a8(codes.to(torch.int8) - 8, scales, layer.group), None)


def _write_w4a8(maker: Maker, layer: Layer) -> fx.Node:
    numbers, token_scales = maker.tokens(layer)
    *weight, zeros = maker.tensors(layer, "hs4", lambda: _packed_w4a8(maker, layer))
    rest = (*_ends(maker, layer), layer.dtype, layer.activation, zeros)
    if layer.low_rank is None:
        op = ops.w4a8_linear.default
        return maker.call(layer, op, numbers, token_scales, *weight, *rest)
    down, up = maker.factors(layer)
    narrow = maker.narrow(layer, down)
    op = ops.w4a8_low_rank_linear.default
    return maker.call(layer, op, numbers, token_scales, *weight, narrow, up, *rest)


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
    """The forms that take a layer on a device, and why the others do not, the nearest first."""
    taken, reasons = [], []
    for form in FORMS:
        if form.device != device:
            continue
        reason = form.refuses(layer)
        if reason is None:
            taken.append(form)
        else:
            reasons.append(f"{form.name}: {reason}")
    # That a form is for another scheme says least.
    return taken, sorted(reasons, key=lambda reason: any(other in reason for other in _OTHERS))
