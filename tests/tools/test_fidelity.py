import json
import math
from typing import Any, NamedTuple

import pytest
import torch

from torchlathe.tools.fidelity import OutputFidelity, as_call, compare_outputs


class Out(NamedTuple):
    logits: torch.Tensor
    hidden: Any


class Cache:
    """Not registered with pytree."""


def test_equal_outputs() -> None:
    (entry,) = compare_outputs(torch.sin, torch.sin, [torch.randn(3, 5), torch.randn(2, 5)])
    assert entry == OutputFidelity(
        "output", (2, 5), "float32", 2, 1.0, 1.0, 0.0, 0.0, top1=1.0, equal=1.0
    )


def test_numbers_against_their_definition() -> None:
    a, b = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    (entry,) = compare_outputs(lambda: a, lambda: b, [()])
    assert entry.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()))
    rows = torch.nn.functional.cosine_similarity(a, b, dim=1)
    assert entry.worst_cosine == pytest.approx(float(rows.min()))
    assert entry.relative_error == pytest.approx(float((a - b).norm() / a.norm()))
    assert entry.max_abs_error == pytest.approx(float((a - b).abs().max()))
    assert entry.top1 == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    assert entry.equal == 0.0


def test_batches_add_up_as_one() -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    pairs = {0: (a[:1], b[:1]), 1: (a[1:], b[1:])}
    (parts,) = compare_outputs(lambda i: pairs[i][0], lambda i: pairs[i][1], [0, 1])
    (whole,) = compare_outputs(lambda: a, lambda: b, [()])
    for name in ("cosine", "worst_cosine", "relative_error", "max_abs_error", "top1"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name)), name


def test_nested_outputs_have_readable_names() -> None:
    def model(x):
        return {"out": Out(x, [x, None, 3]), "cache": Cache(), "n": x.argmax()}

    found = compare_outputs(model, model, [{"x": torch.randn(2, 3)}])
    assert [entry.name for entry in found] == ["out.logits", "out.hidden[0]", "n"]
    assert found[2].dtype == "int64"
    assert (found[2].cosine, found[2].top1, found[2].equal) == (None, None, 1.0)


def test_an_unknown_container_is_left_out_and_only_that() -> None:
    (entry,) = compare_outputs(
        lambda: (Cache(), torch.ones(2)), lambda: (Cache(), torch.ones(2)), [()]
    )
    assert entry.name == "[1]"


@pytest.mark.parametrize(
    ("shape", "told"), [((4, 3), True), ((2, 4, 3), True), ((4,), False), ((4, 1), False)]
)
def test_top1_is_for_what_looks_like_logits(shape: tuple[int, ...], told: bool) -> None:
    (entry,) = compare_outputs(lambda x: x, lambda x: x, [torch.randn(shape)])
    assert (entry.top1 is not None) is told


@pytest.mark.parametrize(
    ("after", "note"),
    [
        (torch.ones(2, 4), "shape (2, 4) instead of (2, 3)"),
        (torch.ones(2, 3, dtype=torch.float64), "torch.float64 instead of torch.float32"),
        (torch.full((2, 3), math.nan), "the compiled model gives NaN or infinity"),
        (None, "missing in the compiled model's outputs"),
    ],
)
def test_what_cannot_be_compared_is_told(after: torch.Tensor | None, note: str) -> None:
    (entry,) = compare_outputs(lambda: torch.ones(2, 3), lambda: after, [()])
    assert entry.note == note
    text = json.dumps(entry.to_dict(), allow_nan=False)
    assert OutputFidelity.from_dict(json.loads(text)) == entry


def test_nan_hides_nothing() -> None:
    after = torch.ones(2, 3)
    after[0, 0] = math.nan
    (entry,) = compare_outputs(lambda: torch.ones(2, 3), lambda: after, [()])
    assert entry.cosine is None
    assert entry.worst_cosine is None
    assert entry.relative_error is None
    assert entry.max_abs_error is None


def test_a_mask_of_infinities_is_no_error() -> None:
    scores = torch.tensor([[0.5, -math.inf], [0.1, 0.2]])
    (entry,) = compare_outputs(lambda: scores, lambda: scores.clone(), [()])
    assert (entry.cosine, entry.relative_error, entry.note) == (1.0, 0.0, "")


def test_zero_outputs() -> None:
    (entry,) = compare_outputs(lambda: torch.zeros(2, 3), lambda: torch.zeros(2, 3), [()])
    assert (entry.cosine, entry.relative_error, entry.equal) == (None, 0.0, 1.0)
    (entry,) = compare_outputs(lambda: torch.ones(0, 3), lambda: torch.ones(0, 3), [()])
    assert (entry.cosine, entry.equal) == (None, None)


@pytest.mark.parametrize(
    ("batch", "call"),
    [
        (1, ((1,), {})),
        ([1, 2], ((1, 2), {})),
        ((1, 2), ((1, 2), {})),
        ({"a": 1}, ((), {"a": 1})),
        (((1,), {"a": 2}), ((1,), {"a": 2})),
        ((), ((), {})),
    ],
)
def test_batches_as_calls(batch: object, call: object) -> None:
    assert as_call(batch) == call


def test_a_model_that_grows_its_cache_leaves_the_batch_as_it_was() -> None:
    cache = [torch.ones(2)]

    def model(x: torch.Tensor, held: list[torch.Tensor]) -> list[torch.Tensor]:
        x += 1
        held.append(x)
        return held

    x = torch.zeros(2)
    found = compare_outputs(model, model, [((x, cache), {})])
    assert [row.shape for row in found] == [(2,), (2,)]
    assert all(row.max_abs_error == 0 for row in found)
    assert len(cache) == 1
    assert torch.equal(x, torch.zeros(2))
