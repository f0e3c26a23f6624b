"""Erasing commutes with further products and norms, wherever the rules say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ir.axes.commuting import Case, case, check_case

aten = torch.ops.aten

PRODUCTS = [
    case(
        "tensordot", 4, lambda x, y: torch.tensordot(x, y, ([2, 0], [0, 1])), (2, 3, 4), (4, 2, 5)
    ),
    case("tensordot-all", 2, lambda x, y: torch.tensordot(x, y, 2), (3, 4), (3, 4)),
    case("tensordot-none", 2, lambda x, y: torch.tensordot(x, y, 0), (3,), (4,)),
    case("inner", 4, torch.inner, (2, 3, 4), (5, 4)),
    case("inner-vectors", 1, torch.inner, (4,), (4,)),
    case("kron", 4, torch.kron, (2, 3), (3, 2)),
    case("kron-ranks", 3, torch.kron, (3,), (2, 2)),
    case("kron-linear", 5, lambda x, a, b: F.linear(x, torch.kron(a, b)), (2, 6), (2, 3), (3, 2)),
    case("bilinear", 4, F.bilinear, (2, 3), (2, 4), (5, 3, 4), (5,)),
    case("addmv", 2, torch.addmv, (3,), (3, 4), (4,)),
    case("addr", 2, torch.addr, (3, 4), (3,), (4,)),
    case("addbmm", 4, torch.addbmm, (3, 2), (2, 3, 4), (2, 4, 2)),
    case("vdot", 1, torch.vdot, (4,), (4,)),
    case("cosine", 2, lambda x, y: F.cosine_similarity(x, y, dim=1), (3, 4), (3, 4)),
    case(
        "cosine-broadcast",
        3,
        lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1),
        (3, 4),
        (5, 4),
    ),
    case("vecdot", 2, lambda x, y: torch.linalg.vecdot(x, y), (3, 4), (3, 4)),
    case("cross", 1, lambda x, y: torch.linalg.cross(x, y), (4, 3), (4, 3)),
    case("cdist", 4, torch.cdist, (2, 3, 4), (2, 5, 4)),
    case("cdist-one", 3, lambda x, y: torch.cdist(x, y, p=1.0), (3, 4), (5, 4)),
    case("pairwise", 2, F.pairwise_distance, (3, 4), (3, 4)),
    case("pdist", 1, F.pdist, (3, 4)),
    case("renorm", 2, lambda x: x.renorm(2, 0, 0.5), (3, 4)),
    case("weight-norm", 2, lambda v, g: torch._weight_norm(v, g, 0), (3, 4), (3, 1)),
    case("weight-norm-last", 3, lambda v, g: torch._weight_norm(v, g, 2), (3, 4, 2), (1, 1, 2)),
    case("weight-norm-all", 2, lambda v, g: torch._weight_norm(v, g, -1), (3, 4), ()),
    case("weight-norm-shared", 2, lambda v, g: torch._weight_norm(v, g, 0) + v, (3, 4), (3, 1)),
    case(
        "weight-norm-linear",
        3,
        lambda x, v, g: F.linear(x, torch._weight_norm(v, g, 0)),
        (2, 4),
        (3, 4),
        (3, 1),
    ),
]


@pytest.mark.parametrize("op", [*PRODUCTS])
def test_erasing_commutes(op: Case) -> None:
    check_case(op)
