"""Saving and loading: what comes back, and that the bytes are always the same."""

import copy
import json
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.backends.small_models import (
    KEPT,
    Pair,
    Perceptron,
    Tied,
    dynamic_perceptron,
    erase_by_hand,
    same_outputs,
    tied_inputs,
)
from torchlathe.backends import CompiledModel, load, manifest
from torchlathe.ir import ArtifactError, BackendError, Program, capture

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Record:
    spec: str
    seconds: float
    statistics: dict[str, float]


@dataclass(frozen=True)
class Report:
    value: float

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "records": [{"spec": "by-hand"}]}


def saved(program: Program, path: Path, report: Any = None) -> CompiledModel:
    compiled = CompiledModel(program, report=report)
    compiled.save(path)
    return compiled


@pytest.fixture
def erased(tmp_path: Path) -> tuple[CompiledModel, Path]:
    program = erase_by_hand(dynamic_perceptron(Perceptron().eval()))
    program.history.append(Record("by-hand", 0.25, {"erased": 4, "share": 0.5}))
    return saved(program, tmp_path / "model.tl", Report(1.5)), tmp_path / "model.tl"


def test_everything_comes_back(erased: tuple[CompiledModel, Path]) -> None:
    compiled, path = erased
    loaded = load(path)
    for batch in (2, 3, 1):
        assert same_outputs(compiled, loaded, torch.randn(batch, 4))
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype is tensor.dtype
    assert list(loaded.state_dict()) == list(compiled.state_dict())
    assert set(loaded.kept) == set(compiled.kept)
    assert torch.equal(loaded.kept["fc2.weight"][1], KEPT)
    before, after = compiled.program, loaded.program
    assert after.to_text() == before.to_text()
    assert after.zeroed.keys() == before.zeroed.keys()
    assert [str(r) for r in after.range_constraints.values()] == [
        str(r) for r in before.range_constraints.values()
    ]
    assert torch.equal(after.example_inputs[0][0], before.example_inputs[0][0])
    assert after.history == [
        {"spec": "by-hand", "seconds": 0.25, "statistics": {"erased": 4, "share": 0.5}}
    ]
    assert loaded.report.to_dict() == {"value": 1.5, "records": [{"spec": "by-hand"}]}


def test_a_new_process_gives_the_same_bits(erased: tuple[CompiledModel, Path]) -> None:
    compiled, path = erased
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = compiled(x)
    check = path.with_name("check.safetensors")
    safetensors.torch.save_file({"x": x, "expected": expected}, check)
    code = (
        "import torch, safetensors.torch\n"
        "from torchlathe.backends import load\n"
        f"data = safetensors.torch.load_file({str(check)!r})\n"
        f"model = load({str(path)!r})\n"
        "x = data['x'].clone()  # aligned again, on which the last bit may depend\n"
        "assert torch.equal(model(x).detach(), data['expected'])\n"
        "assert str(model.program).startswith('<Program of Perceptron')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_same_model_gives_the_same_bytes(erased: tuple[CompiledModel, Path]) -> None:
    compiled, path = erased
    first = path.read_bytes()
    compiled.save(path)
    assert path.read_bytes() == first
    load(path).save(path)
    assert path.read_bytes() == first
    copy.deepcopy(compiled).save(path)
    assert path.read_bytes() == first


def test_a_loaded_model_trains_and_is_saved_as_it_is_now(erased, tmp_path: Path) -> None:
    _, path = erased
    loaded = load(path)
    loaded(torch.randn(2, 4)).square().sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    loaded.save(tmp_path / "again.tl")
    assert same_outputs(load(tmp_path / "again.tl"), loaded, torch.randn(2, 4))
    assert not same_outputs(load(path), loaded, torch.randn(2, 4))


def test_passes_run_on_a_loaded_program(erased: tuple[CompiledModel, Path]) -> None:
    _, path = erased
    loaded = load(path)
    program = loaded.program.copy()
    rest = torch.tensor([1, 3])
    with program.edit(by="second") as edit:
        for name in ("fc1.weight", "fc1.bias"):
            edit.record_zeroed(name, 0, torch.tensor([0, 2]))
            edit.keep(name, {0: rest})
        edit.keep("fc2.weight", {1: rest})
    smaller = CompiledModel(program, source=loaded)
    assert torch.equal(smaller.kept["fc1.bias"][0], KEPT[rest])
    assert smaller(torch.randn(3, 4)).shape == (3, 3)
    saved(program, path)
    assert torch.equal(load(path).kept["fc1.bias"][0], KEPT[rest])
    twin = load(path).zeroed_reference(Perceptron())
    assert (twin.get_parameter("fc1.bias") == 0).sum() == 6


def test_loading_needs_no_metadata_until_it_is_asked_for(erased) -> None:
    _, path = erased
    loaded = load(path)
    inner = loaded.__dict__["_torchlathe"].program
    calls = [node for node in inner.nodes if node.op == "call_function"]
    loaded(torch.randn(2, 4))
    assert not any("val" in node.meta for node in calls)
    assert all("val" in node.meta for node in loaded.program.nodes if node.op == "call_function")


def test_ties_buffers_and_structure_come_back(tmp_path: Path) -> None:
    model = Tied().eval()
    ids, kwargs = tied_inputs()
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    dynamic = {"ids": {0: rows, 1: columns}, "mask": {0: rows, 1: columns}}
    compiled = saved(capture(model, (ids,), kwargs, dynamic_shapes=dynamic), tmp_path / "m.tl")
    loaded = load(tmp_path / "m.tl")
    named = dict(loaded.named_parameters(remove_duplicate=False))
    assert named["head.weight"] is named["embedding.weight"]
    assert not named["frozen"].requires_grad
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(loaded.get_buffer("unread"), torch.arange(5))
    assert {n for n, _ in loaded.named_buffers()} == {n for n, _ in compiled.named_buffers()}
    for batch, length in ((2, 5), (4, 3)):
        ids, kwargs = tied_inputs(batch, length)
        with torch.no_grad():
            expected, found = model(ids, **kwargs), loaded(ids, **kwargs)
        assert torch.equal(found["logits"], expected["logits"])
        assert found["size"] == length
        assert found["pooled"][1] is None
    # A tied weight is in the file once.
    with zipfile.ZipFile(tmp_path / "m.tl") as archive:
        weights = safetensors.torch.load(archive.read("weights.safetensors"))
    assert len({"embedding.weight", "head.weight"} & set(weights)) == 1


def test_the_manifest_is_for_people(erased: tuple[CompiledModel, Path]) -> None:
    _, path = erased
    found = manifest(path)
    assert found["format"] == "torchlathe"
    assert found["model"] == "Perceptron"
    assert found["pipeline"] == "by-hand"
    assert found["torch"] == torch.__version__
    assert found["parameters"] == 4 * 4 + 4 + 3 * 4 + 3
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert json.loads(archive.read("manifest.json")) == found
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        weights = safetensors.torch.load(archive.read("weights.safetensors"))
        text = archive.read("graph.json").decode()
    assert set(weights) >= {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert str(ROOT.parent) not in text.replace(str(ROOT / "tests"), "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float8_e4m3fn", "complex64"])
def test_dtypes_and_layouts_come_back(dtype: str, tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randn(2, 3, 4, 5).to(getattr(torch, dtype))
            self.weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
            self.register_buffer("scalar", torch.tensor(True))
            self.register_buffer("empty", torch.empty(0, 3, dtype=torch.int8))

        scalar: torch.Tensor
        empty: torch.Tensor

        def forward(self, x: torch.Tensor) -> Any:
            wide = self.weight.to(torch.complex128)
            return (wide * x).real, self.scalar.logical_not(), self.empty + 1

    compiled = saved(capture(Cast(), (torch.ones(()),)), tmp_path / "m.tl")
    loaded = load(tmp_path / "m.tl")
    weight = loaded.get_parameter("weight")
    assert weight.dtype is getattr(torch, dtype)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.data_ptr() % weight.element_size() == 0
    for mine, other in zip(loaded(torch.ones(())), compiled(torch.ones(())), strict=True):
        assert torch.equal(mine, other)


def test_arguments_of_all_kinds_come_back(tmp_path: Path) -> None:
    class Kinds(nn.Module):
        def forward(self, x: torch.Tensor, flag: bool, scale: float | None) -> Any:
            filled = x.masked_fill(x < 0, float("-inf")).clamp(min=-1e30)
            rows = torch.arange(x.shape[0], dtype=torch.float64, device=x.device)
            parts = torch.split(x, [1, 3], dim=1)
            like = torch.zeros_like(x, memory_format=torch.preserve_format)
            values, indices = torch.topk(x, 2)
            pair = Pair(parts[0], x[:, 1:])
            return OrderedDict(a=filled, b=(rows, [values, indices]), c=pair, d=like.size(0) * 2)

    x = torch.randn(4, 4)
    rows = torch.export.Dim("rows", max=9)
    program = capture(Kinds(), (x, True, None), dynamic_shapes=({0: rows}, None, None))
    compiled = saved(program, tmp_path / "m.tl")
    loaded = load(tmp_path / "m.tl")
    y = torch.randn(7, 4)
    expected, found = compiled(y, True, None), loaded(y, True, None)
    assert type(found) is OrderedDict
    assert type(found["c"]) is Pair
    assert type(found["b"][1]) is list
    assert found["d"] == 14
    for mine, other in zip(
        torch.utils._pytree.tree_leaves(found),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(other))


def test_large_example_inputs_are_described_only(tmp_path: Path) -> None:
    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 2)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.table(ids).sum() + x.sum()

    ids, x = torch.randint(2, 7, (400, 400)), 3 + 2 * torch.randn(600, 500)
    saved(capture(Look(), (ids, x)), tmp_path / "m.tl")
    assert (tmp_path / "m.tl").stat().st_size < 20_000
    program = load(tmp_path / "m.tl").program
    found_ids, found_x = program.example_inputs[0]
    assert found_ids.shape == ids.shape
    assert (int(found_ids.min()), int(found_ids.max())) == (2, 6)
    assert abs(float(found_x.mean()) - 3) < 0.1
    assert abs(float(found_x.std()) - 2) < 0.1
    program.run(found_ids, found_x)


# -- outputs of other libraries -------------------------------------------------------------------


@dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor | None


def test_registered_types_come_back_and_others_as_plain(tmp_path: Path, monkeypatch) -> None:
    from torch.utils import _pytree as pytree

    if Answer not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(Answer, serialized_type_name="tests.Answer")

    class Asked(nn.Module):
        def forward(self, x: torch.Tensor) -> Answer:
            return Answer(x + 1, None)

    x = torch.randn(3)
    saved(capture(Asked(), (x,)), tmp_path / "m.tl")
    assert isinstance(load(tmp_path / "m.tl")(x), Answer)
    kinds = {k: v for k, v in pytree.SUPPORTED_NODES.items() if k is not Answer}
    monkeypatch.setattr(pytree, "SUPPORTED_NODES", kinds)
    with pytest.warns(UserWarning, match="Answer is not known here: a dict"):
        loaded = load(tmp_path / "m.tl")
    assert torch.equal(loaded(x)["first"], x + 1)


def test_outputs_of_transformers_in_a_new_process(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 20, (2, 4))
    compiled = saved(capture(model, (ids,)), tmp_path / "m.tl")
    with torch.no_grad():
        output = compiled(ids)
    safetensors.torch.save_file({"ids": ids, "logits": output.logits}, tmp_path / "check")
    code = (
        "import torch, safetensors.torch, sys\n"
        "from torchlathe.tools.compat import define_torchvision_ops\n"
        "define_torchvision_ops()\n"
        "import torchlathe\n"
        f"data = safetensors.torch.load_file({str(tmp_path / 'check')!r})\n"
        f"output = torchlathe.load({str(tmp_path / 'm.tl')!r})(data['ids'])\n"
        "assert torch.equal(output.logits.detach(), data['logits'])\n"
        "assert type(output).__name__ == 'CausalLMOutputWithPast', type(output)\n"
        "assert type(output.past_key_values).__name__ == 'DynamicCache'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


# -- what cannot be saved -------------------------------------------------------------------------


def test_a_file_that_cannot_be_written(erased, tmp_path: Path) -> None:
    compiled, path = erased
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="cannot write"):
        compiled.save(tmp_path / "none" / "model.tl")
    with pytest.raises(ArtifactError, match="cannot write"):
        compiled.save(tmp_path)
    program = compiled.program.copy()
    node = next(n for n in program.nodes if n.op == "call_function")
    node.target = torch.square
    with pytest.raises(ArtifactError, match="no registered op"):
        saved(program, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.tl"]


def test_a_failure_while_writing_leaves_the_old_file(erased, monkeypatch, tmp_path: Path) -> None:
    compiled, path = erased
    before = path.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        compiled.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.tl"]


def test_a_tensor_without_a_place_in_the_file() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phase", torch.ones(2, dtype=torch.complex128))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.get_buffer("phase") * x).real

    compiled = CompiledModel(capture(Wide(), (torch.ones(2),)))
    with pytest.raises(ArtifactError, match=r"phase cannot be saved: .*torch.complex128"):
        compiled.save("never.tl")


def test_an_unknown_backend_is_found_before_reading(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no backend is called"):
        load(tmp_path / "none.tl", backend="nothing")


# -- mapped into memory ---------------------------------------------------------------------------


def test_mapped_weights_are_those_that_were_read(tmp_path) -> None:
    model = Tied().eval()
    ids, kwargs = tied_inputs()
    path = tmp_path / "m.tl"
    CompiledModel(capture(model, (ids,), kwargs), source=model).save(path)
    for mapped, check in ((False, True), (True, True), (True, False)):
        loaded = load(path, mmap=mapped, check=check)
        want, got = model(ids, **kwargs), loaded(ids, **kwargs)
        assert torch.equal(got["logits"], want["logits"])
        # Training changes this process' copy, and not the file.
        with torch.no_grad():
            loaded.get_parameter("block.0.weight").add_(1)
    again = load(path, mmap=True)
    assert torch.equal(again.get_parameter("block.0.weight"), model.get_parameter("block.0.weight"))
    pointers = [p.untyped_storage().data_ptr() for p in again.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_mapped_weights_are_held_against_their_hash(tmp_path) -> None:
    path = tmp_path / "m.tl"
    CompiledModel(dynamic_perceptron(Perceptron())).save(path)
    start = manifest_start(path)
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"weights\.safetensors was changed or damaged"):
        load(path, mmap=True)
    load(path, mmap=True, check=False)


def manifest_start(path) -> int:
    """A byte within the last tensor of the weights."""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("weights.safetensors")
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name + extra + entry.file_size - 3
