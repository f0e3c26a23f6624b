"""Arguments of graph nodes as JSON, and ops by name.

A file says which ops to call, so this is the gate: a name leads to an op of ``torch.ops`` that
writes nothing, or to a function of a short list, and to nothing else.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import fx

from torchlathe.ir import ArtifactError

__all__ = ["decode", "encode", "named", "op_name", "resolve_op"]

_OP = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)

# What torch.export leaves in a graph for arithmetic on sizes, and for tuples.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg")),
        (operator, ("pos", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")),
        (math, ("trunc", "ceil", "floor", "sqrt")),
        (torch, ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")),
    )
    for name in names
    if hasattr(module, name)
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}

# Namespaces that torch itself registers and that compute something from tensors alone. Others of
# its own talk to devices, files, other processes or its compilers.
_TORCH_COMPUTES = frozenset(
    {"aten", "prims", "quantized", "_quantized", "quantized_decomposed", "mkldnn", "sparse"}
)
_TORCH_OTHERS = re.compile(
    r"_?c10d_functional(_autograd)?|_dtensor|_?inductor(_test|_prims)?|_native|_test|c10d|"
    r"debug_mode_ops|debugprims|export|flex_lib|fsdp|higher_order|mkl|mkldnn_prepacked|onednn|"
    r"onnx(_symbolic)?|prim|profiler|quantization|rngprims|static_runtime|streams|symm_mem"
)
# Ops that reach outside of the process, or that read what is in no tensor.
_REFUSED_OPS = frozenset({"aten::from_file", "aten::save", "aten::_print", "aten::warn"})

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if type(v) is torch.dtype}
_LAYOUTS = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if type(v) is torch.layout
}
_MEMORY_FORMATS = {
    str(v).removeprefix("torch."): v
    for v in (
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        torch.preserve_format,
    )
}


# -- ops -------------------------------------------------------------------------------------


def op_name(target: Any) -> str:
    """The name of what a node calls.

    Raises:
        ArtifactError: It is nothing that a file may name.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if resolve_op(name) is target:
            return name
    elif target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise ArtifactError(
        f"{target} cannot be saved: it is no registered op",
        hint="register the function as an op with torch.library",
    )


def resolve_op(name: Any) -> Callable[..., Any]:
    """The op or function of this name.

    Raises:
        ArtifactError: There is none, or a file may not name it.
    """
    if not isinstance(name, str):
        raise ArtifactError(f"{name!r} names no op")
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    match = _OP.fullmatch(name)
    if match is None or _TORCH_OTHERS.fullmatch(match[1]):
        raise ArtifactError(f"a saved model may not call {name!r}")
    if match[1] == "torchlathe":
        import_module("torchlathe.kernels.operators")
    # Only registered ops are taken: namespaces and packets have other attributes as well.
    space = getattr(torch.ops, match[1], None)
    packet = getattr(space, match[2], None) if type(space) is torch._ops._OpNamespace else None
    if not isinstance(packet, torch._ops.OpOverloadPacket) or match[3] not in packet.overloads():
        own = match[1] in _TORCH_COMPUTES
        raise ArtifactError(
            f"the model calls the op {name}, which is not registered here",
            hint=f"this is torch {torch.__version__}: load the model with the version that the "
            "manifest names"
            if own
            else f"import the package that registers the ops {match[1]}::*, then load again",
        )
    op: torch._ops.OpOverload = getattr(packet, match[3])
    if op._schema.is_mutable or op._schema.name in _REFUSED_OPS:
        raise ArtifactError(f"a saved model may not call {name!r}: it does more than compute")
    return op


# -- values ----------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value as JSON; what JSON lacks becomes a table of one entry that names its kind.

    Raises:
        ArtifactError: A value of a kind that has no place in a file.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if kind in (list, fx.immutable_collections.immutable_list):
        return [encode(item) for item in value]
    if kind in (tuple, torch.Size):
        return {"tuple": [encode(item) for item in value]}
    if kind in (dict, fx.immutable_collections.immutable_dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if kind is slice:
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if kind is complex:
        return {"complex": [encode(value.real), encode(value.imag)]}
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if kind is torch.device:
        # Files name no device: a model is loaded onto the CPU and moved from there.
        return {"device": "cpu"}
    raise ArtifactError(f"a value of type {kind.__name__} cannot be saved: {value!r}")


def decode(data: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """What `encode` encoded.

    Args:
        data: Parsed JSON.
        nodes: Nodes by name, those that may be read.

    Raises:
        ArtifactError: Anything that `encode` does not write.
    """
    if data is None or type(data) in (bool, int, str, float):
        return data
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        if kind == "node":
            return named(nodes, content, "node")
        if kind in _TABLES:
            return named(_TABLES[kind], content, kind)
        if kind == "dict" and _pairs(content):
            return {_key(decode(k, nodes)): decode(v, nodes) for k, v in content}
        if isinstance(content, list) and kind in ("tuple", "slice", "complex"):
            items = [decode(item, nodes) for item in content]
            if kind == "tuple":
                return tuple(items)
            if kind == "slice" and len(items) == 3:
                return slice(*items)
            if kind == "complex" and [type(item) for item in items] == [float, float]:
                return complex(*items)
    raise ArtifactError(f"the graph holds a value that cannot be read: {str(data)[:80]}")


_TABLES: dict[str, Mapping[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "dtype": _DTYPES,
    "layout": _LAYOUTS,
    "memory_format": _MEMORY_FORMATS,
    "device": {"cpu": torch.device("cpu")},
}


def named(table: Mapping[str, Any], name: Any, kind: str) -> Any:
    """The entry of a table, where the name comes from a file.

    Raises:
        ArtifactError: There is none.
    """
    if not isinstance(name, str) or name not in table:
        raise ArtifactError(f"the graph names the {kind} {str(name)[:80]!r}, which there is not")
    return table[name]


def _pairs(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(p, list) and len(p) == 2 for p in content)


def _key(key: Any) -> Any:
    if type(key) not in (str, int, bool, float, type(None)):
        raise ArtifactError("the graph holds a table whose keys are not plain")
    return key
