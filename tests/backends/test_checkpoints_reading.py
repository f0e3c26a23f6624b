"""Checkpoints of other programs, and what has no place in one: each with an error that says so."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import torchlathe as tl
from tests.backends.test_checkpoints import (
    BF16,
    EXACT,
    ROUNDED,
    TOKENS,
    compiled,
    difference,
    logits,
    needs_reference,
    tiny_llama,
)
from torchlathe.backends.checkpoints import StoredLinear, save_checkpoint
from torchlathe.ir import ArtifactError, BackendError, Error, InputError, UnsupportedError
from torchlathe.tools.checkpoints import load_checkpoint
from torchlathe.tools.cli import main

transformers = pytest.importorskip("transformers")


# -- theirs ------------------------------------------------------------------------------------


def _calibrated(scheme: Any, dtype: torch.dtype) -> Any:
    """A model that the reference library quantises: its scales, its rounding, its layout."""
    theirs = import_module("compressed_tensors.quantization")
    tools = import_module("compressed_tensors.quantization.utils")
    model = tiny_llama(dtype)
    groups = {"group_0": scheme}
    config = theirs.QuantizationConfig(config_groups=groups, ignore=["re:.*lm_head"])
    theirs.apply_quantization_config(model, config)
    for module in model.modules():
        if (found := getattr(module, "quantization_scheme", None)) is None:
            continue
        args, weight = found.weights, module.weight.detach().float()
        total = None
        if args.strategy == "tensor":
            low, high = weight.amin().reshape(1), weight.amax().reshape(1)
        elif args.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        elif args.strategy == "block":
            tall, wide = args.block_structure
            parts = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
            low, high = parts.amin((1, 3)), parts.amax((1, 3))
        else:
            parts = weight.unflatten(1, (-1, args.group_size))
            low, high = parts.amin(-1), parts.amax(-1)
        if args.strategy == "tensor_group":
            total = tools.generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
            module.weight_global_scale.data.copy_(total)
        scale, zero = tools.calculate_qparams(low, high, args, global_scale=total)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        module.quantization_status = theirs.QuantizationStatus.FROZEN
    return model


def _theirs(scheme: Any, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Write a checkpoint by the reference library; what its quantised model computes."""
    compressors = import_module("compressed_tensors.compressors")
    model = _calibrated(scheme, dtype)
    want = logits(model)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return want


def _scheme(bits: int, *, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    theirs = import_module("compressed_tensors.quantization")
    return theirs.QuantizationScheme(
        targets=["Linear"],
        weights=theirs.QuantizationArgs(num_bits=bits, **options),
        input_activations=None if inputs is None else theirs.QuantizationArgs(**inputs),
    )


TOKEN_INTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
TOKEN_FLOATS = TOKEN_INTS | {"type": "float"}


@needs_reference
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param({"bits": 4, "strategy": "group", "group_size": 32}, EXACT, id="w4a16"),
        pytest.param(
            {"bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
            EXACT,
            id="w4a16-zeros",
        ),
        pytest.param({"bits": 3, "strategy": "group", "group_size": 32}, EXACT, id="w3a16"),
        pytest.param(
            {"bits": 6, "strategy": "channel", "symmetric": False}, EXACT, id="w6a16-zeros"
        ),
        pytest.param({"bits": 8, "strategy": "tensor"}, EXACT, id="w8a16-tensor"),
        pytest.param({"bits": 8, "strategy": "channel", "inputs": TOKEN_INTS}, ROUNDED, id="w8a8"),
        pytest.param(
            {"bits": 8, "type": "float", "strategy": "channel", "inputs": TOKEN_FLOATS},
            EXACT,
            id="fp8",
        ),
        pytest.param(
            {"bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
            EXACT,
            id="fp8-blocks",
        ),
        pytest.param(
            {
                "bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            },
            BF16,
            id="nvfp4",
        ),
        pytest.param(
            {
                "bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
                "zp_dtype": "torch.uint8",
            },
            BF16,
            id="mxfp4",
        ),
    ],
)
def test_files_of_the_reference(options: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    want = _theirs(_scheme(**options), tmp_path / "theirs")
    found = load_checkpoint(tmp_path / "theirs")
    assert sum(isinstance(m, StoredLinear) for m in found.modules()) == 14
    assert difference(logits(found), want) <= tolerance


@needs_reference
def test_inputs_with_one_scale_for_all_are_left_out_when_asked(tmp_path: Path) -> None:
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    scheme = _scheme(8, type="float", strategy="tensor", inputs=static)
    _theirs(scheme, tmp_path / "theirs")
    with pytest.raises(UnsupportedError, match="inputs are rounded in a way"):
        load_checkpoint(tmp_path / "theirs")
    found = load_checkpoint(tmp_path / "theirs", round_inputs=False)
    assert difference(logits(found), logits(tiny_llama())) <= 6e-2  # e4m3 keeps four bits


# -- bad files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama = tiny_llama()
    program = tl.capture(llama, (), {"input_ids": TOKENS})
    folder = tmp_path_factory.mktemp("good") / "out"
    compiled(program, llama, "quantize{scheme=w4a16,group=32}").export(folder)
    return folder


def _changed(
    good: Path,
    folder: Path,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> Path:
    folder.mkdir()
    data = json.loads((good / "config.json").read_text())
    values = load_file(good / "model.safetensors")
    if config is not None:
        config(data)
    if tensors is not None:
        tensors(values)
    (folder / "config.json").write_text(json.dumps(data))
    save_file(values, folder / "model.safetensors")
    return folder


UP = "model.layers.0.mlp.up_proj"


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a value of the quantization_config, or of its only group."""

    def change(config: dict[str, Any]) -> None:
        place = config["quantization_config"]
        *path, last = key.split(".")
        for part in path:
            place = place[part]
        place[last] = value

    return change


WEIGHTS = "config_groups.group_0.weights"
BAD_CONFIGS = {
    "another method": (_set("quant_method", "gptq"), UnsupportedError, "'gptq'"),
    "no groups": (_set("config_groups", None), ArtifactError, "config_groups"),
    "a cache": (_set("kv_cache_scheme", {"num_bits": 8}), UnsupportedError, "kv_cache_scheme"),
    "rotations": (_set("transform_config", {"R1": {}}), UnsupportedError, "transform_config"),
    "16 bits": (_set(f"{WEIGHTS}.num_bits", 16), UnsupportedError, "16 bits"),
    "another layout": (_set("config_groups.group_0.format", "marlin-24"), UnsupportedError,
                       "marlin-24"),
    "other groups": (_set(f"{WEIGHTS}.group_size", 16), ArtifactError, "have scales"),
    "other bits": (_set(f"{WEIGHTS}.num_bits", 8), ArtifactError, "8 bits"),
    "zero points": (_set(f"{WEIGHTS}.symmetric", False), ArtifactError, "weight_zero_point"),
    "no layer": (_set("config_groups.group_0.targets", ["Conv9d"]), ArtifactError, "no layer"),
    "all ignored": (_set("ignore", ["re:.*"]), ArtifactError, "no layer"),
    "outputs": (_set("config_groups.group_0.output_activations", {"num_bits": 8}),
                UnsupportedError, "outputs"),
    "inputs alone": (_set(WEIGHTS, None), UnsupportedError, "inputs alone"),
    "no quantization": (lambda c: c.pop("quantization_config"), InputError, "quantization_config"),
    "no class": (lambda c: c.update(architectures=["Nothing"]), InputError, "Nothing"),
    "another size": (lambda c: c.update(vocab_size=7), ArtifactError, "the config says"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_CONFIGS))
def test_configs_that_cannot_be_read(case: str, good: Path, tmp_path: Path) -> None:
    change, kind, words = BAD_CONFIGS[case]
    with pytest.raises(kind, match=words):
        load_checkpoint(_changed(good, tmp_path / "bad", config=change))


def _cut(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight_packed"][:, :-1].contiguous()


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{UP}.weight_scale"][0, 0] = torch.inf


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[Error], str]] = {
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), ArtifactError, "weight_scale"),
    "no numbers": (lambda t: t.pop(f"{UP}.weight_packed"), ArtifactError, "weight_packed"),
    "no norm": (lambda t: t.pop("model.norm.weight"), ArtifactError, "model.norm.weight"),
    "a tensor more": (lambda t: t.update(x=torch.zeros(2)), InputError, "has no x"),
    "another order": (
        lambda t: t.update({f"{UP}.weight_g_idx": torch.arange(64)}),
        UnsupportedError,
        "another order",
    ),
    "short rows": (_cut, ArtifactError, "in words"),
    "infinite": (_poison, ArtifactError, "not finite"),
    "other rows": (lambda t: t[f"{UP}.weight_shape"].fill_(64), ArtifactError, "not int8"),
    "other columns": (lambda t: t[f"{UP}.weight_shape"].fill_(96), ArtifactError, "in words"),
}


@pytest.mark.parametrize("case", list(BAD_TENSORS))
def test_tensors_that_do_not_fit(case: str, good: Path, tmp_path: Path) -> None:
    change, kind, words = BAD_TENSORS[case]
    with pytest.raises(kind, match=words):
        load_checkpoint(_changed(good, tmp_path / "bad", tensors=change))


def test_files_that_are_damaged(good: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    folder = _changed(good, tmp_path / "bad")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_checkpoint(folder)
    # An index that leads out of the folder finds nothing there.
    index = {"weight_map": {"x": "../../good.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        load_checkpoint(folder)


def test_a_module_of_ones_own_is_left_as_it_is(good: Path) -> None:
    llama = tiny_llama()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    found: Any = load_checkpoint(good, llama, dtype=torch.bfloat16)
    assert found.lm_head.weight_packed.dtype == torch.uint8
    assert found.model.norm.weight.dtype == torch.bfloat16
    assert isinstance(llama.lm_head, nn.Linear)
    assert all(torch.equal(before[name], t) for name, t in llama.state_dict().items())
    assert difference(logits(found), logits(load_checkpoint(good))) <= 3e-2  # bf16 activations
    with pytest.raises(ArtifactError, match="no layer of the model"):
        load_checkpoint(good, nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="Sequential has no lm_head"):
        load_checkpoint(good, nn.Sequential(nn.Linear(64, 64)))


def test_parts_that_want_more_bits_keep_them(good: Path) -> None:
    llama = tiny_llama().to(torch.bfloat16)
    llama.model.norm.float()
    found: Any = load_checkpoint(good, llama)
    assert found.model.norm.weight.dtype == torch.float32
    assert found.model.embed_tokens.weight.dtype == torch.bfloat16


def test_what_was_loaded_can_be_cast(good: Path) -> None:
    found: Any = load_checkpoint(good)
    want, scales = logits(found), found.lm_head.weight_scale.detach().clone()
    half = found.to(torch.bfloat16)
    assert torch.equal(half.lm_head.weight_scale, scales)
    assert half.lm_head.weight_scale.dtype == scales.dtype
    assert difference(logits(half), want) <= 3e-2  # bf16 activations
    assert difference(logits(half.float()), want) <= 3e-2  # norms and embeddings were rounded


# -- what a checkpoint cannot say --------------------------------------------------------------


def _llama_refused(passes: str) -> None:
    llama = tiny_llama()
    tl.compile(
        llama, passes, (), example_kwargs={"input_ids": TOKENS}, backend="checkpoint",
        calibration=[{"input_ids": TOKENS}], measure_latency=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("low-rank-split{rank=8}", "a pass added an op"),
        ("structured-erase{sparsity=0.3}", "the config says"),
        ("quantize,fuse-kernels{choose=rule}", "fused op"),
        ("quantize{scheme=w4a16,embeddings=true,group=32}", "looked up"),
        ("quantize{scheme=w4a16,group=48}", "whole groups"),
    ],
)
def test_programs_that_it_has_no_place_for(passes: str, words: str) -> None:
    with pytest.raises(Error, match=words) as caught:
        _llama_refused(passes)
    assert caught.value.hint


def test_models_that_it_has_no_place_for(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="is no model of transformers"):
        tl.compile(nn.Linear(64, 64), "quantize", (torch.randn(2, 64),), backend="checkpoint")
    with pytest.raises(InputError, match="is no model of transformers"):
        save_checkpoint(nn.Linear(4, 4), tmp_path / "out")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, use_cache=False)
    ).eval()
    with pytest.raises(UnsupportedError, match="Conv1D"):
        tl.compile(
            gpt2, "quantize{scheme=w8a16}", (), example_kwargs={"input_ids": TOKENS},
            backend="checkpoint", measure_latency=False,
        )  # fmt: skip


def _vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(1, 3, 16, 16)}


def _mixtral() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval(), {"input_ids": TOKENS}


def _caching() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_llama(), {"input_ids": TOKENS, "use_cache": True}


@pytest.mark.parametrize(
    ("make", "passes", "words"),
    [
        pytest.param(_vit, "quantize{scheme=w8a16}", "projection", id="convolution"),
        pytest.param(_mixtral, "quantize{scheme=w8a16}", "experts", id="experts"),
        pytest.param(_caching, "quantize-cache", "keys and values in few bits", id="cache"),
    ],
)
def test_layers_that_it_has_no_word_for(
    make: Callable[[], tuple[nn.Module, dict[str, Any]]], passes: str, words: str
) -> None:
    model, kwargs = make()
    with pytest.raises(UnsupportedError, match=words) as caught:
        tl.compile(
            model, passes, (), example_kwargs=kwargs, backend="checkpoint", measure_latency=False
        )
    # What it is about, and what to do.
    assert "exclude=" in str(caught.value.hint) or "leave quantize-cache out" in str(
        caught.value.hint
    )


# -- the command line --------------------------------------------------------------------------


def test_the_command_writes_and_reads_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    words = ["--backend", "checkpoint", "--export", str(out), "--no-latency"]
    passes = ["--passes", "quantize{scheme=w4a16,group=32}"]
    assert main(["compile", str(tmp_path / "model"), *passes, *words]) == 0
    assert (out / "model.safetensors").is_file()
    capsys.readouterr()
    assert main(["compile", str(out), "--no-latency", "-o", str(tmp_path / "m.tl")]) == 0
    back = tl.load(tmp_path / "m.tl")
    want = logits(load_checkpoint(out))
    found = back(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert difference(found, want) <= 1e-4
