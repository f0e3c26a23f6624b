"""Distillation losses: values and gradients against float64, limits, and bad options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlathe.ir import InputError, OptionError
from torchlathe.passes.tune.distilling.anchor_prefix import AnchorPrefix
from torchlathe.passes.tune.distilling.images import SpectrumMatching, StructuralSimilarity
from torchlathe.passes.tune.distilling.logits import (
    BalancedDistillation,
    KnowledgeDistillation,
    divergence,
)
from torchlathe.passes.tune.distilling.regularising import BiasLoss, condition_gap
from torchlathe.passes.tune.distilling.values import (
    Anchors,
    AttentionMatching,
    ValueMatching,
    relative_error,
)

SEEDS = st.integers(0, 2**20)
# Sums of some hundred terms of size 1 in float64.
EXACT = 1e-12


def pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, dtype=torch.float64, generator=generator)
    teacher = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher.requires_grad_()


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, at)
    return found


# -- logits ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_gradient_of_knowledge_distillation(seed: int, temperature: float) -> None:
    s, t = pair(seed, 7, 5)
    loss = KnowledgeDistillation(temperature)(s, t)
    p_s, p_t = (F.softmax(z / temperature, -1) for z in (s, t))
    assert torch.allclose(gradient(loss, s), temperature * (p_s - p_t) / 7, atol=EXACT)
    assert loss >= 0
    assert float(KnowledgeDistillation(temperature)(s, s)) == pytest.approx(0, abs=EXACT)


def test_its_gradient_does_not_vanish_at_high_temperatures() -> None:
    s, t = pair(3, 7, 5)
    # To first order in 1/T it is that of half the squared distance of centred logits.
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    found = gradient(KnowledgeDistillation(1e4)(s, t), s)
    assert torch.allclose(found, (centred / 5 / 7).detach(), rtol=1e-3, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    s, t = pair(0, 4, 6)
    images, others = pair(1, 2, 3, 32, 32)
    losses: list[torch.Tensor] = [
        KnowledgeDistillation(2.0)(s, t),
        BalancedDistillation(2.0)(s, t),
        ValueMatching()(s, t),
        AttentionMatching()(images, others),
        Anchors(torch.randn(3, 6, dtype=torch.float64))(s, t),
        SpectrumMatching()(images, others),
        StructuralSimilarity(scales=2)(images, others),
    ]
    for loss in losses:
        found: Any = torch.autograd.grad(loss, (t, others), allow_unused=True)
        assert found == (None, None)


def test_impossible_classes_of_the_teacher_are_no_trouble() -> None:
    s, _ = pair(0, 3, 4)
    t = torch.tensor([[0.0, -math.inf, 1.0, 2.0]] * 3, dtype=torch.float64)
    loss = KnowledgeDistillation(2.0)(s, t)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient(loss, s)).all()


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_gradient_of_the_reverse_divergence(seed: int) -> None:
    s, t = pair(seed, 1, 6)
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1).detach()
    back = divergence(log_s, log_t)
    p = log_s.exp()
    expected = p * (log_s - log_t - back[:, None])
    assert torch.allclose(gradient(back.sum(), s), expected.detach(), atol=EXACT)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_balanced_distillation_weighs_by_the_entropy_gap(seed: int) -> None:
    s, t = pair(seed, 9, 5)
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    forward, backward = BalancedDistillation(delta=3.0).weights(log_s, log_t)
    gap = (-(log_t.exp() * log_t).sum(-1)) - (-(log_s.exp() * log_s).sum(-1))
    assert torch.equal(forward, torch.where(gap > 0, 3.0, 1.0).double())
    assert torch.equal(backward, torch.where(gap > 0, 1.0, 3.0).double())
    # Weights that do not favour anyone give the sum of both divergences.
    even = BalancedDistillation(delta=1.0, temperature=2.0)(s, t)
    p, q = (F.log_softmax(z / 2, -1) for z in (t, s))
    assert torch.allclose(even, 4 * (divergence(p, q) + divergence(q, p)).mean(), atol=EXACT)
    # A smooth weighing goes to the one at once.
    smooth = BalancedDistillation(delta=3.0, sharpness=1e9).weights(log_s, log_t)
    assert torch.allclose(smooth[0], forward)
    assert float(BalancedDistillation()(s, s)) == pytest.approx(0, abs=EXACT)


# -- values ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_matched_values(seed: int) -> None:
    s, t = pair(seed, 4, 8)
    error = relative_error(s, t)
    scale = 4 * t.square().sum(1, keepdim=True)
    assert torch.allclose(gradient(error, s), (2 * (s - t) / scale).detach(), atol=EXACT)
    # A mean over samples is the mean of those of its parts.
    parts = torch.stack([relative_error(s[:2], t[:2]), relative_error(s[2:], t[2:])])
    assert torch.allclose(error, parts.mean(), atol=EXACT)
    flat = relative_error(s[0], t[0])
    assert torch.allclose(flat, (s[0] - t[0]).square().sum() / t[0].square().sum(), atol=EXACT)
    assert float(ValueMatching()(t, t)) == pytest.approx(0, abs=EXACT)
    assert ValueMatching()(s, t) > 0
    # The direction does not change with the scale of the student.
    one, two = (ValueMatching(1.0)(k * s, t) - relative_error(k * s, t) for k in (1.0, 2.0))
    assert torch.allclose(one, two, atol=EXACT)
    assert torch.equal(ValueMatching(0.0)(s, t), error)


def test_attention_of_other_numbers_of_heads() -> None:
    s, t = pair(0, 2, 4, 5, 5)
    assert float(AttentionMatching()(t, t)) == 0
    assert AttentionMatching()(s[:, :2], t).shape == ()
    p, q = s.softmax(-1), t.softmax(-1)
    found = AttentionMatching(divergence=True)(p, q)
    exact = F.kl_div(p.log(), q.detach(), reduction="none").sum(-1).mean()
    assert torch.allclose(found, exact, atol=1e-9)  # of the guard against log 0


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_anchors(seed: int) -> None:
    s, t = pair(seed, 12, 6)
    anchors = Anchors(Anchors.of(t, 4, seed=seed))
    assert float(anchors(t, t)) == pytest.approx(0, abs=EXACT)
    assert anchors(s, t) > 0
    assert anchors.agreement(t, t) == 1.0
    # Embeddings count by their direction only.
    assert torch.allclose(anchors(3 * s, t), anchors(s, t), atol=EXACT)
    # A rotation of the student is seen by the anchors, and not by the relations.
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    relations = Anchors(anchors.anchors, relations=1.0)(t @ rotation, t)
    without = Anchors(anchors.anchors, relations=0.0)(t @ rotation, t)
    assert torch.allclose(relations, without, atol=EXACT)


def test_the_nearest_anchors_become_the_first_tokens() -> None:
    torch.manual_seed(0)
    anchors = torch.eye(5)[:, :4] + 0.01
    prefix = AnchorPrefix(anchors, 4, count=2, temperature=0.5)
    with torch.no_grad():
        prefix.query.weight.copy_(torch.eye(4))
    embeddings = torch.randn(3, 6, 4, requires_grad=True)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[0, 4:] = 0
    found, seen = prefix(embeddings, mask)
    assert found.shape == (3, 8, 4)
    assert torch.equal(found[:, 2:], embeddings)
    assert seen.tolist() == [[1, 1, *row] for row in mask.tolist()]
    # Padding says nothing of what a text is about.
    cosines = F.cosine_similarity(embeddings[0, :4].mean(0)[None], anchors)
    near, places = cosines.topk(2)
    shares = (near / 0.5).softmax(-1)
    tokens = prefix.token(F.normalize(anchors, dim=-1)[places]) * shares[:, None]
    torch.testing.assert_close(found[0, :2], tokens)
    found.square().sum().backward()
    for name, parameter in prefix.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_k_means_finds_planted_centres() -> None:
    torch.manual_seed(0)
    centres = torch.eye(5)[:3]
    points = centres.repeat_interleave(20, 0) + 0.01 * torch.randn(60, 5)
    found = Anchors.of(points, 3, seed=1)
    nearest = (found @ centres.T).amax(1)
    assert bool((nearest > 0.99).sum() >= 2)
    with pytest.raises(OptionError, match="count is 61, but must be from 1 to 60"):
        Anchors.of(points, 61)


# -- images ------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_spectra(seed: int) -> None:
    s, t = pair(seed, 2, 3, 8, 8)
    assert torch.allclose(SpectrumMatching(0.0)(s, t), F.mse_loss(s, t), atol=EXACT)
    assert float(SpectrumMatching(1.0)(t, t)) == 0
    assert SpectrumMatching(1.0)(s, t) > 0


def test_faint_frequencies_count_more() -> None:
    x = torch.arange(32, dtype=torch.float64)
    slow, fast = (torch.sin(2 * math.pi * k * x / 32).expand(32, 32) for k in (1, 8))
    teacher = (slow + 0.1 * fast)[None, None]
    lost_slow, lost_fast = 0.95 * slow + 0.1 * fast, slow + 0.05 * fast
    plain, weighed = SpectrumMatching(0.0), SpectrumMatching(2.0, floor=1e-2)
    # The two are off by the same amount: 0.05 of one wave.
    assert torch.allclose(plain(lost_slow, teacher), plain(lost_fast, teacher), atol=EXACT)
    assert weighed(lost_fast[None, None], teacher) > 5 * weighed(lost_slow[None, None], teacher)


def test_structural_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 48, 48, dtype=torch.float64, generator=generator)
    loss = StructuralSimilarity(scales=3)
    assert float(loss(image, image)) == pytest.approx(0, abs=EXACT)
    noise = torch.randn(2, 3, 48, 48, dtype=torch.float64, generator=generator)
    found = [float(loss(image + level * noise, image)) for level in (0.01, 0.05, 0.2)]
    assert found == sorted(found)
    assert found[0] > 0
    assert found[-1] <= 1
    other = loss.similarity(image, image + 0.1 * noise)
    assert torch.allclose(other, loss.similarity(image + 0.1 * noise, image), atol=EXACT)
    with pytest.raises(InputError, match="scales=5 needs images of at least 176 x 176"):
        StructuralSimilarity(scales=5)(image, image)


def test_one_scale_is_the_plain_index() -> None:
    """Against windows taken one by one."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, 13, 13, dtype=torch.float64, generator=generator) for _ in "ab")
    line = torch.exp(-(torch.arange(11.0).double() - 5).square() / 4.5)
    window = line[:, None] * line[None] / line.sum() ** 2
    luminances, structures = [], []
    for i in range(3):
        for j in range(3):
            x, y = (z[0, 0, i : i + 11, j : j + 11] for z in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            luminances.append((2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4))
            structures.append((2 * cov + 9e-4) / (vx + vy + 9e-4))
    expected = sum(luminances) / 9 * (sum(structures) / 9).clamp_min(1e-6)  # type: ignore[union-attr]
    assert torch.allclose(StructuralSimilarity(scales=1).similarity(a, b)[0, 0], expected)


# -- regularisers ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 9), st.integers(2, 9))
def test_the_gap_bounds_the_condition_number(seed: int, rows: int, columns: int) -> None:
    weight, _ = pair(seed, rows, columns)
    gap = condition_gap(weight, eps=0.0)
    values = torch.linalg.svdvals(weight.detach())
    kappa = math.log(float(values[0] / values[-1]))
    assert kappa <= math.log(2) + float(gap) / 2 + 1e-9
    assert gap >= -1e-9
    n = min(rows, columns)
    square = weight if rows >= columns else weight.T
    expected = -2 * torch.linalg.pinv(square.detach()).T + 2 * n * square.detach() / (
        square.detach().square().sum()
    )
    found = gradient(gap, weight)
    found = found if rows >= columns else found.T
    # The inverse of a matrix of condition kappa loses so many digits.
    assert torch.allclose(found, expected, atol=1e-12 * math.exp(2 * kappa) + 1e-9, rtol=1e-6)


def test_the_gap_of_orthogonal_and_of_empty_matrices() -> None:
    orthogonal, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert float(condition_gap(3 * orthogonal, eps=0.0)) == pytest.approx(0, abs=1e-9)
    padded = torch.zeros(8, 9, dtype=torch.float64)
    padded[1:7, 2:8] = orthogonal
    assert float(condition_gap(padded, eps=0.0)) == pytest.approx(0, abs=1e-9)
    empty = torch.zeros(3, 3, requires_grad=True)
    assert float(condition_gap(empty).detach()) == 0
    assert condition_gap(empty).requires_grad


def test_bias_loss_weighs_by_variance() -> None:
    s, _ = pair(0, 3, 4)
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]])  # variances 0, 0.5, 2
    loss = BiasLoss(alpha=0.3, beta=0.5)
    weights = loss.weights(features)
    scaled = torch.tensor([0.0, 0.25, 1.0])
    assert torch.allclose(weights, torch.exp(0.5 * scaled) - 0.7)
    labels = torch.tensor([0, 1, 2])
    expected = (weights * F.cross_entropy(s, labels, reduction="none")).mean()
    assert torch.allclose(loss(s, labels, features), expected)
    # The least variance is that of all batches so far; equal ones are no division by zero.
    assert float(loss.weights(features[2:])[0]) == pytest.approx(math.exp(0.5) - 0.7)
    same = BiasLoss().weights(torch.ones(3, 5))
    assert torch.allclose(same, torch.full((3,), 0.3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KnowledgeDistillation(0.0), "temperature is 0.0"),
        (lambda: BalancedDistillation(delta=0.5), "delta is 0.5"),
        (lambda: BalancedDistillation(sharpness=0.0), "sharpness is 0.0"),
        (lambda: Anchors(torch.eye(2), temperature=-1.0), "temperature is -1.0"),
        (lambda: SpectrumMatching(-1.0), "exponent is -1.0"),
        (lambda: SpectrumMatching(floor=0.0), "floor is 0.0"),
        (lambda: StructuralSimilarity(scales=6), "scales is 6"),
        (lambda: StructuralSimilarity(data_range=0.0), "data_range is 0.0"),
        (lambda: BiasLoss(alpha=-1.0), "alpha is -1.0"),
        (lambda: AnchorPrefix(torch.eye(2), 3, count=3), "count is 3, but must be from 1 to 2"),
        (lambda: AnchorPrefix(torch.eye(2), 3, count=1, temperature=0.0), "temperature is 0.0"),
    ],
    ids=range(11),
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
