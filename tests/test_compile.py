"""``torchlathe.compile`` end to end, on small modules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import (
    ArtifactError,
    BackendError,
    CaptureError,
    Error,
    InputError,
    OptionError,
    PassError,
    SpecError,
)
from torchlathe.passes import StructuredErase


class Small(nn.Module):
    """A frozen layer, a shared one, batch norm, dropout and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.enter.requires_grad_(False)
        self.norm = nn.BatchNorm1d(12)
        self.mix = nn.Linear(12, 12)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)
        self.register_buffer("shift", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.enter(x)) + self.shift
        x = x + self.mix(self.drop(x).relu())
        return self.head(x + self.mix(x).relu())


@pytest.fixture
def model() -> Small:
    made = Small()
    made.train()
    made.norm.eval()  # a mixture of flags, which has to come back
    return made


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def build(model: Any, passes: Any = "structured-erase", inputs: Any = (X,), **options: Any) -> Any:
    options.setdefault("measure_latency", False)
    return tl.compile(model, passes, inputs, **options)


class Snapshot:
    """Everything of a module that a caller could notice."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {n: t.detach().clone() for n, t in model.state_dict().items()}
        self.ids = {n: id(t) for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.versions = {n: t._version for n, t in model.state_dict(keep_vars=True).items()}
        self.training = {n: m.training for n, m in model.named_modules()}
        self.grads = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
        self.hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}
        self.attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
        self.random = torch.random.get_rng_state()

    def check(self) -> None:
        now = Snapshot(self.model)
        for name, tensor in self.state.items():
            assert torch.equal(
                now.state[name],
                tensor,
            ) or torch.equal(now.state[name].isnan(), tensor.isnan()), name
        for field in ("ids", "versions", "training", "grads", "hooks", "attributes"):
            assert getattr(now, field) == getattr(self, field), field
        assert torch.equal(now.random, self.random)


@pytest.fixture
def untouched(model: Small) -> Iterator[Snapshot]:
    snapshot = Snapshot(model)
    yield snapshot
    snapshot.check()


# -- what comes out ----------------------------------------------------------------------------


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("verify", [False, True, "off", "fast", "full"])
def test_the_result_equals_the_zeroed_model(model: Small, verify: Any) -> None:
    compiled = build(model, verify=verify, dynamic_shapes="auto")
    twin = compiled.zeroed_reference(model)
    for batch in (1, 4, 7):
        x = torch.linspace(-2, 2, batch * 6).reshape(batch, 6)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
    names = set(model.state_dict()) - {"norm.num_batches_tracked"}
    assert set(compiled.state_dict()) - {"norm.num_batches_tracked"} == names
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in compiled.parameters()) < before


@pytest.mark.usefixtures("untouched")
def test_no_passes_change_nothing(model: Small) -> None:
    compiled = build(model, ())
    state = model.state_dict()
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr() or not tensor.numel()
    want = model.eval()(X)
    model.train()
    model.norm.eval()
    assert torch.equal(compiled(X), want)
    assert compiled.kept == {}


@pytest.mark.usefixtures("untouched")
def test_training_the_result_leaves_the_model_alone(model: Small) -> None:
    compiled = build(model)
    assert {n for n, p in compiled.named_parameters() if not p.requires_grad} == {
        "enter.weight", "enter.bias",
    }  # fmt: skip
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    before = compiled(X).detach()
    compiled(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(compiled(X), before)


@pytest.mark.usefixtures("untouched")
def test_composed_passes_speak_of_the_original(model: Small) -> None:
    compiled = build(model, "structured-erase{sparsity=0.3},structured-erase{sparsity=0.3}")
    original = model.state_dict()
    state = compiled.state_dict()
    assert compiled.kept
    for name, axes in compiled.kept.items():
        if name.startswith("norm") or name == "shift":
            continue  # zeroed in the twin or carried; values may be folded
        expected = original[name]
        for axis, indices in axes.items():
            expected = expected.index_select(axis, indices)
        assert torch.equal(state[name], expected), name
    twin = compiled.zeroed_reference(model)
    torch.testing.assert_close(compiled(X), twin(X), rtol=1e-4, atol=1e-5)
    changed = {n for n, t in twin.state_dict().items() if not torch.equal(t, original[n])}
    assert changed <= set(compiled.program.zeroed)


def test_text_and_objects_give_the_same(model: Small) -> None:
    forms: list[Any] = [
        "structured-erase{sparsity=0.4,importance=l1}",
        ["structured-erase{sparsity=0.4,importance=l1}"],
        [StructuredErase(sparsity=0.4, importance="l1")],
        StructuredErase(sparsity=0.4, importance="l1"),
    ]
    compiled = [build(model, form) for form in forms]
    for other in compiled[1:]:
        for name, tensor in compiled[0].state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
        assert other.report.pipeline == compiled[0].report.pipeline


def test_other_forms_of_model(model: Small) -> None:
    model.eval()
    exported = torch.export.export(model, (X,))
    program = tl.capture(model, (X,))
    fingerprint = program.fingerprint()
    want = build(model)(X)
    assert torch.equal(build(exported)(X), want)
    assert torch.equal(build(program)(X), want)
    assert program.fingerprint() == fingerprint


def test_forms_of_example_inputs(model: Small) -> None:
    want = build(model)(X)
    assert torch.equal(build(model, inputs=X)(X), want)
    assert torch.equal(build(model, inputs={"x": X})(x=X), want)
    assert torch.equal(build(model, inputs=(), example_kwargs={"x": X})(x=X), want)


def test_progress_tells_the_stages(model: Small) -> None:
    lines: list[str] = []
    build(model, progress=lines.append)
    assert lines[0] == "capture"
    assert any("structured-erase" in line for line in lines)


# -- the report --------------------------------------------------------------------------------


def test_report(model: Small, tmp_path: Path) -> None:
    compiled = build(model, measure_latency=True, calibration=[X, X])
    report = compiled.report
    assert report.model == "Small"
    assert report.pipeline == "structured-erase"
    assert report.before.parameters == sum(p.numel() for p in model.parameters())
    assert report.after.parameters == sum(p.numel() for p in compiled.parameters())
    assert report.after.bytes < report.before.bytes
    assert report.after.flops < report.before.flops
    assert report.latency is not None
    assert -1 <= report.fidelity[0].cosine <= 1
    assert len(report.passes) == 1
    assert report.seconds > 0
    assert report.versions["torch"] == torch.__version__
    assert "structured-erase" in report.text()
    assert json.loads(report.to_json())
    report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().startswith("<!")


def test_calibration_may_be_an_iterator(model: Small) -> None:
    assert build(model, calibration=iter([X, X])).report.fidelity


# -- bad input ---------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.a(x)
        return x


@torch.library.custom_op("torchlathe_test::compile_mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return torch.cdist(x, x)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(mystery(self.a(x))).relu())


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("passes", "options", "error", "words"),
    [
        ("structured-erasee", {}, SpecError, ["structured-erasee", "structured-erase"]),
        ("structured-erase{sparsty=0.5}", {}, SpecError, ["sparsty", "sparsity"]),
        ("structured-erase{sparsity=0.5", {}, SpecError, ["^"]),
        ("structured-erase{sparsity=much}", {}, Error, ["sparsity", "much"]),
        ("structured-erase{sparsity=1.0}", {}, OptionError, ["sparsity is 1.0", "[0, 1)"]),
        ("structured-erase{sparsity=-1}", {}, OptionError, ["[0, 1)"]),
        ("structured-erase{include=[nothing.*]}", {}, PassError, ["'nothing.*' matches no family"]),
        ("structured-erase", {"backend": "indctor"}, BackendError, ["indctor", "inductor"]),
        ("structured-erase", {"verify": "fully"}, OptionError, ["fully", "full"]),
        (
            "structured-erase",
            {"inputs": (torch.randn(4, 7),)},
            InputError,
            ["4x7", "test_compile.py"],
        ),
        ("structured-erase", {"calibration": "texts"}, InputError, ["batches, got str"]),
        ("structured-erase", {"calibration": 3}, InputError, ["batches, got int"]),
        ("structured-erase", {"inputs": (X, X)}, InputError, []),
        ("structured-erase", {"inputs": ()}, InputError, ["x"]),
        ("structured-erase", {"inputs": {"y": X}}, InputError, ["y"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input(
    model: Small, passes: str, options: dict[str, Any], error: type[Error], words: list[str]
) -> None:
    with pytest.raises(error) as failure:
        build(model, passes, **options)
    for word in words:
        assert word in str(failure.value)


def test_options_are_refused_before_work(model: Small) -> None:
    lines: list[str] = []
    with pytest.raises(BackendError):
        build(model, backend="nothing", progress=lines.append)
    with pytest.raises(SpecError):
        build(model, "structured-erase,nothing", progress=lines.append)
    assert lines == []


def test_data_dependent_branch() -> None:
    model = Branching()
    snapshot = Snapshot(model)
    with pytest.raises(CaptureError) as failure:
        build(model)
    text = str(failure.value)
    assert "test_compile.py" in text
    assert "if x.sum() > 0" in text
    assert "torch.where" in text or "torch.cond" in text
    snapshot.check()


def test_an_op_without_a_rule_works_and_is_told() -> None:
    model = Distances()
    snapshot = Snapshot(model)
    compiled = build(model)
    # Nothing about the op is known, so that what it touches stays; the rest is erased.
    assert compiled.state_dict()["a.weight"].shape == (8, 6)
    assert compiled.state_dict()["b.weight"].shape == (5, 4)
    assert "compile_mystery" in compiled.report.text()
    torch.testing.assert_close(compiled(X), compiled.zeroed_reference(model)(X))
    snapshot.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: Small, value: float) -> None:
    with torch.no_grad():
        model.mix.weight[2, 3] = value
    snapshot = Snapshot(model)
    with pytest.raises(InputError, match=r"NaN or infinity in mix\.weight") as failure:
        build(model)
    assert "checkpoint" in str(failure.value)
    snapshot.check()


def test_a_pass_that_fails_leaves_everything(model: Small) -> None:
    snapshot = Snapshot(model)

    def broken(family: Any, program: Any) -> Tensor:
        with torch.no_grad():
            raise ValueError("no scores today")

    with pytest.raises(PassError, match="no scores today") as failure:
        build(model, ["structured-erase{sparsity=0.1}", StructuredErase(importance=broken)])
    assert "pass 2 of 2" in str(failure.value)
    assert isinstance(failure.value.__cause__, ValueError)
    snapshot.check()


# -- saved files -------------------------------------------------------------------------------


@pytest.fixture
def saved(model: Small, tmp_path: Path) -> Path:
    path = tmp_path / "model.tl"
    build(model).save(path)
    return path


def test_save_and_load(model: Small, saved: Path) -> None:
    loaded = tl.load(saved)
    want = build(model)
    assert torch.equal(loaded(X), want(X))
    assert loaded.kept.keys() == want.kept.keys()
    assert loaded.report.pipeline == "structured-erase"
    torch.testing.assert_close(loaded.zeroed_reference(model)(X), want.zeroed_reference(model)(X))


@pytest.mark.parametrize("damage", ["truncated", "tampered", "empty", "text", "missing"])
def test_damaged_files(saved: Path, damage: str) -> None:
    data = saved.read_bytes()
    if damage == "truncated":
        saved.write_bytes(data[: len(data) // 2])
    elif damage == "tampered":
        middle = data.index(b"enter.weight") + 2000
        saved.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "empty":
        saved.write_bytes(b"")
    elif damage == "text":
        saved.write_text("not a model")
    else:
        saved.unlink()
    with pytest.raises(ArtifactError) as failure:
        tl.load(saved)
    assert str(saved) in str(failure.value)


def test_functional_calls_are_found() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))
            self.v = nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(x @ self.w.T), self.v)

    compiled = build(Plain(), "structured-erase{sparsity=0.5}")
    assert compiled.state_dict()["w"].shape == (4, 6)
    assert compiled.kept["v"][1].tolist() == compiled.kept["w"][0].tolist()
