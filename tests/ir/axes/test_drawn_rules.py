"""Erasing commutes with ops whose dimensions, sizes and places are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ir.axes.commuting import check_op

Draw = Callable[[st.SearchStrategy[Any]], Any]
Call = tuple[Callable[..., Any], list[Any]]


def shape_of(draw: Draw, low: int = 1, high: int = 3) -> list[int]:
    return draw(st.lists(st.integers(2, 4), min_size=low, max_size=high))


def places(draw: Draw, shape: list[int], extent: int) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    found = draw(st.lists(st.integers(0, extent - 1), min_size=count, max_size=count))
    return torch.tensor(found).reshape(shape)


def gather(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    wanted = list(shape)
    wanted[dim] = draw(st.integers(1, 3))
    return lambda x, i: x.gather(dim, i), [tuple(shape), places(draw, wanted, shape[dim])]


def scatter(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    wanted = list(shape)
    wanted[dim] = draw(st.integers(1, 3))
    index = places(draw, wanted, shape[dim])
    how = draw(st.sampled_from(["sum", "amax", "mean"]))
    whole = draw(st.booleans())

    def call(x: Any, y: Any, i: Any) -> Any:
        return x.scatter_reduce(dim, i, y, how, include_self=whole)

    return call, [tuple(shape), tuple(wanted), index]


def index_add(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    wanted = list(shape)
    wanted[dim] = draw(st.integers(1, 4))
    index = places(draw, [wanted[dim]], shape[dim])
    return lambda x, y, i: x.index_add(dim, i, y), [tuple(shape), tuple(wanted), index]


def index_put(draw: Draw) -> Call:
    shape = shape_of(draw)
    chosen = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    count = draw(st.integers(1, 3))
    indices = [places(draw, [count], shape[a]) if a in chosen else None for a in range(len(shape))]
    adds = draw(st.booleans())
    values = torch.ops.aten.index(torch.randn(shape), indices)
    drop = draw(st.integers(0, values.dim()))
    held = [i for i in indices if i is not None]

    def call(x: Any, y: Any, *found: Any) -> Any:
        rest = iter(found)
        where = [None if i is None else next(rest) for i in indices]
        # Reading and writing at the same places; which of two writes wins is not told.
        read = torch.ops.aten.index(x, where)
        return torch.ops.aten.index_put(x, where, y if adds else y.mean(), adds), read

    return call, [tuple(shape), tuple(values.shape[drop:]), *held]


def roll(draw: Draw) -> Call:
    shape = shape_of(draw)
    dims = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    return lambda x: x.roll([1] * len(dims), list(dims)).flip(list(dims)), [tuple(shape)]


def tile(draw: Draw) -> Call:
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    times = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return lambda x: x.tile(times), [tuple(shape)]


def pad(draw: Draw) -> Call:
    shape = shape_of(draw, 2, 3)
    amounts = draw(st.lists(st.integers(-1, 2), min_size=2, max_size=2 * len(shape)))
    amounts = amounts[: len(amounts) // 2 * 2]
    value = draw(st.sampled_from([0.0, 1.0]))
    before = draw(st.sampled_from([torch.abs, torch.cos]))
    return lambda x: F.pad(before(x), amounts, value=value), [tuple(shape)]


def slice_scatter(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    end = draw(st.integers(start + 1, shape[dim]))
    wanted = list(shape)
    wanted[dim] = end - start
    return lambda x, y: x.slice_scatter(y, dim, start, end), [tuple(shape), tuple(wanted)]


def unfold(draw: Draw) -> Call:
    shape = shape_of(draw)
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    size, step = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return lambda x: x.unfold(dim, size, step), [tuple(shape)]


def columns(draw: Draw) -> Call:
    channels, size, kernel = (draw(st.integers(1, 3)) for _ in range(3))
    size += kernel
    options = {"padding": draw(st.integers(0, 1)), "stride": draw(st.integers(1, 2))}

    def call(x: Any) -> Any:
        found = F.unfold(x, kernel, **options)
        return found, F.fold(found, size, kernel, **options)

    return call, [(2, channels, size, size)]


def frequencies(draw: Draw) -> Call:
    shape = shape_of(draw)
    dims = draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=2, unique=True))
    return lambda x: torch.fft.rfftn(x, dim=dims).abs(), [tuple(shape)]


def tensordot(draw: Draw) -> Call:
    shape, other = shape_of(draw), shape_of(draw, 0, 2)
    pairs = draw(st.lists(st.integers(0, len(shape) - 1), max_size=len(shape), unique=True))
    second = [shape[a] for a in pairs] + other
    dims = (pairs, list(range(len(pairs))))
    return lambda x, y: torch.tensordot(x, y, dims), [tuple(shape), tuple(second)]


def kron(draw: Draw) -> Call:
    return torch.kron, [tuple(shape_of(draw, 1, 2)), tuple(shape_of(draw, 1, 2))]


def diagonal(draw: Draw) -> Call:
    shape = shape_of(draw, 2, 3)
    first, second = draw(st.permutations(range(len(shape))))[:2]
    if draw(st.booleans()):
        shape[first] = shape[second]
    offset = draw(st.sampled_from([0, 0, 1]))
    return lambda x: x.diagonal(offset, first, second), [tuple(shape)]


def weight_norm(draw: Draw) -> Call:
    shape = shape_of(draw, 2, 3)
    dim = draw(st.integers(0, len(shape) - 1))
    scale = [size if axis == dim else 1 for axis, size in enumerate(shape)]
    return lambda v, g: torch._weight_norm(v, g, dim), [tuple(shape), tuple(scale)]


OPS = [
    gather, scatter, index_add, index_put, roll, tile, pad, slice_scatter, unfold, columns,
    frequencies, tensordot, kron, diagonal, weight_norm,
]  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_erasing_commutes_for_drawn_arguments(op: Callable[[Draw], Call]) -> None:
    @settings(max_examples=8)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        function, operands = op(data.draw)
        check_op(function, *operands)

    check()
