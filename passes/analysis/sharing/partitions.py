"""Partitions of layers into classes: exact for few, by agglomeration and local search for many.

A cost is any function of a class (a set of layers); what a partition costs is the sum over its
classes. All solvers see nothing but that function.

Source: own. The dynamic programme over sets is the textbook one (the cheapest partition of a set
is the cheapest class of its first element plus the cheapest partition of the rest, 3^n steps);
moves and exchanges between classes are those of Kernighan and Lin (1970); DSATUR is Brélaz (1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "EXACT_LIMIT",
    "ClassCost",
    "Classes",
    "Partition",
    "agglomerate",
    "all_partitions",
    "best_partition",
    "best_partitions",
    "color_conflicts",
    "ordered",
    "partition_cost",
    "refine",
]

# Layers of one type up to which every partition is looked at, 3^10 = 59,049 steps.
EXACT_LIMIT = 10

Classes = frozenset[int]
Partition = tuple[Classes, ...]
ClassCost = Callable[[Classes], float]


def ordered(classes: Iterable[Iterable[int]]) -> Partition:
    """Classes by their first member, empty ones left out."""
    return tuple(sorted((frozenset(c) for c in classes if c), key=lambda c: sorted(c)))


def partition_cost(partition: Partition, cost: ClassCost) -> float:
    """The sum over the classes."""
    return math.fsum(cost(members) for members in partition)


def all_partitions(count: int) -> Iterator[Partition]:
    """Every partition of ``range(count)``; for tests, since there are 4,140 of eight."""

    def place(item: int, classes: list[list[int]]) -> Iterator[Partition]:
        if item == count:
            yield ordered(classes)
            return
        for members in classes:
            members.append(item)
            yield from place(item + 1, classes)
            members.pop()
        yield from place(item + 1, [*classes, [item]])

    return place(0, [])


def best_partition(count: int, cost: ClassCost) -> Partition:
    """The cheapest partition, of any number of classes.

    Args:
        count: Number of layers; at most about 14 in reasonable time.
        cost: Of a class; ``math.inf`` for one that is not allowed.
    """
    costs = _cost_table(count, cost)
    best = [0.0] + [math.inf] * (len(costs) - 1)
    taken = [0] * len(costs)
    for mask in range(1, len(costs)):
        for part in _classes_of_first(mask):
            total = costs[part] + best[mask ^ part]
            if total < best[mask]:
                best[mask], taken[mask] = total, part
    return _unwind(taken, count)


def best_partitions(count: int, cost: ClassCost) -> dict[int, Partition]:
    """The cheapest partition for each number of classes, where one is allowed.

    Args:
        count: Number of layers; at most about 12 in reasonable time.
        cost: Of a class; ``math.inf`` for one that is not allowed.
    """
    costs = _cost_table(count, cost)
    size = len(costs)
    best = [0.0] + [math.inf] * (size - 1)
    found: dict[int, Partition] = {}
    taken_by: list[list[int]] = []
    for number in range(1, count + 1):
        previous, best = best, [math.inf] * size
        taken = [0] * size
        for mask in range(1, size):
            if mask.bit_count() < number:
                continue
            for part in _classes_of_first(mask):
                total = costs[part] + previous[mask ^ part]
                if total < best[mask]:
                    best[mask], taken[mask] = total, part
        taken_by.append(taken)
        if best[-1] < math.inf:
            found[number] = _unwind_levels(taken_by, count)
    return found


def _cost_table(count: int, cost: ClassCost) -> list[float]:
    sets = (frozenset(i for i in range(count) if mask >> i & 1) for mask in range(1, 1 << count))
    return [0.0, *(cost(members) for members in sets)]


def _classes_of_first(mask: int) -> Iterator[int]:
    """Subsets that hold the lowest element of a set, so that each partition is met once."""
    first = mask & -mask
    rest = mask ^ first
    part = rest
    while True:
        yield part | first
        if not part:
            return
        part = (part - 1) & rest


def _unwind(taken: Sequence[int], count: int) -> Partition:
    classes, mask = [], (1 << count) - 1
    while mask:
        part = taken[mask]
        if not part:
            return ordered([i] for i in range(count))  # nothing is allowed
        classes.append([i for i in range(count) if part >> i & 1])
        mask ^= part
    return ordered(classes)


def _unwind_levels(taken_by: Sequence[Sequence[int]], count: int) -> Partition:
    classes, mask = [], (1 << count) - 1
    for taken in reversed(taken_by):
        part = taken[mask]
        classes.append([i for i in range(count) if part >> i & 1])
        mask ^= part
    return ordered(classes)


def agglomerate(
    count: int, cost: ClassCost, start: Partition | None = None
) -> dict[int, Partition]:
    """Merge the two classes that cost least to merge, again and again (a generalised Ward linkage).

    Args:
        count: Number of layers.
        cost: Of a class; ``math.inf`` for one that is not allowed.
        start: Where to begin; by default with every layer by itself.

    Returns:
        The partition for each number of classes that was passed through.
    """
    classes = list(start or ordered([i] for i in range(count)))
    found = {len(classes): ordered(classes)}
    increments: dict[tuple[Classes, Classes], float] = {}
    while len(classes) > 1:
        best, pair = math.inf, None
        for i, one in enumerate(classes):
            for other in classes[i + 1 :]:
                key = (one, other)
                if key not in increments:
                    increments[key] = cost(one | other) - cost(one) - cost(other)
                if increments[key] < best:
                    best, pair = increments[key], key
        if pair is None:
            break
        one, other = pair
        classes = [one | other if c == one else c for c in classes if c != other]
        found[len(classes)] = ordered(classes)
    return found


def refine(partition: Partition, cost: ClassCost, *, keep_count: bool = True) -> Partition:
    """Move single layers, and exchange pairs, between classes while that lowers the cost.

    Args:
        partition: Where to begin.
        cost: Of a class.
        keep_count: Whether the number of classes stays; otherwise classes may empty, and layers
            may leave for one of their own.
    """
    classes = [set(members) for members in partition]
    improved = True
    while improved:
        improved = _move_one(classes, cost, keep_count) or _exchange(classes, cost)
        classes = [members for members in classes if members]
    return ordered(classes)


def _gain(one: set[int], other: set[int], out: set[int], back: set[int], cost: ClassCost) -> float:
    before = cost(frozenset(one)) + (cost(frozenset(other)) if other else 0.0)
    left = frozenset((one - out) | back)
    after = (cost(left) if left else 0.0) + cost(frozenset((other | out) - back))
    # Rounding must not send a layer back and forth.
    return before - after if after < before - 1e-12 * abs(before) else 0.0


def _move_one(classes: list[set[int]], cost: ClassCost, keep_count: bool) -> bool:
    targets = classes if keep_count else [*classes, set()]
    best, move = 0.0, None
    for one in classes:
        if keep_count and len(one) == 1:
            continue
        for layer in sorted(one):
            for other in targets:
                if other is one or (len(one) == 1 and not other):
                    continue
                gain = _gain(one, other, {layer}, set(), cost)
                if gain > best:
                    best, move = gain, (one, layer, other)
    if move is None:
        return False
    one, layer, other = move
    if not any(other is known for known in classes):
        classes.append(other)
    one.remove(layer)
    other.add(layer)
    return True


def _exchange(classes: list[set[int]], cost: ClassCost) -> bool:
    best, move = 0.0, None
    for index, one in enumerate(classes):
        for other in classes[index + 1 :]:
            if len(one) == len(other) == 1:
                continue
            for mine in sorted(one):
                for theirs in sorted(other):
                    gain = _gain(one, other, {mine}, {theirs}, cost)
                    if gain > best:
                        best, move = gain, (one, mine, other, theirs)
    if move is None:
        return False
    one, mine, other, theirs = move
    one.symmetric_difference_update({mine, theirs})
    other.symmetric_difference_update({mine, theirs})
    return True


def color_conflicts(pairs: Mapping[tuple[int, int], float], count: int, limit: float) -> Partition:
    """Few classes in which no pair costs more than a limit: DSATUR on the graph of conflicts.

    A colouring that is proper for a smaller limit is so for a larger one, so the fewest classes
    of all limits up to the given one are taken: their number never rises with the limit.

    Args:
        pairs: Cost of each pair ``(i, j)``, i < j.
        count: Number of layers.
        limit: The most that a pair in one class may cost.
    """
    import networkx

    best = ordered([i] for i in range(count))
    for level in sorted({cost for cost in pairs.values() if cost <= limit}):
        graph: networkx.Graph[int] = networkx.Graph()
        graph.add_nodes_from(range(count))
        graph.add_edges_from(pair for pair, cost in pairs.items() if not cost <= level)
        colors = networkx.greedy_color(graph, strategy="DSATUR")
        classes: dict[int, set[int]] = {}
        for layer, color in colors.items():
            classes.setdefault(color, set()).add(layer)
        if len(classes) < len(best):
            best = ordered(classes.values())
    return best
