"""Erasing commutes with every op that has a rule, wherever the rule says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.ir.axes.commuting import Case, case, check_case

aten = torch.ops.aten


INDEX = torch.tensor([[0, 3], [4, 4], [1, 0]])
POSITIVE = torch.rand(3, 4, dtype=torch.float64) + 0.5

POINTWISE = [
    case("add", 2, torch.add, (3, 4), (3, 4)),
    case("add-alpha", 2, lambda a, b: torch.add(a, b, alpha=2), (3, 4), (4,)),
    case("add-broadcast-both", 2, torch.add, (3, 1), (1, 4)),
    case("add-scalar", 2, lambda a: a + 1.5, (3, 4)),
    case("rsub", 1, lambda a: 1 - a, (4,)),
    case("mul", 3, torch.mul, (2, 3, 4), (3, 1)),
    case("div", 2, torch.div, (3, 4), POSITIVE),
    case("div-scalar", 2, lambda a: a / 3, (3, 4)),
    case("div-by-itself", 2, torch.div, (3, 4), (3, 4)),
    case("zero-times-inverse", 2, lambda a, b: a * b.reciprocal(), (3, 4), (3, 4)),
    case("zero-times-log", 1, lambda a, b: a * torch.log(b.abs()), (4,), (4,)),
    case("rdiv", 1, lambda a: 1 / a, (4,)),
    case("remainder", 2, torch.remainder, (3, 4), POSITIVE),
    case("where", 2, lambda c, a, b: torch.where(c > 0, a, b), (3, 4), (3, 4), (4,)),
    case("where-scalar", 2, lambda a: torch.where(a > 0, a, 0.0), (3, 4)),
    case("where-condition-broadcasts", 2, lambda c, a: torch.where(c > 0, a, 2.0), (3, 1), (3, 4)),
    case("masked-fill", 2, lambda a, m: a.masked_fill(m > 0, -1.0), (3, 4), (3, 4)),
    case("masked-fill-other-axis", 2, lambda a, m: a.masked_fill(m > 0, 0.0), (3, 4), (3, 1)),
    case("lerp", 2, torch.lerp, (3, 4), (3, 4), (4,)),
    case("addcmul", 2, torch.addcmul, (3, 4), (3, 4), (4,)),
    case("pow-scalar", 2, lambda a: a**3, (3, 4)),
    case("two-to-the", 2, lambda a: 2**a, (3, 4)),
    case("maximum", 2, torch.maximum, (3, 4), (4,)),
    case("max-of-two", 2, torch.max, (3, 4), (3, 4)),
    case("min-of-two", 2, torch.min, (3, 4), (4,)),
    case("compare", 2, lambda a, b: (a > b).double(), (3, 4), (4,)),
    case("logical", 2, lambda a, b: ((a > 0) & (b > 0)).double(), (3, 4), (4,)),
    case("to-dtype", 2, lambda a: a.to(torch.float32).double(), (3, 4)),
    case("type-as", 3, lambda a, b: (a.type_as(b), b * 1), (3, 4), (5,)),
    case("zero-dim", 2, torch.add, (3, 4), ()),
    case("mul-zero-dim", 2, torch.mul, (3, 4), ()),
    case("rsqrt", 2, torch.rsqrt, POSITIVE),
    case("nan-to-num", 2, torch.nan_to_num, (3, 4)),
    *(
        case(f"unary-{f.__name__}", 2, f, (3, 4))
        for f in (
            torch.neg,
            torch.abs,
            torch.sigmoid,
            torch.tanh,
            torch.exp,
            torch.cos,
            torch.sin,
            torch.relu,
            F.gelu,
            F.silu,
            F.mish,
            F.softplus,
            F.hardswish,
            F.hardsigmoid,
            F.elu,
            F.leaky_relu,
            F.logsigmoid,
            F.relu6,
            torch.erf,
            torch.expm1,
            torch.square,
            torch.sign,
            F.softsign,
            F.tanhshrink,
            F.hardtanh,
            torch.reciprocal,
        )
    ),
]

CONTRACTIONS = [
    case("linear", 3, F.linear, (2, 3), (4, 3), (4,)),
    case("linear-vector", 2, F.linear, (3,), (4, 3)),
    case("linear-rank-4", 5, F.linear, (2, 3, 2, 3), (4, 3), (4,)),
    case("mm", 3, torch.mm, (2, 3), (3, 4)),
    case("bmm", 4, torch.bmm, (2, 3, 4), (2, 4, 2)),
    case("mv", 2, torch.mv, (3, 4), (4,)),
    case("dot", 1, torch.dot, (4,), (4,)),
    case("outer", 2, torch.outer, (3,), (4,)),
    case("addmm-bias", 3, torch.addmm, (4,), (2, 3), (3, 4)),
    case("addmm-matrix", 3, torch.addmm, (2, 4), (2, 3), (3, 4)),
    case("addmm-row", 3, torch.addmm, (1, 4), (2, 3), (3, 4)),
    case("addmm-column", 3, torch.addmm, (2, 1), (2, 3), (3, 4)),
    case("addmm-scalar", 3, torch.addmm, (), (2, 3), (3, 4)),
    case("addmm-beta", 3, lambda a, b, c: torch.addmm(a, b, c, beta=2), (4,), (2, 3), (3, 4)),
    case("baddbmm", 4, torch.baddbmm, (2, 3, 2), (2, 3, 4), (2, 4, 2)),
    case("baddbmm-vector", 4, torch.baddbmm, (3,), (2, 2, 4), (2, 4, 3)),
    case("baddbmm-batch-of-one", 4, torch.baddbmm, (1, 3, 2), (2, 3, 4), (2, 4, 2)),
    case("matmul-2-2", 3, torch.matmul, (2, 3), (3, 4)),
    case("matmul-1-1", 1, torch.matmul, (3,), (3,)),
    case("matmul-2-1", 2, torch.matmul, (2, 3), (3,)),
    case("matmul-1-2", 2, torch.matmul, (3,), (3, 2)),
    case("matmul-3-1", 3, torch.matmul, (2, 4, 3), (3,)),
    case("matmul-1-3", 3, torch.matmul, (3,), (2, 3, 4)),
    case("matmul-3-2", 4, torch.matmul, (2, 3, 4), (4, 2)),
    case("matmul-2-3", 4, torch.matmul, (2, 3), (4, 3, 2)),
    case("matmul-4-4", 5, torch.matmul, (2, 3, 2, 3), (2, 3, 3, 4)),
    case("matmul-broadcast-batch", 5, torch.matmul, (2, 1, 2, 3), (1, 3, 3, 4)),
    case("matmul-4-3", 5, torch.matmul, (2, 3, 2, 3), (3, 3, 4)),
    case("conv1d", 3, F.conv1d, (2, 3, 6), (4, 3, 3), (4,)),
]

EINSUMS = [
    case(f"einsum-{equation}", free, lambda *o, e=equation: torch.einsum(e, *o), *shapes)
    for equation, free, shapes in [
        ("ij,jk->ik", 3, ((2, 3), (3, 4))),
        ("ij,jk", 3, ((2, 3), (3, 4))),
        ("ij->ji", 2, ((2, 3),)),
        ("ij->", 2, ((2, 3),)),
        ("ii->i", 1, ((3, 3),)),
        ("i,j->ij", 2, ((3,), (4,))),
        ("bhid,bhjd->bhij", 5, ((2, 2, 3, 4), (2, 2, 2, 4))),
        ("...ij,...jk->...ik", 5, ((2, 2, 2, 3), (2, 2, 3, 4))),
        ("...ij,jk->...ik", 4, ((2, 2, 3), (3, 4))),
        ("bi,bj,bk->ijk", 4, ((2, 3), (2, 2), (2, 4))),
        ("ij,ij->i", 2, ((3, 4), (3, 4))),
        ("ik,jk->k", 3, ((3, 4), (2, 4))),
    ]
]

CONVOLUTIONS = [
    case("conv2d", 3, F.conv2d, (2, 3, 5, 5), (4, 3, 3, 3), (4,)),
    case("conv2d-no-batch", 2, F.conv2d, (3, 5, 5), (4, 3, 3, 3), (4,)),
    case(
        "conv2d-stride",
        3,
        lambda x, w: F.conv2d(x, w, stride=2, padding=1, dilation=2),
        (2, 3, 7, 7),
        (4, 3, 3, 3),
    ),
    case(
        "conv2d-same",
        3,
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        (2, 3, 5, 5),
        (4, 3, 3, 3),
        (4,),
    ),
    case(
        "conv2d-groups",
        4,
        lambda x, w, b: F.conv2d(x, w, b, groups=3),
        (2, 6, 5, 5),
        (12, 2, 3, 3),
        (12,),
    ),
    case(
        "conv2d-depthwise",
        2,
        lambda x, w, b: F.conv2d(x, w, b, groups=4),
        (2, 4, 5, 5),
        (4, 1, 3, 3),
        (4,),
    ),
    case(
        "conv2d-depthwise-multiplier",
        3,
        lambda x, w, b: F.conv2d(x, w, b, groups=4),
        (2, 4, 5, 5),
        (8, 1, 3, 3),
        (8,),
    ),
    case("conv3d", 3, F.conv3d, (2, 3, 3, 3, 3), (2, 3, 2, 2, 2), (2,)),
    case("conv-transpose1d", 3, F.conv_transpose1d, (2, 3, 5), (3, 4, 3), (4,)),
    case(
        "conv-transpose2d",
        3,
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        (2, 3, 4, 4),
        (3, 4, 2, 2),
        (4,),
    ),
    case(
        "conv-transpose2d-groups",
        4,
        lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3),
        (2, 6, 4, 4),
        (6, 2, 2, 2),
        (6,),
    ),
    case(
        "conv-transpose2d-depthwise",
        2,
        lambda x, w: F.conv_transpose2d(x, w, groups=4),
        (2, 4, 4, 4),
        (4, 1, 2, 2),
    ),
    case(
        "convolution",
        4,
        lambda x, w: aten.convolution(x, w, None, [1], [0], [1], True, [0], 2),
        (2, 6, 5),
        (6, 2, 3),
    ),
]


def attention(**options: Any) -> Callable[..., Any]:
    def call(q: Any, k: Any, v: Any, *mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, *mask, **options)

    return call


ATTENTION = [
    case("sdpa", 6, attention(), (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4)),
    case("sdpa-scale", 6, attention(scale=0.3), (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4)),
    case("sdpa-causal", 4, attention(is_causal=True), (2, 3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 2)),
    case("sdpa-mask", 6, attention(), (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4), (3, 4, 5)),
    case("sdpa-rank-3", 5, attention(), (2, 4, 6), (2, 5, 6), (2, 5, 4)),
    case("sdpa-gqa", 7, attention(enable_gqa=True), (2, 6, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4)),
    case("sdpa-gqa-same", 6, attention(enable_gqa=True), (2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 4)),
    case("sdpa-gqa-one", 6, attention(enable_gqa=True), (2, 4, 4, 6), (2, 1, 5, 6), (2, 1, 5, 4)),
    case("sdpa-broadcast-keys", 6, attention(), (2, 3, 4, 6), (2, 1, 5, 6), (2, 1, 5, 4)),
]

NORMS = [
    case("layer-norm", 2, lambda x, w, b: F.layer_norm(x, (6,), w, b), (3, 6), (6,), (6,)),
    case("layer-norm-eps", 2, lambda x, w, b: F.layer_norm(x, (6,), w, b, 0.1), (3, 6), (6,), (6,)),
    case("layer-norm-plain", 2, lambda x: F.layer_norm(x, (6,)), (3, 6)),
    case("layer-norm-no-bias", 2, lambda x, w: F.layer_norm(x, (6,), w), (3, 6), (6,)),
    case(
        "layer-norm-two-axes",
        3,
        lambda x, w, b: F.layer_norm(x, (4, 3), w, b),
        (2, 4, 3),
        (4, 3),
        (4, 3),
    ),
    case("rms-norm", 2, lambda x, w: F.rms_norm(x, (6,), w, 1e-3), (3, 6), (6,)),
    case("rms-norm-default-eps", 2, lambda x, w: F.rms_norm(x, (6,), w), (3, 6), (6,)),
    case("rms-norm-plain", 2, lambda x: F.rms_norm(x, (6,), None, 1e-3), (3, 6)),
    case("rms-norm-two-axes", 3, lambda x, w: F.rms_norm(x, (4, 3), w, 1e-3), (2, 4, 3), (4, 3)),
    case(
        "rms-norm-shared-weight",
        2,
        lambda x, w: (F.rms_norm(x, (6,), w, 1e-3), x * w),
        (3, 6),
        (6,),
    ),
    case(
        "batch-norm",
        4,
        lambda x, m, v, w, b: F.batch_norm(x, m.detach(), v.detach().abs() + 1, w, b),
        (2, 3, 4, 2),
        (3,),
        (3,),
        (3,),
        (3,),
    ),
    case(
        "batch-norm-plain",
        2,
        lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().abs() + 1),
        (2, 3),
        (3,),
        (3,),
    ),
    case(
        "batch-norm-statistics",
        3,
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        (4, 3, 2),
        (3,),
        (3,),
    ),
    case("group-norm", 3, lambda x, w, b: F.group_norm(x, 3, w, b), (2, 6, 4), (6,), (6,)),
    case("group-norm-plain", 3, lambda x: F.group_norm(x, 3), (2, 6, 4)),
    case("group-norm-one-each", 2, lambda x, w, b: F.group_norm(x, 6, w, b), (2, 6, 4), (6,), (6,)),
    case("group-norm-all", 2, lambda x, w, b: F.group_norm(x, 1, w, b), (2, 6, 4), (6,), (6,)),
    case("normalize", 2, lambda x: F.normalize(x, dim=-1), (3, 4)),
    case("softmax", 2, lambda x: x.softmax(-1), (3, 4)),
    case("log-softmax", 2, lambda x: x.log_softmax(0), (3, 4)),
    case("cumsum", 2, lambda x: x.cumsum(-1), (3, 4)),
]

REDUCTIONS = [
    case("sum-all", 2, torch.sum, (3, 4)),
    case("sum", 3, lambda x: x.sum(1), (3, 4, 2)),
    case("sum-keepdim", 3, lambda x: x.sum((-1, 0), keepdim=True), (3, 4, 2)),
    case("mean-all", 2, torch.mean, (3, 4)),
    case("mean", 3, lambda x: x.mean(-1), (3, 4, 2)),
    case("mean-keepdim", 3, lambda x: x.mean((0, 2), keepdim=True), (3, 4, 2)),
    *(
        case(
            f"{f.__name__}-{correction}",
            2,
            lambda x, f=f, c=correction: f(x, dim=-1, correction=c),
            (3, 6),
        )
        for f in (torch.var_mean, torch.var, torch.std)
        for correction in (0, 1, 2)
    ),
    case("var-mean-default", 2, lambda x: torch.var_mean(x, -1), (3, 6)),
    case(
        "var-mean-keepdim",
        3,
        lambda x: torch.var_mean(x, (0, 2), correction=1, keepdim=True),
        (3, 2, 4),
    ),
    case("var-mean-all", 2, lambda x: torch.var_mean(x, correction=1), (3, 4)),
    case("var-mean-only-var", 2, lambda x: torch.var_mean(x, -1, correction=0)[0], (3, 6)),
    *(
        case(f"norm-{order}", 2, lambda x, o=order: torch.linalg.vector_norm(x, o, dim=-1), (3, 4))
        for order in (1, 2, 3.5, 0, float("inf"), -1, float("-inf"))
    ),
    case("frobenius", 2, lambda x: x.norm(dim=-1, keepdim=True), (3, 4)),
    case("amax", 2, lambda x: x.amax(-1), (3, 4)),
    case("amin-keepdim", 2, lambda x: x.amin(0, keepdim=True), (3, 4)),
    case("max-with-indices", 1, lambda x: x.max(-1), (3, 4)),
    case("max-without-indices", 2, lambda x: x.max(-1).values, (3, 4)),
    case("max-all", 2, lambda x: x.max(), (3, 4)),
    case("argmax", 1, lambda x: x.argmax(-1), (3, 4)),
    case("prod", 2, lambda x: x.prod(-1), (3, 4)),
    case("logsumexp", 2, lambda x: x.logsumexp(-1), (3, 4)),
    case("any", 2, lambda x: (x > 0).any(-1), (3, 4)),
    case("all", 2, lambda x: (x > 0).all(-1), (3, 4)),
    case("std-mean", 2, lambda x: torch.std_mean(x, -1), (3, 4)),
    case("median", 2, lambda x: x.median(-1).values, (3, 4)),
]

SHAPES = [
    case("view-split", 3, lambda x: x.view(2, 3, 4), (2, 12)),
    case("view-merge", 3, lambda x: x.reshape(2, 12), (2, 3, 4)),
    case("view-infer", 3, lambda x: x.view(2, -1, 4), (2, 12)),
    case("view-regroup", 3, lambda x: x.reshape(2, 12), (6, 4)),
    case("view-through", 0, lambda x: x.reshape(4, 6), (6, 4)),
    case("view-dtype", 0, lambda x: x.view(torch.int64).view(torch.float64), (3, 4)),
    case("flatten", 3, lambda x: x.flatten(1), (2, 3, 4)),
    case("unflatten", 3, lambda x: x.unflatten(1, (3, -1)), (2, 12)),
    case("unflatten-first", 2, lambda x: x.unflatten(-1, (3, 4)), (12,)),
    case("permute", 3, lambda x: x.permute(2, -3, 1), (2, 3, 4)),
    case("transpose", 3, lambda x: x.transpose(-1, 0), (2, 3, 4)),
    case("swapaxes", 3, lambda x: x.swapaxes(-1, 0), (2, 3, 4)),
    case("swapdims", 3, lambda x: x.swapdims(1, 0), (2, 3, 4)),
    case("movedim", 3, lambda x: x.movedim(0, -1), (2, 3, 4)),
    case("moveaxis", 4, lambda x: x.moveaxis((0, 1), (2, 0)), (2, 3, 4, 2)),
    case("t", 2, torch.t, (3, 4)),
    case("t-vector", 1, torch.t, (3,)),
    case("T", 2, lambda x: x.T, (3, 4)),
    case("mT", 3, lambda x: x.mT, (2, 3, 4)),
    case("unsqueeze", 2, lambda x: x.unsqueeze(-2), (3, 4)),
    case("squeeze", 2, lambda x: x.squeeze(), (3, 1, 4)),
    case("squeeze-dim", 2, lambda x: x.squeeze(1), (3, 1, 4)),
    case("squeeze-nothing", 2, lambda x: x.squeeze(0), (3, 4)),
    case("squeeze-dims", 2, lambda x: x.squeeze((0, -1)), (3, 4, 1)),
    case("expand", 3, lambda x: x.expand(2, 3, 4), (3, 4)),
    case("expand-one", 2, lambda x: x.expand(3, 4), (3, 1)),
    case("expand-keep", 2, lambda x: x.expand(-1, 4), (3, 1)),
    case("expand-as", 2, lambda x, y: x.expand_as(y) + y, (3, 1), (3, 4)),
    case("repeat", 3, lambda x: x.repeat(2, 1, 3), (3, 4)),
    case("repeat-interleave", 2, lambda x: x.repeat_interleave(2, -1), (3, 4)),
    case(
        "repeat-interleave-size",
        2,
        lambda x: x.repeat_interleave(2, dim=1, output_size=8),
        (3, 4),
    ),
    case("kv-repeat", 4, lambda k: k[:, None].expand(3, 2, 4, 5).reshape(6, 4, 5), (3, 4, 5)),
]

CUTTING = [
    case("slice", 3, lambda x: x[:, 1:4], (3, 6)),
    case("slice-negative", 2, lambda x: x[:, -4:], (3, 4)),
    case("slice-negative-bounds", 4, lambda x: x[:, -5:-2], (3, 8)),
    case("slice-step", 2, lambda x: x[:, ::2], (3, 8)),
    case("slice-step-offset", 3, lambda x: x[:, 2:8:3], (3, 8)),
    case("slice-step-uneven", 1, lambda x: x[:, ::2], (3, 5)),
    case("slice-beyond", 2, lambda x: x[:, :100], (3, 4)),
    case("slice-empty", 2, lambda x: x[:, 4:4], (3, 4)),
    case("slice-empty-inside", 2, lambda x: x[:, 2:2], (3, 4)),
    case("slice-rows", 2, lambda x: x[1:], (4, 3)),
    case("slice-twice", 4, lambda x: (x[:, :4], x[:, 2:]), (3, 6)),
    case("rotary", 2, lambda x, y: torch.cat((-x[:, 3:], x[:, :3]), -1) * y + x, (4, 6), (4, 6)),
    case("select", 1, lambda x: x[:, -1], (3, 4)),
    case("split", 4, lambda x: x.split(2, 1), (3, 6)),
    case("split-uneven", 3, lambda x: x.split(4, 1), (3, 6)),
    case("split-sizes", 3, lambda x: x.split([1, 3, 2], -1), (3, 6)),
    case("chunk", 3, lambda x: x.chunk(2, -1), (3, 8)),
    case("chunk-gated", 2, lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, -1)), (3, 8)),
    case("chunk-uneven", 4, lambda x: x.chunk(3, 0), (8, 3)),
    case("tensor-split", 4, lambda x: torch.tensor_split(x, 3, 0), (8, 3)),
    case("tensor-split-at", 4, lambda x: torch.tensor_split(x, (2, 6), 0)[1:], (8, 3)),
    case("unbind", 1, lambda x: x.unbind(1), (3, 4)),
    case("qkv", 3, lambda x: x.view(2, 3, 2, 4).permute(1, 0, 2, 3).unbind(0), (2, 24)),
    case("cat", 3, lambda x, y: torch.cat([x, y], 1), (3, 4), (3, 2)),
    case("cat-negative", 4, lambda x, y, z: torch.cat([x, y, z], -1), (3, 4), (3, 2), (3, 2)),
    case("cat-same", 2, lambda x: torch.cat([x, x], 1), (3, 4)),
    case("cat-rows", 3, lambda x, y: torch.cat([x, y]), (3, 4), (2, 4)),
    case("stack", 2, lambda x, y: torch.stack([x, y], -1), (3, 4), (3, 4)),
    case("index", 2, lambda x: x[torch.tensor([0, 2, 2])], (3, 4)),
    case("index-middle", 3, lambda x: x[:, torch.tensor([0, 2]), :], (3, 4, 2)),
    case("index-pair", 2, lambda x: x[:, torch.tensor([0, 2]), torch.tensor([1, 1])], (3, 4, 2)),
    case("index-apart", 2, lambda x: x[torch.tensor([0, 2]), :, torch.tensor([1, 1])], (3, 4, 2)),
    case("pad", 3, lambda x: F.pad(x, (1, 2)), (3, 4)),
    case("pad-value", 3, lambda x: F.pad(x, (1, 2), value=1.0), (3, 4)),
    case("pad-of-constant", 3, lambda x: F.pad(x.sigmoid(), (1, 2)), (3, 4)),
    case("pad-same-constant", 3, lambda x: F.pad(x.cos(), (1, 2), value=1.0), (3, 4)),
    case("pad-reflect", 2, lambda x: F.pad(x, (1, 2), mode="reflect"), (3, 2, 4)),
    case("roll", 1, lambda x: x.roll(1, -1), (3, 4)),
    case("flip", 1, lambda x: x.flip(0), (3, 4)),
    case("sort", 1, lambda x: x.sort(-1), (3, 4)),
    case("topk", 1, lambda x: x.topk(2), (3, 4)),
    case("argsort", 1, lambda x: x.argsort(-1), (3, 4)),
    case("tril", 0, torch.tril, (3, 4)),
]

POSITIONS = [
    case("max-pool", 2, lambda x: F.max_pool2d(x, 2), (2, 3, 4, 4)),
    case("max-pool-indices", 2, lambda x: F.max_pool2d(x, 2, return_indices=True), (2, 3, 4, 4)),
    case("avg-pool", 2, lambda x: F.avg_pool2d(x, 3, 1, 1), (2, 3, 4, 4)),
    case("avg-pool-of-constant", 2, lambda x: F.avg_pool2d(x.cos(), 3, 1, 1), (2, 3, 4, 4)),
    case("max-pool-of-constant", 2, lambda x: F.max_pool2d(x.cos(), 3, 1, 1), (2, 3, 4, 4)),
    case("adaptive-pool", 2, lambda x: F.adaptive_avg_pool2d(x, 1), (2, 3, 4, 4)),
    case("adaptive-max-pool", 2, lambda x: F.adaptive_max_pool2d(x, 2), (2, 3, 4, 4)),
    case("adaptive-pool-1d", 2, lambda x: F.adaptive_avg_pool1d(x, 2), (2, 3, 4)),
    case("upsample", 2, lambda x: F.interpolate(x, scale_factor=2), (2, 3, 4, 4)),
    case(
        "upsample-bilinear",
        2,
        lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=False),
        (2, 3, 4, 4),
    ),
    case("pixel-shuffle", 2, lambda x: F.pixel_shuffle(x, 2), (2, 12, 3, 3)),
    case("pixel-unshuffle", 2, lambda x: F.pixel_unshuffle(x, 2), (2, 3, 4, 4)),
]

OTHERS = [
    case("embedding", 3, lambda i, w: F.embedding(i, w), INDEX, (5, 4)),
    case("embedding-padding", 3, lambda i, w: F.embedding(i, w, padding_idx=0), INDEX, (5, 4)),
    case("zeros", 2, lambda x: torch.zeros(3, 4, dtype=torch.float64) + x, (3, 4)),
    case("ones", 2, lambda x: torch.ones(3, 4, dtype=torch.float64) * x, (3, 4)),
    case("full", 2, lambda x: torch.full((3, 4), 2.0, dtype=torch.float64) + x, (3, 4)),
    case("new-zeros", 2, lambda x: x.new_zeros(3, 4) + x, (3, 4)),
    case("full-like", 2, lambda x: torch.full_like(x, 3) + x, (3, 4)),
    case("arange", 1, lambda x: torch.arange(4) + x, (3, 4)),
    case("fresh-zeros", 2, lambda x: torch.zeros(3, 4, dtype=torch.float64) + x[:1, :1], (1, 1)),
    case(
        "squeeze-excite",
        5,
        lambda x, a, b: (
            x * F.linear(F.linear(x.mean((2, 3)), a).relu(), b).sigmoid()[:, :, None, None]
        ),
        (2, 4, 3, 3),
        (2, 4),
        (4, 2),
    ),
]

TABLE = [
    *POINTWISE, *CONTRACTIONS, *EINSUMS, *CONVOLUTIONS, *ATTENTION, *NORMS, *REDUCTIONS,
    *SHAPES, *CUTTING, *POSITIONS, *OTHERS,
]  # fmt: skip


@pytest.mark.parametrize("op", TABLE)
def test_erasing_commutes(op: Case) -> None:
    check_case(op)
