"""Post-dominators of a graph: what dies when a node's result is not used any more.

A node *v* post-dominates *u* if every path from *u* to an output runs through *v*. The nodes that
*v* post-dominates are exactly those that are dead once nothing reads *v*, and they form a tree.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from torchlathe.ir.edit import has_effect

__all__ = ["PostDominators"]


class PostDominators:
    """The post-dominator tree of an acyclic graph, its root being the outputs together.

    In reverse topological order the parent of a node is the nearest common ancestor of its users
    (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001, which needs one sweep
    without cycles). Ancestors are found by jump pointers (Myers, "An applicative random-access
    stack", 1983), so that all of it takes O(edges · log nodes).

    Args:
        graph: Nodes in execution order. Calls that nobody reads count as outputs if they have
            side effects, and are left out otherwise, as are unused inputs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._order = list(graph.nodes)
        # Index 0 is the root; others are 1 + position in the graph.
        self._index = {node: i + 1 for i, node in enumerate(self._order)}
        count = len(self._order) + 1
        self._parent = [0] * count
        self._depth = [0] * count
        self._jump = [0] * count
        self._first = [0] * count  # interval of the subtree in preorder; empty if left out
        self._last = [-1] * count
        self._preorder: list[int] = []
        self._build()

    def _build(self) -> None:
        children: list[list[int]] = [[] for _ in self._parent]
        inside = [False] * len(self._parent)
        for node in reversed(self._order):
            own = self._index[node]
            users = [i for user in node.users if inside[i := self._index[user]]]
            if users:
                parent = users[0]
                for user in users[1:]:
                    parent = self._common(parent, user)
            elif node.op == "output" or (node.op == "call_function" and has_effect(node)):
                parent = 0
            else:
                continue
            inside[own] = True
            self._hang(own, parent)
            children[parent].append(own)
        self._number(children)

    def _hang(self, own: int, parent: int) -> None:
        depth, jump = self._depth, self._jump
        self._parent[own] = parent
        depth[own] = depth[parent] + 1
        far = jump[parent]
        even = depth[parent] - depth[far] == depth[far] - depth[jump[far]]
        jump[own] = jump[far] if even else parent

    def _common(self, a: int, b: int) -> int:
        """The nearest common ancestor."""
        parent, depth, jump = self._parent, self._depth, self._jump
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            # Nodes of one depth jump equally far.
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def _number(self, children: list[list[int]]) -> None:
        # Later nodes were hung first, so the stack gives each subtree as one run.
        stack = list(children[0])
        while stack:
            own = stack.pop()
            self._first[own] = len(self._preorder)
            self._preorder.append(own)
            stack.extend(children[own])
        size = [1] * len(self._parent)
        for own in reversed(self._preorder):
            self._last[own] = self._first[own] + size[own] - 1
            size[self._parent[own]] += size[own]

    def subtree(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The node and all that it post-dominates, in execution order."""
        own = self._index[node]
        found = sorted(self._preorder[self._first[own] : self._last[own] + 1])
        return tuple(self._order[i - 1] for i in found)

    def contains(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether ``other`` is dead without ``node``; a node is dead without itself."""
        own, inner = self._index[node], self._index[other]
        return self._first[own] <= self._first[inner] <= self._last[own]

    def common(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """The nearest node through which all paths from these nodes run; None for the outputs."""
        found: int | None = None
        for node in nodes:
            own = self._index[node]
            found = own if found is None else self._common(found, own)
        return self._order[found - 1] if found else None
