"""Distillation beyond logits: rotations, attention maps, anchors, biased samples, images."""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import torchlathe as tl
from tests.passes.test_distill import Net, loss, student, task
from torchlathe.ir import InputError, PreconditionError
from torchlathe.passes import Distill, PassManager
from torchlathe.passes.tune.distilling.anchor_prefix import AnchorPrefix
from torchlathe.passes.tune.distilling.attending import attention_sites, paired_sites
from torchlathe.passes.tune.distilling.heads import ends_of_blocks, with_heads
from torchlathe.passes.tune.distilling.images import StructuralSimilarity
from torchlathe.passes.tune.distilling.layered import ROTATIONS, JointLabels, turned
from torchlathe.passes.tune.distilling.learning_teacher import LearningTeacher
from torchlathe.passes.tune.distilling.logits import KnowledgeDistillation
from torchlathe.passes.tune.distilling.values import Anchors
from torchlathe.passes.tune.training import TrainingModule
from torchlathe.tools.compat import define_torchvision_ops

SEEDS = st.integers(0, 2**20)
# Sums of some hundred terms of size 1 in float32.
NEAR = 1e-5


def distilled(**options: Any) -> tuple[tl.Program, Any]:
    teacher, batches = task()
    chosen = {"steps": 20, "lr": 8e-3, "teacher": teacher, **options}
    after = PassManager([Distill(**chosen)]).run(student(), calibration=batches, loss=loss)
    return after, after.history[0].statistics


# -- rotations -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_pairs_of_class_and_rotation_by_the_chain_rule(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes, count = 5, 3
    shape = (ROTATIONS * count, classes * ROTATIONS)
    head = torch.randn(shape, generator=generator).requires_grad_()
    labels = torch.randint(classes, (count,), generator=generator)
    learnt = JointLabels(lambda z: F.cross_entropy(z, labels), KnowledgeDistillation())
    pairs = torch.cat([labels * ROTATIONS + rotation for rotation in range(ROTATIONS)])
    found = learnt.labelled(head)
    torch.testing.assert_close(found, F.cross_entropy(head, pairs), rtol=NEAR, atol=NEAR)
    (gradient,) = torch.autograd.grad(found, head)
    want = (head.softmax(-1) - F.one_hot(pairs, shape[1])) / shape[0]
    torch.testing.assert_close(gradient, want, rtol=NEAR, atol=NEAR)


def test_the_deepest_head_teaches_and_is_not_taught() -> None:
    torch.manual_seed(0)
    heads = [torch.randn(8, 12, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 2])
    task_of = functools.partial(F.cross_entropy, target=labels)
    learnt = JointLabels(task_of, KnowledgeDistillation(2.0))
    found = torch.autograd.grad(learnt(heads), heads)
    # The deepest gets the gradient of its labels alone.
    (alone,) = torch.autograd.grad(learnt.labelled(heads[-1]) / 3, heads[-1])
    torch.testing.assert_close(found[-1], alone, rtol=NEAR, atol=1e-7)
    assert all(gradient.abs().max() > 1e-3 for gradient in found)
    rotations = JointLabels(None, KnowledgeDistillation())(heads[-1:])
    assert torch.isfinite(rotations)


def test_images_are_turned_and_others_repeated() -> None:
    x, y = torch.arange(32.0).reshape(2, 1, 4, 4), torch.tensor([5, 6])
    images, labels, rest = turned([x, y, 3])
    assert images.shape == (8, 1, 4, 4)
    assert torch.equal(images[:2], x)
    assert torch.equal(images[2:4], torch.rot90(x, 1, (2, 3)))
    assert labels.tolist() == [5, 6] * 4
    assert rest == 3
    with pytest.raises(InputError, match="no input is one"):
        turned([torch.randn(2, 3)])


def test_rotations_train_the_model_and_leave_nothing_behind() -> None:
    after, found = distilled(alpha=0.0, heads=2, rotations=True)
    assert found["task_after"] < found["task_before"]
    assert after.parameters.keys() == student().parameters.keys()
    assert after.out_spec == student().out_spec
    headed = with_heads(student(), 5 * ROTATIONS, 9, deepest=True)
    assert headed.heads == 3
    assert len(ends_of_blocks(student(), 1, deepest=True)) == 2


def test_heads_of_rows_of_features() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = layers, nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            found: torch.Tensor = self.head(x)
            return found

    x = torch.randn(5, 6)
    headed = with_heads(tl.capture(Mlp().eval(), (x,)), 4, 2)
    own, heads = headed.program.run(x)
    assert [tuple(head.shape) for head in heads] == [(5, 4), (5, 4)]
    weight = headed.program.tensor("auxiliary_head_0.weight")
    torch.testing.assert_close(heads[0], layers[0](x) @ weight.T)
    assert own.shape == (5, 4)


# -- attention -----------------------------------------------------------------------------------


class Attending(nn.Module):
    """Layers of attention, grouped and causal if asked for."""

    def __init__(self, layers: int, *, heads: int = 4, shared: int = 1, causal: bool = False):
        super().__init__()
        self.heads, self.shared, self.causal = heads, shared, causal
        kept = 16 // shared
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"q": nn.Linear(16, 16), "k": nn.Linear(16, kept), "v": nn.Linear(16, kept)}
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers: Any = self.layers
        for layer in layers:
            q, k, v = (
                layer[name](x).unflatten(-1, (-1, 16 // self.heads)).transpose(1, 2)
                for name in ("q", "k", "v")
            )
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=self.causal, enable_gqa=self.shared > 1
            )
            x = x + y.transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


@pytest.mark.parametrize(
    ("heads", "shared", "causal"),
    [(4, 1, False), (4, 2, True), (2, 1, True)],
    ids=["plain", "grouped-causal", "causal"],
)
def test_maps_of_fused_attention(heads: int, shared: int, causal: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, 16)
    model = Attending(2, heads=heads, shared=shared, causal=causal).eval()
    program = tl.capture(model, (x,))
    sites = attention_sites(program)
    assert len(sites) == 2
    values: dict[str, torch.Tensor] = {}
    site = sites[0]
    layer: Any = model.layers[0]
    for name, part in ((site.query, "q"), (site.key, "k")):
        assert name is not None
        values[name] = layer[part](x).unflatten(-1, (-1, 16 // heads)).transpose(1, 2)
    maps = site.probabilities(values)
    assert maps.shape == (3, heads, 6, 6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, heads, 6))
    assert (maps[0, 0, 0, 1:] == 0).all() == causal
    # Attending to v with the maps is what the program computes.
    v = layer["v"](x).unflatten(-1, (-1, 16 // heads)).transpose(1, 2)
    q, k = values[site.query], values[site.key or ""]
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared > 1)
    torch.testing.assert_close(maps @ v.repeat_interleave(shared, 1), want, rtol=NEAR, atol=NEAR)


def test_masks_are_heeded_in_a_model_of_transformers() -> None:
    define_torchvision_ops()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, attn_implementation="sdpa",
    )  # fmt: skip
    tokens = torch.randint(50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    found = {}
    for kind in ("sdpa", "eager"):
        model = BertModel(config).eval()
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.set_attn_implementation(kind)
        program = tl.capture(model, (tokens, mask))
        sites = attention_sites(program)
        assert len(sites) == 1
        module = TrainingModule(program, (), taps=sites[0].taps).eval()
        with torch.no_grad():
            _, values = module(*program.flatten_inputs((tokens, mask), {}))
            found[kind] = sites[0].probabilities(values)
    assert (found["sdpa"][1, :, :, 5:] == 0).all()
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-4, atol=1e-5)


def test_attention_is_matched_layer_by_layer() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 6, 16) for _ in range(6)]
    programs = [
        tl.capture(Attending(layers, heads=heads).eval(), (batches[0],), dynamic_shapes="auto")
        for layers, heads in ((4, 4), (2, 2))
    ]
    teacher, learner = programs
    pairs = paired_sites(learner, teacher)
    assert [theirs for _, theirs in pairs] == attention_sites(teacher)[1::2]
    with pytest.raises(PreconditionError, match="has 4 attentions and the teacher 2"):
        paired_sites(teacher, learner)

    def gap(program: tl.Program) -> float:
        found = []
        for one, which in ((program, 0), (teacher, 1)):
            taps = [name for pair in pairs for name in pair[which].taps]
            with torch.no_grad():
                _, values = TrainingModule(one, (), taps=taps).eval()(batches[0])
            found.append([pair[which].probabilities(values).mean(1) for pair in pairs])
        return sum(float((a - b).abs().mean()) for a, b in zip(*found, strict=True))

    pass_ = Distill(teacher=teacher, attention_maps=50.0, steps=40, lr=5e-3, outputs="logits")
    after = PassManager([pass_]).run(learner, calibration=batches)
    assert gap(after) < 0.7 * gap(learner)
    wrong = PassManager([Distill(teacher=Attending(4).eval(), attention_maps=1.0, steps=2)])
    with pytest.raises(tl.Error, match="has to be a Program"):
        wrong.run(learner, calibration=batches)


# -- anchors and samples ---------------------------------------------------------------------------


def test_anchors_of_embeddings() -> None:
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 6)
    batches = [centres[torch.randint(4, (16,))] + 0.3 * torch.randn(16, 6) for _ in range(8)]
    mapped = nn.Linear(6, 5)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))

    teacher = nn.Sequential(mapped, nn.Tanh()).eval()
    program = tl.capture(net().eval(), (batches[0],), dynamic_shapes="auto")
    pass_ = Distill(teacher=teacher, anchors=4, steps=60, lr=1e-2, outputs="values")
    after = PassManager([pass_]).run(program, calibration=batches)
    x = torch.cat(batches)
    theirs = teacher(x).detach()
    anchors = Anchors(Anchors.of(theirs, 4))
    assert float(anchors(after.run(x).detach(), theirs)) < float(
        0.2 * anchors(program.run(x).detach(), theirs)
    )
    with pytest.raises(tl.Error, match="no output is such"):
        distilled(anchors=3)


@pytest.mark.parametrize("listed", [True, False], ids=["list", "loader"])
def test_anchors_are_of_the_batches_to_train_on(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 6) for _ in range(8)]
    program = tl.capture(nn.Linear(6, 5).eval(), (batches[0],), dynamic_shapes="auto")
    seen: list[torch.Tensor] = []

    def of(embeddings: torch.Tensor, count: int, *, seed: int = 0) -> torch.Tensor:
        seen.append(embeddings)
        return embeddings[:count]

    monkeypatch.setattr(Anchors, "of", of)
    teacher = nn.Linear(6, 5)
    pass_ = Distill(teacher=teacher, anchors=2, steps=2, outputs="values", held_out=0.25)
    rows: Any = torch.cat(batches)
    data: Any = batches if listed else DataLoader(rows, batch_size=4)
    PassManager([pass_]).run(program, calibration=data)
    (found,) = seen
    # The last two are held out of a list; those of a loader cannot be.
    want = teacher(rows[:24] if listed else rows).detach()
    torch.testing.assert_close(found, want)


class Prefixed(nn.Module):
    """Attention over token embeddings with anchors in front of them."""

    def __init__(self, anchors: torch.Tensor) -> None:
        super().__init__()
        self.embed, self.prefix = nn.Embedding(20, 8), AnchorPrefix(anchors, 8, count=2)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, seen = self.prefix(self.embed(tokens), torch.ones_like(tokens))
        y = F.scaled_dot_product_attention(self.mix(x), x, x, (seen != 0)[:, None])
        found: torch.Tensor = self.out(torch.tanh(x + y)[:, self.prefix.count :].mean(1))
        return found


def test_a_student_with_anchors_in_front_learns_to_read_them() -> None:
    torch.manual_seed(0)
    teacher = nn.EmbeddingBag(20, 4, mode="mean")
    batches = [torch.randint(20, (16, 5)) for _ in range(8)]
    anchors = Anchors.of(torch.cat([teacher(x) for x in batches]), 6)
    program = tl.capture(Prefixed(anchors).eval(), (batches[0],))
    passes = [Distill(teacher=teacher, trainable=("prefix.*",), steps=40, lr=2e-2)]
    after = PassManager(passes).run(program, calibration=batches)
    found = after.history[0].statistics
    assert found["loss_after"] < 0.9 * found["loss_before"]
    assert torch.equal(after.tensor("prefix.anchors"), program.tensor("prefix.anchors"))


def test_samples_of_varied_features_count_more() -> None:
    _, found = distilled(bias=1.0)
    assert found["task_after"] < found["task_before"]
    flat = tl.capture(nn.Linear(3, 2).eval(), (torch.randn(4, 3),), dynamic_shapes="auto")
    wrong = PassManager([Distill(teacher=nn.Linear(3, 2), bias=1.0, steps=2)])
    with pytest.raises(tl.Error, match="the last block"):
        wrong.run(flat, calibration=[torch.randn(4, 3)] * 3)


@pytest.mark.parametrize(
    "options",
    [{"bias": 1.0}, {"alpha": 0.0, "heads": 1, "rotations": True}, {"teacher_lr": 1e-3}],
    ids=["bias", "rotations", "teacher"],
)
def test_they_are_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"steps": 8, "save_every": 4, "checkpoint": str(tmp_path), **options}

    def run(stop: bool) -> tl.Program:
        def say(text: str) -> None:
            if stop and text.startswith("step 6 "):
                raise KeyboardInterrupt

        teacher, batches = task()
        torch.manual_seed(2)
        return PassManager([Distill(teacher=teacher, **chosen)]).run(
            student(), calibration=batches, loss=loss, progress=say
        )

    with pytest.raises(KeyboardInterrupt):
        run(True)
    resumed = run(False)
    for file in tmp_path.iterdir():
        file.unlink()
    whole = run(False)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.tensor(name)), name


# -- a teacher that learns ---------------------------------------------------------------------


@pytest.mark.parametrize("of_program", [False, True], ids=["module", "program"])
def test_a_teacher_trains_along_and_stays_as_it_is(of_program: bool) -> None:
    torch.manual_seed(4)
    teacher = Net(12)  # has learnt nothing
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x = task()[1][0][0]
    given = tl.capture(teacher.eval(), (x,), dynamic_shapes="auto") if of_program else teacher
    _, found = distilled(teacher=given, teacher_lr=5e-3, loss="balanced")
    assert found["teacher_task_after"] < 0.9 * found["teacher_task_before"]
    assert found["task_after"] < found["task_before"]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([0.5, 1.0, 4.0]))
def test_gradients_of_a_teacher_that_learns(seed: int, degree: float) -> None:
    program = tl.capture(nn.Linear(3, 5).eval(), (torch.randn(2, 3),))
    learning = LearningTeacher(nn.Linear(3, 5), program, rate=1.0, weight=0.5)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        torch.randn(7, 5, generator=generator, requires_grad=True) for _ in range(2)
    )
    learning.divergence(teacher, student, degree).backward()
    assert student.grad is None
    assert teacher.grad is not None
    p, q = (F.softmax(z.detach() / degree, -1) for z in (teacher, student))
    # Float32 numbers of order 1, over seven rows.
    assert torch.allclose(teacher.grad, 0.5 * degree * (p - q) / 7, atol=1e-6)


def test_what_a_teacher_that_learns_needs() -> None:
    teacher, batches = task()
    wrong: list[dict[str, Any]] = [
        {"hidden": 1.0}, {"attention_maps": 1.0}, {"teacher": [teacher, teacher]}
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(tl.Error, match="trains along is one"):
            Distill(**{"teacher": teacher, "teacher_lr": 1e-3, **options})
    pass_ = Distill(teacher=teacher, teacher_lr=1e-3, steps=2)
    with pytest.raises(tl.Error, match="loss"):
        PassManager([pass_]).run(student(), calibration=[x for x, _ in batches])
    frozen = deepcopy(teacher).requires_grad_(False)
    with pytest.raises(tl.Error, match="no parameter that requires gradients"):
        distilled(teacher=frozen, teacher_lr=1e-3)


def test_what_cannot_be_turned_is_refused() -> None:
    with pytest.raises(tl.Error, match="rotations are for auxiliary heads"):
        Distill(rotations=True)
    for name in ("attention_maps", "anchors", "anchor_weight", "bias"):
        options: dict[str, Any] = {name: -1}
        with pytest.raises(tl.Error, match=f"{name} is -1"):
            Distill(**options)
    teacher, batches = task()
    static = tl.capture(Net(6).eval(), (batches[0][0],))
    wrong = PassManager([Distill(teacher=teacher, heads=1, rotations=True, steps=2)])
    with pytest.raises(tl.Error, match="only batches of one size"):
        wrong.run(static, calibration=batches, loss=loss)


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (16, {"values": "spectrum"}),
        (176, {"values": "ms-ssim"}),
        (32, {"values": "ms-ssim"}),
        (32, {"values": "ms-ssim", "scales": 1, "data_range": 2.0}),
    ],
    ids=["spectrum", "ms-ssim-176", "ms-ssim-32", "one-scale"],
)
def test_image_outputs(size: int, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blur = nn.Sequential(nn.Conv2d(1, 1, 5, padding=2), nn.Sigmoid()).eval()
    program = tl.capture(
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid()).eval(),
        (torch.rand(1, 1, size, size),),
    )
    batches = [torch.rand(1, 1, size, size) for _ in range(3)]
    pass_ = Distill(teacher=blur, outputs="values", steps=10, lr=2e-2, evaluate_every=5, **options)
    found = PassManager([pass_]).run(program, calibration=batches).history[0].statistics
    assert found["loss_after"] < found["loss_before"]


@pytest.mark.parametrize(
    ("size", "scales"), [(11, 1), (21, 1), (22, 2), (32, 2), (175, 4), (176, 5), (400, 5)]
)
def test_as_many_scales_as_images_have_room_for(size: int, scales: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1, 1, size, size + 3, generator=generator) for _ in range(2))
    found = StructuralSimilarity().similarity(a, b)
    assert torch.equal(found, StructuralSimilarity(scales=scales).similarity(a, b))
    assert float(StructuralSimilarity()(a, a)) == pytest.approx(0.0, abs=1e-6)
    if scales < 5:
        with pytest.raises(InputError, match=f"scales={scales + 1} needs images"):
            StructuralSimilarity(scales=scales + 1)(a, b)


def test_scales_and_range_are_options() -> None:
    (read,) = PassManager("distill{values=ms-ssim,data-range=255.0,scales=3}").passes
    assert isinstance(read, Distill)
    assert read.similarity() == StructuralSimilarity(255.0, 3)
    assert Distill().similarity() == StructuralSimilarity()
    with pytest.raises(InputError, match="scales=1 needs images of at least 11 x 11, got 10 x 40"):
        StructuralSimilarity()(torch.rand(1, 1, 10, 40), torch.rand(1, 1, 10, 40))
    for wrong, message in (({"scales": 6}, "scales is 6"), ({"data_range": 0.0}, "data_range")):
        with pytest.raises(tl.Error, match=message):
            Distill(**wrong)  # type: ignore[arg-type]


def test_structural_similarity_is_that_of_torchmetrics() -> None:
    define_torchvision_ops()
    image = pytest.importorskip("torchmetrics.functional.image")
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 1, 176, 176, dtype=torch.float64, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, dtype=a.dtype, generator=generator)).clamp(0, 1)
    # Theirs leaves out the border in this term alone, as ours does in all.
    _, theirs = image.structural_similarity_index_measure(
        a, b, data_range=1.0, return_contrast_sensitivity=True, reduction="none"
    )
    _, ours = StructuralSimilarity()._compare(a, b)
    torch.testing.assert_close(ours.mean(1), theirs, rtol=1e-9, atol=1e-12)
    # Of the rest theirs has mirrored borders too: 5 of 176 pixels on each side.
    several = image.multiscale_structural_similarity_index_measure(a, b, data_range=1.0)
    assert 1 - float(StructuralSimilarity()(a, b)) == pytest.approx(float(several), abs=2e-3)
