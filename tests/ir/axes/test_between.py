"""Ops between two layers: the units that run through are erased exactly, the rest is pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.ir.axes.between import check_between
from tests.zoo.zoo_model import images, vectors
from torchlathe.ir.axes import register_rule
from torchlathe.ir.axes.table import _table


class Columns(nn.Module):
    """``after(op(relu(before(x))))`` on vectors of 8 hidden units."""

    def __init__(self, op: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 8), nn.Linear(width, 2)
        self.op = op
        self.register_buffer("index", torch.tensor([3, 0, 1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(torch.relu(self.before(x)), self.index))


class Channels(nn.Module):
    """``after(op(relu(before(x))))`` on images of 8 channels."""

    def __init__(self, op: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 2, 1)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.op(torch.relu(self.before(x))))


BEFORE = "before.weight:0"
FREE = {BEFORE: "exact"}


def messages(x: Tensor, index: Tensor) -> Tensor:
    """Each row gets the sum of the rows that point to it, as in a graph network."""
    sent = x.index_select(0, index % x.shape[0])
    return torch.zeros_like(x).index_add(0, index % x.shape[0], sent)


def scattered(x: Tensor, index: Tensor) -> Tensor:
    """As torch_geometric does it, with an index for every channel."""
    index = (index % x.shape[0]).view(-1, 1).expand(-1, x.shape[1])
    return torch.zeros_like(x).scatter_reduce(0, index, x.gather(0, index), "amax")


COLUMNS = {
    "messages": (messages, 8, FREE, {}),
    "scattered": (scattered, 8, FREE, {}),
    "tile": (lambda x, i: x.tile(1, 2), 16, FREE, {}),
    "hstack": (lambda x, i: torch.hstack((x, x.abs())), 16, FREE, {}),
    "index-put": (lambda x, i: x.clone().index_put((i[:1] * 0,), x[:1] * 2), 8, FREE, {}),
    "masked-scatter": (
        lambda x, i: x.masked_scatter((i[:1] > 0).expand_as(x), 2 * x),
        8,
        FREE,
        {},
    ),
    "slice-scatter": (lambda x, i: x.slice_scatter(x[:, :3] * 2, 1, 4, 7), 8, {}, {}),
    "gather-columns": (
        lambda x, i: x.gather(1, i.expand(x.shape[0], 4)),
        4,
        {},
        {BEFORE: "its indices are picked by the values of a tensor"},
    ),
    "sort": (lambda x, i: x.sort(1).values, 8, {}, {BEFORE: "its order matters"}),
    "roll": (lambda x, i: x.roll(1, 1), 8, {}, {BEFORE: "its indices change places"}),
    "fft": (
        lambda x, i: torch.fft.rfft(x).abs(),
        5,
        {},
        {BEFORE: "it is transformed to frequencies"},
    ),
    "diff": (lambda x, i: x.diff(), 7, {}, {BEFORE: "its differences are taken"}),
    "masked-select": (
        lambda x, i: x + x.masked_select(x > 0).mean(),
        8,
        {},
        {BEFORE: "its values say how many indices there are"},
    ),
}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_columns(name: str) -> None:
    op, width, free, pinned = COLUMNS[name]
    options = {**vectors(3), "sizes": ((4, 0), (4, 0))}
    if name == "masked-select":
        options["dynamic_shapes"] = None
    check_between(lambda: Columns(op, width), options, free=free, pinned=pinned)


def sampled(x: Tensor) -> Tensor:
    """Read along a grid that the image itself gives."""
    places = x.mean(1).tanh()
    return F.grid_sample(x, torch.stack((places, -places), -1), align_corners=False)


@torch.library.custom_op("between::boxes", mutates_args=())
def boxes(input: Tensor, rois: Tensor) -> Tensor:
    """As ``roi_align``, with one place for each box."""
    return torch.stack([input[int(r[0]), :, int(r[1]), int(r[2])] for r in rois])[:, :, None, None]


@boxes.register_fake
def _(input: Tensor, rois: Tensor) -> Tensor:
    return input.new_empty(rois.shape[0], input.shape[1], 1, 1)


CHANNELS = {
    "unfold-fold": (lambda x: F.fold(F.unfold(x, 2), (8, 8), 2), 8),
    "unfold": (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32),
    "channel-shuffle": (lambda x: F.channel_shuffle(x, 4), 8),
    "grid-sample": (sampled, 8),
    "frequencies": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x)), 8),
    "windows": (lambda x: x.unfold(2, 2, 2).amax(-1), 8),
    "unpool": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2)), 8),
    "shortcut": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)), 16),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8),
    "rows-and-columns": (lambda x: x.triu() + x.tril(), 8),
}


@pytest.mark.parametrize("name", sorted(CHANNELS))
def test_channels(name: str) -> None:
    op, width = CHANNELS[name]
    options = {**images(), "sizes": ((2, 8), (3, 8))}
    exactness = {"channel-shuffle": {}, "grid-sample": {BEFORE: "exact-after-correction"}}
    check_between(lambda: Channels(op, width), options, free=exactness.get(name, FREE))


def test_boxes() -> None:
    register_rule("between::boxes", _table()["torchvision::roi_align"])
    rois = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 3.0]], dtype=torch.float64)
    options = {**images(), "sizes": ((2, 8), (3, 8))}
    check_between(lambda: Channels(lambda x: boxes(x, rois)), options, free=FREE)


@torch.library.custom_op("between::deform", mutates_args=())
def deform(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """A convolution as ``deform_conv2d`` names its operands."""
    return F.conv2d(input * mask.mean() * offset.mean(), weight, bias, padding=1)


@deform.register_fake
def _(input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(input, weight, bias, padding=1)


class Deformed(nn.Module):
    """The kernel reads at places that another convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.places = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 18, 1)
        self.middle, self.after = nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(x)
        y = torch.relu(self.before(x))
        return self.after(
            deform(y, self.middle.weight, places, places.sigmoid(), self.middle.bias).relu()
        )


def test_deformable_kernels() -> None:
    register_rule("between::deform", _table()["torchvision::deform_conv2d"])
    options = {**images(), "sizes": ((2, 8), (3, 8))}
    pinned = {"places.weight:0": "it says where a kernel reads"}
    free = {**FREE, "middle.weight:0": "exact"}
    check_between(Deformed, options, free=free, pinned=pinned)


class Normalised(nn.Module):
    """Weights with a norm: of rows, and of kernel positions (as in wav2vec 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.before = weight_norm(nn.Conv1d(3, 8, 3, padding=1))
        self.middle = weight_norm(nn.Conv1d(8, 8, 3, padding=1, groups=2), dim=2)
        self.after = weight_norm(nn.Conv1d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        return self.after(x + torch.relu(self.middle(x)))


def test_weight_norms_keep_the_share_of_what_is_erased() -> None:
    free = {f"before.bias:0/{i}": "exact-after-correction" for i in range(2)}
    options = {**images(spatial=1), "sizes": ((2, 8), (3, 8))}
    case = check_between(Normalised, options, free=free)
    directions = [n for n in case.program.entries if n.endswith("original1")]
    assert len(directions) == 3


class Experts(nn.Module):
    """A mixture of experts with one matrix product for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.up = nn.Parameter(torch.randn(3, 4, 12))
        self.down = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.router(x).argmax(-1)
        order = expert.argsort()
        counts = F.one_hot(expert, 3).sum(0)
        ends = counts.cumsum(0).to(torch.int32)
        gate, value = multiply(x[order], self.up, ends).chunk(2, -1)
        mixed = multiply(F.silu(gate) * value, self.down, ends)
        return torch.zeros_like(x).index_put((order,), mixed)


def multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Any:
    return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


def test_experts() -> None:
    pytest.importorskip("transformers.integrations.moe")
    pinned = {"up:0": "offsets say which rows belong to which matrix"}
    options = {**vectors(4), "sizes": ((5, 0), (7, 0))}
    check_between(Experts, options, free={"up:2/0": "exact"}, pinned=pinned)
