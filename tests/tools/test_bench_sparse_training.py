"""The benchmark of sparse training: its page, and rows of other numbers of steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import torchlathe as tl
from torchlathe.optim import HESSO
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.tools.bench.bench_sparse_training import RESULTS, _is_current
from torchlathe.tools.bench.markdown import MARK
from torchlathe.tools.bench.quality.nets import digits
from torchlathe.tools.bench.sparse_training.resnet import ResNet18
from torchlathe.tools.bench.sparse_training.tasks import TASKS, _shifted
from torchlathe.tools.bench.sparse_training_page import measured

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sparse_training.md"


def test_the_page_is_made_of_the_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    _, mark, text = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    assert text == "\n" + measured(result)


def test_rows_of_another_number_of_steps_are_measured_anew() -> None:
    steps = TASKS["digits CNN"](0).steps
    assert _is_current("digits CNN|HESSO|0.7|0", {"steps": steps}, ["digits CNN"])
    assert not _is_current("digits CNN|HESSO|0.7|0", {"steps": steps - 1}, ["digits CNN"])
    assert _is_current("digits CNN|HESSO|0.7|0", {"steps": steps - 1}, ["small"])
    assert _is_current("small|planted|0", {}, ["small"])


def test_the_net_is_that_of_the_tutorial() -> None:
    model, x = ResNet18().eval(), torch.randn(1, 3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    with torch.no_grad():
        assert model(x).shape == (1, 10)
    groups = tl.capture(model, (x,)).analysis(ZeroInvariantGroups)
    optimizer = HESSO(groups, model, lr=0.1, target_sparsity=0.7)
    assert optimizer.table.count == 2880
    assert optimizer.table.count - optimizer.target == 865


def test_images_are_moved_by_a_pixel_at_most() -> None:
    torch.manual_seed(0)
    images = torch.rand(40, 1, 8, 8)
    moved, padded = _shifted(images), F.pad(images, (1, 1, 1, 1))[:, 0]
    assert moved.shape == images.shape
    places = [(i, j) for i in range(3) for j in range(3)]
    found = [
        next(at for at in places if torch.equal(part[at[0] :, at[1] :][:8, :8], image[0]))
        for part, image in zip(padded, moved, strict=True)
    ]
    assert set(found) == set(places)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_seed_of_the_batches_shows_images_of_the_test(seed: int) -> None:
    def told(images: torch.Tensor) -> set[tuple[float, ...]]:
        # Rolling sideways keeps each row's values.
        return {tuple(image.sort(-1).values.flatten().tolist()) for image in images}

    batches = TASKS["digits CNN"](0).batches(seed)
    seen = set.union(*(told(next(batches)[0]) for _ in range(18)))
    test = told(digits(0).test[0])
    assert len(seen) > 1100
    assert not seen & test
