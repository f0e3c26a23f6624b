"""Replacing the layers whose class cannot say what is left of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from torchlathe.backends.module.sizes import Sizes
from torchlathe.backends.module.stand_ins import (
    CompactAttention,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    Erased,
)
from torchlathe.ir import Program, info
from torchlathe.ir.axes import Concat, Product, Term
from torchlathe.ir.axes.extents import is_static
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.capturing import eval_mode

__all__ = ["leave_out_branches", "replace_parts"]

aten = torch.ops.aten
_ATTENTION = (aten.scaled_dot_product_attention.default,)


def replace_parts(root: nn.Module, sizes: Sizes, nodes: dict[str, list[fx.Node]]) -> list[str]:
    """Put our own modules where a layer of torch cannot express the program.

    These are layer and group norms that still have to count erased channels, and attention whose
    heads no longer fill the embedding.

    Args:
        root: Changed in place; it has its new parameters already.
        sizes: What became of the sizes.
        nodes: Nodes of the program after the passes, by the module whose forward made them.

    Returns:
        Paths of the modules that were replaced.
    """
    done: dict[int, nn.Module] = {}
    paths = []
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if not path:
            continue
        new = done.get(id(module))
        if new is None and isinstance(module, nn.LayerNorm):
            new = _layer_norm(module, path, sizes, nodes.get(path, []))
        elif new is None and isinstance(module, nn.GroupNorm):
            new = _group_norm(module, path, sizes, nodes.get(path, []))
        elif new is None and type(module) is nn.MultiheadAttention:
            new = _attention(module, path, sizes, nodes.get(path, []))
        if new is None:
            continue
        if id(module) not in done:
            done[id(module)] = new
            _take_over(new, module)
        _put(root, path, new)
        paths.append(path)
    return paths


def leave_out_branches(root: nn.Module, source: nn.Module, sizes: Sizes) -> list[Erased]:
    """Put `Erased` in place of modules of which the passes left no op.

    Args:
        root: Changed in place.
        source: The module that it is a copy of, at its full size; run once.
        sizes: What became of the sizes.
    """
    before, after = sizes.before, sizes.after
    if before.tensor_nodes.keys() <= after.tensor_nodes.keys():
        return []
    # An op of no consequence may be left, such as a cast that others read too: a module whose
    # parameters all went is gone as well.
    had = {path for node in before.graph.nodes for path in _stack(node)}
    left = {path for node in after.graph.nodes for path in _stack(node)}
    owners = _owners(before), _owners(after)
    left -= owners[0] - owners[1]
    # Children of one that is gone are gone with it.
    gone = [path for path in sorted(had - left) if path.rpartition(".")[0] not in had - left]
    gone = [path for path in gone if path and _has(root, path)]
    counts = _output_counts(source, before, gone)
    made = []
    for path in gone:
        old = root.get_submodule(path)
        layers = (vars(part).get("layer_idx") for part in old.modules())
        layer = next((index for index in layers if type(index) is int), None)
        new = Erased(outputs=counts.get(path), layer=layer)
        _take_over(new, old)
        _put(root, path, new)
        made.append(new)
    return made


def _owners(program: Program) -> set[str]:
    """Modules that have a tensor in themselves, or in a module in them."""
    found: set[str] = set()
    for name in (*program.tensor_nodes, *program.aliases):
        parts = name.split(".")[:-1]
        found.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return found


def _output_counts(source: nn.Module, program: Program, paths: list[str]) -> dict[str, int]:
    """How many values some modules return, of those that return a tuple."""
    counts: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                counts[path] = len(output)

        return hook

    handles = [source.get_submodule(p).register_forward_hook(note(p)) for p in paths]
    args, kwargs = program.example_inputs
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(source):
            source(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _has(root: nn.Module, path: str) -> bool:
    """Whether a module is still there: one in a replaced one is not."""
    try:
        return not isinstance(root.get_submodule(path), Erased)
    except AttributeError:
        return False


def _put(root: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    parent = root.get_submodule(owner)
    parent._modules[leaf] = new
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fused path reads the parameters and would compute what they were made for.
        parent.activation_relu_or_gelu = 0


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Mode and hooks of the module that is replaced."""
    new.training = old.training
    for name, value in vars(old).items():
        if "_hooks" in name and name in vars(new):
            vars(new)[name] = value


def _layer_norm(
    module: nn.LayerNorm, path: str, sizes: Sizes, nodes: list[fx.Node]
) -> nn.Module | None:
    node = _corrected(path, aten.layer_norm.default, sizes, nodes)
    if node is None:
        return None
    shape: Any = argument(node, "normalized_shape")
    if len(shape) != 1:
        return None
    source = node.args[0]
    axis = -1
    if (
        isinstance(source, fx.Node)
        and source.target is aten.permute.default
        and path in _stack(source)
    ):
        order: Any = source.args[1]
        axis = int(order[-1])
    return CompensatedLayerNorm(
        module.weight, module.bias, total=int(shape[0]), eps=module.eps, axis=axis
    )


def _group_norm(
    module: nn.GroupNorm, path: str, sizes: Sizes, nodes: list[fx.Node]
) -> nn.Module | None:
    node = _corrected(path, aten.group_norm.default, sizes, nodes)
    if node is None:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    channels = sizes.axis_map.terms(source)[1]
    if not is_static(channels.extent):
        return None
    groups: Any = argument(node, "num_groups")
    inner = int(channels.extent) // groups
    group = torch.arange(int(channels.extent))[sizes.mask(channels)] // inner
    # Groups that went as a whole are not numbered.
    group = group.unique(return_inverse=True)[1]
    device = next((t.device for t in (module.weight,) if t is not None), group.device)
    return CompensatedGroupNorm(
        module.weight, module.bias, group=group.to(device), inner=inner, eps=module.eps
    )


def _corrected(path: str, target: Any, sizes: Sizes, nodes: list[fx.Node]) -> fx.Node | None:
    """The op of a module before the passes, if they wrote it in the open."""
    if not any(info(node).created_by for node in nodes):
        return None
    calls = sizes.before.graph.find_nodes(op="call_function", target=target)
    return next((node for node in calls if path in _stack(node)), None)


def _stack(node: fx.Node) -> set[str]:
    """Paths of all modules that a node was made in."""
    stack: Any = node.meta.get("nn_module_stack") or {}
    return {str(path) for path, _ in stack.values()}


def _attention(
    module: nn.MultiheadAttention, path: str, sizes: Sizes, nodes: list[fx.Node]
) -> nn.Module | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    name = "in_proj_weight" if module.in_proj_weight is not None else "q_proj_weight"
    full = f"{path}.{name}"
    before = sizes.before
    node = before.tensor_nodes.get(before.aliases.get(full, full))
    if node is None:
        return None
    rows = getattr(module, name).shape[0] // (3 if name == "in_proj_weight" else 1)
    old_dim = module.head_dim
    dim = _trailing(sizes.axis_map.resolve(sizes.axis_map.terms(node)[0]), old_dim, sizes)
    heads = rows // dim
    embed = module.out_proj.weight.shape[0]
    if dim == old_dim and heads * dim == embed:
        module.num_heads = heads
        return None
    scale = next((argument(n, "scale") for n in nodes if n.target in _ATTENTION), None)
    return CompactAttention(
        module,
        num_heads=heads,
        head_dim=dim,
        scale=1 / math.sqrt(old_dim) if scale is None else float(scale),
    )


def _trailing(term: Term, old: int, sizes: Sizes) -> int:
    """New extent of the innermost factors of an axis whose product was ``old``."""
    if isinstance(term, Concat):
        return _trailing(term.pieces[0], old, sizes)
    factors = term.factors if isinstance(term, Product) else (term,)
    before = after = 1
    for factor in reversed(factors):
        if before == old:
            break
        if isinstance(factor, Concat) and before * int(factor.extent) > old:
            return _trailing(factor, old // before, sizes) * after
        before *= int(factor.extent)
        after *= sizes.extent(factor)
    return after if before == old else old
