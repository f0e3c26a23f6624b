"""Leaving experts out: equal to a router that may not choose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchlathe as tl
from tests.passes.moe_models import EACH, TopK, batch_for, made, qwen3_moe
from torchlathe.ir import PassError, PreconditionError, Program, UnsupportedError, capture
from torchlathe.ir.verifying import check_equivalence
from torchlathe.passes import ExpertLayers, PassManager, PruneExperts
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.rewrite.experts.routers import leave_out


def run(program: Program, spec: Any, batches: Any = None) -> Program:
    return PassManager(spec).run(program, calibration=batches)


def layers_of(program: Program) -> tuple[ExpertLayer, ...]:
    return program.analysis(ExpertLayers).layers


def forbidden(program: Program, kept: dict[str, torch.Tensor]) -> Program:
    """The program at full size, in which logits of other experts are far below all else."""
    twin = program.copy()
    with twin.edit() as edit:
        for layer in layers_of(twin):
            low = torch.full((layer.choices,), -1e4)
            low[kept[layer.name]] = 0
            mask = edit.add_tensor(f"{layer.name}.low", low)
            add = edit.call(torch.ops.aten.add.Tensor, (layer.logits, mask), like=layer.logits)
            edit.replace(layer.logits, add)
    return twin


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("router", ["rows", "mask"])
def test_pruned_models_never_choose_what_was_left_out(name: str, router: str) -> None:
    _, program, batches = made(name)
    pruned = run(program, f"prune-experts{{experts=3,allocation=uniform,router={router}}}", batches)
    assert pruned.history[0].statistics["experts_per_layer"] == "3, 3"
    kept = {}
    for layer, after in zip(layers_of(program), layers_of(pruned), strict=True):
        first, axis = next(iter(layer.tensors.items()))
        kept[layer.name] = pruned.kept[first][axis]
        assert after.experts == 3
        assert after.choices == (3 if router == "rows" else 4)
        assert (after.table is None) == (router == "rows")
        for tensor, axis in layer.tensors.items():
            whole = program.tensor(tensor).index_select(axis, kept[layer.name])
            assert torch.equal(pruned.tensor(tensor), whole)
    # A probability of exp(-1e4) is zero in float64 too, and nothing else differs.
    found = check_equivalence(forbidden(program, kept), pruned, inputs=((), batches[1]))
    assert found.passed, found.detail


@pytest.mark.parametrize(
    ("experts", "top_k", "stay"), [(4, 2, [0, 2, 3]), (3, 1, [1]), (5, 2, [1, 4])]
)
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "mask"])
def test_pruned_layers_are_those_written_out(
    experts: int, top_k: int, stay: list[int], rows: bool
) -> None:
    torch.manual_seed(0)
    model = TopK(experts, top_k).double()
    x = torch.randn(6, 6, dtype=torch.float64)
    program = capture(model, (x,))
    (layer,) = layers_of(program)
    kept = torch.tensor(stay)
    leave_out(program, {layer: kept}, rows=rows, by="", told=[])
    # float64; sums in another order.
    torch.testing.assert_close(program.run(x), model.written_out(x, stay), rtol=1e-9, atol=1e-9)
    assert program.tensor("up").shape[0] == len(stay)
    assert program.tensor("router.bias").shape[0] == (len(stay) if rows else experts)


def test_logits_that_are_returned_keep_their_shape() -> None:
    class Told(TopK):
        def forward(self, x: torch.Tensor) -> Any:
            logits = self.router(x)
            return self.mixed(x, logits), logits

    torch.manual_seed(0)
    model = Told()
    x = torch.randn(6, 6)

    program = capture(model, (x,))
    assert len(layers_of(program)) == 1
    pruned = run(program, "prune-experts{experts=3}", [x])
    out, logits = pruned.run(x)
    assert logits.shape == (6, 4)
    torch.testing.assert_close(logits, program.run(x)[1])
    assert out.shape == (6, 6)


def test_merged_experts_can_be_left_out_and_pruned_ones_merged() -> None:
    _, program, batches = made("mixtral")
    for pipeline in (
        "merge-experts{experts=3,allocation=uniform},prune-experts{experts=2,allocation=uniform}",
        "prune-experts{experts=3,allocation=uniform},merge-experts{experts=2,allocation=uniform}",
    ):
        both = run(program, pipeline, batches)
        text = pipeline.replace("prune-experts{", "prune-experts{router=mask,")
        masked = run(program, text, batches)
        for layer in layers_of(both):
            assert layer.experts == 2
            assert layer.choices < 4
        found = check_equivalence(both, masked, inputs=((), batches[0]))
        assert found.passed, found.detail


@pytest.mark.parametrize("by", ["usage", "outputs", "reap"])
def test_experts_that_nobody_picks_go_first(by: str) -> None:
    torch.manual_seed(0)
    model = TopK(experts=5, top_k=2)
    with torch.no_grad():
        model.router.bias[3] = -1e3
    x = torch.randn(40, 6)
    program = capture(model, (x,))
    pruned = run(program, PruneExperts(4, by=by), [x])  # type: ignore[arg-type]
    assert pruned.kept["up"][0].tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(pruned.run(x), program.run(x))


def test_gates_that_are_not_normalised_follow_the_softmax_of_what_is_left() -> None:
    torch.manual_seed(0)
    model = qwen3_moe(norm_topk_prob=False)
    batch = batch_for(model)
    program = capture(model, (), batch)
    rows, mask = (
        run(program, f"prune-experts{{router={router}}}", [batch]) for router in ("rows", "mask")
    )
    found = check_equivalence(rows, mask)
    assert found.passed, found.detail


def test_a_row_cannot_pick_more_experts_than_are_left() -> None:
    _, program, batches = made("mixtral")
    with pytest.raises(PassError, match="but rows pick 2, 2") as caught:
        run(program, "prune-experts{experts=1}", batches)
    assert isinstance(caught.value.__cause__, PreconditionError)
    _, program, batches = made("switch")
    alone = run(program, "prune-experts{experts=1}", batches)
    assert alone.history[0].statistics["experts_per_layer"] == "1, 1"


def test_pruned_models_are_saved_and_loaded(tmp_path: Any) -> None:
    model, _, batches = made("qwen3")
    for router in ("rows", "mask"):
        compiled = tl.compile(
            model,
            passes=[PruneExperts(0.5, router=router), "structured-erase{sparsity=0.2}"],  # type: ignore[arg-type]
            example_kwargs=batches[0],
            calibration=batches,
        )
        with pytest.raises(UnsupportedError, match="new values"):
            compiled.zeroed_reference(model)
        compiled.save(tmp_path / f"{router}.tl")
        loaded = tl.load(tmp_path / f"{router}.tl")
        assert torch.equal(loaded(**batches[1]).logits, compiled(**batches[1]).logits)


def test_pruned_mixtral_is_a_smaller_mixtral() -> None:
    model, _, batches = made("mixtral")
    compiled = tl.compile(
        model,
        passes="prune-experts{experts=3,allocation=uniform}",
        example_kwargs=batches[0],
        calibration=batches,
        backend="module",
    )
    small: Any = compiled.module
    assert type(compiled.module) is type(model)
    assert small.model.layers[0].mlp.experts.num_experts == 3
    with torch.no_grad():
        # The same sums in float32, by the model's own code.
        torch.testing.assert_close(
            small(**batches[1]).logits, compiled(**batches[1]).logits, rtol=1e-4, atol=1e-5
        )
