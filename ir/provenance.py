"""Where a node came from: module path, source line, and the pass that made it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from torch import fx

__all__ = ["NodeInfo", "describe", "info", "module_path", "source_line"]

_KEY = "torchlathe"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_LIBRARY = re.compile(r"(^|[/\\])torch[/\\](nn|_ops|fx|export|_export|utils|functional)")


@dataclass(frozen=True)
class NodeInfo:
    """What torchlathe keeps on a node, under one key of ``node.meta``.

    Attributes:
        tensor: Name of the parameter, buffer or constant that a placeholder stands for.
        created_by: Text form of the pass that made the node; None for captured nodes.
        stands_for: Name of the captured node whose value a pass made this node give instead.
    """

    tensor: str | None = None
    created_by: str | None = None
    stands_for: str | None = None


_NONE = NodeInfo()


def info(node: fx.Node) -> NodeInfo:
    """Return the node's info; an empty one if nothing was recorded."""
    found = node.meta.get(_KEY, _NONE)
    assert isinstance(found, NodeInfo)
    return found


def set_info(node: fx.Node, **fields: str | None) -> None:
    """Record fields of `NodeInfo` on a node."""
    node.meta[_KEY] = replace(info(node), **fields)


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node; "" at the top."""
    stack = node.meta.get("nn_module_stack")
    # torch marks what it inserted itself, such as sizes of inputs, by a module of this name.
    if not stack or "_empty_nn_module_stack_from_metadata_hook" in stack:
        return ""
    path, _ = list(stack.values())[-1]
    # Export's own name for code that it traced outside of any module's forward.
    return "" if str(path).startswith("_empty_nn_module_stack") else str(path)


def source_line(node: fx.Node) -> str | None:
    """``file:line (function)`` of the model code that made the node, outside of torch itself."""
    trace = node.meta.get("stack_trace")
    return _model_line(trace) if trace else None


@functools.lru_cache(maxsize=4096)  # one line of a module makes many nodes
def _model_line(trace: str) -> str | None:
    frames = list(_FRAME.finditer(trace))
    for frame in reversed(frames):
        if not _LIBRARY.search(frame["file"]) and not frame["file"].startswith("<"):
            return f"{frame['file']}:{frame['line']} ({frame['function']})"
    return None


def describe(node: fx.Node) -> str:
    """One line that tells a user where a node is: op, node name, module and source line."""
    target = node.target if isinstance(node.target, str) else str(node.target)
    text = f"%{node.name} = {target}"
    if path := module_path(node):
        text += f" in {path}"
    if line := source_line(node):
        text += f" at {line}"
    if by := info(node).created_by:
        text += f" (made by {by})"
    return text
