"""Fewer bits for what attention keeps of the tokens before: key and value caches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from torchlathe.ir import Edit, OptionError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import info
from torchlathe.ir.verifying import cannot_run
from torchlathe.kernels.dequantize.cache import (
    dequantize_cache,
    quantize_cache,
    row_bytes,
)
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.quantising.caches import (
    Cache,
    find_caches,
    holds_keys,
    rows_of,
    token_axis,
)
from torchlathe.passes.statistics.running import flat_batches, need_data

__all__ = ["QuantizeCache", "stored_inputs"]

aten = torch.ops.aten
assert quantize_cache is not None
assert dequantize_cache is not None
QUANTIZE = torch.ops.torchlathe.quantize_cache.default
DEQUANTIZE = torch.ops.torchlathe.dequantize_cache.default


# Of the batches that the error is measured on.
_BATCHES = 4


@dataclass(frozen=True)
class QuantizeCache(RewritePass):
    """Keeps keys and values in 8 or 4 bits, with scales for each head and token.

    Inputs that come back as outputs with new rows joined to them hold rows of bytes afterwards,
    and so do the outputs; only new rows are rounded, and attention reads what the bytes stand for.
    A program for the prompt, which has no such input, gives its keys and values in the same form.

    Keeps: every weight, and the structure of inputs and outputs. Changes: the type and the last
    extent of caches: a caller passes on what it is given, and begins with none, with zeros, or with
    what `stored_inputs` makes of a floating cache.

    Source: see `torchlathe.kernels.dequantize.cache`.
    """

    name: ClassVar[str] = "quantize-cache"
    # What it takes is of another type: the manager cannot run both on the same inputs.
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    bits: Literal[8, 4] = field(default=8, metadata={"help": "of each number"})
    group: int = field(
        default=0, metadata={"help": "channels of a head that share a scale; 0 for all of a head"}
    )
    rotate: bool | None = field(
        default=None,
        metadata={
            "help": "rotate rows by a Hadamard matrix before rounding, which spreads large "
            "channels over all; by default with 4 bits"
        },
    )
    keys: Literal["token", "channel"] = field(
        default="token",
        metadata={
            "help": "whether each channel of keys has a zero point of its own besides, its mean on "
            "the calibration data"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: A group that is none.
        """
        super().__post_init__()
        if self.group < 0 or self.group % 2:
            raise OptionError(f"group is {self.group}, but must be even, or 0", where=self.name)

    @property
    def _rotates(self) -> bool:
        return self.bits == 4 if self.rotate is None else self.rotate

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrite every cache."""
        caches, left = self._caches(program)
        if not caches:
            return PassResult(False, {"caches": 0}, left)
        keys = [cache for cache in caches if self.keys == "channel" and holds_keys(cache)]
        if self.keys == "channel" and not keys:
            text = "no cache holds keys: nothing compares queries with its rows"
            left.append(Diagnostic("warning", text))
        before = program.copy()
        middles = _middles(program, ctx, keys)
        with program.edit(by=ctx.spec) as edit:
            writer = _Writer(edit, self.bits, self.group, self._rotates)
            for number, (cache, found) in enumerate(middles.items()):
                writer.add_middles(cache, f"key_middles_{number}", found)
            for cache in caches:
                writer.rewrite(cache)
        # The structure stays, so that what is stored can stand in the place of what was given.
        program.example_inputs = stored_inputs(program, *before.example_inputs)
        statistics, told = self._told(caches)
        statistics |= {
            "keys_by_channel": len(keys),
            "bytes_of_inputs_before": _nbytes(before),
            "bytes_of_inputs": _nbytes(program),
        }
        if cannot_run(before) is None:
            places = {cache.place for cache in caches}
            statistics["output_error"] = _error(before, program, ctx, places)
        return PassResult(True, statistics, [*told, *left])

    def _told(
        self, caches: Sequence[Cache]
    ) -> tuple[dict[str, int | float | str], list[Diagnostic]]:
        """Bytes of a row, on average and of each cache."""
        told, sizes = [], [0.0, 0.0]
        for cache in caches:
            old = cache.columns * cache.dtype.itemsize
            new = row_bytes(cache.columns, self.bits, self.group)
            sizes = [sizes[0] + old / len(caches), sizes[1] + new / len(caches)]
            text = f"{new} bytes for a head and token, from {old}"
            told.append(Diagnostic("note", text, name=cache.name))
        names = ("bytes_of_a_row_before", "bytes_of_a_row")
        return {"caches": len(caches), **dict(zip(names, sizes, strict=True))}, told

    def _caches(self, program: Program) -> tuple[list[Cache], list[Diagnostic]]:
        """Those that can be stored, and why others cannot."""
        found = find_caches(program)
        if not found:
            text = "no input of four axes comes back as an output with new rows joined to it"
            return [], [Diagnostic("warning", text)]
        caches, left = [], []
        for cache in found:
            try:
                row_bytes(cache.columns, self.bits, self.group)
            except OptionError as error:
                reason = error.message
            else:
                if self.keys == "token" or cache.past is not None:
                    caches.append(cache)
                    continue
                reason = (
                    "zero points of channels are those of the program that reads the cache; "
                    "convert it by stored_inputs of that one, or let that begin with an empty cache"
                )
            left.append(Diagnostic("warning", f"left as it is: {reason}", name=cache.name))
        return caches, left


def _middles(program: Program, ctx: PassContext, keys: Sequence[Cache]) -> dict[Cache, Tensor]:
    """Means of channels over all tokens, as they go with rows."""
    if not keys:
        return {}
    need_data(ctx, "zero points of the keys' channels are their means on it")
    sums: dict[Cache, Tensor] = {}
    counts = dict.fromkeys(keys, 0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _, flat in flat_batches(program, ctx):
            outputs = run_flat(program, flat)
            for cache in keys:
                axes = (0, token_axis(cache))
                rows = outputs[cache.place].to(torch.float32)
                found = rows.sum(axes, keepdim=True)
                sums[cache] = found if cache not in sums else sums[cache] + found
                counts[cache] += rows.shape[axes[0]] * rows.shape[axes[1]]
    return {cache: found / max(counts[cache], 1) for cache, found in sums.items()}


class _Writer:
    """Puts bytes in the place of rows."""

    def __init__(self, edit: Edit, bits: int, group: int, rotate: bool) -> None:
        self.edit = edit
        self.rest = (bits, group, rotate)
        self._bits, self._group = bits, group
        self._rows: dict[fx.Node, fx.Node] = {}
        self._new: dict[tuple[fx.Node, tuple[fx.Node, ...]], fx.Node] = {}
        self._middles: dict[Cache, fx.Node] = {}
        self._place = {node: i for i, node in enumerate(edit.program.graph.nodes)}

    def add_middles(self, cache: Cache, name: str, middles: Tensor) -> None:
        """Take something off the rows of a cache before they are stored."""
        self._middles[cache] = self.edit.add_tensor(name, middles)
        self.edit.program.rewritten |= {name}

    def rewrite(self, cache: Cache) -> None:
        """One cache, from its input to its output."""
        output = self.edit.program.output_node
        if cache.past is None:
            self._rows[cache.steps[0]] = self._stored(cache, cache.steps[0], None)
        elif cache.past not in self._rows:
            self._input(cache, cache.past)
            for step in cache.steps:
                self._step(cache, step, output)
        flat: Any = list(output.args[0])  # type: ignore[arg-type]
        flat[cache.place] = self._rows[cache.steps[-1]]
        self.edit.set_args(output, (tuple(flat),))

    def _input(self, cache: Cache, past: fx.Node) -> None:
        value = past.meta["val"]
        # Bytes have as many rows as what they stand for.
        readers = [
            user for user in past.users if user not in cache.steps and not _counts_rows(user)
        ]
        self._rows[past] = past
        if readers:
            first = min(readers, key=self._place.__getitem__)
            self._read(cache, past, past, readers, first)
        shape = (*value.shape[:-1], row_bytes(cache.columns, self._bits, self._group))
        past.meta["val"] = value.new_empty(shape, dtype=torch.uint8)
        past.meta.pop("tensor_meta", None)
        self.edit.touch(past)

    def _step(self, cache: Cache, step: fx.Node, output: fx.Node) -> None:
        """The same move of bytes; whoever else reads its rows reads what they stand for."""

        def moved(node: fx.Node) -> fx.Node:
            return self._stored(cache, node, step) if node in wanted else node

        wanted = rows_of(step)
        if step.target is aten.cat.default:
            parts: Any = step.args[0]
            # An empty tensor of another type would decide that of the result.
            joined = [self._stored(cache, part, step) for part in parts if part in wanted]
            args: tuple[Any, ...] = (joined, *step.args[1:])
        else:
            joined = []
            args = fx.map_arg(step.args, moved)
        target: Any = step.target
        new = joined[0] if len(joined) == 1 else self.edit.call(
            target, args, step.kwargs, like=step, before=step
        )  # fmt: skip
        self._rows[step] = new
        users = [user for user in step.users if user not in cache.steps and user is not output]
        if counts := [user for user in users if _counts_rows(user)]:
            self.edit.replace(step, new, counts)
        if readers := [user for user in users if not _counts_rows(user)]:
            self._read(cache, step, new, readers, step)

    def _read(
        self, cache: Cache, old: fx.Node, rows: fx.Node, users: list[fx.Node], before: fx.Node
    ) -> None:
        args = (rows, cache.columns, *self.rest, cache.dtype, *self._own(cache))
        like = before if old.op == "placeholder" else old
        self.edit.replace(old, self.edit.call(DEQUANTIZE, args, like=like, before=before), users)

    def _own(self, cache: Cache) -> tuple[fx.Node, ...]:
        """The last argument of both ops, if there is one."""
        return (self._middles[cache],) if cache in self._middles else ()

    def _stored(self, cache: Cache, node: fx.Node, before: fx.Node | None) -> fx.Node:
        """The bytes of rows; those of new ones are made once for all caches of one form."""
        if node in self._rows:
            return self._rows[node]
        own = self._own(cache)
        if (node, own) not in self._new:
            args = (node, *self.rest, *own)
            self._new[node, own] = self.edit.call(QUANTIZE, args, like=node, before=before)
        return self._new[node, own]


def _counts_rows(user: fx.Node) -> bool:
    """Whether a reader of rows wants to know how many there are, and nothing else."""
    return user.target is aten.sym_size.int and user.args[1] not in (3, -1)


def stored_inputs(
    program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with floating caches in the form that a program keeps them in.

    Args:
        program: After `QuantizeCache`.
        args: As the program before it takes them.
        kwargs: As the program before it takes them.

    Returns:
        The same with rows of bytes in the place of floating ones; all else, and rows that are bytes
        already, as they are.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    forms = _forms(program)
    new = [
        torch.ops.torchlathe.quantize_cache(leaf, *forms[node])
        if node in forms and isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for node, leaf in zip(program.input_nodes, leaves, strict=True)
    ]
    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(new, spec)
    return found


def _forms(program: Program) -> dict[fx.Node, tuple[Any, ...]]:
    """All but the rows that every input that holds bytes is written with."""
    found: dict[fx.Node, tuple[Any, ...]] = {}
    for node in program.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        todo = [node.args[0]]
        while todo:
            rows: Any = todo.pop()
            if rows.op == "placeholder":
                own = [program.tensor(str(info(part).tensor)) for part in node.args[6:]]
                found[rows] = (*node.args[2:5], *own)
            else:
                todo += [part for part in rows.all_input_nodes if part.target is not QUANTIZE]
    return found


def _nbytes(program: Program) -> int:
    """Of the example inputs, the caches so far among them."""
    leaves = pytree.tree_leaves(program.example_inputs)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def _error(before: Program, after: Program, ctx: PassContext, caches: set[int]) -> float:
    """Relative squared error of all floating outputs but the caches."""
    lost = whole = 0.0
    data = PassContext(before, ctx.spec, ctx.calibration)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _, flat in itertools.islice(flat_batches(before, data), _BATCHES):
            args, kwargs = pytree.tree_unflatten(flat, before.in_spec)
            new, _ = pytree.tree_flatten(stored_inputs(after, args, kwargs))
            pairs = zip(run_flat(before, flat), run_flat(after, new), strict=True)
            for place, (old, found) in enumerate(pairs):
                if place in caches or not isinstance(old, Tensor) or not old.is_floating_point():
                    continue
                lost += float((found.double() - old.double()).square().sum())
                whole += float(old.double().square().sum())
    return lost / max(whole, 1e-300)
