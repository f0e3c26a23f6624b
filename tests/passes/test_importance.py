"""Criteria against naive float64 formulas, by hand on small nets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import Error, InputError, OptionError, PreconditionError, Program
from torchlathe.passes import HessianSensitivity, PassManager, StructuredErase
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups
from torchlathe.passes.base import PassContext
from torchlathe.passes.importance import comparable, criterion_names, get_criterion, scores
from torchlathe.passes.importance.curvature import SensitivityCost
from torchlathe.passes.importance.gradients import Fisher, Taylor
from torchlathe.passes.importance.weights import BnScale

# Float64 sums in another order.
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-12}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class ConvBn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 3)
        for tensor in (*self.bn.parameters(), self.bn.get_buffer("running_mean")):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.bn(self.a(x)))))
        return self.c(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.o, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 3, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 12)
        return self.head(x + self.o(y)).mean(1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.norm(x))


SHAPES = {Chain: (5,), ConvBn: (2, 6, 6), Attention: (4, 8), Residual: (5,)}


class Case:
    """A net in float64 with its program, batches and loss."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.model: Any = kind().double().eval()
        shape = SHAPES[kind]  # type: ignore[index]
        self.batches = [
            (torch.randn(6, *shape, dtype=torch.float64) + 0.3, torch.randint(0, 3, (6,)))
            for _ in range(3)
        ]
        self.program = tl.capture(self.model, (self.batches[0][0],), dynamic_shapes="auto")
        self.families = self.program.analysis(ZeroInvariantGroups)

    def context(self, **given: Any) -> PassContext:
        options: dict[str, Any] = {"calibration": self.batches, "loss": loss, **given}
        return PassContext(self.program, "test", **options)

    def scores(self, importance: Any, **given: Any) -> dict[str, Tensor]:
        ctx = self.context(**given)
        found = scores(self.program, self.families, self.families.prunable, importance, ctx)
        return {family.name: value for family, value in found.items()}

    def family(self, name: str) -> Family:
        return self.families.by_name(name)


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


@pytest.fixture(params=[Chain, ConvBn, Attention, Residual], ids=lambda kind: kind.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def owned(case: Case, family: Family, unit: int, *, writers: bool = False) -> list[Any]:
    """(name, axis, indices) of what a unit owns, found by zeroing it in the axis terms' masks."""
    from torchlathe.passes.rewrite.erasing.units import unit_indices

    found = []
    nodes = case.program.tensor_nodes
    for part in family.slices:
        if part.kind.value != "parameter" or (writers and not part.writes):
            continue
        term = case.families.axis_map.terms(nodes[part.name])[part.axis]
        indices = (unit_indices(term, family.atom.number) == unit).nonzero().flatten()
        found.append((part.name, part.axis, indices))
    return found


def values(case: Case, family: Family, unit: int, of: Any = None, **options: Any) -> Tensor:
    """All numbers that a unit owns, as one vector; a scalar once for each slice that has it."""
    tensors = dict(case.model.named_parameters()) if of is None else of
    parts = owned(case, family, unit, **options)
    return torch.cat([tensors[n].detach().index_select(a, i).flatten() for n, a, i in parts])


def batch_gradients(case: Case) -> list[dict[str, Tensor]]:
    """By the original module and torch.autograd."""
    found = []
    for batch in case.batches:
        case.model.zero_grad()
        loss(case.model(batch[0]), batch).backward()
        found.append({n: p.grad.clone() for n, p in case.model.named_parameters()})
    return found


def assert_scores(case: Case, got: dict[str, Tensor], of: Callable[[Family, int], Tensor]) -> None:
    assert got
    for name, score in got.items():
        family = case.family(name)
        want = torch.stack([of(family, unit) for unit in range(family.extent)])
        torch.testing.assert_close(score, want, **CLOSE)


# -- against formulas --------------------------------------------------------------------------


def test_l1_and_l2(case: Case) -> None:
    assert_scores(case, case.scores("l1"), lambda f, u: values(case, f, u).abs().mean())
    assert_scores(case, case.scores("l2"), lambda f, u: values(case, f, u).square().mean().sqrt())


def test_lamp(case: Case) -> None:
    def naive(family: Family, unit: int) -> Tensor:
        squares = [values(case, family, u).square().sum() for u in range(family.extent)]
        return squares[unit] / sum(s for s in squares if s >= squares[unit])

    got = case.scores("lamp")
    assert_scores(case, got, naive)
    # The best unit of each family scores one.
    assert all(float(score.max()) == pytest.approx(1) for score in got.values())


def test_lamp_of_equal_and_of_zero_units() -> None:
    case = Case(Chain)
    with torch.no_grad():
        for tensor, axis in ((case.model.a.weight, 0), (case.model.a.bias, 0)):
            tensor.index_copy_(axis, torch.tensor([1, 2]), tensor[[0, 0]])
            tensor.index_fill_(axis, torch.tensor([3]), 0)
        case.model.b.weight[:, [1, 2]] = case.model.b.weight[:, [0, 0]]
        case.model.b.weight[:, 3] = 0
    score = case.scores("lamp")["a.weight:0"]
    assert score[0] == score[1] == score[2]
    assert score[3] == 0


def test_geometric_median(case: Case) -> None:
    def naive(family: Family, unit: int) -> Tensor:
        rows = [values(case, family, u, writers=True) for u in range(family.extent)]
        return sum((rows[unit] - row).norm() for row in rows)  # type: ignore[return-value]

    # Distances come from inner products, and a square root halves the digits that are left.
    for name, score in case.scores("geometric-median").items():
        family = case.family(name)
        want = torch.stack([naive(family, u) for u in range(family.extent)])
        torch.testing.assert_close(score, want, rtol=1e-7, atol=1e-7)


def test_taylor(case: Case) -> None:
    gradients = batch_gradients(case)
    for over in ("all", "writers"):

        def naive(family: Family, unit: int, writers: bool = over == "writers") -> Tensor:
            weight = values(case, family, unit, writers=writers)
            sums = [weight @ values(case, family, unit, g, writers=writers) for g in gradients]
            return torch.stack(sums).abs().mean()

        assert_scores(case, case.scores(Taylor(over=over)), naive)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["auto", "kfac"])
def test_sensitivity(case: Case, method: Any) -> None:
    found = case.scores(SensitivityCost(method=method))
    whole = HessianSensitivity(samples=0).on(case.program, calibration=case.batches, loss=loss)
    for name, score in found.items():
        (want,) = whole.costs_of([name], method=method).values()
        # Vectors are drawn for all families at once, or for one: the same numbers.
        torch.testing.assert_close(score, want, rtol=1e-9, atol=1e-12)
        assert torch.isfinite(score).all()


def test_fisher(case: Case) -> None:
    gradients = batch_gradients(case)

    def naive(family: Family, unit: int) -> Tensor:
        squares = [values(case, family, unit, g).square() for g in gradients]
        mean = torch.stack(squares).mean(0)
        return (values(case, family, unit).square() * mean).sum() / 2

    assert_scores(case, case.scores("fisher"), naive)


def test_per_sample_is_batches_of_one(case: Case) -> None:
    ones = [(x[i : i + 1], y[i : i + 1]) for x, y in case.batches for i in range(len(y))]
    for kind in (Taylor, Fisher):
        got = case.scores(kind(per_sample=True))
        for name, want in case.scores(kind(), calibration=ones).items():
            torch.testing.assert_close(got[name], want, **CLOSE)


def hooked_inputs(case: Case) -> dict[str, Tensor]:
    """What each layer reads, by forward hooks, channels last: (samples, channels)."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in case.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def hook(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                x = args[0]
                x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
                found.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

            hooks.append(module.register_forward_hook(hook))
    for x, _ in case.batches:
        case.model(x)
    for h in hooks:
        h.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_activation_weighted_readers(case: Case, name: str) -> None:
    inputs = hooked_inputs(case)
    modules = dict(case.model.named_modules())

    def naive(family: Family, unit: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for tensor, axis, indices in owned(case, family, unit):
            layer = tensor.removesuffix(".weight")
            if any(s.name == tensor and s.axis == axis and s.writes for s in family.slices):
                continue
            weight = modules[layer].weight.detach()
            if weight.dim() < 2:
                continue
            groups = getattr(modules[layer], "groups", 1)
            x = inputs[layer].unflatten(1, (groups, -1))
            rows = weight.unflatten(0, (groups, -1))
            for g in range(groups):
                for i in indices.tolist():
                    w = rows[g, :, i]
                    if name == "wanda":
                        total += w.abs().sum() * x[:, g, i].square().mean().sqrt()
                    else:
                        total += w.square().sum() * x[:, g, i].var()
        return total

    got = {n: s for n, s in case.scores(name).items() if case.family(n).readers}
    assert_scores(case, got, naive)


def test_activation_weighted_writers_where_none_reads() -> None:
    case = Case(Attention)
    # Queries and keys share a dimension that no parameter reads.
    (name,) = (n for n, s in case.scores("l2").items() if not case.family(n).readers)
    scale = torch.cat([x for x, _ in case.batches]).reshape(-1, 8).square().mean(0).sqrt()
    rows = sum(m.weight.detach().abs() @ scale for m in (case.model.q, case.model.k))
    want = rows.view(3, 4).sum(0)  # over heads
    torch.testing.assert_close(case.scores("wanda")[name], want, **CLOSE)


def test_bn_scale() -> None:
    case = Case(ConvBn)
    ctx = case.context()
    family = case.family("a.weight:0/1")
    got = scores(case.program, case.families, (family,), "bn-scale", ctx)[family]
    torch.testing.assert_close(got, case.model.bn.weight.detach().abs().view(2, 3).mean(0), **CLOSE)
    assert not ctx.diagnostics
    assert torch.equal(case.scores("bn-scale")["b.weight:0/1"], case.scores("l2")["b.weight:0/1"])
    with pytest.raises(InputError, match=r"no norm with a scale writes b\.weight:0/1"):
        case.scores(BnScale(missing="error"))


def test_bn_scale_takes_layer_norms_and_written_out_ones() -> None:
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return self.b(self.scale * x)

    model = Rms().eval()
    program = tl.capture(model, (torch.randn(2, 4),))
    families = program.analysis(ZeroInvariantGroups)
    (family,) = families.prunable
    got = scores(program, families, (family,), "bn-scale", PassContext(program))[family]
    torch.testing.assert_close(got, model.scale.detach().abs().double())
    case = Case(Residual)
    want = case.model.norm.weight.detach().abs()
    torch.testing.assert_close(case.scores("bn-scale")["enter.weight:0"], want)


def test_random_depends_on_the_seed_alone() -> None:
    case = Case(Chain)
    one, two = case.scores("random", seed=3), case.scores("random", seed=3)
    other = case.scores("random", seed=4)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


# -- invariances -------------------------------------------------------------------------------

DETERMINISTIC = [name for name in criterion_names() if name != "random"]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_permuting_units_permutes_scores(name: str) -> None:
    case = Case(Chain)
    before = case.scores(name)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    with torch.no_grad():
        case.model.a.weight.copy_(case.model.a.weight[order].clone())
        case.model.a.bias.copy_(case.model.a.bias[order].clone())
        case.model.b.weight.copy_(case.model.b.weight[:, order].clone())
    # Analyses of a program stay valid until it is edited, and this was done behind its back.
    case.program = tl.capture(case.model, (case.batches[0][0],), dynamic_shapes="auto")
    case.families = case.program.analysis(ZeroInvariantGroups)
    after = case.scores(name)
    close: Any = {"rtol": 1e-7, "atol": 1e-9}  # the activations are summed in another order
    torch.testing.assert_close(after["a.weight:0"], before["a.weight:0"][order], **close)
    torch.testing.assert_close(after["b.weight:0"], before["b.weight:0"], **close)


@pytest.mark.parametrize("name", ["taylor", "fisher", "wanda", "flap"])
def test_rescaling_a_relu_unit_changes_nothing(name: str) -> None:
    """Two nets that compute the same: a unit's writers times c, its readers over c."""
    case = Case(Chain)
    before = case.scores(name)["a.weight:0"]
    with torch.no_grad():
        scale = torch.linspace(0.2, 4, 7, dtype=torch.float64)
        case.model.a.weight.mul_(scale[:, None])
        case.model.a.bias.mul_(scale)
        case.model.b.weight.div_(scale)
    torch.testing.assert_close(case.scores(name)["a.weight:0"], before, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_magnitudes_scale(name: str) -> None:
    case = Case(Residual)
    before = case.scores(name)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(3)
    for family, score in case.scores(name).items():
        torch.testing.assert_close(score, 3 * before[family], **CLOSE)


def test_lamp_does_not_depend_on_scale() -> None:
    case = Case(Residual)
    before = case.scores("lamp")
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(3)
    for family, score in case.scores("lamp").items():
        torch.testing.assert_close(score, before[family], **CLOSE)


# -- given scores, errors and fallbacks --------------------------------------------------------


def test_callables_and_given_scores() -> None:
    case = Case(Chain)
    given = {"a.weight:0": torch.arange(7), "b.weight:0": list(range(6))}
    got = case.scores(given)
    assert got["b.weight:0"].tolist() == list(range(6))
    assert got["a.weight:0"].dtype == torch.float64
    rows = case.scores(lambda family, program: program.tensor(family.writers[0].name).sum(1))
    torch.testing.assert_close(rows["a.weight:0"], case.model.a.weight.detach().sum(1))


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="importance='tailor' is not known") as caught:
        get_criterion("tailor")
    assert caught.value.hint is not None
    assert "did you mean taylor?" in caught.value.hint
    with pytest.raises(OptionError, match="'fischer'"):
        StructuredErase(importance="fischer")


def test_names_with_underscores() -> None:
    assert get_criterion("geometric_median") is get_criterion("geometric-median")
    for name in criterion_names():
        assert get_criterion(name).name == name


def test_comparable() -> None:
    assert [n for n in criterion_names() if comparable(n)] == [
        "fisher",
        "l1",
        "l2",
        "lamp",
        "sensitivity",
        "taylor",
    ]
    assert not comparable(torch.ones(3))


def test_gradients_need_a_loss_and_data() -> None:
    case = Case(Chain)
    for name in ("taylor", "fisher", "sensitivity"):
        with pytest.raises(PreconditionError, match="needs loss") as caught:
            case.scores(name, loss=None)
        assert "loss=" in str(caught.value.hint)
        with pytest.raises(PreconditionError, match="needs calibration"):
            case.scores(name, calibration=None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(lambda out, batch: out, "must be one number", id="not-scalar"),
        pytest.param(lambda out, batch: 1.0, "must be one number, got float", id="not-a-tensor"),
        pytest.param(lambda out, batch: out.detach().sum(), "does not depend", id="detached"),
    ],
)
def test_impossible_losses(wrong: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Case(Chain).scores("taylor", loss=wrong)


def test_activations_fall_back_to_the_example_inputs_with_a_warning() -> None:
    case = Case(Chain)
    ctx = case.context(calibration=None)
    got = scores(case.program, case.families, case.families.prunable, "wanda", ctx)
    (told,) = ctx.diagnostics
    assert told.severity == "warning"
    assert "example inputs" in told.message
    want = case.scores("wanda", calibration=[case.batches[0]])
    for family, score in got.items():
        torch.testing.assert_close(score, want[family.name], **CLOSE)


def test_batches_that_do_not_fit_and_none_at_all() -> None:
    case = Case(Chain)
    with pytest.raises(Error, match="calibration batch 1 does not fit"):
        case.scores("wanda", calibration=[case.batches[0], torch.randn(2, 9).double()])
    with pytest.raises(Error, match="holds no batch"):
        case.scores("wanda", calibration=[])


def test_nothing_of_the_callers_changes() -> None:
    case = Case(ConvBn)
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    data = [x.clone() for x, _ in case.batches]
    for name in criterion_names():
        case.scores(name)
    assert all(torch.equal(t, before[n]) for n, t in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    assert all(torch.equal(x, y) for (x, _), y in zip(case.batches, data, strict=True))


@pytest.mark.parametrize("name", criterion_names())
def test_in_a_pipeline(name: str) -> None:
    case = Case(ConvBn)

    def run() -> Program:
        manager = PassManager(f"structured-erase{{sparsity=0.4,importance={name}}}")
        return manager.run(case.program, calibration=case.batches, loss=loss)

    one, two = run(), run()
    assert one.history[0].changed
    assert one.to_text() == two.to_text()


def test_diagnostics_reach_the_record() -> None:
    case = Case(Chain)
    after = PassManager("structured-erase{importance=flap}").run(case.program)
    assert any("example inputs" in str(d["message"]) for d in after.history[0].diagnostics)


# -- other people's models ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> tuple[Program, Any, nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (3, 8))
    inputs = {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}
    return tl.capture(model, (), inputs), inputs, model


@pytest.mark.parametrize("name", criterion_names())
def test_bert_with_its_own_loss(bert: Any, name: str) -> None:
    program, inputs, _ = bert
    families = program.analysis(ZeroInvariantGroups)
    ctx = PassContext(program, "test", calibration=[inputs])
    got = scores(program, families, families.prunable, name, ctx)
    assert len(got) >= 3
    assert all(bool(s.isfinite().all()) and float(s.max()) > 0 for s in got.values())


def test_gradients_of_bert_are_those_of_the_module(bert: Any) -> None:
    from torchlathe.passes.statistics import stream_gradients

    program, inputs, model = bert
    (found,) = stream_gradients(program, PassContext(program, "test", calibration=[inputs]))
    model.zero_grad()
    want = model(**inputs).loss
    want.backward()
    assert found.loss == pytest.approx(float(want.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in found.values:
            # Float32, and ops that torch.export splits or fuses in another way.
            torch.testing.assert_close(found.values[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_gpt2_and_resnet() -> None:
    from torchvision.models import resnet18
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=4, n_positions=16, use_cache=False
    )
    gpt2 = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 40, (2, 8))
    program = tl.capture(gpt2, (), {"input_ids": ids, "labels": ids})
    resnet = tl.capture(resnet18().eval(), (torch.randn(1, 3, 32, 32),))
    images = [(torch.randn(1, 3, 32, 32), torch.tensor([3]))]
    for made, data, given in ((program, None, None), (resnet, images, loss)):
        families = made.analysis(ZeroInvariantGroups)
        for name in ("taylor", "wanda", "flap", "geometric-median"):
            ctx = PassContext(made, "test", calibration=data, loss=given)
            got = scores(made, families, families.prunable, name, ctx)
            assert all(bool(s.isfinite().all()) for s in got.values())
