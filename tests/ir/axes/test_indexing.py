"""Erasing commutes with reading and writing at places, wherever the rules say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ir.axes.commuting import Case, case, check_case

aten = torch.ops.aten

INDEX = torch.tensor([[0, 3], [2, 2], [1, 0]])
VECTOR = torch.tensor([2, 0, 1])
MASK = torch.tensor([True, False, True])
POSITIVE = torch.rand(3, 4, dtype=torch.float64) + 0.5


def wide(index: Tensor, channels: int) -> Tensor:
    """An index that is the same for all channels, as models write it."""
    return index.unsqueeze(-1).expand(-1, -1, channels)


INDEXING = [
    case("index-mask", 1, lambda x, m: x[m].sum(0), (3, 4), MASK),
    case("index-mask-middle", 2, lambda x, m: x[:, m].sum(1), (2, 3, 4), MASK),
    case("index-mask-matrix", 1, lambda x, m: x[m > 0].sum(0), (2, 3, 4), torch.eye(2, 3)),
    case("index-select", 2, lambda x, i: x.index_select(0, i), (3, 4), VECTOR),
    case("index-select-last", 2, lambda x, i: x.index_select(-1, i), (3, 4), VECTOR),
    case("gather", 2, lambda x, i: x.gather(1, i), (3, 4), INDEX),
    case("gather-fewer", 1, lambda x, i: x.gather(1, i), (5, 4), INDEX),
    case("gather-expanded", 3, lambda x, i: x.gather(1, wide(i, 5)), (3, 4, 5), INDEX),
    case(
        "gather-repeated",
        3,
        lambda x, i: x.gather(1, i.unsqueeze(-1).repeat(1, 1, 5)),
        (3, 4, 5),
        INDEX,
    ),
    case("take-along-dim", 2, lambda x, i: x.take_along_dim(i, 1), (3, 4), INDEX),
    case(
        "take-along-broadcast", 3, lambda x, i: x.take_along_dim(i[:, :, None], 1), (3, 4, 5), INDEX
    ),
    case("take-along-flat", 0, lambda x, i: x.take_along_dim(i), (3, 4), VECTOR),
    case("take", 2, lambda x, i: x.take(i), (3, 4), INDEX),
    case("embedding-bag", 1, lambda i, w: F.embedding_bag(i, w), INDEX, (5, 4)),
    case("embedding-bag-max", 1, lambda i, w: F.embedding_bag(i, w, mode="max"), INDEX, (5, 4)),
    case("one-hot", 2, lambda i: F.one_hot(i, 5), INDEX),
    case("bucketize", 2, lambda x, b: torch.bucketize(x, b.sort().values), (3, 4), (5,)),
    case("searchsorted", 1, lambda b, x: torch.searchsorted(b.sort(-1).values, x), (3, 4), (3, 2)),
    case("isin", 2, lambda x, y: torch.isin(x, y).double(), (3, 4), (5,)),
]

SCATTERING = [
    case("scatter", 1, lambda x, i, y: x.scatter(1, i, y), (3, 4), INDEX, (3, 2)),
    case("scatter-value", 1, lambda x, i: x.scatter(1, i, 0.0), (3, 4), INDEX),
    case("scatter-one", 1, lambda x, i: x.cos().scatter(1, i, 1.0), (3, 4), INDEX),
    case("scatter-add", 1, lambda x, i, y: x.scatter_add(1, i, y), (3, 4), INDEX, (3, 2)),
    case(
        "scatter-expanded",
        2,
        lambda x, i, y: x.scatter(1, wide(i, 5), y),
        (3, 4, 5),
        INDEX,
        (3, 2, 5),
    ),
    *(
        case(
            f"scatter-reduce-{how}",
            1,
            lambda x, i, y, h=how: x.scatter_reduce(1, i, y, h),
            (3, 4),
            INDEX,
            (3, 2),
        )
        for how in ("sum", "prod", "mean", "amax", "amin")
    ),
    case("scatter-fewer", 0, lambda x, i, y: x.scatter(1, i, y), (5, 4), INDEX, (4, 3)),
    case("index-add", 1, lambda x, i, y: x.index_add(0, i, y), (5, 4), VECTOR, (3, 4)),
    case(
        "messages",
        2,
        lambda x, w, i: torch.zeros(3, 4, dtype=torch.float64).index_add(
            0, i, F.linear(x, w).index_select(0, i)
        ),
        (3, 5),
        (4, 5),
        VECTOR,
    ),
    case("index-copy", 1, lambda x, i, y: x.index_copy(0, i, y), (5, 4), VECTOR, (3, 4)),
    case("index-fill", 1, lambda x, i: x.index_fill(0, i, 0.0), (5, 4), VECTOR),
    case(
        "index-reduce", 1, lambda x, i, y: x.index_reduce(0, i, y, "amax"), (5, 4), VECTOR, (3, 4)
    ),
    case("index-put", 1, lambda x, i, y: x.index_put((i,), y), (5, 4), VECTOR, (3, 4)),
    case("index-put-row", 1, lambda x, i, y: x.index_put((i,), y), (5, 4), VECTOR, (4,)),
    case("index-put-scalar", 1, lambda x, i, y: x.index_put((i,), y), (5, 4), VECTOR, ()),
    case(
        "index-put-add",
        2,
        lambda x, i, y: aten.index_put(x, [None, i, None], y, True),
        (2, 5, 4),
        VECTOR,
        (2, 3, 4),
    ),
    case(
        "index-put-apart",
        1,
        lambda x, i, y: aten.index_put(x, [i, None, i], y),
        (3, 4, 3),
        VECTOR,
        (3, 4),
    ),
    case("index-put-mask", 1, lambda x, m, y: x.index_put((m,), y), (3, 4), MASK, (4,)),
    case(
        "masked-scatter", 1, lambda x, m, y: x.masked_scatter(m[:, None], y), (3, 4), MASK, (2, 4)
    ),
    case(
        "masked-scatter-expanded",
        1,
        lambda x, m, y: x.masked_scatter(m[:, None].expand_as(x), y),
        (3, 4),
        MASK,
        (2, 4),
    ),
    case(
        "masked-scatter-any",
        0,
        lambda x, m, y: x.masked_scatter(m > 0, y),
        (3, 4),
        torch.eye(3, 4),
        (3, 4),
    ),
    case("slice-scatter", 3, lambda x, y: x.slice_scatter(y, 1, 1, 4), (3, 6), (3, 3)),
    case("slice-scatter-end", 3, lambda x, y: x.slice_scatter(y, 1, -2), (3, 6), (3, 2)),
    case("slice-scatter-all", 2, lambda x, y: x.slice_scatter(y, 1), (3, 6), (3, 6)),
    case("slice-scatter-step", 1, lambda x, y: x.slice_scatter(y, 1, 0, 6, 2), (3, 6), (3, 3)),
    case("select-scatter", 1, lambda x, y: x.select_scatter(y, 1, -1), (3, 4), (3,)),
    case("diagonal-scatter", 1, lambda x, y: x.diagonal_scatter(y, 0, 1, 2), (2, 3, 4), (2, 3)),
]


@pytest.mark.parametrize("op", [*INDEXING, *SCATTERING])
def test_erasing_commutes(op: Case) -> None:
    check_case(op)
