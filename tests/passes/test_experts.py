"""Finding experts, statistics of routing, and merging: exact where members are the same."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import torchlathe as tl
from tests.passes.moe_models import EACH, MODELS, TopK, batch_for, made, mixtral, switch
from torchlathe.ir import OptionError, PassError, PreconditionError, Program, capture
from torchlathe.ir.verifying import check_equivalence
from torchlathe.passes import ExpertLayers, MergeExperts, PassContext, PassManager
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.analysis.routing import collect_routing
from torchlathe.passes.rewrite.experts.grouping import (
    budgets,
    clustered_classes,
    kept_experts,
    led_classes,
)
from torchlathe.passes.rewrite.experts.merging import merge_weights
from torchlathe.passes.statistics import Calibration

# Both sides run in float64 and differ in the order of sums at most.
EXACT = 1e-9


def run(program: Program, spec: Any, batches: Any = None) -> Program:
    return PassManager(spec).run(program, calibration=batches)


def error(program: Program, spec: Any, batches: Any = None) -> float:
    """The relative error that the manager measured in float64, of the last pass."""
    record = run(program, spec, batches).history[-1]
    assert record.changed
    return float(record.verification["max_rel_error"])


def messages(program: Program) -> str:
    return "; ".join(d["message"] for record in program.history for d in record.diagnostics)


def layers_of(program: Program) -> tuple[ExpertLayer, ...]:
    return program.analysis(ExpertLayers).layers


# -- finding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_models_are_found(name: str) -> None:
    _, program, _ = made(name)
    found = program.analysis(ExpertLayers)
    assert not found.rejected
    assert len(found.layers) == 2
    for layer in found.layers:
        assert layer.experts == layer.choices == 4
        assert layer.top_k == (1 if name == "switch" else 2)
        assert layer.table is None
        assert {program.tensor(n).shape[axis] for n, axis in layer.tensors.items()} == {4}
        assert len(layer.tensors) == 2
        (hidden,) = layer.hidden
        assert hidden.atom.extent == 24
        (router,) = layer.router
        assert ".gate." in router or "classifier" in router
        assert layer.logits.meta["val"].shape[-1] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba"],
)
def test_layers_of_models_that_are_not_in_the_table_are_found(name: str) -> None:
    from torchlathe.tools.bench.coverage.models_text import TEXT

    entry = next(e for e in TEXT if e.name == f"transformers/{name}")
    args, kwargs = entry.example()
    program = capture(entry.build(), args, kwargs, dynamic_shapes=entry.dynamic_shapes)
    layers = layers_of(program)
    assert layers
    assert all(bool(layer.hidden) == (name != "gpt_oss") for layer in layers)
    merged = run(program, "merge-experts{experts=0.5,balance=true}")
    assert merged.history[0].changed


def test_biases_of_experts_and_of_the_router_belong_to_the_layer() -> None:
    program = capture(TopK(), (torch.randn(7, 6),), dynamic_shapes="auto")
    (layer,) = layers_of(program)
    assert dict(layer.tensors) == {"up": 0, "up_bias": 0, "down": 0}
    assert dict(layer.router) == {"router.weight": 0, "router.bias": 0}
    (hidden,) = layer.hidden
    assert sorted(hidden.places) == [("down", 2), ("up", 1), ("up_bias", 1)]


class Dense(nn.Module):
    """Experts that all rows go through, with the choice as a one-hot code."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = nn.functional.one_hot(self.router(x).argmax(-1), 4).to(x.dtype)
        return torch.einsum("te,td,edf->tf", code, x, self.weight)


class Codebook(nn.Module):
    """A choice that picks vectors, which is quantisation and no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[self.near(x).argmax(-1)]


class Untied(nn.Module):
    """Experts of which something else reads the weights as well."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = TopK()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x) + self.moe.down.sum()


class Gathered(TopK):
    """Gates that are looked up by the very numbers that pick the weights."""

    def mixed(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.softmax(-1)
        numbers = scores.topk(1, dim=-1).indices.flatten()
        gates = scores.flatten()[torch.arange(len(x)) * scores.shape[-1] + numbers]
        hidden = torch.bmm(self.up[numbers][:, :5], x.unsqueeze(-1))
        return torch.bmm(self.down[numbers], hidden).squeeze(-1) * gates.unsqueeze(-1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Gathered(), "reads the numbers of the experts for something else"),
        (Dense(), "the numbers of the choice go into"),
        (Untied(), "read by .* too, which no routing leads to"),
        (Codebook(), "no topk or argmax of a router picks weights"),
        (nn.Linear(6, 6), "no topk or argmax of a router picks weights"),
    ],
    ids=["gates-by-number", "dense", "read-elsewhere", "codebook", "linear"],
)
@pytest.mark.parametrize("name", ["merge-experts", "prune-experts"])
def test_what_is_no_layer_of_experts_is_refused(model: nn.Module, reason: str, name: str) -> None:
    program = capture(model, (torch.randn(7, 6),))
    assert not layers_of(program)
    with pytest.raises(PassError, match=reason) as caught:
        run(program, name, [torch.randn(7, 6)])
    assert isinstance(caught.value.__cause__, PreconditionError)


def test_the_analysis_stands_in_a_pipeline() -> None:
    _, program, _ = made("mixtral")
    (record,) = run(program, "expert-layers").history
    assert record.statistics == {"layers": 2, "experts": 8, "not understood": 0}


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_of_routing_are_those_of_all_rows_at_once() -> None:
    torch.manual_seed(0)
    model = TopK(experts=5, top_k=2).double()
    batches = [torch.randn(n, 6, dtype=torch.float64) for n in (9, 4, 11)]
    program = capture(model, (batches[0],), dynamic_shapes="auto")
    layers = layers_of(program)
    found = collect_routing(program, PassContext(program, calibration=batches), layers)[layers[0]]
    x = torch.cat(batches)
    logits = model.router(x)
    gates, chosen = logits.softmax(-1).topk(2)
    assert found.rows == 24
    assert torch.equal(found.counts, torch.bincount(chosen.flatten(), minlength=5).double())
    assert float(found.usage.sum()) == pytest.approx(1, abs=1e-15)
    cosines = nn.functional.cosine_similarity(logits.T[:, None], logits.T[None], dim=-1)
    torch.testing.assert_close(found.similarity, (cosines + 1) / 2, atol=EXACT, rtol=0)
    totals = torch.zeros(5, dtype=torch.float64)
    for row, gate, numbers in zip(x, gates, chosen, strict=True):
        for g, e in zip(gate, numbers.tolist(), strict=True):
            a, b = (model.up[e] @ row + model.up_bias[e]).chunk(2)
            totals[e] += (g * (model.down[e] @ (nn.functional.silu(a) * b))).norm()
    saliency = totals / found.counts.clamp_min(1)
    assert found.saliency is not None
    torch.testing.assert_close(found.saliency, saliency.detach(), atol=EXACT, rtol=0)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("name", ["mixtral", "mixtral-batched"])
def test_interrupted_statistics_of_routing_go_on(name: str, limit: Any, tmp_path: Any) -> None:
    _, program, batches = made(name)
    layers = layers_of(program)

    class Stops:
        def __iter__(self) -> Any:
            yield from batches[:2]
            raise Interrupted

    def collected(data: Any, said: list[str] | None = None) -> Any:
        progress = None if said is None else said.append
        ctx = PassContext(program, calibration=data, progress=progress)
        return collect_routing(program, ctx, layers)

    want = collected(batches)
    settings: dict[str, Any] = {"resume": tmp_path, "save_every": 1, "limit_bytes": limit}
    with pytest.raises(Interrupted):
        collected(Calibration(Stops(), **settings))
    said: list[str] = []
    got = collected(Calibration(batches, **settings), said)
    assert [text.partition(" (")[0] for text in said] == [
        "statistics: batch 1 was seen before",
        "statistics: batch 2 was seen before",
        "statistics: batch 3 of 3",
    ]
    for layer in layers:
        ours, theirs = want[layer], got[layer]
        assert ours.rows == theirs.rows == 3 * 16
        for field in ("counts", "picks", "moments", "slots", "outputs"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_models_do_not_depend_on_how_experts_are_read(name: str) -> None:
    _, program, batches = made(name)
    layers = layers_of(program)
    found = collect_routing(program, PassContext(program, calibration=batches), layers)
    for layer in layers:
        sums = found[layer]
        assert sums.rows == 3 * 16
        assert float(sums.usage.sum()) == pytest.approx(1, abs=1e-15)
        assert sums.saliency is not None
        if name == "mixtral":
            _, other, _ = made("mixtral-batched")
            context = PassContext(other, calibration=batches)
            twins = collect_routing(other, context, layers_of(other))
            (twin,) = (s for x, s in twins.items() if x.name == layer.name)
            assert torch.equal(twin.counts, sums.counts)
            # float32 activations, summed in another order.
            torch.testing.assert_close(twin.saliency, sums.saliency, rtol=1e-4, atol=1e-6)


# -- budgets and classes ---------------------------------------------------------------------------

_USAGES = st.lists(
    st.lists(st.integers(0, 5), min_size=2, max_size=6).map(
        lambda counts: torch.tensor(counts, dtype=torch.float64) / max(1, sum(counts))
    ),
    min_size=1,
    max_size=4,
)


@hypothesis.given(_USAGES, st.sampled_from(["global", "uniform"]), st.integers(1, 2))
def test_budgets_are_met_and_grow_with_the_total(
    usages: list[torch.Tensor], allocation: str, floor: int
) -> None:
    floors = [floor] * len(usages)
    before = floors
    for total in range(sum(floors), sum(map(len, usages)) + 1):
        counts = budgets(usages, total, allocation=allocation, floors=floors)
        assert sum(counts) == total  # whatever is tied
        for low, count, usage in zip(before, counts, usages, strict=True):
            assert low <= count <= len(usage)
        before = counts


def test_a_global_budget_goes_where_experts_are_used() -> None:
    even, one = torch.tensor([0.25, 0.25, 0.25, 0.25]), torch.tensor([0.97, 0.01, 0.01, 0.01])
    assert budgets([even, one], 5, allocation="global", floors=[1, 1]) == [4, 1]
    assert budgets([even, one], 5, allocation="uniform", floors=[1, 1]) == [3, 2]


@hypothesis.given(st.integers(2, 7), st.data())
def test_classes_cover_all_experts_and_are_led_by_the_most_used(
    experts: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    usage = torch.rand(experts, generator=generator)
    similarity = torch.rand(experts, experts, generator=generator)
    for group in (led_classes, clustered_classes):
        found = group(similarity, usage, count)
        assert found.numbers[found.leaders].tolist() == list(range(count))
        assert found.leaders.tolist() == sorted(found.leaders.tolist())
        for number, leader in enumerate(found.leaders):
            members = (found.numbers == number).nonzero().flatten()
            assert usage[members].max() == usage[leader]
    led = led_classes(similarity, usage, count)
    assert torch.equal(led.leaders, kept_experts(usage, count))
    for expert in set(range(experts)) - set(led.leaders.tolist()):
        best = similarity[expert, led.leaders].max()
        assert similarity[expert, led.leaders[led.numbers[expert]]] == best


@hypothesis.given(st.lists(st.integers(0, 2), min_size=3, max_size=9), st.randoms())
def test_clusters_find_groups_that_are_planted(groups: list[int], random: Any) -> None:
    of = torch.tensor([*range(3), *groups])
    similarity = (of[:, None] == of[None, :]).double() * 0.5
    similarity += 0.1 * torch.rand(len(of), len(of))
    usage = torch.tensor([random.random() for _ in of])
    found = clustered_classes(similarity, usage, 3)
    assert torch.equal(found.numbers[:, None] == found.numbers, of[:, None] == of)


@hypothesis.given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_weights_of_a_merge_are_a_mean(counts: list[int]) -> None:
    usage = torch.tensor(counts, dtype=torch.float64) / max(1, sum(counts))
    found = {w: merge_weights(usage, w) for w in ("frequency", "uniform", "reversed")}  # type: ignore[arg-type]
    for weights in found.values():
        assert bool((weights >= 0).all())
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert sorted(found["reversed"].tolist()) == pytest.approx(sorted(found["frequency"].tolist()))
    assert int(found["reversed"].argmin()) == 0 or max(counts) >= counts[0]


# -- merging ---------------------------------------------------------------------------------------


def plant(program: Program, copies: dict[int, int], *, shuffle: bool) -> Program:
    """The program with some experts as copies of others, with their hidden units shuffled."""
    program = program.copy()
    with program.edit() as edit:
        for layer in layers_of(program):
            up, down = (program.tensor(name).detach().clone() for name in layer.tensors)
            for copy, source in copies.items():
                order = torch.randperm(24) if shuffle else torch.arange(24)
                rows = torch.cat([order + start for start in range(0, up.shape[1], 24)])
                up[copy], down[copy] = up[source][rows], down[source][:, order]
            for name, tensor in zip(layer.tensors, (up, down), strict=True):
                edit.set_tensor(name, tensor)
    return program


@pytest.mark.parametrize("name", EACH)
def test_merging_permuted_copies_loses_nothing_once_they_are_aligned(name: str) -> None:
    _, program, batches = made(name)
    program = plant(program, {2: 0, 3: 1}, shuffle=True)
    spec = "merge-experts{similarity=weight,grouping=clusters,allocation=uniform%s}"
    merged = run(program, spec % "", batches)
    assert merged.history[0].verification["max_rel_error"] < 1e-6
    assert merged.history[0].statistics["experts_per_layer"] == "2, 2"
    for layer in layers_of(merged):
        slots = layer.slots(merged).tolist()
        assert slots[0] == slots[2] != slots[1] == slots[3]
    assert error(program, spec % ",align=false", batches) > 1e-2


@pytest.mark.parametrize(
    ("weighting", "similarity"),
    [("frequency", "router-logits"), ("uniform", "weight"), ("reversed", "random")],
)
def test_copies_of_one_expert_merge_into_it_however_they_are_weighed(
    weighting: str, similarity: str
) -> None:
    _, program, batches = made("qwen3")
    program = plant(program, {1: 0, 2: 0, 3: 0}, shuffle=True)
    spec = f"merge-experts{{experts=2,similarity={similarity},weighting={weighting}}}"
    assert error(program, spec, batches) < 1e-6


def test_merging_identical_experts_needs_no_alignment() -> None:
    _, program, batches = made("qwen3")
    program = plant(program, {1: 0, 2: 0, 3: 0}, shuffle=False)
    assert error(program, "merge-experts{experts=1,align=false}", batches) < 1e-6


@pytest.mark.parametrize(
    ("name", "experts"), [("mixtral", 1), ("qwen3", 2), ("mixtral-batched", 2), ("switch", 3)]
)
def test_a_row_that_picks_two_members_counts_both_gates(name: str, experts: int) -> None:
    """The full-size model in which each expert has the weights of its class is the same."""
    _, program, batches = made(name)
    merged = run(program, MergeExperts(experts, allocation="uniform"), batches)
    twin = program.copy()
    with twin.edit() as edit:
        for layer, after in zip(layers_of(program), layers_of(merged), strict=True):
            assert after.table is not None
            assert after.experts == experts
            assert after.choices == 4
            for tensor, axis in layer.tensors.items():
                full = merged.tensor(tensor).detach().index_select(axis, after.slots(merged))
                edit.set_tensor(tensor, full)
    found = check_equivalence(twin, merged, inputs=((), batches[1]))
    assert found.passed, found.detail


def test_merged_weights_stay_in_the_hull_of_their_members() -> None:
    _, program, batches = made("mixtral")
    merged = run(program, MergeExperts(2, align=False, allocation="uniform"), batches)
    for layer, after in zip(layers_of(program), layers_of(merged), strict=True):
        slots = after.slots(merged)
        for name in layer.tensors:
            full = program.tensor(name).detach()
            for number, mean in enumerate(merged.tensor(name).detach()):
                members = full[slots == number]
                assert bool((mean <= members.amax(0) + 1e-7).all())  # an ulp of float32
                assert bool((mean >= members.amin(0) - 1e-7).all())


def test_experts_that_stay_alone_keep_every_bit() -> None:
    _, program, batches = made("mixtral")
    merged = run(program, MergeExperts(3, allocation="uniform"), batches)
    for layer, after in zip(layers_of(program), layers_of(merged), strict=True):
        slots = after.slots(merged)
        for number in range(3):
            members = (slots == number).nonzero().flatten()
            if len(members) == 1:
                for name in layer.tensors:
                    whole = program.tensor(name)[members[0]]
                    assert torch.equal(merged.tensor(name)[number], whole)


def test_merging_twice_composes_the_tables() -> None:
    _, program, batches = made("qwen3")
    once = run(program, "merge-experts{experts=3,allocation=uniform}", batches)
    twice = run(once, "merge-experts{experts=2,allocation=uniform}", batches)
    for first, second in zip(layers_of(once), layers_of(twice), strict=True):
        assert second.table == first.table
        assert second.experts == 2
        pairs = set(zip(first.slots(once).tolist(), second.slots(twice).tolist(), strict=True))
        assert len(pairs) == 3  # each of the three went to one of the two
    assert sum("expert_of_choice" in name for name in twice.entries) == 2


def test_as_many_experts_as_there_are_change_nothing() -> None:
    _, program, batches = made("mixtral")
    same = run(program, "merge-experts{experts=4}", batches)
    assert not same.history[0].changed
    assert "all experts stay" in messages(same)


def test_merged_experts_can_be_erased_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = mixtral()
    batch = batch_for(model)
    compiled = tl.compile(
        model,
        passes="merge-experts{experts=0.5},structured-erase{sparsity=0.3}",
        example_kwargs=batch,
        calibration=[batch],
        verify="full",
    )
    assert [record.changed for record in compiled.program.history] == [True, True]
    units = {layer.hidden[0].atom.extent for layer in layers_of(compiled.program)}
    assert max(units) < 24
    compiled.save(tmp_path / "merged.tl")
    loaded = tl.load(tmp_path / "merged.tl")
    assert torch.equal(loaded(**batch).logits, compiled(**batch).logits)


@pytest.mark.parametrize("remainder", [0.0, 0.2])
def test_merged_experts_become_low_rank_plus_sparse(remainder: float, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = mixtral()
    batches = [batch_for(model, seed) for seed in range(3)]
    split = f"low-rank-split{{share=0.6,remainder={remainder},include=[*experts*]}}"
    compiled = tl.compile(
        model,
        f"merge-experts{{experts=0.5,allocation=uniform}},{split}",
        example_kwargs=batches[0],
        calibration=batches,
        measure_latency=False,
    )
    merged, after = (record.parameters_after for record in compiled.program.history)
    assert after < merged < compiled.program.history[0].parameters_before
    names = {name.rpartition("_")[2] for name in compiled.program.parameters if "experts" in name}
    assert {"down.weight", "up.weight"} <= names
    assert ("rows.weight" in names) == (remainder > 0)
    compiled.save(tmp_path / "small.tl")
    loaded = tl.load(tmp_path / "small.tl")
    found = compiled(**batches[0]).logits
    assert torch.isfinite(found).all()
    assert torch.equal(loaded(**batches[0]).logits, found)


def test_gradients_reach_merged_experts() -> None:
    _, program, batches = made("mixtral")
    merged = run(program, "merge-experts", batches)
    inputs: Any = batches[0]
    merged.run(**inputs).logits.sum().backward()
    for layer in layers_of(merged):
        for name in layer.tensors:
            tensor = merged.tensor(name)
            assert tensor.requires_grad
            assert tensor.grad is not None
            assert float(tensor.grad.abs().max()) > 0


def test_merging_keeps_the_dtype() -> None:
    torch.manual_seed(0)
    model = mixtral().bfloat16()
    batch = batch_for(model)
    merged = run(capture(model, (), batch), "merge-experts", [batch])
    for layer in layers_of(merged):
        assert {merged.tensor(name).dtype for name in layer.tensors} == {torch.bfloat16}


def test_the_caller_s_model_stays_as_it_was() -> None:
    model, program, batches = made("switch")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(program, "merge-experts{experts=1}", batches)
    run(program, "prune-experts{experts=1}", batches)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merge-experts", "prune-experts"])
@pytest.mark.parametrize("experts", ["0", "-1", "-0.5"])
def test_no_expert_at_all_is_refused_before_any_work(name: str, experts: str) -> None:
    with pytest.raises(OptionError, match="at least one expert has to stay"):
        PassManager(f"{name}{{experts={experts}}}")


@pytest.mark.parametrize("name", ["merge-experts", "prune-experts"])
def test_more_experts_than_there_are_is_refused(name: str) -> None:
    _, program, batches = made("mixtral")
    with pytest.raises(PassError, match="more than the 8 experts that 2 layers have"):
        run(program, f"{name}{{experts=5}}", batches)


def test_without_calibration_the_example_inputs_do_with_a_warning() -> None:
    _, program, _ = made("mixtral")
    merged = run(program, "merge-experts")
    assert "no calibration data was given" in messages(merged)


def test_a_program_without_values_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.manual_seed(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = TopK()
        program = capture(model, (torch.randn(7, 6),))
    assert len(layers_of(program)) == 1  # it can be analysed all the same
    with pytest.raises(PassError, match="a program that runs"):
        run(program, "merge-experts")


def test_options_are_read_from_text() -> None:
    text = "merge-experts{experts=3.0,allocation=uniform,similarity=weight,align=false}"
    (item,) = PassManager(text).passes
    assert item == MergeExperts(3, "uniform", "weight", align=False)
    assert item.spec() == text
    assert MergeExperts().spec() == "merge-experts"


# -- Switch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_stacked_switch_layers_compute_what_the_loop_does(capacity: int) -> None:
    torch.manual_seed(0)
    loop = switch(stacked=False, expert_capacity=capacity)
    torch.manual_seed(0)
    stacked = switch(expert_capacity=capacity)
    batch = batch_for(loop)
    with torch.no_grad():
        # float32, with sums in another order.
        torch.testing.assert_close(
            stacked(**batch).logits, loop(**batch).logits, rtol=1e-4, atol=1e-5
        )


def test_models_without_switch_layers_are_not_stacked() -> None:
    from torchlathe.tools.stacked_experts import stack_switch_experts

    with pytest.raises(ValueError, match="no SwitchTransformersSparseMLP"):
        stack_switch_experts(nn.Linear(2, 2).eval())
    with pytest.raises(ValueError, match="training mode"):
        stack_switch_experts(nn.Linear(2, 2))
