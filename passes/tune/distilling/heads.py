"""Auxiliary classifiers at the ends of blocks, for the time of a training.

Source: the structure is that of LSSKD (arXiv 2506.07055) and of its parent HSAKD (arXiv
2107.13715): a classifier after each stage learns the labels and from the deepest one. Here each is
the mean over positions and a linear layer (own).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.ir import Edit, InputError, Program, TensorKind
from torchlathe.passes.tune.training.blocks import block_name

__all__ = ["HeadedProgram", "ends_of_blocks", "with_heads"]

aten = torch.ops.aten


@dataclass(frozen=True)
class HeadedProgram:
    """A program that also gives the logits of auxiliary heads.

    Attributes:
        program: A copy of the one that was given, whose outputs are followed by the heads'.
        heads: How many.
        names: Of the parameters that were added, which the given program has not.
    """

    program: Program
    heads: int
    names: frozenset[str]


def ends_of_blocks(program: Program, most: int, *, deepest: bool = False) -> list[fx.Node]:
    """The last node of blocks that gives one value per sample and channel, evenly spread.

    The last block is left out, for the classifier of the model itself comes after it, unless
    ``deepest`` asks for it besides the others.
    """
    last: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        name = block_name(node) if node.op == "call_function" else None
        value = node.meta.get("val")
        if name is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        if value.dim() in (2, 3, 4) and _channels(value) is not None:
            last[name] = node
    nodes = list(last.values())
    found = nodes[:-1]
    if len(found) > most:
        found = [found[round((i + 1) * len(found) / (most + 1))] for i in range(most)]
    return [*found, *nodes[-1:]] if deepest else found


def _channels(value: torch.Tensor) -> int | None:
    """Extent of the channels: the second axis of maps, the last of sequences and of rows."""
    extent = value.shape[1] if value.dim() == 4 else value.shape[-1]
    return extent if isinstance(extent, int) else None


def with_heads(
    program: Program, classes: int, most: int, *, seed: int = 0, deepest: bool = False
) -> HeadedProgram:
    """Add classifiers at the ends of blocks.

    Args:
        program: It stays as it is, so that nothing has to be removed again.
        classes: Of each.
        most: At most so many heads.
        seed: Of their weights.
        deepest: One more after the last block.

    Raises:
        InputError: The program has no blocks.
    """
    copy = program.copy()
    ends = ends_of_blocks(copy, most, deepest=deepest)
    if not ends:
        raise InputError(
            "the program has no blocks that auxiliary heads could be put after",
            hint="blocks are modules with numbers in their paths, as layers.3; heads=0 for none",
        )
    generator = torch.Generator().manual_seed(seed)
    before = set(copy.entries)
    results = []
    with copy.edit(by="auxiliary heads") as edit:
        for index, node in enumerate(ends):
            name = f"auxiliary_head_{index}.weight"
            results.append(_add_head(edit, node, name, classes, generator))
        output = copy.output_node
        outputs = list(output.args[0])  # type: ignore[arg-type]
        edit.set_args(output, ((*outputs, *results),))
        copy.out_spec = pytree.tree_structure((copy.unflatten_outputs(outputs), [0] * len(results)))
    return HeadedProgram(copy, len(results), frozenset(set(copy.entries) - before))


def _add_head(
    edit: Edit, node: fx.Node, name: str, classes: int, generator: torch.Generator
) -> fx.Node:
    """A classifier of the mean over positions of a value."""
    value = node.meta["val"]
    channels = _channels(value)
    assert channels is not None
    drawn = torch.randn(classes, channels, generator=generator) / channels**0.5
    drawn = drawn.to(value.device, value.dtype)
    weight = edit.add_tensor(name, drawn, TensorKind.PARAMETER)
    mean = node
    if value.dim() > 2:
        axes = [2, 3] if value.dim() == 4 else [1]
        mean = edit.call(aten.mean.dim, (node, axes), like=node)
    return edit.call(aten.linear.default, (mean, weight), like=mean)
