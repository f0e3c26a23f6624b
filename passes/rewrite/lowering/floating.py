"""Layers of floating weights for which there are ops: blocks of zeros, 2:4, and low rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.extents import example_sizes
from torchlathe.ir.provenance import info
from torchlathe.kernels.block_sparse import op as block_sparse
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.semi_structured import op as semi_structured
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem
from torchlathe.passes.rewrite.lowering.forms import Maker
from torchlathe.passes.rewrite.lowering.layers import Layer, claimed_once, tokens_of, with_epilogue
from torchlathe.passes.rewrite.lowering.seeing import next_reader, source

__all__ = ["Blocks", "Fours", "Thin", "floating_layers"]

aten = torch.ops.aten
ops = torch.ops.torchlathe
_HALVES = (torch.float16, torch.bfloat16)
# Where nothing was measured. On a GPU the bar is three times dense with a fifth of the blocks. On
# a CPU a fifth was 1.2 to 2 times as fast as dense by torch's own format: a quarter breaks even.
_MOST_STORED = {"cuda": 0.5, "cpu": 0.25}
_FEW_TOKENS = 64
_MOST_RANK = 512


@dataclass(frozen=True, eq=False)
class _Floating:
    """A layer of floating weights.

    Attributes:
        layer: What it reads, and what follows it.
        device: Type of device that it is for.
    """

    layer: Layer
    device: str

    @property
    def name(self) -> str:
        """Of the weight."""
        return str(info(self.layer.weight).tensor)

    def _ends(self, maker: Maker) -> tuple[Any, Any, int, str]:
        layer = self.layer
        return layer.bias, maker.now(layer.residual), layer.shape[0], layer.activation

    def _written(self, maker: Maker, target: Any, *weights: Any) -> None:
        layer = self.layer
        args = (maker.now(layer.operand), *weights, *self._ends(maker))
        maker.stands(layer.last, maker.call(layer, target, *args))


@dataclass(frozen=True, eq=False)
class Blocks(_Floating):
    """A weight many of whose blocks are zero.

    Attributes:
        size: Rows and columns of a block.
        stored: Share of the blocks that are not zero.
    """

    size: int
    stored: float
    op = "block_sparse_linear"

    def refuses(self) -> str | None:
        """Why the op does not take it, or None."""
        if self.device == "cuda" and self.layer.dtype not in _HALVES:
            return f"its inputs are {str(self.layer.dtype).removeprefix('torch.')}"
        return None

    def by_rule(self) -> str | None:
        """Why it is no faster where nothing is measured, or None."""
        most = _MOST_STORED[self.device]
        if self.stored <= most:
            return None
        return f"{self.stored:.0%} of its blocks are not zero, and up to {most:.0%} pay"

    def write(self, maker: Maker) -> None:
        """Put the op in its place."""
        weight = maker.edit.program.tensor(self.name).detach()
        parts = block_sparse.pack(weight, self.size)
        nodes = [
            maker.add(f"{self.name}_{kind}", part)
            for kind, part in zip(("blocks", "columns", "offsets"), parts, strict=True)
        ]
        self._written(maker, ops.block_sparse_linear.default, *nodes)

    def key(self, name: str) -> str:
        """What measurements of it are kept under."""
        outs, ins = self.layer.shape
        kind = str(self.layer.dtype).removeprefix("torch.")
        extra = f"|{self.size}|{self.stored:.2f}" if name != "dense" else ""
        return f"{name}|{self.layer.rows}x{ins}x{outs}|{kind}{extra}"

    def contestant(self, name: str) -> Any:
        """A call of the dense layer or of the op, on random data of the size."""
        outs, ins = self.layer.shape
        x = torch.randn(self.layer.rows, ins).to(self.layer.dtype)
        weight = torch.randn(outs, ins).to(self.layer.dtype)
        if name == "dense":
            return lambda: torch.nn.functional.linear(x, weight)
        high, wide = -(-outs // self.size), -(-ins // self.size)
        kept = torch.zeros(high * wide)
        kept[torch.randperm(high * wide)[: max(1, round(self.stored * high * wide))]] = 1
        mask = kept.view(high, wide).repeat_interleave(self.size, 0)
        mask = mask.repeat_interleave(self.size, 1)[:outs, :ins].to(weight.dtype)
        packed = block_sparse.pack(weight * mask, self.size)
        return lambda: ops.block_sparse_linear(x, *packed, None, None, outs, "none")


@dataclass(frozen=True, eq=False)
class Fours(_Floating):
    """A weight with two zeros in each four."""

    op = "semi_structured_linear"

    def refuses(self) -> str | None:
        """Why the op does not take it, or None."""
        if self.device != "cuda":
            return "two zeros in each four: torch has no such product on a CPU"
        if self.layer.dtype not in _HALVES:
            return f"its inputs are {str(self.layer.dtype).removeprefix('torch.')}"
        return None

    def by_rule(self) -> str | None:
        """Why it is no faster, as far as tables of the device say, or None."""
        kind = str(self.layer.dtype).removeprefix("torch.")
        problems = [Problem(self.op_key, kind, m, *self.layer.shape) for m in (1024, 2048, 4096)]
        if any(tile_for(problem, "cuda") is not None for problem in problems):
            return None
        return (
            "two zeros in each four: no measurement says that the library's sparse product is "
            "faster here (`torchlathe kernels tune` makes one)"
        )

    op_key = "semi_structured"

    def write(self, maker: Maker) -> None:
        """Put the op in its place."""
        compressed = semi_structured.compress(maker.edit.program.tensor(self.name).detach())
        node = None if compressed is None else maker.add(f"{self.name}_compressed", compressed)
        self._written(maker, ops.semi_structured_linear.default, self.layer.weight, node)


@dataclass(frozen=True, eq=False)
class Thin(_Floating):
    """Two thin layers, one after the other; ``layer`` reads what the first does.

    Attributes:
        down: The weight of the first.
        up: The weight of the second.
    """

    down: fx.Node
    up: fx.Node
    op = "low_rank_linear"

    @property
    def name(self) -> str:
        """Of the second weight."""
        return str(info(self.up).tensor)

    def refuses(self) -> str | None:
        """Why the op does not take it, or None."""
        if self.layer.dtype not in _HALVES:
            return f"its inputs are {str(self.layer.dtype).removeprefix('torch.')}"
        return None

    def by_rule(self) -> str | None:
        """Why two products by the library are faster, or None."""
        if self.layer.rows > _FEW_TOKENS:
            return f"for {self.layer.rows} tokens two products by the library are faster"
        rank = int(self.down.meta["val"].shape[0])
        return None if rank <= _MOST_RANK else f"its rank of {rank} is over {_MOST_RANK}"

    def write(self, maker: Maker) -> None:
        """Put the op in its place."""
        program = maker.edit.program
        names = [str(info(node).tensor) for node in (self.down, self.up)]
        packed = low_rank.pack(*(program.tensor(name).detach() for name in names))
        nodes = [
            maker.add(f"{name}_padded", tensor) for name, tensor in zip(names, packed, strict=True)
        ]
        self._written(maker, ops.low_rank_linear.default, *nodes)


def floating_layers(
    program: Program, device: str, taken: set[fx.Node]
) -> Iterator[Blocks | Fours | Thin]:
    """Layers of floating weights that could become ops, in order of execution.

    Args:
        program: The program.
        device: Type of device that they are for.
        taken: Nodes that another op stands for.
    """
    sizes, sums = example_sizes(program), set(taken)
    for call in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        data, weight = call.args[0], call.args[1]
        if call in taken or not isinstance(data, fx.Node) or not isinstance(weight, fx.Node):
            continue
        if info(weight).tensor is None:
            continue
        (layer,) = claimed_once([with_epilogue(_layer(call, data, weight, sizes))], sums)
        if device == "cuda" and (thin := _thin(layer, device, sizes)) is not None:
            yield thin
        elif (zeros := _with_zeros(program, layer, device)) is not None:
            yield zeros


def _layer(call: fx.Node, data: fx.Node, weight: fx.Node, sizes: Any) -> Layer:
    bias: Any = argument(call, "bias")
    return Layer(
        call=call,
        kind="linear",
        weight=weight,
        operand=source(data),
        activations=None,
        bias=bias if isinstance(bias, fx.Node) else None,
        activation="none",
        residual=None,
        last=call,
        rows=tokens_of(data, sizes),
    )


def _thin(layer: Layer, device: str, sizes: Any) -> Thin | None:
    """The two layers that end in this one, where they are thinner than one would be."""
    first = layer.operand
    if first.target is not aten.linear.default or argument(first, "bias") is not None:
        return None
    reader = next_reader(first)
    if reader is None or reader[1] is not layer.call:
        return None
    data, down = first.args[0], first.args[1]
    if not isinstance(data, fx.Node) or not isinstance(down, fx.Node):
        return None
    if info(down).tensor is None:
        return None
    rank, ins = (int(extent) for extent in down.meta["val"].shape)
    outs = layer.shape[0]
    if rank * (ins + outs) >= ins * outs:
        return None
    whole = replace(layer, operand=source(data), rows=tokens_of(data, sizes))
    return Thin(whole, device, down, layer.weight)


def _with_zeros(program: Program, layer: Layer, device: str) -> Blocks | Fours | None:
    name = str(info(layer.weight).tensor)
    weight = program.tensor(name).detach()
    if weight.dim() != 2 or isinstance(weight, FakeTensor) or weight.is_meta:
        return None
    few = weight[:: max(1, weight.shape[0] // 64)]
    if not few.numel() or float(few.eq(0).float().mean()) < 0.2:
        return None  # a glance at some rows: most weights have no zeros at all
    found = [(size, share) for size in block_sparse.BLOCKS if (share := _stored(weight, size)) < 1]
    if found:
        # The larger blocks, unless they hold many more numbers.
        size, share = min(found, key=lambda pair: (round(pair[1], 1), -pair[0]))
        if share < 0.9:
            return Blocks(layer, device, size, share)
    if weight.shape[1] % 4 == 0 and int(weight.unflatten(1, (-1, 4)).count_nonzero(2).max()) <= 2:
        return Fours(layer, device)
    return None


def _stored(weight: torch.Tensor, size: int) -> float:
    """Share of the blocks that are not zero."""
    rows, columns = (-(-extent // size) * size for extent in weight.shape)
    whole = torch.nn.functional.pad(
        weight.ne(0), (0, columns - weight.shape[1], 0, rows - weight.shape[0])
    )
    kept = whole.view(rows // size, size, columns // size, size).any(3).any(1)
    return float(kept.float().mean())
