"""Finding backends by name, and the inductor."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch

from tests.backends.small_models import Perceptron, dynamic_perceptron, erase_by_hand, same_outputs
from torchlathe.backends import (
    Backend,
    CompiledModel,
    Eager,
    Inductor,
    Lowerable,
    backend_names,
    backend_text,
    capabilities_of,
    get_backend,
)
from torchlathe.ir import BackendError, OptionError, SpecError

BUILT_IN = [
    "aoti",
    "auto",
    "checkpoint",
    "eager",
    "executorch",
    "inductor",
    "module",
    "onnx",
    "openvino",
]


@dataclass(frozen=True)
class Counting:
    """A backend of another package: runs by the module form, and counts."""

    name = "counting"
    calls: tuple[list[int]] = ([0],)

    def lower(self, source: Lowerable) -> Callable[..., Any]:
        module = source.graph_module()
        assert all("val" in node.meta for node in source.program.nodes if node.op != "output")

        def call(*inputs: Any) -> Any:
            self.calls[0][0] += 1
            return module(*inputs)

        return call


def test_backends_by_name_instance_and_class() -> None:
    assert get_backend("eager") == Eager()
    assert get_backend("inductor") == Inductor()
    assert get_backend(Inductor(dynamic=True)).dynamic is True  # type: ignore[attr-defined]
    assert isinstance(get_backend(Eager), Eager)
    assert isinstance(Eager(), Backend)
    assert backend_names() == BUILT_IN
    for name in BUILT_IN:
        assert get_backend(name).name == name


@pytest.mark.parametrize("name", ["induktor", "Inductor", "inducto"])
def test_an_unknown_name_tells_the_nearest(name: str) -> None:
    with pytest.raises(BackendError, match="did you mean inductor"):
        get_backend(name)


def test_what_is_no_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="there are aoti, auto, checkpoint, eager"):
        get_backend("zzz")
    with pytest.raises(BackendError, match="is not a backend"):
        get_backend(3)  # type: ignore[arg-type]


def _install(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = metadata.EntryPoints(
        metadata.EntryPoint(name, value, "torchlathe.backends") for name, value in points
    )
    monkeypatch.setattr(metadata, "entry_points", lambda **kwargs: found.select(**kwargs))


def test_an_entry_point_adds_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, ("counting", f"{__name__}:Counting"))
    assert backend_names() == sorted(["counting", *BUILT_IN])
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), "counting", source=model)
    x = torch.randn(3, 4)
    calls = compiled.backend.calls[0]  # type: ignore[attr-defined]
    assert calls[0] == 2  # it was compared with the eager program, at two sizes
    assert same_outputs(model, compiled, x)
    assert calls[0] == 3
    # The module form reads the live tensors, too.
    compiled.double()
    assert compiled(x.double()).dtype is torch.float64
    compiled.load_state_dict(Perceptron().double().state_dict(), assign=True)
    assert not same_outputs(model.double(), compiled, x.double())


def test_a_backend_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, ("broken", "no_such_module:Thing"), ("eager", f"{__name__}:Counting"))
    with pytest.raises(BackendError, match=r"'broken'.*could not be loaded"):
        get_backend("broken")
    with pytest.raises(BackendError, match="several backends are called 'eager'"):
        get_backend("eager")


def test_a_backend_of_another_package_runs_a_loaded_model(tmp_path) -> None:
    from torchlathe.backends import load

    model = Perceptron().eval()
    CompiledModel(dynamic_perceptron(model), source=model).save(tmp_path / "m.tl")
    loaded = load(tmp_path / "m.tl", backend=Counting())
    assert same_outputs(model, loaded, torch.randn(3, 4))


# -- inductor -------------------------------------------------------------------------------------


def test_options_of_the_inductor_are_checked() -> None:
    with pytest.raises(OptionError, match="mode of inductor: expected default"):
        Inductor(mode="fast")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="exclude each other"):
        Inductor(mode="max-autotune", options={"freezing": True})
    model = CompiledModel(dynamic_perceptron(Perceptron()))
    with pytest.raises(BackendError, match="refuses"):
        CompiledModel(model.program, Inductor(options={"no_such_option": 1}))


@pytest.mark.cxx
def test_the_inductor_runs_and_trains() -> None:
    model = Perceptron().eval()
    program = erase_by_hand(dynamic_perceptron(model))
    eager = CompiledModel(program, source=model)
    compiled = CompiledModel(program, "inductor")
    for batch in (2, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for (name, mine), (_, other) in zip(
        compiled.named_parameters(), eager.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        before = compiled(x)
        compiled.get_parameter("fc2.bias").add_(1)
        torch.testing.assert_close(compiled(x), before + 1, rtol=1e-5, atol=1e-5)


def test_a_compiler_that_fails_gives_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def refuse(module: torch.nn.Module, **options: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            raise TorchDynamoException("g++ is not there")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    program = dynamic_perceptron(Perceptron())
    with pytest.raises(BackendError, match=r"(?s)could not compile Perceptron.*g\+\+") as caught:
        CompiledModel(program, "inductor")
    assert 'backend="eager"' in str(caught.value)
    compiled = CompiledModel(program, "inductor", check=False)
    with pytest.raises(BackendError, match="could not compile") as caught:
        compiled(torch.randn(2, 4))
    assert 'backend="eager"' in str(caught.value)


def test_an_error_of_the_run_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*inputs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(torch, "compile", lambda module, **options: run)
    compiled = CompiledModel(dynamic_perceptron(Perceptron()), "inductor", check=False)
    with pytest.raises(ZeroDivisionError):
        compiled(torch.randn(2, 4))


@pytest.mark.slow
@pytest.mark.cxx
def test_the_inductor_serves_every_size_of_an_encoder(tmp_path) -> None:
    from torchlathe.backends import load
    from torchlathe.ir import capture

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.BertModel(config).eval()

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, length - 1 :] = 0
        return {"input_ids": torch.randint(0, 50, (batch, length)), "attention_mask": mask}

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=512)
    sizes = {0: batch, 1: length}
    program = capture(
        model,
        (),
        inputs(2, 16),
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    )
    CompiledModel(program, source=model).save(tmp_path / "m.tl")
    compiled = load(tmp_path / "m.tl", backend=Inductor())
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for shape in ((2, 16), (3, 16), (5, 40), (1, 7)):
            given = inputs(*shape)
            expected, found = model(**given), compiled(**given)
            assert type(found) is type(expected)
            torch.testing.assert_close(
                found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5
            )
    # One graph for all but the batch of 1, which torch may treat as a case of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# -- options as text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "backend"),
    [
        ("inductor{freezing=true,autotune=true}", Inductor(freezing=True, autotune=True)),
        ("inductor{freezing}", Inductor(freezing=True)),
        ("inductor{mode=max-autotune}", Inductor(mode="max-autotune")),
        ("inductor{options={max_autotune:true}}", Inductor(options={"max_autotune": True})),
        ("eager", Eager()),
    ],
)
def test_options_have_a_text_form(text: str, backend: Backend) -> None:
    assert get_backend(text) == backend
    assert get_backend(backend_text(backend)) == backend


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("inductor{freezin=true}", SpecError, "did you mean freezing"),
        ("inductor{freezing=3}", OptionError, "expected true or false, got 3"),
        ("inductor{freezing=true", SpecError, "never closed"),
        ("eager,inductor", SpecError, "names 2 backends"),
        ("", SpecError, "expected a pass name|names no backends"),
        ("auto{budget-seconds=0}", OptionError, "must be above 0"),
        ("auto{candidates=[auto]}", OptionError, "cannot hold auto"),
        ("auto{candidates=[eagre]}", BackendError, "did you mean eager"),
        ("onnx{threads=0}", OptionError, "at least 1"),
        ("openvino{precision=f64}", OptionError, "f32, bf16, f16 or native"),
        ("executorch{largest=1}", OptionError, "at least 2"),
        ("inductor{freezing=true,mode=max-autotune}", OptionError, "exclude each other"),
    ],
)
def test_a_wrong_text_is_pointed_at(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_backend(text)


def test_a_backend_without_options_of_its_own_has_its_name_as_text() -> None:
    class Plain:
        name = "plain"

        def lower(self, source: Lowerable) -> Callable[..., Any]:
            return Eager().lower(source)

    assert backend_text(Plain()) == "plain"
    assert capabilities_of(Plain()).training
