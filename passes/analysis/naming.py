"""Finding what a user names: a tensor, an axis, an index, a family, a module, a node or an op."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from torchlathe.ir import InputError, Program, module_path
from torchlathe.passes.analysis.families import Families, Family

__all__ = ["Target", "find_target"]

_CHANNEL = re.compile(r"(?P<tensor>.+):(?P<axis>-?\d+)(\[(?P<index>-?\d+)\])?")
_MOST_NODES = 64  # of one op; the rest would only repeat them


@dataclass(frozen=True)
class Target:
    """What a name stands for.

    Attributes:
        name: In full.
        kind: ``"parameter"``, ``"axis"``, ``"channel"``, ``"family"``, ``"module"``, ``"node"`` or
            ``"op"``.
        places: The axes in question: nodes (of tensors, or of calls) with the axis.
        atom: The one atom that is asked for; None for all of the axes.
        index: The index that is asked for.
        nodes: The calls that are asked for themselves.
        notes: What to tell about the name.
    """

    name: str
    kind: str
    places: tuple[tuple[fx.Node, int], ...]
    atom: int | None = None
    index: int | None = None
    nodes: tuple[fx.Node, ...] = ()
    notes: tuple[str, ...] = ()


def find_target(program: Program, families: Families, name: str) -> Target:
    """What a name stands for; tensors before families before modules before nodes before ops.

    Raises:
        InputError: Nothing is called so, or the axis or index is out of range.
    """
    return _Names(program, families).find(name.strip())


class _Names:
    """Everything in a program that has a name."""

    def __init__(self, program: Program, families: Families) -> None:
        self.program = program
        self.families = families
        self.tensors = program.tensor_nodes

    def find(self, name: str) -> Target:
        tensor, notes = self._tensor(name)
        if tensor is not None:
            return Target(tensor, "parameter", self._axes(self.tensors[tensor]), notes=notes)
        match = _CHANNEL.fullmatch(name)
        if match is not None:
            tensor, notes = self._tensor(match["tensor"])
            if tensor is not None:
                return self._axis(tensor, match, notes)
        for family in self.families:
            if family.name == name:
                return self._family(family)
        found = self._module(name) or self._calls(name.removeprefix("%"))
        if found is None:
            raise self._unknown(name)
        return found

    # -- one kind after the other ----------------------------------------------------------

    def _tensor(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        kept = self.program.aliases.get(name)
        if kept is not None:
            return kept, (f"{name} is tied to {kept}, and shares all that is said of it",)
        return (name if name in self.tensors else None), ()

    def _axes(self, node: fx.Node) -> tuple[tuple[fx.Node, int], ...]:
        return tuple((node, axis) for axis in range(len(self.families.axis_map.terms(node))))

    def _axis(self, tensor: str, match: re.Match[str], notes: tuple[str, ...]) -> Target:
        node = self.tensors[tensor]
        terms = self.families.axis_map.terms(node)
        axis = _in_range(int(match["axis"]), len(terms), tensor, "axes")
        if match["index"] is None:
            return Target(f"{tensor}:{axis}", "axis", ((node, axis),), notes=notes)
        extent = int(terms[axis].extent)
        index = _in_range(int(match["index"]), extent, f"axis {axis} of {tensor}", "indices")
        full = f"{tensor}:{axis}[{index}]"
        return Target(full, "channel", ((node, axis),), index=index, notes=notes)

    def _family(self, family: Family) -> Target:
        first = (family.writers or family.slices)[0]
        place = (self.tensors[first.name], first.axis)
        return Target(family.name, "family", (place,), atom=family.atom.number)

    def _module(self, name: str) -> Target | None:
        """A module by its path; one without tensors by what it calls."""
        own = [n for n in self.tensors if n.startswith(name + ".")]
        if own:
            places = [place for tensor in own for place in self._axes(self.tensors[tensor])]
            return Target(name, "module", tuple(places))
        calls = [n for n in self._call_nodes() if module_path(n) == name]
        return self._of_nodes(name, "module", calls) if calls and name else None

    def _calls(self, name: str) -> Target | None:
        nodes = [n for n in self._call_nodes() if n.name == name]
        if nodes:
            return self._of_nodes(f"%{name}", "node", nodes)
        nodes = [n for n in self._call_nodes() if name in _op_names(n)]
        return self._of_nodes(name, "op", nodes) if nodes else None

    def _of_nodes(self, name: str, kind: str, nodes: list[fx.Node]) -> Target:
        shown = nodes[:_MOST_NODES]
        # An op with several results has its axes where they are taken apart.
        results = [r for n in shown for r in ((n,) if self._axes(n) else n.users)]
        places = [place for node in results for place in self._axes(node)]
        notes = () if shown == nodes else (f"of {len(nodes)} nodes the first {len(shown)}",)
        return Target(name, kind, tuple(places), nodes=tuple(nodes), notes=notes)

    def _call_nodes(self) -> Iterator[fx.Node]:
        return (n for n in self.program.nodes if n.op == "call_function")

    # -- nothing found ---------------------------------------------------------------------

    def _unknown(self, name: str) -> InputError:
        if name in self.program.dropped:
            return InputError(
                f"{name} is a parameter that the forward code never reads, so it is in no family"
            )
        if name in self.program.carried:
            return InputError(
                f"{name} is a buffer that the forward code never reads, so it is in no family"
            )
        known = dict.fromkeys(self._known())
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if not close:
            close = [n for n in known if name and name in n][:3]
        hint = f"did you mean {' or '.join(close)}?" if close else None
        return InputError(
            f"nothing in {self.program.model_name} is called {name!r}",
            hint=hint
            or "name a parameter, an axis (name:0), an index (name:0[17]), a family, a "
            "module, or a node of the listing (torchlathe inspect MODEL --text)",
        )

    def _known(self) -> Iterator[str]:
        modules = set()
        for name, node in self.tensors.items():
            yield name
            for axis in range(len(self.families.axis_map.terms(node))):
                yield f"{name}:{axis}"
            while name := name.rpartition(".")[0]:
                modules.add(name)
        yield from self.program.aliases
        yield from (family.name for family in self.families)
        for node in self._call_nodes():
            yield node.name
            modules.add(module_path(node))
            yield from _op_names(node)
        yield from sorted(modules - {""})


def _op_names(node: fx.Node) -> tuple[str, ...]:
    """``aten.linear.default`` and, without the overload, ``aten.linear``."""
    schema = getattr(node.target, "_schema", None)
    full = str(node.target)
    return (full,) if schema is None else (full, str(schema.name).replace("::", "."))


def _in_range(number: int, count: int, whose: str, what: str) -> int:
    if not -count <= number < count:
        raise InputError(
            f"{whose} has {count} {what}, and {number} is none of them",
            hint=f"they count from 0 to {count - 1}" if count else None,
        )
    return number % count
