"""Tensors of a program as a tree of plain modules under the names that the model gave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.export import ExportedProgram

from torchlathe.ir import BackendError, Program, TensorEntry, TensorKind

__all__ = ["own_entries", "refresh", "tensor_tree", "tie"]


# -- owning ----------------------------------------------------------------------------------


def own_entries(program: Program, source: torch.nn.Module | ExportedProgram | None) -> None:
    """Replace each tensor of the program that others may hold by a copy.

    Args:
        program: Changed in place; a copy that nobody else has.
        source: What the program was captured from: only tensors in its storage are copied. None:
            every tensor is copied.

    Raises:
        BackendError: The program was captured without values.
    """
    for name, entry in (*program.entries.items(), *program.carried.items()):
        if is_fake(entry.tensor):
            raise BackendError(
                f"{name} has a shape but no values: the program was captured from fake tensors",
                hint="it can be analysed; capture the model with its weights to run it",
            )
    shared = None if source is None else {_storage(t) for t in _tensors_of(source)}
    for table in (program.entries, program.carried):
        for name, entry in table.items():
            table[name] = _owned(entry, shared)


def _owned(entry: TensorEntry, shared: set[int] | None) -> TensorEntry:
    tensor = entry.tensor
    if shared is None or _storage(tensor) in shared:
        tensor = tensor.detach().clone()
    if entry.kind is not TensorKind.PARAMETER:
        return replace(entry, tensor=tensor.detach())
    if not isinstance(tensor, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad)
    return replace(entry, tensor=tensor)


def _tensors_of(source: torch.nn.Module | ExportedProgram) -> Iterator[torch.Tensor]:
    if isinstance(source, ExportedProgram):
        held: Iterable[object] = [*source.state_dict.values(), *source.constants.values()]
        yield from (t for t in held if isinstance(t, torch.Tensor))
        return
    for module in source.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            yield from (t for t in table.values() if isinstance(t, torch.Tensor))


def _storage(tensor: torch.Tensor) -> int:
    try:
        # Empty and meta storages are all at 0, and have nothing to share.
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)  # sparse tensors and wrappers have no storage of their own


# -- building --------------------------------------------------------------------------------


def tensor_tree(program: Program) -> tuple[torch.nn.Module, dict[str, str]]:
    """Build the tree.

    Parameters, buffers, carried buffers and aliases are registered under their own names, tied
    ones as one object. Constants, which the model had no names for, go into a child of their own
    as non-persistent buffers.

    Returns:
        The root, and per tensor of the program its dotted path in it.
    """
    root = torch.nn.Module()
    paths: dict[str, str] = {}
    own = [n for n, e in program.entries.items() if e.kind is not TensorKind.CONSTANT]
    for name in own:
        _register(root, name, program.entries[name])
        paths[name] = name
    for name, entry in program.carried.items():
        _register(root, name, entry)
    for alias, name in program.aliases.items():
        if name in paths:
            _register(root, alias, program.entries[name])
    taken = {name.partition(".")[0] for name in (*own, *program.carried, *program.aliases)}
    holder = "_constants"
    while holder in taken:
        holder += "_"
    constants = [n for n in program.entries if n not in paths]
    for index, name in enumerate(constants):
        paths[name] = f"{holder}.c{index}"
        _register(root, paths[name], replace(program.entries[name], persistent=False))
    return root, paths


def _register(root: torch.nn.Module, name: str, entry: TensorEntry) -> None:
    *prefix, leaf = name.split(".")
    owner = root
    for part in prefix:
        child = owner._modules.get(part)
        if child is None:
            if part in owner._parameters or part in owner._buffers:
                raise _clash(name)
            child = owner._modules[part] = torch.nn.Module()
            # The graph was captured in eval mode, and the tree says so.
            child.training = False
        owner = child
    if not _printable(name):
        raise BackendError(f"{name!r} cannot be the name of a tensor in a module")
    if leaf in owner._modules or leaf in owner._parameters or leaf in owner._buffers:
        raise _clash(name)
    if entry.kind is TensorKind.PARAMETER:
        owner._parameters[leaf] = entry.tensor  # type: ignore[assignment]
        return
    owner._buffers[leaf] = entry.tensor
    if not entry.persistent:
        owner._non_persistent_buffers_set.add(leaf)


def _printable(name: str) -> bool:
    """Whether a name can stand in generated code: it may come from a file."""
    return name.isprintable() and not set(name) & set("'\"\\") and all(name.split("."))


def _clash(name: str) -> BackendError:
    return BackendError(
        f"the tensor name {name!r} clashes with another tensor or with a module of this name",
        hint="a pass that adds a tensor must give it a free name, with free names above it",
    )


# -- keeping up ------------------------------------------------------------------------------


def refresh(program: Program, root: torch.nn.Module, paths: dict[str, str]) -> bool:
    """Let the program read the tensors that the tree has now; True if one was another object."""
    changed = False
    places = [(program.entries, name, path) for name, path in paths.items()]
    places += [(program.carried, name, name) for name in program.carried]
    for table, name, path in places:
        tensor = _get(root, path)
        if tensor is not None and table[name].tensor is not tensor:
            table[name] = replace(table[name], tensor=tensor)
            changed = True
    return changed


def tie(program: Program, root: torch.nn.Module, paths: dict[str, str]) -> None:
    """Let every alias be the one object again, after something replaced tensors by name."""
    for alias, name in program.aliases.items():
        tensor = _get(root, paths[name]) if name in paths else None
        if tensor is None:
            continue
        owner, _, leaf = alias.rpartition(".")
        module = root.get_submodule(owner)
        for registry in (module._parameters, module._buffers):
            if leaf in registry:
                registry[leaf] = tensor  # type: ignore[assignment]


def _get(root: torch.nn.Module, path: str) -> torch.Tensor | None:
    owner, _, leaf = path.rpartition(".")
    module = root.get_submodule(owner)
    found = getattr(module, leaf, None)
    return found if isinstance(found, torch.Tensor) else None
