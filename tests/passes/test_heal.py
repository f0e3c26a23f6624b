"""Healing: layers in closed form, blocks, and distillation from the original."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import torchlathe as tl
from tests.passes.test_training import worker
from tests.passes.training_worker import NormNet, heal, make
from torchlathe.ir import OptionError, PreconditionError
from torchlathe.passes import Heal, PassManager, PassResult, RewritePass
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.healing.alignment import (
    aligned_blocks,
    aligned_nodes,
    logits_among,
)
from torchlathe.passes.tune.healing.layerwise import fit_layers
from torchlathe.passes.tune.healing.objective import output_names


class Encoder(nn.Module):
    """Two blocks of feed-forward layers between an embedding and a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return F.normalize(x.mean(1), dim=-1)


@functools.cache
def encoder() -> tuple[tl.Program, list[torch.Tensor]]:
    torch.set_num_threads(1)  # everything here is small
    torch.manual_seed(0)
    mix = torch.randn(24, 24) / 5
    batches = [torch.randn(16, 4, 24) @ mix for _ in range(12)]
    return tl.capture(Encoder().eval(), (batches[0],), dynamic_shapes="auto"), batches


SPLIT = "low-rank-split{method=svd,rank=6}"


def healed(passes: str, **given: Any) -> tuple[tl.Program, Any]:
    program, batches = encoder()
    after = PassManager(passes, **given).run(program, calibration=batches, seed=1)
    return after, after.history[-1]


# -- alignment ---------------------------------------------------------------------------------


def test_split_layers_are_aligned_by_their_module() -> None:
    program, _ = encoder()
    split = PassManager(SPLIT).run(program)
    names = {node.name: other.name for node, other in aligned_nodes(program, split).items()}
    linears = [node.name for node in program.nodes if "linear" in str(node.target)]
    assert set(linears) <= set(names.values())
    ups = [a for a, b in names.items() if b in linears]
    found = {node.name: node for node in split.nodes}
    assert all(found[name].meta["val"].shape[-1] in (24, 48) for name in ups)
    # Everything that no pass touched has its own name.
    assert {b for a, b in names.items() if a == b} >= {"layer_norm", "gelu", "add"}
    assert len(set(names.values())) == len(names)
    blocks = aligned_blocks(program, split)
    assert set(blocks) == {"layers.0", "layers.1"}


def test_erased_channels_are_not_taken_for_the_same() -> None:
    program, _ = encoder()
    erased = PassManager("structured-erase{sparsity=0.5}").run(program)
    for node, other in aligned_nodes(program, erased).items():
        assert node.meta["val"].shape[1:] == other.meta["val"].shape[1:]


def test_outputs_are_told_apart() -> None:
    program, _ = encoder()
    assert logits_among(program, output_names(program)) == [False]
    net, _ = make("norm")
    assert logits_among(net, output_names(net)) == [True]
    one = tl.capture(nn.Linear(4, 1).eval(), (torch.randn(2, 4),))
    assert logits_among(one, output_names(one)) == [False]


# -- closed form -------------------------------------------------------------------------------


def test_a_linear_model_is_healed_exactly() -> None:
    """What a wrong weight does to a layer is undone by least squares up to its damping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double().eval()
    batches = [torch.randn(32, 6, dtype=torch.float64) for _ in range(4)]
    program = tl.capture(model, (batches[0],), dynamic_shapes="auto")
    changed = program.copy()
    with changed.edit() as edit:
        noise = torch.randn(5, 8, dtype=torch.float64)
        edit.set_tensor("1.weight", program.tensor("1.weight").detach() + noise)
        edit.set_tensor("1.bias", torch.zeros(5, dtype=torch.float64))
    ctx = PassContext(changed, "test", batches, original=program)
    with changed.edit() as edit:
        fits = fit_layers(program, changed, edit, ctx, trainable=set(program.parameters))
    (x,) = torch.randn(1, 9, 6, dtype=torch.float64)
    # The least ridge is 1e-8 of the inputs' scale, and hidden units depend on 6 inputs only.
    assert torch.allclose(changed.run(x), program.run(x), atol=1e-6)
    fit = next(fit for fit in fits if fit.weight == "1.weight")
    assert fit.before > 0.1
    assert fit.after < 1e-12


def test_both_factors_of_a_split_are_fitted_to_the_data() -> None:
    """The error of a refitted pair is at most that of the best pair for whitened inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    batches = [torch.randn(64, 16) @ torch.diag(torch.logspace(1, -1, 16)) for _ in range(6)]
    program = tl.capture(model, (batches[0],), dynamic_shapes="auto")
    plain = PassManager("low-rank-split{method=svd,rank=6}").run(program)
    changed = plain.copy()
    ctx = PassContext(changed, "test", batches, original=program)
    with changed.edit() as edit:
        fits = fit_layers(program, changed, edit, ctx, trainable=set(changed.parameters))
    assert len(fits) == 2

    @torch.no_grad()
    def error(other: tl.Program) -> float:
        pairs = [(other.run(x), program.run(x)) for x in batches]
        wrong = sum(float((a - b).square().sum()) for a, b in pairs)
        return wrong / sum(float(b.square().sum()) for _, b in pairs)

    assert error(changed) < 0.5 * error(plain)
    whitened = PassManager("low-rank-split{method=whitened-svd,rank=6}").run(
        program, calibration=batches
    )
    # Both are the optimum, but for damping.
    assert error(changed) < 1.01 * error(whitened)


def test_zeros_and_shared_weights_are_left_alone_in_closed_form() -> None:
    program, batches = encoder()
    changed = program.copy()
    with changed.edit() as edit:
        sparse = program.tensor("layers.0.1.weight").detach().clone()
        sparse[:, ::2] = 0
        edit.set_tensor("layers.0.1.weight", sparse)
    ctx = PassContext(changed, "test", batches, original=program)
    with changed.edit() as edit:
        fits = fit_layers(program, changed, edit, ctx, trainable=set(changed.parameters))
    assert "layers.0.1.weight" not in [fit.weight for fit in fits]
    assert torch.equal(changed.tensor("layers.0.1.weight"), sparse)
    assert all(fit.after <= fit.before for fit in fits)


# -- the pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["closed-form", "blockwise", "distil", "all"])
def test_each_method_brings_the_outputs_nearer(method: str) -> None:
    split, _ = healed(SPLIT)
    program, record = healed(f"{SPLIT},heal{{method={method},steps=30,lr=0.003}}")
    found = record.statistics
    assert record.exactness == "trained"
    assert found["error_after"] < 0.9 * found["error_before"]
    assert found["cosine_after"] > found["cosine_before"]
    assert program.fingerprint() != split.fingerprint()
    assert program.parameters.keys() == split.parameters.keys()
    stages = [stage["stage"] for stage in record.details["healing"]["stages"]]
    expected = {"all": ["closed-form", "distil"]}.get(method, [method])
    assert stages == ["before", *expected]
    assert ("training" in record.details) == (method != "closed-form")


def test_it_is_never_worse_on_what_was_held_out() -> None:
    harmful = "heal{method=distil,steps=10,lr=10.0,optimizer=SGD,clip=none,optimizer-options={}}"
    _, record = healed(f"{SPLIT},{harmful}")
    assert record.statistics["loss_after"] <= record.statistics["loss_before"]


def test_nothing_changed_is_nothing_to_heal() -> None:
    _, record = healed("heal")
    assert not record.changed
    assert "nothing was changed before heal" in record.diagnostics[0]["message"]


def test_the_original_and_the_model_stay_as_they_are() -> None:
    program, batches = encoder()
    before = program.fingerprint()
    values = {name: t.detach().clone() for name, t in program.parameters.items()}
    PassManager(f"{SPLIT},heal{{steps=3}}").run(program, calibration=batches)
    assert program.fingerprint() == before
    assert all(torch.equal(t, values[name]) for name, t in program.parameters.items())


def test_batch_norm_follows_the_rewritten_net() -> None:
    _, batches = make("norm")
    torch.manual_seed(0)
    model = NormNet()
    for _ in range(20):  # statistics that fit the data
        for x, _ in batches:
            model.train()(x)
    program = tl.capture(model.eval(), (batches[0][0],), dynamic_shapes="auto")
    passes = "structured-erase{sparsity=0.5},heal{method=distil,steps=40,lr=0.01}"
    after = PassManager(passes).run(program, calibration=[x for x, _ in batches])
    found = after.history[-1].statistics
    assert found["loss_after"] < 0.7 * found["loss_before"]
    assert "top1_after" in found
    assert not torch.equal(
        after.tensor("stem.1.running_var"),
        PassManager("structured-erase{sparsity=0.5}").run(program).tensor("stem.1.running_var"),
    )


def test_sparse_weights_stay_sparse() -> None:
    program, batches = encoder()

    changed = program.copy()
    with changed.edit() as edit:
        sparse = program.tensor("layers.1.3.weight").detach().clone()
        sparse[::2] = 0
        edit.set_tensor("layers.1.3.weight", sparse)
    ctx = PassContext(changed, "heal", batches, original=program)
    result = Heal(steps=10, lr=1e-2).run(changed, ctx)
    assert result.changed
    after = changed.tensor("layers.1.3.weight")
    assert int(after[::2].count_nonzero()) == 0
    assert not torch.equal(after[1::2], sparse[1::2])
    changed = program.copy()
    with changed.edit() as edit:
        edit.set_tensor("layers.1.3.weight", sparse)
    ctx = PassContext(changed, "heal", batches, original=program)
    Heal(steps=10, lr=1e-2, keep_zeros=False).run(changed, ctx)
    assert int(changed.tensor("layers.1.3.weight")[::2].count_nonzero())


def test_hidden_states_and_the_task_count_if_asked_for() -> None:
    program, batches = encoder()
    split = PassManager(SPLIT).run(program)

    def run(**options: Any) -> list[list[float]]:
        changed = split.copy()
        ctx = PassContext(
            changed, "heal", batches, lambda out, batch: out.square().mean(), original=program
        )
        result = Heal(method="distil", steps=4, **options).run(changed, ctx)
        return result.details["training"]["distil"]["losses"]  # type: ignore[no-any-return]

    plain = run()
    assert run(hidden=1.0)[0][1] > plain[0][1]
    # The outputs are unit vectors of 24: the mean of squares is 1/24.
    assert run(task=2.4)[0][1] == pytest.approx(plain[0][1] + 0.1, abs=1e-5)


def test_a_second_run_finds_the_checkpoint(tmp_path: Any) -> None:
    passes = f'{SPLIT},heal{{method=distil,steps=6,save-every=2,checkpoint="{tmp_path}"}}'
    first, _ = healed(passes)
    assert len(list(tmp_path.iterdir())) == 1
    said: list[str] = []
    program, batches = encoder()
    again = PassManager(passes).run(program, calibration=batches, seed=1, progress=said.append)
    assert "going on from step 6 of 6" in said
    for name, tensor in first.parameters.items():
        assert torch.equal(tensor, again.tensor(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("temperature=0", "temperature is 0.0, but must be positive"),
        ("hidden=-1", "hidden is -1.0, but must not be negative"),
        ("lr=-1", "lr is -1.0, but must be positive"),
        ("optimizer=Adamm", "torch.optim has no Adamm"),
        ("method=best", "method"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else "",
)
def test_impossible_options_are_refused_before_any_work(options: str, message: str) -> None:
    with pytest.raises(tl.Error, match=message):
        PassManager(f"heal{{{options}}}")
    with pytest.raises(OptionError, match="must be positive"):
        Heal(temperature=-2.0)


def test_it_needs_data_a_pipeline_and_blocks() -> None:
    program, batches = encoder()
    with pytest.raises(PreconditionError, match="needs calibration"):
        PassManager(f"{SPLIT},heal").run(program)
    with pytest.raises(PreconditionError, match="gradients are those of a loss"):
        PassManager(f"{SPLIT},heal{{task=1.0}}").run(program, calibration=batches)
    with pytest.raises(PreconditionError, match="needs the original"):
        Heal().run(program, PassContext(program, "heal", batches))
    flat = [x[:, 0].contiguous() for x in batches]
    plain = tl.capture(nn.Linear(24, 24).eval(), (flat[0],), dynamic_shapes="auto")
    with pytest.raises(tl.Error, match="no block of the program matches"):
        PassManager("low-rank-split{rank=3,method=svd},heal{method=blockwise}").run(
            plain, calibration=flat
        )


def test_the_report_shows_the_curve() -> None:
    program, batches = encoder()
    compiled = tl.compile(
        program, f"{SPLIT},heal{{steps=5}}", calibration=batches, measure_latency=False
    )
    page = compiled.report.to_html()
    assert "Loss by step of the optimizer" in page
    assert "heal: distil" in page


@pytest.mark.slow
def test_two_processes_heal_as_one_does(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = worker("heal", str(out), processes=2)
    assert done.returncode == 0, done.stderr
    found, alone = load_file(out), heal()
    assert found.keys() == alone.parameters.keys()
    assert alone.history[-1].details["training"]["distil"]["best"]["step"] > 0
    for name, tensor in alone.parameters.items():
        # Sums over samples are taken in another order, and Adam divides by small ones.
        assert torch.allclose(found[name], tensor, atol=1e-4), name


def test_passes_are_told_what_the_pipeline_was_given() -> None:
    seen: list[Any] = []

    @dataclasses.dataclass(frozen=True)
    class Look(RewritePass):
        """Remembers the original."""

        name: ClassVar[str] = "look"

        def run(self, program: tl.Program, ctx: PassContext) -> PassResult:
            seen.append((ctx.original, program))
            return PassResult(False)

    program, _ = encoder()
    PassManager([Look(), SPLIT, Look()]).run(program)
    assert [original for original, _ in seen] == [program, program]
    assert all(now is not program for _, now in seen)
