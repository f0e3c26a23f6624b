"""A copy of a module that has a program's tensors in place of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from torchlathe.ir import BackendError, Program, TensorKind
from torchlathe.ir.provenance import module_path

__all__ = ["changed_floats", "copy_with", "correct_floats", "tensors_of"]


def copy_with(source: nn.Module, program: Program) -> nn.Module:
    """Copy a module around the tensors of a program; those of the source are not copied.

    Args:
        source: Left as it is.
        program: Its tensors become the copy's, as the same objects.

    Raises:
        BackendError: The module cannot be copied, or has no place for a tensor.
    """
    memo: dict[int, Any] = {}
    for name, tensor in tensors_of(source).items():
        entry = program.entries.get(program.aliases.get(name, name)) or program.carried.get(name)
        if entry is not None:
            memo[id(tensor)] = entry.tensor
    for name, entry in program.entries.items():
        held = _plain_attribute(source, name) if entry.kind is TensorKind.CONSTANT else None
        if held is not None:
            memo[id(held)] = entry.tensor
    try:
        module = copy.deepcopy(source, memo)
    except Exception as error:
        raise BackendError(
            f"{type(source).__name__} cannot be copied: {type(error).__name__}: {error}",
            hint="copy.deepcopy(model) must work; what it holds besides tensors and modules may "
            "define __deepcopy__",
        ) from error
    for name, entry in program.entries.items():
        if entry.kind is not TensorKind.CONSTANT:
            _put(module, name, entry.tensor, entry.kind)
    for alias, name in program.aliases.items():
        tied = program.entries.get(name)
        if tied is not None and tied.kind is not TensorKind.CONSTANT:
            _put(module, alias, tied.tensor, tied.kind)
    return module


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, tied ones under each of their names."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    found.update(module.named_buffers(remove_duplicate=False))
    return found


def _plain_attribute(module: nn.Module, name: str) -> torch.Tensor | None:
    """A tensor that a module has as an attribute, neither parameter nor buffer."""
    owner, _, leaf = name.rpartition(".")
    try:
        found = vars(module.get_submodule(owner)).get(leaf)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _put(module: nn.Module, name: str, tensor: torch.Tensor, kind: TensorKind) -> None:
    """Register a tensor; a buffer without a place belongs to what a pass wrote in the open."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is not None and leaf in owner._parameters:
        owner._parameters[leaf] = tensor  # type: ignore[assignment]
    elif owner is not None and leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    elif owner is not None and kind is TensorKind.PARAMETER and not hasattr(owner, leaf):
        owner.register_parameter(leaf, tensor)  # type: ignore[arg-type]
    elif kind is TensorKind.PARAMETER:
        raise BackendError(
            f"a pass added the tensor {name!r}, which the module has no place for",
            hint='backend="eager" runs every program',
        )


# -- numbers ---------------------------------------------------------------------------------


def changed_floats(before: Program, after: Program) -> dict[str, dict[float, float]]:
    """Float arguments of ops that passes changed, old to new, by module."""
    new = {node.name: node for node in after.graph.nodes if node.op == "call_function"}
    found: dict[str, dict[float, float]] = {}
    for node in before.graph.nodes:
        other = new.get(node.name) if node.op == "call_function" else None
        if other is None or other.target is not node.target:
            continue
        for a, b in _float_pairs(node, other):
            found.setdefault(module_path(node), {})[a] = b
    return found


def _float_pairs(node: fx.Node, other: fx.Node) -> Iterator[tuple[float, float]]:
    pairs = [
        *zip(node.args, other.args, strict=False),
        *((value, other.kwargs.get(name)) for name, value in node.kwargs.items()),
    ]
    for a, b in pairs:
        if isinstance(a, float) and isinstance(b, float) and a != b:
            yield a, b


def correct_floats(root: nn.Module, changed: Mapping[str, Mapping[float, float]]) -> None:
    """Give attributes such as ``eps`` the value that the op in their module has now."""
    done: set[int] = set()
    for path, module in root.named_modules(remove_duplicate=False):
        if path not in changed or id(module) in done:
            continue
        done.add(id(module))
        for name, value in list(vars(module).items()):
            if type(value) is float and value in changed[path]:
                setattr(module, name, changed[path][value])
