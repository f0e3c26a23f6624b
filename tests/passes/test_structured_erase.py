"""Erasing coupled slices: every option, exactness, composition, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import InputError, OptionError, PassError, Program
from torchlathe.passes import PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.shrink import erase_units


class Mlp(nn.Module):
    """A residual block: stream of 12, inner layer of 20."""

    def __init__(self, norm: Any = nn.LayerNorm) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.norm = norm(12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.norm(x))


class Conv(nn.Module):
    """Depthwise and grouped convolutions, batch norm and a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Linear(8, 4)
        self.excite = nn.Linear(4, 8)
        self.mix = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 6, 1, groups=3)
        self.head = nn.Linear(6, 5)
        for tensor in (*self.parameters(), self.bn.get_buffer("running_mean")):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.bn(self.stem(x))))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        x = self.grouped(F.silu(self.mix(x * gate[:, :, None, None])))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Fused qkv with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, 8))


class Gate(nn.Module):
    """A sigmoid holds 0.5 at zeroed units; a softmax counts every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.soft = nn.Linear(6, 10)
        self.b = nn.Linear(10, 4)
        self.c = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.c(self.soft(x).softmax(-1))


def program_of(model: nn.Module, *inputs: Tensor, **options: Any) -> Program:
    return tl.capture(model.eval(), inputs, **options)


@pytest.fixture
def mlp() -> Program:
    return program_of(Mlp(), torch.randn(4, 6))


@pytest.fixture
def conv() -> Program:
    return program_of(Conv(), torch.randn(2, 3, 8, 8))


def erase(program: Program, verify: Any = "full", seed: int = 0, **options: Any) -> Program:
    return PassManager([StructuredErase(**options)], verify=verify).run(program, seed=seed)


def count(program: Program) -> int:
    return sum(t.numel() for t in program.parameters.values())


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in program.parameters.items()}


def kept(program: Program) -> dict[str, dict[int, list[int]]]:
    return {n: {a: i.tolist() for a, i in axes.items()} for n, axes in program.kept.items()}


def zeroed(before: Program, after: Program) -> Any:
    """The outputs of the full-size program in which what ``after`` says is zero is zero."""

    def zero(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        for axis, indices in after.zeroed.get(name, {}).items():
            tensor.index_fill_(axis, indices, 0)
        return tensor

    args, kwargs = before.example_inputs
    return before.run(*args, replace_tensor=zero, dtype=torch.float64, **kwargs)


def outputs(program: Program) -> Any:
    args, kwargs = program.example_inputs
    return program.run(*args, dtype=torch.float64, **kwargs)


def assert_equal_to_zeroed(before: Program, after: Program, rtol: float = 1e-12) -> None:
    want = zeroed(before, after)
    torch.testing.assert_close(outputs(after), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def assert_identical(one: Program, two: Program) -> None:
    assert one.to_text() == two.to_text()
    for name, entry in one.entries.items():
        assert torch.equal(entry.tensor, two.entries[name].tensor)


# -- how much --------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_share_is_reached_to_within_a_unit(mlp: Program, sparsity: float, scope: str) -> None:
    families = mlp.analysis(ZeroInvariantGroups).prunable
    owned = {s.name for f in families for s in f.slices}
    prunable = sum(mlp.parameters[name].numel() for name in owned)
    unit = max(f.parameters_per_unit for f in families)
    after = erase(mlp, sparsity=sparsity, scope=scope)
    gone = count(mlp) - count(after)
    # A local step takes a unit of each family that is due.
    slack = unit if scope == "global" else sum(f.parameters_per_unit for f in families)
    assert abs(gone - sparsity * prunable) <= slack / 2 + 1
    assert_equal_to_zeroed(mlp, after)


def test_nothing_to_erase(mlp: Program) -> None:
    after = erase(mlp, sparsity=0)
    assert shapes(after) == shapes(mlp)
    record = after.history[-1]
    assert not record.changed
    assert [d["message"] for d in _dicts(record.diagnostics)] == ["there was nothing to erase"]


def _dicts(diagnostics: Any) -> list[dict[str, Any]]:
    return [d if isinstance(d, dict) else vars(d) for d in diagnostics]


def messages(program: Program) -> str:
    return "\n".join(str(d["message"]) for d in _dicts(program.history[-1].diagnostics))


def test_dict_of_shares_of_units(mlp: Program) -> None:
    after = erase(mlp, sparsity={"up.weight:0": 0.25, "enter.*": 0.5})
    assert after.parameters["up.weight"].shape == (15, 6)
    assert after.parameters["enter.weight"].shape == (6, 6)
    assert_equal_to_zeroed(mlp, after)


def test_dict_leaves_other_families_alone(mlp: Program) -> None:
    after = erase(mlp, sparsity={"up.weight:0": 0.5})
    assert after.parameters["enter.weight"].shape == (12, 6)


def test_a_pattern_matches_tensors_of_the_family(mlp: Program) -> None:
    # down.weight:1 reads what up.weight:0 writes.
    after = erase(mlp, sparsity={"down.weight:1": 0.5})
    assert after.parameters["up.weight"].shape == (10, 12)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("multiple", [4, 8, 16])
def test_round_to(mlp: Program, multiple: int, scope: str) -> None:
    after = erase(mlp, sparsity=0.6, round_to=multiple, scope=scope)
    for extent, full in (
        (after.parameters["up.weight"].shape[0], 20),
        (after.parameters["enter.weight"].shape[0], 12),
    ):
        assert extent % multiple == 0 or extent == full
    assert_equal_to_zeroed(mlp, after)


@pytest.mark.parametrize(
    ("least", "up", "enter"), [(1, 1, 1), (7, 7, 7), (0.5, 10, 6), (99, 20, 12)]
)
def test_keep_at_least(mlp: Program, least: float, up: int, enter: int) -> None:
    after = erase(mlp, sparsity=0.999, keep_at_least=least)
    assert after.parameters["up.weight"].shape == (up, enter)
    assert after.parameters["enter.weight"].shape == (enter, 6)
    if up < 20:
        assert_equal_to_zeroed(mlp, after)


def test_what_cannot_be_reached_is_told(mlp: Program) -> None:
    after = erase(mlp, sparsity=0.9, keep_at_least=0.5)
    assert "asked to erase 90%" in messages(after)


def test_include_and_exclude(mlp: Program) -> None:
    only = erase(mlp, include=("up.weight:0",))
    assert shapes(only)["enter.weight"] == (12, 6)
    assert shapes(only)["up.weight"][0] < 20
    # up.weight:1 only reads the residual stream: naming the tensor does not include that family,
    # but excluding the tensor does exclude it.
    assert shapes(erase(mlp, include=("up.*",)))["enter.weight"] == (12, 6)
    assert shapes(erase(mlp, exclude=("up.weight",)))["up.weight"] == (20, 12)
    assert shapes(erase(mlp, exclude=("up.weight:0",)))["up.weight"][0] == 20
    assert shapes(erase(mlp, exclude=("up.weight:0",)))["enter.weight"][0] < 12


def test_excluding_everything(mlp: Program) -> None:
    after = erase(mlp, exclude=("*",))
    assert not after.history[-1].changed


def test_including_a_pinned_family_says_why(mlp: Program) -> None:
    after = erase(mlp, include=("head.weight:0",))
    assert "it is an axis of an output of the model" in messages(after)


# -- which units -----------------------------------------------------------------------------


def test_l2_erases_the_smallest(mlp: Program) -> None:
    small = [0, 3, 7, 11, 19]
    with torch.no_grad():
        for name, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            tensor = mlp.entries[name].tensor
            tensor.index_copy_(
                axis, torch.tensor(small), tensor.index_select(axis, torch.tensor(small)) * 0.01
            )
    for importance in ("l1", "l2"):
        after = erase(mlp, sparsity={"up.weight:0": 0.25}, importance=importance)
        assert set(range(20)) - set(kept(after)["up.weight"][0]) == set(small)


def test_l1_and_l2_differ(mlp: Program) -> None:
    with torch.no_grad():
        for name in ("up.weight", "up.bias", "down.weight"):
            mlp.entries[name].tensor.fill_(1.0)
        mlp.entries["up.weight"].tensor[0] = 0
        mlp.entries["up.weight"].tensor[0, 0] = 11.0  # mean |.| below 1, mean square above
    share = {"up.weight:0": 0.05}
    assert 0 not in kept(erase(mlp, sparsity=share, importance="l1"))["up.weight"][0]
    assert 0 in kept(erase(mlp, sparsity=share, importance="l2"))["up.weight"][0]


def test_random_follows_the_seed(mlp: Program) -> None:
    draws = [kept(erase(mlp, importance="random", seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("importance", ["l1", "l2", "random"])
def test_deterministic(conv: Program, importance: str) -> None:
    one, two = (erase(conv, importance=importance) for _ in range(2))
    assert kept(one) == kept(two)
    assert_identical(one, two)


@pytest.mark.parametrize("form", ["tensor", "dict", "callable", "list", "infinite"])
def test_given_scores(mlp: Program, form: str) -> None:
    scores = torch.arange(20.0)
    importance: Any = {
        "tensor": scores,
        "dict": {"up.weight:0": scores},
        "callable": lambda family, program: scores.to(torch.int64),
        "list": lambda family, program: scores.tolist(),
        "infinite": scores.index_fill(0, torch.arange(5, 20), float("inf")),
    }[form]
    after = erase(
        mlp, importance=importance, include=("up.weight:0",), sparsity={"up.weight:0": 0.25}
    )
    assert kept(after)["up.weight"][0] == list(range(5, 20))
    after = erase(mlp, importance=importance, include=("up.weight:0",), sparsity=0.25)
    assert kept(after)["up.weight"][0] == list(range(5, 20))


def test_negative_scores_rank_too(mlp: Program) -> None:
    after = erase(mlp, importance=-torch.arange(20.0), include=("up.weight:0",), sparsity=0.25)
    assert kept(after)["up.weight"][0] == list(range(15))


# -- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "must be in"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": {"up.*": 1.5}}, "sparsity for 'up.*' is 1.5"),
        ({"round_to": 0}, "round_to is 0"),
        ({"keep_at_least": 0}, "keep_at_least is 0"),
        ({"keep_at_least": -3}, "keep_at_least is -3"),
        ({"keep_at_least": 2.5}, "keep_at_least is 2.5"),
        ({"keep_at_least": float("nan")}, "keep_at_least is nan"),
        ({"importance": "l3"}, "importance='l3' is not known"),
        ({"scope": "everywhere"}, "scope"),
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words.replace("*", r"\*")):
        StructuredErase(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": ("upp.*",)}, "'upp.*' matches no family"),
        ({"exclude": ("nothing",)}, "'nothing' matches no family"),
        ({"sparsity": {"encoder.*": 0.5}}, "'encoder.*' matches no family"),
        ({"importance": torch.ones(20)}, "one tensor of scores was given for 2 families"),
        ({"importance": torch.ones(7), "include": ("up.weight:0",)}, "expected (20,)"),
        (
            {"importance": {"up.weight:0": torch.ones(20)}},
            "no scores were given for enter.weight:0",
        ),
        ({"importance": lambda family, program: None}, "enter.weight:0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_do_not_fit_the_model(
    mlp: Program, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PassError) as failure:
        erase(mlp, **options)
    assert isinstance(failure.value.__cause__, OptionError)
    assert words in str(failure.value)


def test_nan_in_weights(mlp: Program) -> None:
    with torch.no_grad():
        mlp.entries["up.weight"].tensor[3, 1] = float("nan")
    before = shapes(mlp)
    for options in ({}, {"zeros": True}):
        with pytest.raises(PassError, match=r"up\.weight") as failure:
            erase(mlp, verify="off", **options)
        assert isinstance(failure.value.__cause__, InputError)
        assert "NaN" in str(failure.value)
        assert shapes(mlp) == before


def test_nan_scores(mlp: Program) -> None:
    with pytest.raises(PassError, match=r"importance of up\.weight:0 is NaN"):
        erase(mlp, importance=torch.full((20,), float("nan")), include=("up.weight:0",))


def test_units_that_cannot_go(mlp: Program) -> None:
    families = mlp.analysis(ZeroInvariantGroups)
    up, head = families.by_name("up.weight:0"), families.by_name("head.weight:0")
    with pytest.raises(InputError, match="it is an axis of an output"):
        erase_units(mlp, {head: torch.tensor([0])})
    with pytest.raises(InputError, match="units 0 to 19"):
        erase_units(mlp, {up: torch.tensor([20])})
    with pytest.raises(InputError, match="all 20 units"):
        erase_units(mlp, {up: torch.arange(20)})
    assert mlp.version == 0 or not mlp.kept


# -- exactness -------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 1e-6, 0.3])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_are_corrected(norm: Any, eps: float | None) -> None:
    options = {} if eps is None else {"eps": eps}
    model = Mlp(lambda width: norm(width, **options)).double()
    before = program_of(model, torch.randn(4, 6).double())
    after = erase(before, sparsity={"enter.weight:0": 0.5})
    assert after.history[-1].statistics["corrected_families"] == 1
    assert_equal_to_zeroed(before, after, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.RMSNorm(n, eps=1e-6)])
def test_norms_in_low_precision(norm: Any, dtype: torch.dtype) -> None:
    model = Mlp(norm).to(dtype)
    before = program_of(model, torch.randn(4, 6).to(dtype))
    after = erase(before, sparsity=0.5)
    result = after.run(*after.example_inputs[0])
    assert result.dtype == dtype
    want = zeroed(before, after)
    error = (result.double() - want).norm() / want.norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_small_input_to_a_norm_with_the_default_epsilon(dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm = nn.Linear(4, 8), nn.RMSNorm(8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.enter(x) * 1e-3))

    before = program_of(Net().to(dtype), torch.randn(3, 4).to(dtype))
    after = erase(before, sparsity=0.5)
    want = zeroed(before, after)
    error = (after.run(*after.example_inputs[0]).double() - want).norm() / want.norm()
    assert error < 16 * torch.finfo(dtype).eps


def test_norm_of_a_half_precision_stream_with_float_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.norm = nn.Linear(4, 8).bfloat16(), nn.LayerNorm(8)
            self.head = nn.Linear(8, 2).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.enter(x)))

    before = program_of(Net(), torch.randn(3, 4).bfloat16())
    after = erase(before, sparsity=0.5)
    assert after.run(*after.example_inputs[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_convolutions(conv: Program, sparsity: float) -> None:
    after = erase(conv, sparsity=sparsity)
    assert count(after) < count(conv)
    assert_equal_to_zeroed(conv, after)


def test_attention_heads_and_dimensions() -> None:
    before = program_of(Attention(), torch.randn(2, 3, 8))
    names = [f.name for f in before.analysis(ZeroInvariantGroups).prunable]
    after = erase(before, sparsity={name: 0.5 for name in names})
    assert after.parameters["out.weight"].shape == (8, 2)
    assert_equal_to_zeroed(before, after)


def test_approximate_families_are_left_alone_and_told() -> None:
    before = program_of(Gate(), torch.randn(3, 6))
    after = erase(before, sparsity=0.5)
    assert after.parameters["soft.weight"].shape == (10, 6)
    assert after.parameters["a.weight"].shape[0] < 10
    assert "left alone, since erasing it is not exact: every index along this axis" in messages(
        after
    )
    assert after.history[-1].verification["passed"]


def test_approximate_families_on_request() -> None:
    before = program_of(Gate(), torch.randn(3, 6))
    after = erase(before, sparsity={"soft.weight:0": 0.5}, approximate=True)
    assert after.parameters["soft.weight"].shape == (5, 6)
    assert after.parameters["c.weight"].shape == (4, 5)
    # What is left is the model without these units, which is another function.
    full = zeroed(before, after)
    assert (outputs(after) - full).abs().max() > 1e-3
    keep = after.kept["soft.weight"][0]
    state = {n: e.tensor.double() for n, e in before.entries.items()}
    x = before.example_inputs[0][0].double()
    soft = F.linear(x, state["soft.weight"][keep], state["soft.bias"][keep]).softmax(-1)
    want = F.linear(
        F.linear(x, state["a.weight"], state["a.bias"]).relu(), state["b.weight"], state["b.bias"]
    ) + F.linear(soft, state["c.weight"][:, keep], state["c.bias"])
    torch.testing.assert_close(outputs(after), want)


# -- composing -------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), [(Mlp, (4, 6)), (Conv, (2, 3, 8, 8))])
def test_erasing_twice_is_erasing_the_union(make: Any, shape: tuple[int, ...]) -> None:
    before = program_of(make().double(), torch.randn(shape).double())
    generator = torch.Generator().manual_seed(3)
    prunable = before.analysis(ZeroInvariantGroups).prunable
    names = [f.name for f in prunable if f.extent > 2]
    once, twice = before.copy(), before.copy()

    def units(program: Program, choose: Any) -> dict[Any, Tensor]:
        families = program.analysis(ZeroInvariantGroups)
        return {families.by_name(n): choose(n, families.by_name(n)) for n in names}

    orders = {f.name: torch.randperm(f.extent, generator=generator) for f in prunable}
    third = {n: max(1, len(o) // 4) for n, o in orders.items()}
    erase_units(once, units(once, lambda n, f: orders[n][: 2 * third[n]]))
    erase_units(twice, units(twice, lambda n, f: orders[n][: third[n]]))

    def second(name: str, family: Any) -> Tensor:
        left = [
            i for i in range(len(orders[name])) if i not in orders[name][: third[name]].tolist()
        ]
        return torch.tensor([left.index(i) for i in orders[name][third[name] : 2 * third[name]]])

    erase_units(twice, units(twice, second))
    assert kept(once) == kept(twice)
    assert shapes(once) == shapes(twice)
    assert {n: {a: sorted(i.tolist()) for a, i in x.items()} for n, x in once.zeroed.items()} == {
        n: {a: sorted(i.tolist()) for a, i in x.items()} for n, x in twice.zeroed.items()
    }
    torch.testing.assert_close(outputs(once), outputs(twice), rtol=1e-12, atol=1e-12)
    assert_equal_to_zeroed(before, twice)


def test_kept_and_zeroed_speak_of_the_original(mlp: Program) -> None:
    after = PassManager(
        "structured-erase{sparsity=0.3},structured-erase{sparsity=0.3}", verify="full"
    ).run(mlp)
    original = {name: e.tensor for name, e in mlp.entries.items()}
    for name, axes in after.kept.items():
        expected = original[name]
        for axis, indices in axes.items():
            expected = expected.index_select(axis, indices)
        assert torch.equal(after.entries[name].tensor, expected)
    for name, axes in after.zeroed.items():
        for axis, indices in axes.items():
            both = torch.cat([indices, after.kept[name][axis]])
            assert both.sort().values.tolist() == list(range(original[name].shape[axis]))
    assert_equal_to_zeroed(mlp, after)


def test_only_writers_are_zeroed(mlp: Program) -> None:
    after = erase(mlp, sparsity={"up.weight:0": 0.5})
    assert {n: set(a) for n, a in after.zeroed.items()} == {"up.weight": {0}, "up.bias": {0}}
    assert {n: set(a) for n, a in after.kept.items()} == {
        "up.weight": {0}, "up.bias": {0}, "down.weight": {1},
    }  # fmt: skip


def test_the_program_before_is_untouched(conv: Program) -> None:
    state = {n: e.tensor.clone() for n, e in conv.entries.items()}
    text, fingerprint = conv.to_text(), conv.fingerprint()
    erase(conv, sparsity=0.5)
    assert conv.to_text() == text
    assert conv.fingerprint() == fingerprint
    assert all(torch.equal(conv.entries[n].tensor, t) for n, t in state.items())


def test_dynamic_batch() -> None:
    model = Attention()
    before = program_of(model, torch.randn(2, 3, 8), dynamic_shapes="auto")
    after = erase(before, sparsity=0.5)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, axes in after.zeroed.items():
            for axis, indices in axes.items():
                twin.get_parameter(name).index_fill_(axis, indices, 0)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8)
        torch.testing.assert_close(after.run(x), twin(x), rtol=1e-4, atol=1e-6)


def test_text_and_object_are_the_same(conv: Program) -> None:
    text = "structured-erase{sparsity=0.4,importance=l1,scope=local,round_to=2}"
    made = StructuredErase(sparsity=0.4, importance="l1", scope="local", round_to=2)
    one = PassManager(text).run(conv)
    two = PassManager([made]).run(conv)
    assert_identical(one, two)
    assert one.history[-1].spec == two.history[-1].spec
