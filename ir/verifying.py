"""Holding a program to its invariants, and a changed program to the one before it.

Source: own. ``graph.lint()`` and ``ExportedProgram.validate()`` accept cleared metadata, a weight
of another shape than its placeholder and wrong shapes downstream; these checks do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import fx

from torchlathe.ir.equivalence import Equivalence, LastOutputs, cannot_run, check_equivalence
from torchlathe.ir.errors import VerifyError
from torchlathe.ir.extents import expression
from torchlathe.ir.fakes import fake_run
from torchlathe.ir.provenance import describe, info

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["Equivalence", "LastOutputs", "Level", "cannot_run", "check_equivalence", "verify"]

Level: TypeAlias = Literal["off", "fast", "full"]


def verify(program: Program, level: Level = "fast") -> None:
    """Check that a program is well formed.

    Args:
        program: What to check; nothing in it changes.
        level: ``"fast"`` reads the graph and its metadata; ``"full"`` also runs every node on
            fake tensors; ``"off"`` does nothing.

    Raises:
        VerifyError: The first invariant that does not hold, and the node where it does not.
    """
    if level == "off":
        return
    _check_graph(program.graph)
    _check_tensors(program)
    _check_inputs(program)
    _check_outputs(program)
    _check_names(program)
    for node in program.nodes:
        if node.op == "call_function":
            _check_call(node)
    if level == "full":
        _check_metadata(program)


def _check_graph(graph: fx.Graph) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"the graph is not well formed: {error}") from error
    late = False
    for node in graph.nodes:
        if node.op != "placeholder":
            late = True
        elif late:
            raise VerifyError("a placeholder comes after the first call", where=describe(node))


def _check_tensors(program: Program) -> None:
    """Each tensor has one placeholder, of its shape and dtype, that something reads."""
    nodes: dict[str, fx.Node] = {}
    inputs_began = False
    for node in program.graph.find_nodes(op="placeholder"):
        name = info(node).tensor
        if name is None:
            inputs_began = True
            continue
        if inputs_began:
            raise VerifyError(f"{name} comes after the inputs", where=describe(node))
        if name in nodes:
            raise VerifyError(f"{name} has two placeholders", where=describe(node))
        if name not in program.entries:
            raise VerifyError(f"{name} has a placeholder but no tensor", where=describe(node))
        nodes[name] = node
    for name, entry in program.entries.items():
        if name not in nodes:
            raise VerifyError(f"{name} has a tensor but no placeholder")
        node = nodes[name]
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise VerifyError(f"{name} has no metadata", where=describe(node))
        shown, found = _signature(value), _signature(entry.tensor)
        if shown != found:
            raise VerifyError(
                f"{name} is {_text(found)}, but the graph takes it for {_text(shown)}",
                where=describe(node),
                hint="replace tensors through Edit.set_tensor, which updates both",
            )
        if not node.users:
            raise VerifyError(f"{name} is dead: nothing reads it", where=describe(node))


def _check_inputs(program: Program) -> None:
    wanted, found = program.in_spec.num_leaves, len(program.input_nodes)
    if wanted != found:
        raise VerifyError(f"the graph takes {found} inputs, the signature has {wanted}")


def _check_outputs(program: Program) -> None:
    output = program.output_node
    if output.op != "output" or not isinstance(output.args[0], tuple):
        raise VerifyError("the last node is not an output with one flat tuple")
    wanted, found = program.out_spec.num_leaves, len(output.args[0])
    if wanted != found:
        raise VerifyError(f"the graph gives {found} outputs, the signature has {wanted}")


def _check_names(program: Program) -> None:
    """Aliases and the record of what was kept fit the tensors."""
    for alias, name in program.aliases.items():
        if name not in program.entries or alias in program.entries:
            raise VerifyError(f"{alias} is tied to {name}, which is not a tensor of the program")
    for name, axes in program.kept.items():
        entry = program.entries.get(name)
        for axis, indices in axes.items():
            if entry is not None and entry.tensor.shape[axis] != indices.numel():
                raise VerifyError(
                    f"{name} has extent {entry.tensor.shape[axis]} on axis {axis}, "
                    f"but {indices.numel()} indices are on record as kept"
                )


def _check_call(node: fx.Node) -> None:
    if "val" not in node.meta:
        raise VerifyError(
            "a node without metadata",
            where=describe(node),
            hint="make nodes through Edit.call, which fills it in",
        )
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise VerifyError(
            "a node writes into its input", where=describe(node), hint="use the functional op"
        )


def _check_metadata(program: Program) -> None:
    """Every node gives what its metadata says, when run on what its inputs' metadata says."""
    mode = program.fake_mode
    for node in program.nodes:
        if node.op != "call_function":
            continue
        shown, found = _signature(node.meta["val"]), _signature(fake_run(node, mode))
        if not _agree(shown, found):
            raise VerifyError(
                f"the metadata says {_text(shown)}, but the node gives {_text(found)}",
                where=describe(node),
            )


# A tensor is its dtype and extents, a list of values the tuple of theirs.
_Signature: TypeAlias = Any


def _signature(value: Any) -> _Signature:
    if isinstance(value, torch.Tensor):
        return (value.dtype, *(expression(extent) for extent in value.shape))
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    return expression(value)


def _agree(a: _Signature, b: _Signature) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_agree, a, b))
    if any(_decided_by_data(x) for x in (a, b)):
        return True  # each run makes a new symbol
    if a == b:
        return True
    # The same extent may come in two forms, as 2*(s + 1) and 2*s + 2.
    difference = getattr(a - b, "expand", None) if _is_number(a) and _is_number(b) else None
    return difference is not None and difference() == 0


def _decided_by_data(extent: Any) -> bool:
    return any(s.name.startswith(("u", "zuf")) for s in getattr(extent, "free_symbols", ()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or hasattr(value, "free_symbols")


def _text(signature: _Signature) -> str:
    return "".join(_pieces(signature))


def _pieces(signature: _Signature) -> Iterator[str]:
    if not isinstance(signature, tuple):
        yield str(signature)
    elif signature and isinstance(signature[0], torch.dtype):
        yield str(signature[0]).removeprefix("torch.")
        yield "[" + ", ".join(map(str, signature[1:])) + "]"
    else:
        yield "(" + ", ".join(map(_text, signature)) + ")"
