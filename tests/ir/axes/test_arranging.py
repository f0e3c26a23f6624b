"""Erasing commutes with arranging and making tensors, wherever the rules say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.ir.axes.commuting import Case, case, check_case

aten = torch.ops.aten

ARRANGING = [
    case("tile", 2, lambda x: x.tile(2), (3, 4)),
    case("tile-more", 3, lambda x: x.tile(2, 1, 3), (3, 4)),
    case("tile-one", 2, lambda x: x.tile(1, 3), (4, 1)),
    case("repeat-one", 3, lambda x, y: x.repeat(1, 1, 3) * y, (2, 4, 1), (2, 4, 3)),
    case("interleave-one", 2, lambda x, y: x.repeat_interleave(3, 1) * y, (4, 1), (4, 3)),
    case("view-as", 3, lambda x, y: x.view_as(y) + y, (2, 12), (2, 3, 4)),
    case("reshape-as", 3, lambda x, y: x.reshape_as(y), (2, 3, 4), (2, 12)),
    case("atleast-2d", 1, torch.atleast_2d, (4,)),
    case("atleast-3d", 2, torch.atleast_3d, (3, 4)),
    case("mH", 2, lambda x: x.mH, (3, 4)),
    case("rot90", 1, lambda x: x.rot90(1, (0, 1)), (3, 4, 2)),
    case("rot90-twice", 1, lambda x: x.rot90(2, (0, 2)), (3, 4, 2)),
    case("diagonal", 2, lambda x: x.diagonal(0, 1, 2), (2, 3, 3)),
    case("diagonal-beside", 1, lambda x: x.diagonal(1, 1, 2), (2, 3, 3)),
    case("diagonal-oblong", 0, lambda x: x.diagonal(), (3, 4)),
    case("diag-vector", 1, torch.diag, (4,)),
    case("diag-matrix", 1, torch.diag, (4, 4)),
    case("diag-embed", 2, torch.diag_embed, (3, 4)),
    case("diag-embed-in-front", 2, lambda x: torch.diag_embed(x, dim1=0, dim2=2), (3, 4)),
    case("diag-embed-beside", 1, lambda x: torch.diag_embed(x, 1), (3, 4)),
    case("diagonal-scale", 3, lambda x, s, w: x @ torch.diag(s) @ w, (2, 3), (3,), (3, 4)),
    case("trace", 0, torch.trace, (4, 4)),
    case("meshgrid", 2, lambda x, y: torch.meshgrid(x, y, indexing="ij"), (3,), (4,)),
    case(
        "meshgrid-xy", 3, lambda x, y, z: torch.meshgrid(x, y, z, indexing="xy"), (3,), (4,), (2,)
    ),
    case("broadcast-tensors", 2, lambda x, y: torch.broadcast_tensors(x, y), (3, 1), (4,)),
    case("broadcast-one", 2, lambda x, y: torch.broadcast_tensors(x, y), (3, 4), (1,)),
    case("channel-shuffle", 5, lambda x: F.channel_shuffle(x, 3), (2, 6, 2, 2)),
    case("hstack", 3, lambda x, y: torch.hstack((x, y)), (3, 4), (3, 2)),
    case("hstack-vectors", 2, lambda x, y: torch.hstack((x, y)), (3,), (4,)),
    case("vstack", 3, lambda x, y: torch.vstack((x, y)), (3, 4), (2, 4)),
    case("vstack-vectors", 1, lambda x, y: torch.vstack((x, y)), (4,), (4,)),
    case("dstack", 2, lambda x, y: torch.dstack((x, y)), (3, 4), (3, 4)),
    case("dstack-vectors", 1, lambda x, y: torch.dstack((x, y)), (4,), (4,)),
    case("column-stack", 2, lambda x, y: torch.column_stack((x, y)), (3,), (3, 4)),
    case("hsplit", 3, lambda x: torch.hsplit(x, 2), (3, 4)),
    case("vsplit", 2, lambda x: torch.vsplit(x, [1]), (4, 3)),
    case("dsplit", 4, lambda x: torch.dsplit(x, 2), (2, 3, 6)),
    case("copy", 2, lambda x, y: aten.copy(x, y), (3, 4), (4,)),
    case("pad-channels", 4, lambda x: F.pad(x, (2, 3)), (3, 4)),
    case("pad-channels-before-space", 4, lambda x: F.pad(x, (0, 0, 1, 2)), (3, 4, 5)),
    case("pad-value-joins", 3, lambda x: F.pad(x.cos(), (0, 2), value=1.0), (3, 4)),
    case("pad-both", 6, lambda x: F.pad(x, (2, 2, 2, 2), value=0.0), (3, 4)),
    case("pad-and-crop", 1, lambda x: F.pad(x, (2, -2)), (3, 4)),
    case("crop", 1, lambda x: F.pad(x, (-1, 0)), (3, 4)),
    case("pad-shortcut", 4, lambda x, y: F.pad(x, (2, 2)) + y, (3, 4), (3, 8)),
]

MADE = [
    case("empty", 2, lambda x: torch.empty_like(x).copy_(x) * 2, (3, 4)),
    case("fill", 2, lambda x: torch.fill(x, 2.0) + x, (3, 4)),
    case("new-empty-fill", 2, lambda x: x.new_empty(3, 4).fill_(0.0) + x, (3, 4)),
    case("rand", 0, lambda x: torch.rand(3, 4, dtype=torch.float64).sign() + x, (3, 4)),
    case("hann", 1, lambda x: torch.hann_window(4, dtype=torch.float64) * x, (3, 4)),
]


@pytest.mark.parametrize("op", [*ARRANGING, *MADE])
def test_erasing_commutes(op: Case) -> None:
    check_case(op)
