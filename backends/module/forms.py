"""Writing corrections of a graph so that the module's own code can say them.

A root mean square norm written by hand, over C' of C channels with s = C'/C, computes after an
erase ``w x rsqrt(s mean(x^2) + eps)``. That is ``(w / sqrt(s)) x rsqrt(mean(x^2) + eps / s)``:
the same code with another weight and epsilon (own; algebra).
"""

from __future__ import annotations

import torch
from torch import fx

from torchlathe.ir import Program, info
from torchlathe.ir.edit import Edit

__all__ = ["write_norms_as_code"]

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.contiguous.default)


def write_norms_as_code(program: Program) -> int:
    """Move the share of a corrected mean square into epsilon and weight.

    Args:
        program: Changed in place; its tensors belong to the caller alone.

    Returns:
        How many norms were rewritten.
    """
    found = [match for node in program.nodes if (match := _match(node)) is not None]
    if not found:
        return 0
    with program.edit("backend-module") as edit:
        for mean, scaled, add, weight, offset in found:
            share = float(scaled.args[1])  # type: ignore[arg-type]
            _rewrite(edit, mean, scaled, add, share)
            name = info(weight).tensor
            assert name is not None
            old = program.entries[name].tensor.detach().double()
            new = (old + offset) * share**-0.5 - offset
            edit.set_tensor(name, new.to(program.entries[name].tensor.dtype), rewrites=False)
    return len(found)


def _rewrite(edit: Edit, mean: fx.Node, scaled: fx.Node, add: fx.Node, share: float) -> None:
    edit.replace(scaled, mean, list(scaled.users))
    eps = float(add.args[1])  # type: ignore[arg-type]
    edit.set_args(add, (mean, eps / share, *add.args[2:]))


def _match(scaled: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, float] | None:
    """``mul(mean, s)`` of a pass, followed by what a root mean square norm does."""
    if scaled.target is not aten.mul.Tensor or not info(scaled).created_by:
        return None
    mean, share = scaled.args
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    if not isinstance(share, float) or share <= 0:
        return None
    add = _only_user(scaled)
    if add is None or add.target is not aten.add.Tensor or add.args[0] is not scaled:
        return None
    if not isinstance(add.args[1], int | float):
        return None
    root = _only_user(add)
    inverse = root is not None and (
        root.target is aten.rsqrt.default
        or (root.target is aten.pow.Tensor_Scalar and root.args[1] == -0.5)
    )
    if root is None or not inverse:
        return None
    product = _only_user(root)
    if product is None or product.target is not aten.mul.Tensor:
        return None
    weight = _weight_after(product)
    return None if weight is None else (mean, scaled, add, *weight)


def _weight_after(product: fx.Node) -> tuple[fx.Node, float] | None:
    """The parameter that a normalised value is multiplied by, and what is added to it first."""
    node: fx.Node | None = product
    while (node := _only_user(product)) is not None and node.target in _CASTS:
        product = node
    if node is None or node.target is not aten.mul.Tensor:
        return None
    other = node.args[1] if node.args[0] is product else node.args[0]
    offset = 0.0
    while isinstance(other, fx.Node) and other.op == "call_function" and len(other.users) == 1:
        if other.target in _CASTS:
            other = other.args[0]
        elif other.target is aten.add.Tensor and offset == 0.0:
            numbers = [a for a in other.args if isinstance(a, int | float)]
            nodes = [a for a in other.args if isinstance(a, fx.Node)]
            if len(numbers) != 1 or len(nodes) != 1:
                return None
            offset, other = float(numbers[0]), nodes[0]
        else:
            return None
    if not isinstance(other, fx.Node) or info(other).tensor is None or len(other.users) != 1:
        return None
    return other, offset


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
