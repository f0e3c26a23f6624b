"""Families of the same structure: coupled in the same way, by the same ops, at whatever width.

Source: isomorphic pruning (arXiv 2407.04616, section 3) ranks sub-structures only against those
that have the same topology, since magnitudes of different ones do not compare. The key is own: the
paper labels a graph of modules; here the ops that an atom runs through are the graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from torch import fx

from torchlathe.ir import info
from torchlathe.passes.analysis.families import Families, Family

__all__ = ["isomorphic_groups", "structure_of"]


def isomorphic_groups(chosen: Iterable[Family], families: Families) -> list[list[Family]]:
    """The families in groups of the same structure, in the order of their first members."""
    groups: dict[Hashable, list[Family]] = {}
    for family in chosen:
        groups.setdefault(structure_of(family, families), []).append(family)
    return list(groups.values())


def structure_of(family: Family, families: Families) -> Hashable:
    """What two families have in common if, and only if, they are coupled in the same way.

    That is: what they own (role, axis, kind and indices per unit of each slice, and the ops that
    use the tensor), and how the ops that carry the atom feed each other. Extents do not count.
    """
    touching = families.index.touching[family.atom.number]
    tensors = {name: node for node in touching if (name := info(node).tensor) is not None}
    slices = sorted(
        (part.writes, part.axis, part.kind.value, part.repeat, _users(tensors.get(part.name)))
        for part in family.slices
    )
    own = set(tensors.values())
    number: dict[fx.Node, int] = {}
    pattern: list[tuple[str, tuple[int, ...]]] = []
    for node in touching:
        if node.op == "call_function":
            number[node] = len(pattern)
            # A tensor of the program stands for itself, wherever in the list of tensors it is.
            inputs = (
                number.get(used, -1)
                for used in node.all_input_nodes
                if used in number or used in own
            )
            pattern.append((str(node.target), tuple(inputs)))
    return tuple(slices), tuple(pattern)


def _users(node: fx.Node | None) -> tuple[str, ...]:
    return () if node is None else tuple(sorted(str(user.target) for user in node.users))
