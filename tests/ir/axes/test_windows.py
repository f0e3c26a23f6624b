"""Erasing commutes with windows and frequencies, wherever the rules say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ir.axes.commuting import Case, case, check_case

aten = torch.ops.aten


def real(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Complex results as two real ones, which comparisons and casts can take."""
    return lambda *x: torch.view_as_real(function(*x))


WINDOWS = [
    case("unfold", 2, lambda x: x.unfold(1, 3, 2), (3, 7, 2)),
    case("im2col", 2, lambda x: F.unfold(x, 2), (2, 3, 4, 4)),
    case("im2col-padded", 2, lambda x: F.unfold(x, 3, padding=1), (2, 3, 4, 4)),
    case("im2col-no-batch", 1, lambda x: F.unfold(x, 2), (3, 4, 4)),
    case("col2im", 2, lambda x: F.fold(x, 4, 2), (2, 12, 9)),
    case("unfold-fold", 2, lambda x: F.fold(F.unfold(x, 2), 4, 2), (2, 3, 4, 4)),
    case(
        "grid-sample",
        2,
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        (2, 3, 4, 4),
        (2, 2, 3, 2),
    ),
    case(
        "grid-sample-3d",
        2,
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        (2, 3, 2, 2, 2),
        (2, 2, 3, 1, 3),
    ),
    case(
        "grid-sample-border",
        2,
        lambda x, g: F.grid_sample(x.cos(), g, padding_mode="border", align_corners=False),
        (2, 3, 4, 4),
        (2, 2, 3, 2),
    ),
    case(
        "affine-grid", 0, lambda t: F.affine_grid(t, [2, 3, 4, 4], align_corners=False), (2, 2, 3)
    ),
    case(
        "upsample-linear", 2, lambda x: F.interpolate(x, scale_factor=2, mode="linear"), (2, 3, 4)
    ),
    case("upsample-nearest3d", 2, lambda x: F.interpolate(x, scale_factor=2), (2, 3, 2, 2, 2)),
    case(
        "upsample-exact",
        2,
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        (2, 3, 4),
    ),
    case("max-pool1d-indices", 2, lambda x: F.max_pool1d(x, 2, return_indices=True), (2, 3, 4)),
    case(
        "adaptive-max1d", 2, lambda x: F.adaptive_max_pool1d(x, 2, return_indices=True), (2, 3, 4)
    ),
    case("adaptive-max3d", 2, lambda x: F.adaptive_max_pool3d(x, 1), (2, 3, 2, 2, 2)),
    case("lp-pool", 2, lambda x: F.lp_pool2d(x, 2, 2), (2, 3, 4, 4)),
    case(
        "max-unpool",
        2,
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2)),
        (2, 3, 4, 4),
    ),
    case(
        "fractional",
        0,
        lambda x, i: F.fractional_max_pool2d(x, 2, 2, _random_samples=(i / 4.0).double()),
        (2, 3, 4, 4),
        torch.ones(2, 3, 2, dtype=torch.int64),
    ),
    case("diff", 1, lambda x: x.diff(), (3, 4)),
    case("diff-twice", 1, lambda x: x.diff(2, 0), (4, 3)),
    case("diff-prepend", 1, lambda x, y: x.diff(dim=1, prepend=y), (3, 4), (3, 2)),
    case("fliplr", 1, torch.fliplr, (3, 4)),
    case("tril-batch", 2, torch.tril, (2, 3, 4, 4)),
    case("triu-of-constant", 2, lambda x: torch.triu(x.cos()), (2, 3, 4, 4)),
    case("msort", 1, torch.msort, (3, 4)),
    case("logcumsumexp", 2, lambda x: x.logcumsumexp(1), (3, 4)),
    case("kthvalue", 2, lambda x: x.kthvalue(2, 1).values, (3, 4)),
    case("aminmax", 2, lambda x: x.aminmax(dim=1), (3, 4)),
    case("count-nonzero", 2, lambda x: x.count_nonzero(1), (3, 4)),
    case("matrix-norm", 3, lambda x: torch.linalg.matrix_norm(x), (2, 3, 4)),
    case("norm-two", 1, lambda x: torch.linalg.norm(x, dim=0), (4,)),
    case("inverse", 1, lambda x: torch.linalg.inv(x + 4 * torch.eye(3)), (2, 3, 3)),
    case("svd", 1, lambda x: torch.linalg.svdvals(x), (2, 3, 4)),
    case("as-strided", 0, lambda x: x.as_strided((2, 2), (1, 2)), (3, 4)),
    case("nonzero", 0, lambda x: x.nonzero().sum(), (3, 4)),
]

FOURIER = [
    case("fft", 1, real(torch.fft.fft), (3, 4)),
    case("fft-first", 1, real(lambda x: torch.fft.fft(x, dim=0)), (3, 4)),
    case("rfft", 2, real(torch.fft.rfft), (3, 2, 4)),
    case("irfft", 2, lambda x: torch.fft.irfft(torch.fft.rfft(x), n=4), (3, 2, 4)),
    case("rfft2", 2, lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), (3, 2, 4, 4)),
    case(
        "rfft2-channels-last",
        2,
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x, dim=(1, 2)), dim=(1, 2)),
        (3, 4, 4, 2),
    ),
    case("fftn", 0, real(torch.fft.fftn), (3, 4)),
    case("fftn-sizes", 1, real(lambda x: torch.fft.fftn(x, s=(4,))), (3, 4)),
    case("fftshift", 0, torch.fft.fftshift, (3, 4)),
    case("fftshift-last", 1, lambda x: torch.fft.fftshift(x, dim=-1), (3, 4)),
    case(
        "fourier-mixing",
        1,
        lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
        (2, 3, 4),
    ),
    case(
        "global-filter",
        2,
        lambda x, w: torch.fft.irfft2(
            torch.fft.rfft2(x, dim=(1, 2)) * torch.view_as_complex(w), dim=(1, 2)
        ),
        (2, 4, 4, 3),
        (4, 3, 3, 2),
    ),
    case("stft", 1, lambda x: torch.stft(x, 4, return_complex=True).abs(), (2, 16)),
    case(
        "istft",
        1,
        lambda x: torch.istft(
            torch.stft(x, 4, window=torch.ones(4, dtype=torch.float64), return_complex=True),
            4,
            window=torch.ones(4, dtype=torch.float64),
        ),
        (2, 16),
    ),
    case(
        "rotary-complex",
        2,
        lambda x, f: torch.view_as_real(
            torch.view_as_complex(x) * torch.polar(torch.ones_like(f), f)
        ).flatten(1),
        (3, 4, 2),
        (3, 4),
    ),
    case(
        "complex", 2, lambda x, y: (torch.complex(x, y) * torch.complex(y, x)).imag, (3, 4), (3, 4)
    ),
    case("conjugate", 2, lambda x, y: torch.complex(x, y).conj().abs(), (3, 4), (3, 4)),
    case("angle", 2, lambda x, y: torch.complex(x, y).angle(), (3, 4), (3, 4)),
]


@pytest.mark.parametrize("op", [*WINDOWS, *FOURIER])
def test_erasing_commutes(op: Case) -> None:
    check_case(op)
