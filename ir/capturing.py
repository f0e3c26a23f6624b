"""Capturing a module into a Program by ``torch.export``.

The result is functional ATen with nothing decomposed: in-place ops are turned into their functional
twins here where that is plainly safe, and by ``run_decompositions({})`` where it is not.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from torchlathe.ir.canonical import restore_norms
from torchlathe.ir.errors import InputError, UnsupportedError
from torchlathe.ir.exporting import eval_mode, export, functional
from torchlathe.ir.functional import (
    drop_statistics_updates,
    functionalize_in_place,
    inline_wrapped_regions,
    make_complex_views_contiguous,
    write_out_default_eps,
)
from torchlathe.ir.program import Program, TensorEntry, TensorKind, copy_graph
from torchlathe.ir.provenance import describe, set_info

__all__ = ["capture", "eval_mode", "from_exported"]

log = logging.getLogger("torchlathe")


def capture(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture a model into a Program, in eval mode, without changing it.

    Args:
        model: Any module that ``torch.export`` can capture, or an exported program.
        example_inputs: Positional arguments; a tuple, or one tensor, or a dict of keywords.
        example_kwargs: Keyword arguments.
        dynamic_shapes: As ``torch.export.export`` takes them, or ``"auto"``: the first dimension
            of every tensor input that shares its extent with the first input is the batch and
            becomes dynamic.

    Returns:
        The program. Its tensors are the model's own, shared until a pass replaces them.

    Raises:
        InputError: The model does not run on the example inputs.
        CaptureError: The model runs, but cannot be captured as one graph.
    """
    args, kwargs = _normalise_inputs(example_inputs, example_kwargs)
    if isinstance(model, ExportedProgram):
        return from_exported(model, (args, kwargs) if args or kwargs else None)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}",
            hint="wrap a function into a module with a forward method",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"{type(model).__name__} holds TorchScript, which torch.export cannot capture",
            hint="give the nn.Module that it was made from",
        )
    if dynamic_shapes == "auto":
        args, kwargs, dynamic_shapes = _mark_batch(model, args, kwargs)
    elif isinstance(dynamic_shapes, str):
        raise InputError(f'dynamic_shapes={dynamic_shapes!r} is not known; the one text is "auto"')
    exported = export(model, args, kwargs, dynamic_shapes)
    program = from_exported(exported, (args, kwargs), model=model)
    program.model_name = type(model).__name__
    return program


def from_exported(
    exported: ExportedProgram,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    *,
    model: torch.nn.Module | None = None,
) -> Program:
    """Make a Program of an exported program.

    Args:
        exported: The result of ``torch.export.export`` or ``torch.export.load``.
        example_inputs: ``(args, kwargs)``; by default those kept in ``exported``.
        model: The module it came from; names that share a tensor there are kept as aliases.
    """
    # The exported program stays as it was.
    graph = copy_graph(exported.graph)
    if not (inline_wrapped_regions(graph, exported.graph_module) and functionalize_in_place(graph)):
        log.debug("wrapped regions or writes to aliases: flattening by run_decompositions")
        exported = functional(exported)
        graph = copy_graph(exported.graph)
        _refuse_submodules(graph)
    drop_statistics_updates(graph)
    write_out_default_eps(graph)
    restore_norms(graph)
    make_complex_views_contiguous(graph)
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        names = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise UnsupportedError(
            f"the forward code writes into {', '.join(sorted(names))}",
            hint="a graph here has no state: return the new value as an output, or skip the write "
            "when not self.training (capture runs in eval mode)",
        )
    inputs = example_inputs or exported.example_inputs or ((), {})

    entries: dict[str, TensorEntry] = {}
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                node.meta["val"] = spec.arg.value
            continue
        if spec.kind not in _KINDS:
            raise UnsupportedError(f"inputs of kind {spec.kind.name} are not supported")
        assert spec.target is not None
        entries[spec.target] = _entry(exported, spec.kind, spec.target, spec.persistent)
        set_info(node, tensor=spec.target)

    aliases = _merge_tied(graph, nodes, entries, signature.input_specs, model)
    _drop_metadata_asserts(graph)
    carried, dropped = _drop_unused(graph, nodes, entries, signature.input_specs, model)
    name = type(model).__name__ if model is not None else "ExportedProgram"
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    _output_flat(graph)
    return Program(
        graph,
        entries,
        in_spec=in_spec,
        out_spec=out_spec,
        example_inputs=(tuple(inputs[0]), dict(inputs[1])),
        aliases={a: n for a, n in aliases.items() if n in entries},
        carried=carried,
        dropped=dropped,
        range_constraints=exported.range_constraints,
        model_name=name,
    )


def _refuse_submodules(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="get_attr"):
        user = next(iter(node.users), node)
        raise UnsupportedError(
            f"the model has control flow or a nested graph ({user.target}), and a program is one "
            "flat graph",
            where=describe(user),
            hint="write a branch with torch.where, or decide it outside of forward",
        )


_KINDS = {
    InputKind.PARAMETER: TensorKind.PARAMETER,
    InputKind.BUFFER: TensorKind.BUFFER,
    InputKind.CONSTANT_TENSOR: TensorKind.CONSTANT,
}


def _entry(
    exported: ExportedProgram, kind: InputKind, name: str, persistent: bool | None
) -> TensorEntry:
    held = exported.state_dict if name in exported.state_dict else exported.constants
    tensor = held[name]
    keep = kind is InputKind.PARAMETER or (kind is InputKind.BUFFER and persistent is not False)
    return TensorEntry(tensor, _KINDS[kind], keep)


def _merge_tied(
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    entries: dict[str, TensorEntry],
    specs: Sequence[Any],
    model: torch.nn.Module | None,
) -> dict[str, str]:
    """Let names that share one tensor share one placeholder; return alias to kept name."""
    own: dict[str, torch.Tensor] = {}
    if model is not None:
        own.update(model.named_parameters(remove_duplicate=False))
        own.update(model.named_buffers(remove_duplicate=False))
    first: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    by_name = {s.target: nodes[s.arg.name] for s in specs if s.target is not None}
    for name in list(entries):
        key = id(own[name]) if name in own else _identity(entries[name])
        kept = first.setdefault(key, name)
        if kept != name:
            by_name[name].replace_all_uses_with(by_name[kept])
            graph.erase_node(by_name[name])
            del entries[name]
            aliases[name] = kept
    # Export may have left out names that the module has for a tensor it did keep.
    for name, tensor in own.items():
        if name not in entries and name not in aliases and id(tensor) in first:
            aliases[name] = first[id(tensor)]
    return aliases


def _identity(entry: TensorEntry) -> Hashable:
    """What two tensors have in common that are tied in a saved program, where no module tells."""
    tensor = entry.tensor
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel():
        return id(tensor)
    return (entry.kind, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _drop_metadata_asserts(graph: fx.Graph) -> None:
    """Remove the checks that export adds for casts: they compute nothing and pin shapes."""
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        graph.erase_node(node)


def _drop_unused(
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    entries: dict[str, TensorEntry],
    specs: Sequence[Any],
    model: torch.nn.Module | None,
) -> tuple[dict[str, TensorEntry], list[str]]:
    """Take out tensors that nothing reads; buffers go on with the state dict."""
    graph.eliminate_dead_code()
    carried: dict[str, TensorEntry] = {}
    dropped: list[str] = []
    for spec in specs:
        name = spec.target
        if name not in entries or nodes[spec.arg.name].users:
            continue
        entry = entries.pop(name)
        graph.erase_node(nodes[spec.arg.name])
        if entry.kind is TensorKind.BUFFER:
            carried[name] = entry
        elif entry.kind is TensorKind.PARAMETER:
            dropped.append(name)
    return carried, dropped


def _output_flat(graph: fx.Graph) -> None:
    """Hold the output node to the one form that the rest relies on: a flat tuple."""
    output = next(iter(reversed(graph.nodes)))
    assert output.op == "output"
    output.args = (tuple(output.args[0]),)


# -- inputs ----------------------------------------------------------------------------------


def _normalise_inputs(
    example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), kwargs
    if isinstance(example_inputs, Mapping):
        if kwargs:
            raise InputError("keywords were given twice: in example_inputs and example_kwargs")
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        raise InputError(
            f"example_inputs must be a tuple of arguments, got {type(example_inputs).__name__}",
            hint="write (x,) for one argument; keywords go into example_kwargs={...}",
        )
    return tuple(example_inputs), kwargs


def _mark_batch(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batch = next((x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.dim()), None)

    def marked(x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == batch

    if batch == 1:
        # Export takes an extent of 1 as a constant, so the batch is captured at 2.
        leaves = [torch.cat([x, x]) if marked(x) else x for x in leaves]
        batch = 2
        args, kwargs = pytree.tree_unflatten(leaves, spec)
    # AUTO lets export fall back to a static dimension where the model fixes it.
    dynamic = [{0: Dim.AUTO} if marked(x) else None for x in leaves]
    dynamic_args, dynamic_kwargs = pytree.tree_unflatten(dynamic, spec)
    # By parameter name, as export binds the arguments itself.
    try:
        bound = inspect.signature(model.forward).bind(*dynamic_args, **dynamic_kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit forward{inspect.signature(model.forward)}: {error}",
            hint="example_inputs are the positional arguments, example_kwargs the keywords",
        ) from error
    return args, kwargs, dict(bound.arguments)
