"""The nodes of a program that carry data from its inputs, and what they read of each other.

Constants, tables of positions, and whatever only measures or imitates a shape are beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import fx

from torchlathe.ir import Program, info, module_path
from torchlathe.passes.analysis.constants import op_name

__all__ = ["DataFlow"]

# What they give depends on the shape of their operand alone.
_IMITATE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
# Their second operand gives a shape or a dtype, and no data.
_FIRST_ONLY = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})


class DataFlow:
    """Who reads whose data.

    Attributes:
        nodes: The calls that depend on the data of an input, in execution order.
        sources: Per such call, the distinct inputs and calls whose data it reads.
        readers: Per call or input, the calls that read its data, the output node among them.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder" and info(node).tensor is None:
                if _has_tensors(node):
                    self.readers[node] = []
                continue
            if node.op not in ("call_function", "output"):
                continue
            found = tuple(n for n in _operands(node) if n in self.readers)
            if node.op == "output" or (found and _has_tensors(node)):
                for source in found:
                    self.readers[source].append(node)
            if node.op == "call_function" and found and _has_tensors(node):
                self.sources[node] = found
                self.readers[node] = []
        self._totals = Counter(p for n in self.sources for p in _prefixes(module_path(n)))
        self._users = self._data_users()

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """The calls that carry data, in execution order."""
        return iter(self.sources)

    def is_joint(self, node: fx.Node) -> bool:
        """Whether a call brings data of several nodes together."""
        return len(self.sources[node]) > 1

    def users_of(self, tensor: str) -> frozenset[fx.Node]:
        """Calls with data that read a tensor, directly or through what is made of tensors."""
        return self._users[tensor]

    def _data_users(self) -> dict[str, frozenset[fx.Node]]:
        beside: dict[fx.Node, frozenset[fx.Node]] = {}

        def users(node: fx.Node) -> frozenset[fx.Node]:
            if node not in beside:
                found: set[fx.Node] = set()
                for user in node.users:
                    found |= {user} if user in self.sources else beside.get(user, frozenset())
                    if user.op == "output":
                        found.add(user)
                beside[node] = frozenset(found)
            return beside[node]

        tensors = self.program.tensor_nodes
        made = [n for n in self.program.graph.nodes if n.op == "call_function"]
        for node in reversed(made):
            if node not in self.sources and _has_tensors(node):
                users(node)
        return {name: users(node) for name, node in tensors.items()}

    # -- names -------------------------------------------------------------------------------

    def name_of(self, nodes: Sequence[fx.Node], owned: Collection[str]) -> str:
        """A name for some calls, from the paths of the modules that they belong to.

        The module itself where they are all of its calls, ``a.b.first..last`` where they run
        from one of its children to another, and ``a.b.op`` where they have no parameters.

        Args:
            nodes: Calls that carry data, in execution order.
            owned: The parameters that these calls own.
        """
        readers: set[fx.Node] = set()
        for name in owned:
            readers |= self._users[name]
        paths = [path for n in nodes if n in readers and (path := module_path(n))]
        if not paths:
            path = _common([module_path(n) for n in nodes])
            last = op_name(nodes[-1])
            return f"{path}.{last}" if path else last
        inside = Counter(p for n in nodes for p in _prefixes(module_path(n)))
        whole = {p for p, count in inside.items() if count == self._totals[p]}
        base = _common(paths)
        if base in whole:
            return base
        parts = list(dict.fromkeys(_largest(path, base, whole) for path in paths))
        start = f"{base}." if base else ""
        return parts[0] + ("" if len(parts) == 1 else f"..{parts[-1].removeprefix(start)}")


def _operands(node: fx.Node) -> list[fx.Node]:
    name = op_name(node) if node.op == "call_function" else ""
    if name in _IMITATE or name.startswith(("new_", "sym_")):
        return []
    if name in _FIRST_ONLY:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def _has_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(v, torch.Tensor) for v in values)


def _prefixes(path: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    end = path.find(".")
    while end >= 0:
        yield path[:end]
        end = path.find(".", end + 1)
    if path:
        yield path


def _common(paths: Collection[str]) -> str:
    """The longest path that all of these are at or below."""
    rows = [path.split(".") for path in paths if path]
    if not rows or len(rows) < len(paths):
        return ""
    shared = []
    for parts in zip(*rows, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _largest(path: str, base: str, whole: Collection[str]) -> str:
    """The outermost module on a path below ``base`` that is whole; else the path itself."""
    return next((p for p in _prefixes(path) if len(p) > len(base) and p in whole), path)
