"""The analysis: what it finds and predicts, and that it leaves everything as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.test_curvature import (
    NETS,
    problem,
    squared,
    true_gauss_newton,
    true_hessian,
)
from torchlathe.ir import OptionError, PassError, PreconditionError, Program, capture
from torchlathe.passes import (
    Exactness,
    HessianSensitivity,
    PassContext,
    PassManager,
    PassResult,
    RewritePass,
    ZeroInvariantGroups,
)
from torchlathe.passes.analysis.curvature import (
    LayerCurvature,
    Objective,
    Products,
    Sensitivity,
    dense,
    low_rank_delta,
    quantise_delta,
)
from torchlathe.passes.statistics import collect_layers


def analysed(
    make: Callable[[], nn.Module], shape: tuple[int, ...], loss: Any = None, **options: Any
) -> Sensitivity:
    program, ctx = problem(make, shape) if loss is None else problem(make, shape, loss)
    return ctx_analysis(program, ctx, **options)


def ctx_analysis(program: Program, ctx: PassContext, **options: Any) -> Sensitivity:
    options = {"rows": 0, **options}
    return HessianSensitivity(**options).on(program, calibration=ctx.calibration, loss=ctx.loss)


def random_delta(s: Sensitivity, size: float, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = s.objective.parameters()
    return {
        n: size * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in values.items()
        if not names or n in names
    }


# -- Kronecker factors ---------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["weight", "both"])
def test_factors_are_exact_for_one_linear_layer_with_squared_errors(over: str) -> None:
    # Every draw has its own signs per sample, so each output in turn gives G exactly; and H of the
    # outputs is the same for every sample, so that G (x) A loses nothing.
    s = analysed(lambda: nn.Linear(4, 3), (4,), squared, draws=0, rescale=False)
    delta = random_delta(s, 1.0, "weight") if over == "weight" else random_delta(s, 1.0)
    exact = s.predict(delta, "hessian")
    found = s.predict(delta, "kfac")
    assert found.second == pytest.approx(exact.second, rel=1e-9)
    assert found.first == pytest.approx(exact.first, rel=1e-9)
    (layer,) = s.layers.values()
    assert layer is s.layer(layer.node)
    assert layer.bias == "bias"
    # The trace and the diagonal are those of the block.
    block = true_hessian(s.objective.only(["weight"]))
    assert layer.trace == pytest.approx(float(block.trace()), rel=1e-9)
    assert layer.top == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-9)
    diagonal = layer.diagonal(torch.Size((3, 4)))
    torch.testing.assert_close(diagonal.flatten(), block.diagonal(), rtol=1e-9, atol=1e-12)


def test_factors_are_exact_for_one_sample_of_a_linear_layer_with_any_loss() -> None:
    # With one sample per batch and one batch, GGN = x x' (x) H whatever H is.
    torch.manual_seed(0)
    batches = [(torch.randn(1, 4).double(), torch.tensor([2]))]
    program = capture(nn.Linear(4, 3).double(), (batches[0][0],))
    ctx = PassContext(program, "test", batches, lambda o, b: F.cross_entropy(o, b[1]))
    s = ctx_analysis(program, ctx, draws=0, rescale=False)
    delta = random_delta(s, 1.0)
    # 3 outputs: Lanczos spans them all; the root at the zero eigenvalue costs half of the digits.
    assert s.predict(delta, "kfac").second == pytest.approx(
        s.predict(delta, "ggn").second, rel=1e-6
    )


@pytest.mark.parametrize("net", NETS)
def test_quadratic_is_the_trace_that_it_says_and_positive(net: str) -> None:
    s = analysed(*NETS[net], draws=2)
    for layer in s.layers.values():
        weight = s.objective.parameters()[layer.weight]
        dW = torch.randn_like(weight)
        D = layer.moments.weight_matrix(dW)
        product = layer.outputs @ D @ layer.inputs @ D.mT
        trace = float(torch.diagonal(product, dim1=1, dim2=2).sum())
        assert layer.quadratic(dW) == pytest.approx(trace, rel=1e-9)
        assert trace >= 0
        for factor in (layer.inputs, layer.outputs):
            assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()
        torch.testing.assert_close(layer.moments.weight_from(D, weight.shape), dW)


def test_the_bias_is_one_more_feature() -> None:
    s = analysed(*NETS["conv"], draws=2)
    for layer in s.layers.values():
        assert layer.bias is not None
        weight = torch.randn_like(s.objective.parameters()[layer.weight])
        bias = torch.randn_like(s.objective.parameters()[layer.bias])
        D = torch.cat([layer.moments.weight_matrix(weight), bias.reshape(1, -1, 1)], 2)
        mean = layer.mean[:, :, None]
        A = torch.cat(
            [torch.cat([layer.inputs, mean], 2), nn.functional.pad(mean.mT, (0, 1), value=1)], 1
        )
        wanted = float(torch.diagonal((layer.outputs @ D @ A @ D.mT)[0]).sum())
        assert layer.quadratic(weight, bias) == pytest.approx(wanted, rel=1e-9)
        assert float(layer.row_products(weight, bias).sum()) >= 0
        # All rows together are the whole weight and bias.
        assert float(layer.row_products(weight, bias).sum()) == pytest.approx(wanted, rel=1e-9)
        whole = layer.quadratic(weight)
        assert float(layer.column_products(weight).sum()) == pytest.approx(whole, rel=1e-9)


def test_rescaled_factors_have_the_trace_of_the_draws() -> None:
    s = analysed(*NETS["conv"], draws=3)
    for layer in s.layers.values():
        assert layer.trace == pytest.approx(s.trace(layer.weight, matrix="ggn").value, rel=1e-9)


def test_factors_of_the_collector_are_of_the_same_kind() -> None:
    program, ctx = problem(*NETS["mlp"])
    s = ctx_analysis(program, ctx)
    for node, moments in collect_layers(program, ctx, gradients=True).items():
        theirs, ours = LayerCurvature.of(moments), s.layer(node)
        torch.testing.assert_close(theirs.inputs, ours.inputs)
        assert theirs.outputs.shape == ours.outputs.shape
        assert (theirs.weight, theirs.bias) == (ours.weight, ours.bias)


def test_fewer_rows_are_as_good_on_average() -> None:
    program, ctx = problem(*NETS["conv"])
    whole = ctx_analysis(program, ctx, draws=32, rescale=False)
    few = ctx_analysis(program, ctx, draws=32, rescale=False, rows=24)
    for name, layer in whole.layers.items():
        # Half of 25 positions x 6 samples or less; 64 draws of rows leave 10 to 20 % of noise.
        assert few.layers[name].trace == pytest.approx(layer.trace, rel=0.4)


# -- traces and diagonals ------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_traces_are_within_their_errors(net: str) -> None:
    s = analysed(*NETS[net], samples=60, draws=30)
    hessian = true_hessian(s.objective)
    ggn = dense(Products(s.objective, "ggn").each, s.objective.parameters())
    for found, true in ((s.trace(matrix="hessian"), hessian), (s.trace(matrix="ggn"), ggn)):
        # Five standard errors: once in two million for a normal distribution.
        assert abs(found.value - float(true.trace())) < 5 * found.standard_error
        # 60 samples of at most twice the squared norm each (of a batch's matrix, not much more).
        assert found.standard_error < 3 * (2 / 60) ** 0.5 * float(true.norm())
    parts = [s.trace(name).value for name in s.objective.names]
    assert sum(parts) == pytest.approx(s.trace().value, rel=1e-9)


def test_diagonals() -> None:
    program, ctx = problem(*NETS["mlp"])
    drawn = ctx_analysis(program, ctx, draws=100, diagonal="ggn", samples=0)
    objective = drawn.objective
    like = objective.parameters()
    true = dense(Products(objective, "ggn").each, like).diagonal()
    found = torch.cat([drawn.diagonal(n).flatten() for n in like])
    # 200 squares: sqrt(2 / 200) = 10 % of noise each, and five times that at most.
    torch.testing.assert_close(found, true, rtol=0.5, atol=1e-9)

    probed = ctx_analysis(program, ctx, samples=200, diagonal="hessian")
    found = torch.cat([probed.diagonal(n).flatten() for n in like])
    noise = (true_hessian(objective).square().sum(1) / 200).sqrt()
    assert ((found - true_hessian(objective).diagonal()).abs() < 5 * noise + 1e-9).all()

    gradients = []
    for batch in objective:
        leaves = objective.leaves()
        with objective.running(batch):
            loss = objective.loss(leaves, batch)
            gradients.append(torch.autograd.grad(loss, list(leaves.values())))
    fisher = ctx_analysis(program, ctx, diagonal="fisher")
    for name, *each in zip(like, *gradients, strict=True):
        torch.testing.assert_close(fisher.gradient(name), sum(each) / 2)
        torch.testing.assert_close(fisher.diagonal(name), sum(g.square() for g in each) / 2)
    single = ctx_analysis(program, ctx, diagonal="fisher-per-sample")
    assert (single.diagonal("0.weight") >= 0).all()
    assert float(single.diagonal("0.weight").sum()) > float(fisher.diagonal("0.weight").sum())


# -- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_the_error_of_an_exact_prediction_is_of_third_order(net: str) -> None:
    s = analysed(*NETS[net])
    errors = []
    for size in (4e-3, 2e-3, 1e-3):
        delta = random_delta(s, size)
        found = s.predict(delta, "hessian")
        errors.append(abs(s.objective.value(delta) - s.loss - found.total))
        assert found.standard_error is not None
        assert found.standard_error > 0
    # Halving the step divides the error by 8 where the third order leads; 5 leaves room for more.
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_predictions_by_tensor_add_up() -> None:
    s = analysed(*NETS["mlp"])
    delta = random_delta(s, 0.1)
    for method in ("kfac", "diagonal"):
        found = s.predict(delta, method)  # type: ignore[arg-type]
        assert sum(found.parts.values()) == pytest.approx(found.second)
        assert found.total == found.first + found.second
    kfac = s.predict(delta, "kfac")
    assert set(kfac.parts) == {"0.weight", "2.weight", "2.bias", "3.weight"}
    assert s.predict({}, "kfac").total == 0
    alone = s.predict({"0.bias": delta["0.bias"]}, "kfac")
    layer = s.layers_of("0.weight")[0]
    G, db = layer.outputs[0], delta["0.bias"]
    assert alone.second == pytest.approx(float(db @ G @ db) / 2)


@pytest.mark.parametrize("method", ["kfac", "diagonal", "ggn"])
@pytest.mark.parametrize("net", NETS)
def test_costs_of_units_are_predictions_of_their_erasing(net: str, method: Any) -> None:
    s = analysed(*NETS[net], draws=2)
    families = [f for f in s.families if f.slices and f.extent < 20]
    for family in families:
        for over in ("writers", "readers", "all"):
            costs = s.unit_costs(family, over, method)
            deltas = [s.erase(family.name, [unit], over) for unit in range(family.extent)]
            wanted = torch.tensor([s.predict(d, method).total for d in deltas]).double()
            assert costs.shape == (family.extent,)
            if over == "all" and _shared(family):
                continue  # rows and columns of one matrix: their corner is counted twice
            torch.testing.assert_close(costs, wanted, rtol=1e-6, atol=1e-9)
    assert families


def test_drawn_costs_are_those_of_the_whole_matrix_but_for_noise() -> None:
    s = analysed(*NETS["conv"])
    family = next(f for f in s.families.prunable if len(f.writers) > 2)  # with a norm behind it
    costs, exact = (s.unit_costs(family, method=m) for m in ("drawn", "ggn"))
    slopes = s.unit_costs(family, method="ggn") - torch.tensor(
        [s.predict(s.erase(family, [u]), "ggn").second for u in range(family.extent)]
    )
    # 32 squares: sqrt(2 / 32) = 25 % of noise, and four times that at most.
    assert ((costs - exact).abs() < exact - slopes).all()
    delta = s.erase(family, [0])
    assert s.predict(delta, "drawn").total == pytest.approx(float(costs[0]))
    assert HessianSensitivity(method="drawn").method == "drawn"


def _shared(family: Any) -> bool:
    names = [part.name for part in family.slices]
    return len(set(names)) < len(names) or any(p.name.endswith("weight") for p in family.readers)


def test_erased_units_are_zero() -> None:
    s = analysed(*NETS["mlp"])
    family = next(f for f in s.families if f.name.startswith("0.weight:0"))
    values = s.objective.parameters()
    moved = s.erase(family, torch.tensor([1, 3]))
    after = {n: values[n] + d for n, d in moved.items()}
    assert not after["0.weight"][[1, 3]].any()
    assert torch.equal(after["0.weight"][[0, 2, 4]], values["0.weight"][[0, 2, 4]])
    traces = s.unit_traces(family)
    assert traces.shape == (5,)
    assert (traces > 0).all()


def test_spectra_on_demand_and_by_option() -> None:
    s = analysed(*NETS["mlp"], eigenvalues=True, samples=0)
    block = torch.linalg.eigvalsh(true_hessian(s.objective.only(["0.weight"])))
    assert s.extremes["0.weight"] == pytest.approx((float(block[-1]), float(block[0])), rel=1e-2)
    assert s.eigenvalues("0.weight") == pytest.approx([float(block[-1])], rel=1e-2)
    with pytest.raises(OptionError, match="set samples above 0"):
        s.trace(matrix="hessian")
    assert s.trace().value == s.trace(matrix="ggn").value
    whole = torch.linalg.eigvalsh(true_hessian(s.objective))
    assert s.eigenvalues(end="bottom") == pytest.approx([float(whole[0])], rel=1e-2, abs=1e-6)
    vector = random_delta(s, 1.0)
    product, along = s.product(vector), s.along(vector)
    total = sum(float((product[n] * vector[n]).sum()) for n in vector)
    assert total == pytest.approx(sum(along.second) / 2)


@pytest.mark.parametrize("net", NETS)
def test_blocks_of_families_are_those_of_the_dense_matrix(net: str) -> None:
    def moved() -> nn.Module:  # no parameter is zero, so that what is zeroed can be seen
        model = NETS[net][0]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter) + 0.01)
        return model

    s = analysed(moved, NETS[net][1], samples=0)
    family = next(f for f in s.families if f.slices and f.extent > 1)
    objective = s.objective
    hessian = true_hessian(objective)
    owned = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in objective.parameters().items()}
    for name, change in s.erase(family, range(family.extent), "all").items():
        owned[name] |= change != 0
    places = torch.cat([mask.flatten() for mask in owned.values()])
    block = hessian[places][:, places]
    values = torch.linalg.eigvalsh(block)
    assert s.family_eigenvalues(family, count=1) == pytest.approx([float(values[-1])], rel=1e-2)
    bottom = s.family_eigenvalues(family.name, count=1, end="bottom")
    assert bottom == pytest.approx([float(values[0])], rel=1e-2, abs=1e-3 * float(values[-1]))
    for matrix in ("hessian", "ggn"):
        found = s.family_trace(family, matrix, samples=40)  # type: ignore[arg-type]
        whole = hessian if matrix == "hessian" else true_gauss_newton(objective)
        want = float(whole[places][:, places].trace())
        assert abs(found.value - want) < 5 * found.standard_error + 1e-9
        assert found.samples == 80


# -- an analysis in a pipeline -------------------------------------------------------------------


@dataclass(frozen=True)
class Asking(RewritePass):
    """Asks for the sensitivity, and maybe scales a weight."""

    name: ClassVar[str] = "asking"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    requires: ClassVar = (HessianSensitivity,)

    change: bool = False

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        s = ctx.analysis(HessianSensitivity)
        assert ctx.analysis(HessianSensitivity) is s
        assert ctx.analysis(HessianSensitivity(samples=1)) is not s
        if self.change:
            with program.edit(by=ctx.spec) as edit:
                edit.set_tensor("0.weight", program.tensor("0.weight").detach() * 0.5)
        return PassResult(self.change, {"loss": s.loss})


@dataclass(frozen=True)
class Keeping(Asking):
    """Says that the sensitivity is still right after its change."""

    name: ClassVar[str] = "keeping"
    preserves: ClassVar = frozenset({HessianSensitivity})


def test_passes_share_the_result_until_the_program_changes() -> None:
    program, ctx = problem(*NETS["mlp"])
    data: Any = {"calibration": ctx.calibration, "loss": ctx.loss}
    asking = [HessianSensitivity(), Asking(), Asking(change=True), Asking()]
    after = PassManager(asking).run(program, **data)
    computed, reused = (
        [record.analyses[how].count("hessian-sensitivity") for record in after.history]
        for how in ("computed", "reused")
    )
    assert computed == [1, 0, 0, 1]
    assert reused == [0, 1, 1, 0]
    assert "hessian-sensitivity" in after.history[2].analyses["dropped"]
    first, second, third, fourth = (record.statistics["loss"] for record in after.history)
    assert first == second == third != fourth


def test_a_wrong_claim_to_preserve_it_is_found_out() -> None:
    program, ctx = problem(*NETS["mlp"])
    manager = PassManager([Asking(), Keeping(change=True)], verify="full")
    with pytest.raises(PassError, match="preserves hessian-sensitivity, but it does not"):
        manager.run(program, calibration=ctx.calibration, loss=ctx.loss)


def test_the_result_belongs_to_its_data_loss_and_seed() -> None:
    program, ctx = problem(*NETS["mlp"])
    analysis, batches = HessianSensitivity(), ctx.calibration
    first = analysis.on(program, calibration=batches, loss=ctx.loss)
    assert analysis.on(program, calibration=batches, loss=ctx.loss) is first
    assert analysis.on(program, calibration=list(batches or ()), loss=ctx.loss) is not first
    assert analysis.on(program, calibration=batches, loss=squared) is not first
    assert analysis.on(program, calibration=batches, loss=ctx.loss, seed=1) is not first
    copied = analysis.on(program.copy(), calibration=iter(batches or ()), loss=ctx.loss)
    assert analysis.same(copied, first)


def test_missing_data_is_refused_before_any_work() -> None:
    program, ctx = problem(*NETS["mlp"])
    with pytest.raises(PreconditionError, match="looks at data"):
        program.analysis(HessianSensitivity)
    for item in (HessianSensitivity(), Asking()):
        started: list[str] = []
        manager = PassManager([ZeroInvariantGroups(), item])
        for batches in (ctx.calibration, None):
            with pytest.raises(PreconditionError, match=f"{item.name}.* needs loss"):
                manager.run(program, calibration=batches, progress=started.append)
        with pytest.raises(PreconditionError, match="needs calibration"):
            manager.run(program, loss=ctx.loss, progress=started.append)
        assert not started
    with torch.device("meta"):
        empty = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    with pytest.raises(PreconditionError, match="with its weights"):
        HessianSensitivity().on(empty, calibration=ctx.calibration, loss=ctx.loss)


def test_bad_options_and_names() -> None:
    with pytest.raises(OptionError, match="samples of hessian-sensitivity must not be negative"):
        HessianSensitivity(samples=-1)
    with pytest.raises(OptionError, match="set samples"):
        HessianSensitivity(diagonal="hessian", samples=0)
    s = analysed(*NETS["mlp"])
    with pytest.raises(OptionError, match="not a parameter"):
        s.predict({"nothing": torch.zeros(1)})
    with pytest.raises(OptionError, match=r"has shape \(2,\), expected \(5, 4\)"):
        s.predict({"0.weight": torch.zeros(2)})
    with pytest.raises(OptionError, match="not a family"):
        s.unit_costs("nothing:0")


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))
    model.eval()
    batches = [(torch.randn(4, 1, 5, 5), torch.randint(3, (4,))) for _ in range(2)]
    program = capture(model, (batches[0][0],))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    print_, state = program.fingerprint(), torch.get_rng_state()
    loss = lambda o, b: F.cross_entropy(o, b[1])  # noqa: E731
    first = HessianSensitivity().on(program, calibration=batches, loss=loss)
    torch.rand(3)  # the caller's random numbers do not matter
    second = HessianSensitivity().on(program.copy(), calibration=batches, loss=loss)
    assert HessianSensitivity().same(first, second)
    assert first.trace() == second.trace()
    torch.set_rng_state(state)
    HessianSensitivity(mode="forward", eigenvalues=True).on(
        program, calibration=batches, loss=loss
    ).predict({"0.weight": torch.ones(2, 1, 3, 3)}, "ggn")
    assert torch.equal(torch.get_rng_state(), state)
    assert program.fingerprint() == print_
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training


def test_dropout_in_the_graph_draws_the_same_numbers_each_time() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    batches = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    program = capture(model, (batches[0][0],))
    ctx = PassContext(program, "test", batches, lambda o, b: F.cross_entropy(o, b[1]))
    objective = Objective(program, ctx)
    assert objective.value() == objective.value()
    vectors = [{n: torch.randn_like(t) for n, t in objective.parameters().items()} for _ in "ab"]
    one, two = (Products(objective)(v) for v in vectors)
    crossed = [
        sum(float((a[n] * b[n]).sum()) for n in a)
        for a, b in ((one, vectors[1]), (two, vectors[0]))
    ]
    assert crossed[0] == pytest.approx(crossed[1], rel=1e-4)  # float32 sums of some 70 terms


# -- other people's models -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> tuple[Program, list[dict[str, torch.Tensor]]]:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=4,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batches = [
        {
            "input_ids": torch.randint(50, (4, 6)),
            "attention_mask": torch.ones(4, 6, dtype=torch.int64),
            "labels": torch.randint(4, (4,)),
        }
        for _ in range(2)
    ]
    return capture(model, (), batches[0]), batches


def test_a_transformer_with_its_own_loss(bert: Any) -> None:
    program, batches = bert
    s = HessianSensitivity(draws=4).on(program, calibration=batches)
    assert len(s.layers) == 2 * 6 + 2  # with the pooler and the classifier
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    delta = {weight: quantise_delta(program.tensor(weight), 4)}
    predictions = {m: s.predict(delta, m) for m in ("kfac", "diagonal", "ggn", "hessian")}  # type: ignore[arg-type]
    true = s.objective.value(delta) - s.loss
    # The loss near ln 4 is known to 1e-7 in float32, and the change is some 1e-4.
    assert predictions["hessian"].total == pytest.approx(true, abs=3e-6, rel=0.05)
    assert all(p.second > 0 for p in predictions.values() if p.method != "hessian")
    heads = next(f for f in s.families.prunable if "query" in f.name)
    assert s.unit_costs(heads).shape == (heads.extent,)


def test_a_transformer_has_one_hessian(bert: Any) -> None:
    import transformers

    torch.manual_seed(0)
    _, batches = bert
    batches[0]["input_ids"][0, 0] = 0  # what padding reads is a row as any other
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=4
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    program = capture(model, (), batches[0])
    objective = Objective(program, PassContext(program, "test", batches))
    vectors = [
        {n: torch.randn_like(t) for n, t in objective.parameters().items()} for _ in range(2)
    ]
    forward = Products(objective, "hessian", "forward").each(vectors)
    reverse = Products(objective).each(vectors)
    for name, value in forward[0].items():
        torch.testing.assert_close(value, reverse[0][name], rtol=1e-8, atol=1e-12)
    crossed = [
        sum(float((a[n] * b[n]).sum()) for n in a)
        for a, b in ((reverse[0], vectors[1]), (vectors[0], reverse[1]))
    ]
    assert crossed[0] == pytest.approx(crossed[1], rel=1e-9)
    pad = objective.only(["bert.embeddings.word_embeddings.weight"])
    step = {name: torch.zeros_like(t) for name, t in pad.parameters().items()}
    next(iter(step.values()))[0] = 1e-5
    slope = sum(Products(pad).along(step).first) / 2
    assert slope == pytest.approx(objective.value(step) - objective.value(), rel=1e-2)
    assert slope


def test_a_model_with_its_own_loss_and_no_logits() -> None:
    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    batches = [torch.randn(3, 4)]
    program = capture(Losing(), (batches[0],))
    with pytest.raises(PreconditionError, match="comes without logits"):
        HessianSensitivity().on(program, calibration=batches)


def test_half_precision_is_computed_with_in_float32() -> None:
    program, ctx = problem(*NETS["mlp"])
    wide = ctx_analysis(program, ctx)
    torch.manual_seed(1)
    model = NETS["mlp"][0]().double().eval().to(torch.bfloat16)
    batches = [(x.bfloat16(), y) for x, y in ctx.calibration or ()]
    half = capture(model, (batches[0][0],))
    s = HessianSensitivity(rows=0).on(half, calibration=batches, loss=ctx.loss)
    assert s.gradient("0.weight").dtype is torch.float32
    # Eight bits of mantissa in weights and data.
    assert s.loss == pytest.approx(wide.loss, rel=0.02)
    assert s.predict({"0.weight": low_rank_delta(half.tensor("0.weight"), 2)}, "hessian").second


def test_a_shared_weight_has_the_curvature_of_all_its_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    s = analysed(Twice, (3,), draws=16)
    assert len(s.layers_of("layer.weight")) == 2
    traces = sum(layer.trace for layer in s.layers_of("layer.weight"))
    assert traces == pytest.approx(s.trace("layer.weight", matrix="ggn").value, rel=1e-9)
    delta = random_delta(s, 0.1, "layer.weight")
    assert s.predict(delta, "kfac").second == pytest.approx(
        sum(layer.quadratic(delta["layer.weight"]) for layer in s.layers.values()) / 2
    )


def test_as_text() -> None:
    text = "hessian-sensitivity{method=diagonal,samples=2,mode=forward}"
    (item,) = PassManager(text).passes
    assert item == HessianSensitivity(method="diagonal", samples=2, mode="forward")
    assert str(item) == text
    program, ctx = problem(*NETS["mlp"])
    after = PassManager(text).run(program, calibration=ctx.calibration, loss=ctx.loss)
    record = after.history[0]
    assert not record.changed
    assert {"loss", "trace", "trace_error", "layers"} <= record.statistics.keys()
