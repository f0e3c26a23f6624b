"""Experts of a mixture as factors: one grouped product becomes two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchlathe as tl
from tests.passes.moe_models import mixtral, qwen3_moe
from torchlathe.passes import LowRankSplit, PassManager
from torchlathe.passes.rewrite.factorising.sites import find_sites

RANK = 3


def batches(count: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (2, 6), generator=generator)} for _ in range(count)]


def captured(make: Any) -> tuple[tl.Program, list[dict[str, Any]], Any]:
    model, data = make(), batches()
    return tl.capture(model, (), data[0]), data, model


@pytest.mark.parametrize("make", [mixtral, qwen3_moe], ids=["mixtral", "qwen3"])
def test_experts_of_low_rank_are_split_without_loss(make: Any) -> None:
    program, data, model = captured(make)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "experts" in name and tensor.dim() == 3:
                left, values, right = torch.linalg.svd(tensor.double(), full_matrices=False)
                product = left[..., :RANK] * values[:, None, :RANK] @ right[:, :RANK]
                tensor.copy_(product.float())
    options = LowRankSplit(rank=RANK, include=("*experts*",))
    result = PassManager([options]).run(program, calibration=data)
    names = [name for name in result.parameters if "experts" in name]
    assert names
    assert all(
        name.endswith((".down.weight", ".up.weight")) or "_down" in name or "_up" in name
        for name in names
    )
    ranks = {result.tensor(n).shape[1] for n in names if "down.weight" in n}
    assert ranks == {RANK}
    got, want = (p.run(**data[1]) for p in (result, program))
    # Weights of rank 3 up to the rounding of float32.
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    grouped = [n for n in result.nodes if "grouped_mm" in str(n.target)]
    assert len(grouped) == 2 * sum("grouped_mm" in str(n.target) for n in program.nodes)


def test_merged_experts_are_split_and_saved(tmp_path: Any) -> None:
    model, data = mixtral(), batches()
    compiled = tl.compile(
        model,
        passes="merge-experts{experts=0.5},low-rank-split{share=0.6}",
        example_kwargs=data[0],
        example_inputs=(),
        calibration=data,
    )
    count = sum(p.numel() for p in compiled.parameters())
    assert count < sum(p.numel() for p in model.parameters()) / 1.5
    compiled.save(tmp_path / "small.tl")
    loaded = tl.load(tmp_path / "small.tl")
    got, want = (run(**data[1])[0] for run in (loaded, compiled))
    assert torch.equal(got, want)


def test_ranks_of_experts_can_be_erased() -> None:
    program, data, _ = captured(mixtral)
    spec = "low-rank-split{rank=6,include=[*experts*]}"
    split = PassManager(spec).run(program, calibration=data)
    down = next(n for n in split.parameters if "experts" in n and "down.weight" in n)
    families = split.analysis(tl.passes.ZeroInvariantGroups)
    (rank,) = [f for f in families.of(down, 1) if f.prunable]
    smaller = PassManager([tl.passes.StructuredErase(sparsity={rank.name: 0.5})]).run(split)
    assert smaller.tensor(down).shape[1] == 3
    assert smaller.history[-1].verification["passed"]


def test_experts_that_are_read_otherwise_are_left_alone() -> None:
    program, _, _ = captured(lambda: mixtral("batched_mm"))
    sites, reasons = find_sites(program)
    assert not any(site.kind == "experts" for site in sites)
    assert any("experts" in name for name in reasons)
