"""Checkpoints: what is written is what transformers, by the reference library, and we read."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import torchlathe as tl
from torchlathe.backends import CompiledModel
from torchlathe.backends.checkpoints import StoredLinear, save_checkpoint
from torchlathe.backends.checkpoints.coding import from_file, numbers_of, to_file
from torchlathe.backends.checkpoints.stored import Stored
from torchlathe.ir import (
    BackendError,
    InputError,
    OptionError,
    Program,
    UnsupportedError,
)
from torchlathe.kernels.dequantize.formats import FORMATS
from torchlathe.passes import PassManager
from torchlathe.passes.rewrite.quantising.grids import quantised
from torchlathe.tools.checkpoints import load_checkpoint
from torchlathe.tools.cli import main

transformers = pytest.importorskip("transformers")
needs_reference = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)

TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))

# Weights that are stored alike are read alike: the same ops on the same numbers.
EXACT = 1e-6
# The reference multiplies 4-bit floats in bf16, so that weights are off by half a unit of 2^-8.
BF16 = 1e-2
# It rounds inputs in steps of 1/127.5 of the largest, not 1/127: two roundings to 8 bits differ by
# about as much as one does from none, a per cent or two of the norm.
ROUNDED = 4e-2

# Pipeline, difference to the reference, and whether that loads stored numbers in fp32: asymmetric
# ones it cannot load without dequantising, its own files neither, and 4-bit floats it can in bf16.
SCHEMES = [
    pytest.param("quantize{scheme=w4a16,group=32}", EXACT, True, id="w4a16"),
    pytest.param("quantize{scheme=w4a16,group=32,symmetric=false}", EXACT, False, id="w4a16-zeros"),
    pytest.param("quantize{scheme=w4a16,group=0}", EXACT, True, id="w4a16-rows"),
    pytest.param("quantize{scheme=w8a16}", EXACT, True, id="w8a16"),
    pytest.param("quantize", ROUNDED, True, id="w8a8"),
    pytest.param("quantize{symmetric=false}", ROUNDED, True, id="w8a8-zeros"),
    pytest.param("quantize{scheme=w4a8,group=32}", ROUNDED, True, id="w4a8"),
    pytest.param("quantize{scheme=fp8}", ROUNDED, True, id="fp8"),
    pytest.param("quantize{scheme=w2a16}", EXACT, False, id="w2a16"),
    pytest.param("quantize{scheme=nvfp4}", BF16, False, id="nvfp4"),
    pytest.param("quantize{scheme=mxfp4}", BF16, False, id="mxfp4"),
    pytest.param("sparsify-nm{method=magnitude}", EXACT, True, id="2:4"),
]


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def program(llama: Any) -> Program:
    return tl.capture(llama, (), {"input_ids": TOKENS})


def compiled(program: Program, llama: Any, passes: str, options: str = "") -> CompiledModel:
    after = PassManager(passes, verify="off").run(program.copy())
    return CompiledModel(after, f"checkpoint{options}", source=llama, before=program)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(input_ids=TOKENS).logits
    assert isinstance(found, torch.Tensor)
    return found.float()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- numbers in a file -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    whole=st.booleans(),
    symmetric=st.booleans(),
    rounded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_numbers_come_back_as_they_were(
    form: str, rows: int, groups: int, whole: bool, symmetric: bool, rounded: bool, seed: int
) -> None:
    kind = FORMATS[form]
    group = kind.block or (0 if whole else 16)
    # Columns that fill no word: rows of 4-bit numbers end in the middle of one.
    columns = groups * group if group else 2 * groups + 1
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if not kind.integer:
        symmetric, rounded = True, rounded and kind.bits == 8
    q = quantised(weight, form, group=group, symmetric=symmetric)
    stored = Stored(
        q.values, q.scales, q.zeros, q.total, columns, q.group, form, torch.float32,
        ("int8" if kind.integer else "fp8") if rounded else None,
    )  # fmt: skip
    numbers = numbers_of(stored, "x")
    back = from_file(to_file(stored, numbers), numbers, torch.float32, "x")
    assert torch.equal(back.values, stored.values)
    assert torch.equal(back.scales, stored.scales)
    assert back.scales.dtype == stored.scales.dtype
    if stored.zeros is not None:
        assert back.zeros is not None
        assert torch.equal(back.zeros, stored.zeros)
    # 1 / (1 / x) is within an ulp of x, and all else is the same.
    torch.testing.assert_close(back.dequantised(), stored.dequantised(), rtol=3e-7, atol=0)


@needs_reference
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 31, 64, 77])
def test_words_are_those_of_the_reference(bits: int, columns: int) -> None:
    from torchlathe.backends.checkpoints.coding import _packed, _unpacked

    pack_to_int32 = import_module("compressed_tensors.compressors.pack_quantized").pack_to_int32
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    numbers = torch.randint(low, high, (5, columns), generator=generator).to(torch.int8)
    words = pack_to_int32(numbers, bits)
    assert torch.equal(_unpacked(words, bits, columns, "x"), numbers)
    if (form := {2: "int2", 4: "int4", 8: "int8"}.get(bits)) is not None:
        assert torch.equal(_packed(numbers, FORMATS[form]), words)


# -- ours, read by others and by us ------------------------------------------------------------


@pytest.mark.parametrize(("passes", "tolerance", "stored"), SCHEMES)
def test_what_is_written_computes_what_was_compiled(
    passes: str, tolerance: float, stored: bool, program: Program, llama: Any, tmp_path: Path
) -> None:
    made = compiled(program, llama, passes)
    assert made.agreement is not None
    made.export(tmp_path / "out")
    want = logits(made)
    if "quantize" in passes:
        back = load_checkpoint(tmp_path / "out")
        layers = [m for m in back.modules() if isinstance(m, StoredLinear)]
        assert len(layers) == 15
        torch.testing.assert_close(logits(back), want, rtol=1e-5, atol=1e-6)
    if find_spec("compressed_tensors") is None:
        return
    auto = transformers.AutoModelForCausalLM
    if stored:
        assert difference(logits(auto.from_pretrained(tmp_path / "out")), want) <= tolerance
    if "quantize" in passes:
        config = transformers.CompressedTensorsConfig(dequantize=True)
        read = auto.from_pretrained(tmp_path / "out", quantization_config=config)
        # Dense weights, so that inputs stay as they are.
        assert difference(logits(read), want) <= tolerance


@needs_reference
@pytest.mark.parametrize("scheme", ["nvfp4", "w4a16,group=32"])
def test_models_in_bf16(scheme: str, tmp_path: Path) -> None:
    llama = tiny_llama(torch.bfloat16)
    program = tl.capture(llama, (), {"input_ids": TOKENS})
    made = compiled(program, llama, f"quantize{{scheme={scheme}}}")
    made.export(tmp_path / "out")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.bfloat16
    # Products of numbers and scales are rounded to bf16 by both, the scales before it by one.
    assert difference(logits(read), logits(made)) <= 2e-2
    back = load_checkpoint(tmp_path / "out")
    assert difference(logits(back), logits(made)) <= BF16


def test_the_compiled_model_is_the_one_of_transformers(
    program: Program, llama: Any, tmp_path: Path
) -> None:
    made = compiled(program, llama, "quantize{scheme=w8a16,exclude=[lm_head]}")
    assert type(made.module) is type(llama)
    assert isinstance(made.module.model.layers[0].mlp.up_proj, StoredLinear)
    assert type(made.module.lm_head) is nn.Linear
    # Its tensors are those of the compiled model, and nothing is the original's.
    with torch.no_grad():
        made.state_dict()["model.norm.weight"].mul_(2)
    torch.testing.assert_close(made.module.model.norm.weight, 2 * llama.model.norm.weight)
    for _ in range(2):  # a checkpoint that is there is replaced
        save_checkpoint(made.module, tmp_path / "out")
    assert difference(logits(load_checkpoint(tmp_path / "out")), logits(made)) <= EXACT
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.layers.0.mlp.up_proj.weight_packed" in names
    assert "lm_head.weight" in names
    assert not any("inv_freq" in name for name in names)


def test_what_is_loaded_is_captured_in_the_logical_form(
    program: Program, llama: Any, tmp_path: Path
) -> None:
    made = compiled(program, llama, "quantize{scheme=w4a16,group=32,symmetric=false}")
    made.export(tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    again = tl.capture(loaded, (), {"input_ids": TOKENS})
    ours = {name: entry.tensor for name, entry in made.program.entries.items()}
    found = {name: entry.tensor for name, entry in again.entries.items()}
    assert {n for n in ours if "proj" in n} == {n for n in found if "proj" in n}
    for name in ours:
        if "proj" in name:
            assert torch.equal(found[name], ours[name]), name
    # Passes, fused ops and files go on from it.
    fused = tl.compile(loaded, "", (), example_kwargs={"input_ids": TOKENS}, measure_latency=False)
    assert difference(logits(fused), logits(made)) <= 1e-4
    CompiledModel(again, "checkpoint", source=loaded).export(tmp_path / "again")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_file_without_the_module_takes_a_config(
    program: Program, llama: Any, tmp_path: Path
) -> None:
    made = compiled(program, llama, "quantize{scheme=w4a16,group=32}")
    made.export(tmp_path / "out")
    made.save(tmp_path / "model.tl")
    words = [str(tmp_path / "model.tl"), "--like", str(tmp_path / "out" / "config.json")]
    assert main(["export", *words, "-o", str(tmp_path / "again")]) == 0
    first, second = (tmp_path / f / "model.safetensors" for f in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["export", *words, "-o", str(first)]) == 2
    with pytest.raises(BackendError, match="whose config a checkpoint needs"):
        tl.load(tmp_path / "model.tl", backend="checkpoint")


def test_bits_by_a_budget_are_named_layer_by_layer(
    program: Program, llama: Any, tmp_path: Path
) -> None:
    spec = "quantize{scheme=w8a16,include=[*mlp*]},quantize{scheme=w4a16,group=32,include=[*attn*]}"
    compiled(program, llama, spec).export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert all("Linear" not in group["targets"] for group in config["config_groups"].values())
    want = logits(compiled(program, llama, spec))
    assert difference(logits(load_checkpoint(tmp_path / "out")), want) <= EXACT
    if find_spec("compressed_tensors") is not None:
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert difference(logits(read), want) <= EXACT


def test_dense_weights_need_no_package(program: Program, llama: Any, tmp_path: Path) -> None:
    made = compiled(program, llama, "quantize{scheme=w4a16,group=32}", "{format=dense}")
    made.export(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(logits(read), logits(made)) <= EXACT
    with pytest.raises(InputError, match="no quantization_config"):
        load_checkpoint(tmp_path / "out")
    with pytest.raises(UnsupportedError, match="inputs are rounded"):
        compiled(program, llama, "quantize", "{format=dense}")


def test_large_models_are_spread_over_files(program: Program, llama: Any, tmp_path: Path) -> None:
    made = compiled(program, llama, "quantize{scheme=w8a16}", "{shard-bytes=40000}")
    made.export(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert difference(logits(load_checkpoint(tmp_path / "out")), logits(made)) <= EXACT
    if find_spec("compressed_tensors") is not None:
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert difference(logits(read), logits(made)) <= EXACT
    with pytest.raises(InputError, match="holds other weights"):
        compiled(program, llama, "quantize{scheme=w8a16}").export(tmp_path / "out")
    with pytest.raises(OptionError, match="shard_bytes"):
        compiled(program, llama, "quantize", "{shard-bytes=0}")


# -- models nobody here wrote ------------------------------------------------------------------


def _other_models() -> dict[str, Any]:
    t = transformers
    text = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return {
        "bert": lambda: t.BertModel(t.BertConfig(**text, intermediate_size=96)),
        "opt-tied": lambda: t.OPTForCausalLM(
            t.OPTConfig(**text, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64,
                        use_cache=False)
        ),
        "qwen2-tied": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(**text, intermediate_size=96, num_key_value_heads=2, use_cache=False,
                          tie_word_embeddings=True)
        ),
        "gpt-neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**text, intermediate_size=96, max_position_embeddings=64,
                            use_cache=False)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "opt-tied", "qwen2-tied", "gpt-neox"])
def test_other_models(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _other_models()[name]().eval()
    program = tl.capture(model, (), {"input_ids": TOKENS})
    made = compiled(program, model, "quantize{scheme=w4a16,group=32}")
    made.export(tmp_path / "out")
    with torch.no_grad():
        want = made(input_ids=TOKENS)[0]
        back = load_checkpoint(tmp_path / "out")(input_ids=TOKENS)[0]
        torch.testing.assert_close(back, want, rtol=1e-5, atol=1e-6)
        if find_spec("compressed_tensors") is not None:
            read = type(model).from_pretrained(tmp_path / "out")
            torch.testing.assert_close(read(input_ids=TOKENS)[0], want, rtol=1e-5, atol=1e-6)


class Pooled(nn.Module):
    """Code of one's own around a model of transformers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(tokens).logits.mean(1)
        return found


def test_the_model_may_be_part_of_another(llama: Any, tmp_path: Path) -> None:
    made = tl.compile(
        Pooled(llama), "quantize{scheme=w8a16}", (TOKENS,), backend="checkpoint",
        measure_latency=False,
    )  # fmt: skip
    made.export(tmp_path / "out")
    back = Pooled(load_checkpoint(tmp_path / "out"))
    torch.testing.assert_close(back(TOKENS), made(TOKENS), rtol=1e-5, atol=1e-6)
