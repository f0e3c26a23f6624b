"""gptq and zeros for what is more than one matrix: experts, grouped and 3-d convolutions, ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.ir.verifying import verify
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.sweeping.sweep import relative_error
from torchlathe.passes.statistics.arriving import arrivals
from torchlathe.passes.statistics.readers import patches, readers_of
from torchlathe.passes.statistics.routed import routed_reader
from torchlathe.tools.compat import define_torchvision_ops


def _mixtral(experts: int = 4) -> tuple[nn.Module, Program, list[torch.Tensor]]:
    define_torchvision_ops()
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    data = [torch.randint(0, 60, (4, 16)) for _ in range(3)]
    return model, capture(model, (data[0],)), data


def _rows(after: Program) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in after.history[-1].details["quantised"]}


def _warnings(after: Program) -> dict[str, str]:
    told = after.history[-1].diagnostics
    return {str(d["name"]): str(d["message"]) for d in told if d["severity"] == "warning"}


def test_each_expert_has_the_moment_of_its_own_rows() -> None:
    _, program, data = _mixtral()
    site = next(s for s in find_sites(program)[0] if s.weight.endswith("0.mlp.experts.down_proj"))
    reader = routed_reader(site.calls[0])
    assert reader is not None
    (arrival,) = arrivals(program, [[x] for x in data], [reader])
    seen: dict[str, list[Any]] = {"rows": [], "ends": []}

    def observe(node: Any, value: Any) -> None:
        for key, wanted in (("rows", reader.operand), ("ends", reader.ends)):
            if node is wanted:
                seen[key].append(value)

    from torchlathe.ir.interpreting import run_flat

    with torch.no_grad():
        for x in data:
            run_flat(program, [x], observe=observe)
    for expert, moment in enumerate(arrival.moments):
        found = []
        for rows, ends in zip(seen["rows"], seen["ends"], strict=True):
            start = 0 if expert == 0 else int(ends[expert - 1])
            found.append(rows[start : int(ends[expert])].double())
        own = torch.cat(found)
        assert arrival.counts[expert] == len(own)
        torch.testing.assert_close(moment, own.T @ own / max(len(own), 1))
    # Two experts for each of the tokens.
    assert sum(arrival.counts) == 2 * sum(x.numel() for x in data)


def test_experts_are_swept_one_by_one() -> None:
    _, program, data = _mixtral()
    after = PassManager("quantize{scheme=w4a16,group=32,method=gptq}").run(
        program, calibration=data
    )
    verify(after, "full")
    rows = {n: r for n, r in _rows(after).items() if "experts" in n}
    assert len(rows) == 4
    assert all(row["output_error"] < 0.9 * row["output_error_nearest"] for row in rows.values())
    nearest = PassManager("quantize{scheme=w4a16,group=32}").run(program)
    errors = []
    with torch.no_grad():
        for found in (nearest, after):
            pairs = [(found.run(x).logits, program.run(x).logits) for x in data]
            errors.append(sum(float((new - old).square().sum()) for new, old in pairs))
    assert errors[1] < errors[0]


def test_experts_that_get_no_rows_are_rounded_and_told() -> None:
    model, _, data = _mixtral(experts=8)
    # The last experts of the first layer are hardly ever chosen.
    gate = dict(model.named_parameters())["model.layers.0.mlp.gate.weight"]
    with torch.no_grad():
        gate[5:] = 1e-3 * gate[5:] - 5 * gate[:3]
    program = capture(model, (data[0][:1],))
    few = [x[:1] for x in data[:1]]
    after = PassManager("quantize{scheme=w4a16,group=32,method=gptq}").run(program, calibration=few)
    told = _warnings(after)["model.layers.0.mlp.experts.down_proj"]
    assert "experts were rounded to nearest: fewer than 12 rows" in told
    with torch.no_grad():
        assert bool(torch.isfinite(after.run(few[0]).logits).all())


def test_zeros_in_experts_by_their_own_rows() -> None:
    _, program, data = _mixtral()
    after = PassManager("sparsify-nm{pattern=2:4}").run(program, calibration=data)
    found = {row["layer"]: row for row in after.history[-1].details["sparse"]}
    row = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert row["method"] == "sparsegpt"
    assert row["error"] < row["error_magnitude"]
    weight = after.tensor("model.layers.1.mlp.experts.gate_up_proj").detach()
    assert bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


class Video(nn.Module):
    """3-d convolutions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 16, 3, padding=1)
        self.second = nn.Conv3d(16, 16, (1, 3, 2), groups=4, stride=(1, 2, 1), dilation=(1, 1, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3, 4)))


def test_patches_of_three_dimensions() -> None:
    torch.manual_seed(0)
    model = Video().double()
    x = torch.randn(2, 3, 4, 6, 7, dtype=torch.float64)
    program = capture(model, (x,))
    readers = {r.weight: r for r in readers_of(program).values()}
    data = torch.relu(model.first(x))
    for name, value, layer in (
        ("first.weight", x, model.first),
        ("second.weight", data, model.second),
    ):
        found = patches(readers[name], value)
        assert found is not None
        groups = layer.groups
        kernel = layer.weight.reshape(groups, layer.out_channels // groups, -1)
        assert layer.bias is not None
        wanted = layer(value) - layer.bias[:, None, None, None]
        product = (found @ kernel.transpose(1, 2)).unflatten(1, (2, -1))
        product = product.permute(1, 0, 3, 2).reshape(wanted.shape)
        torch.testing.assert_close(product, wanted)


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4"])
def test_convolutions_of_three_dimensions_are_swept(scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 6, 7)
    program = capture(Video(), (x,), dynamic_shapes="auto")
    data = [torch.randn(4, 3, 4, 6, 7) for _ in range(3)]
    after = PassManager(f"quantize{{scheme={scheme},method=gptq}}").run(program, calibration=data)
    verify(after, "full")
    rows = _rows(after)
    for name in ("first.weight", "second.weight"):
        assert rows[name]["output_error"] < rows[name]["output_error_nearest"]


def test_a_tied_table_is_stored_once_and_both_readers_see_the_same() -> None:
    from tests.passes.test_quantize import tied

    model, program, data = tied()
    spec = "quantize{scheme=w4a16,group=32,method=gptq,embeddings=true}"
    after = PassManager(spec).run(program, calibration=data)
    stored = [n for n in after.entries if n.startswith(("embed", "head"))]
    assert sorted(stored) == ["embed.weight_packed", "embed.weight_scale"]
    seen: dict[str, torch.Tensor] = {}

    def observe(node: Any, value: Any) -> None:
        if "dequantize" in str(node.target) and value.shape[-1] == 64:
            seen[str(tuple(value.shape))] = value

    from torchlathe.ir.interpreting import run_flat

    with torch.no_grad():
        run_flat(after, [data[0]], observe=observe)
    table, rows = seen["(50, 64)"], seen[str((*data[0].shape, 64))]
    assert torch.equal(rows, table[data[0]])
    assert relative_error(model.embed.weight.detach(), table) < 0.02
