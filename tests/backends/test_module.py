"""The module backend: the user's own classes with smaller parameters and attributes that fit."""

import copy
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchlathe as tl
from tests.backends.module_models import (
    LARGER,
    TEXT,
    VISION,
    Attention,
    Call,
    Closure,
    DefaultScale,
    Folded,
    Layers,
    shared_layers,
)
from torchlathe.backends import CompiledModel
from torchlathe.backends.module.stand_ins import (
    CompactAttention,
    CompensatedGroupNorm,
    CompensatedLayerNorm,
    Erased,
)
from torchlathe.ir import BackendError, UnsupportedError, capture
from torchlathe.passes import EraseOperators, StructuredErase, ZeroInvariantGroups

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, args: Any, kwargs: Any = None, **options: Any) -> CompiledModel:
    return tl.compile(
        model,
        StructuredErase(**options),
        args,
        example_kwargs=kwargs,
        backend="module",
        measure_latency=False,
    )


def same(first: Any, second: Any) -> None:
    """Equal up to float32 rounding of a few dozen ops, relative to the largest value."""
    a = first if isinstance(first, torch.Tensor) else first[0]
    b = second if isinstance(second, torch.Tensor) else second[0]
    a, b = a.detach(), b.detach()
    assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())


def families(call: Call) -> list[str]:
    """Names of what can be erased exactly."""
    model, args, kwargs = call
    found = capture(model, args, kwargs).analysis(ZeroInvariantGroups).prunable
    return [f.name for f in found if f.exactness != "approximate"]


def whole(names: list[str]) -> dict[str, float]:
    """Half of the channels, hidden units and streams, and half of the heads."""
    plain = {n: 0.5 for n in names if "/" not in n}
    heads = {n: 0.5 for n in names if n.endswith("/0") and n.count("/") <= 2 and "/2/" not in n}
    return plain | heads


# -- hand-made -----------------------------------------------------------------------------------


def test_plain_ints_follow_the_sizes() -> None:
    model = Attention().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = compiled(
        model,
        (X,),
        sparsity={"qkv.weight:0/1": 0.5, "up.weight:0": 0.4, "enter.weight:0": 0.25},
    )
    module = small.module
    assert type(module) is Attention
    assert (module.h, module.d, module.width) == (2, 8, 24)
    assert module.layer_idx == 4  # the same value as the heads had, and no size
    assert (module.qkv.in_features, module.qkv.out_features) == (24, 48)
    assert module.up.weight is small.get_parameter("up.weight")
    same(module(X), small.zeroed_reference(model)(X))
    assert (model.h, model.width) == (4, 32)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_it_serves_every_batch_size_of_a_dynamic_program() -> None:
    model = Attention().eval()
    small = tl.compile(
        model, "structured-erase", (X,), dynamic_shapes="auto", backend="module",
        measure_latency=False,
    )  # fmt: skip
    x = torch.randn(5, 5, 6)
    same(small(x), small.zeroed_reference(model)(x))
    same(small(x), small.module(x))


def test_layers_of_torch_by_the_table() -> None:
    model = Layers().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.2, 1)
    x = torch.randn(2, 3, 4, 4)
    small = compiled(model, (x,), sparsity=0.5, scope="local")
    body = small.module.body
    shapes = {name: tuple(p.shape) for name, p in small.module.named_parameters()}
    assert body[1].num_features == body[0].out_channels == len(body[1].running_mean) < 8
    assert body[3].groups == body[3].in_channels == body[3].out_channels
    assert body[4].num_channels == body[3].out_channels
    assert (body[5].in_channels, body[5].out_channels) == shapes["body.5.weight"][:2]
    assert body[7].in_channels == body[7].groups * shapes["body.7.weight"][1]
    assert body[11].normalized_shape == shapes["body.11.weight"]
    assert isinstance(body[13], CompensatedLayerNorm)
    assert body[13].total == 14
    same(small.module(x), small.zeroed_reference(model)(x))


def test_a_shared_record_of_options_is_split_where_layers_differ() -> None:
    model: Any = shared_layers().eval()
    x = torch.randn(2, 5, 16)
    small = compiled(model, (x,), sparsity={"0.q.weight:0/0": 0.5, "1.q.weight:0/0": 0.25})
    assert [layer.options.heads for layer in small.module] == [2, 3]
    assert [layer.options.heads for layer in model] == [4, 4]


def test_a_folded_constant_gives_a_layer_the_bias_that_it_had_not() -> None:
    model = Folded().eval()
    x = torch.randn(2, 6)
    small = compiled(model, (x,), sparsity=0.5)
    assert small.module.down.bias is not None
    assert small.module.table.shape == (8,)
    same(small.module(x), small.zeroed_reference(model)(x))


def test_group_norm_goes_on_counting_erased_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 2, 1))
    x = torch.randn(2, 3, 4, 4)
    small = compiled(model.eval(), (x,), sparsity={"0.weight:0/1": 0.5})
    assert isinstance(small.module[1], CompensatedGroupNorm)
    assert small.module[1].inner == 4
    same(small.module(x), small.zeroed_reference(model)(x))


def test_parameters_that_start_at_zero_hide_nothing() -> None:
    """A head of zeros gives equal outputs whatever comes before it."""
    model = DefaultScale().eval()
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.out.bias)
    x = torch.randn(2, 5, 16)
    dims = next(n for n in families((model, (x,), {})) if n.endswith("/2"))
    with pytest.raises(BackendError, match="differs by"):
        compiled(model, (x,), sparsity={dims: 0.5})


@pytest.mark.parametrize(
    ("name", "block", "branch", "gives"),
    [
        ("timm-vit", "blocks.1.attn", "blocks.1.attn", "zeros"),
        ("resnet", "layer1.0", "layer1", "input"),
        ("densenet", "*denseblock1.denselayer2", "features.denseblock1.denselayer2", "empty"),
    ],
    ids=["attention", "residual", "concatenated"],
)
def test_a_branch_that_is_gone_gives_nothing(
    name: str, block: str, branch: str, gives: str
) -> None:
    model, args, _ = VISION[name]()
    x = args[0]
    passes = EraseOperators(count=1, include=(f"{block}.*",))
    small = tl.compile(
        model.eval(), passes, args, dynamic_shapes="auto", backend="module", measure_latency=False
    )
    gone = {p: m for p, m in small.module.named_modules() if isinstance(m, Erased)}
    assert gone[branch].gives == gives
    assert all(not p.startswith(f"{branch}.") for p in small.module.state_dict())
    three = torch.cat([x, x[:1]])
    with torch.no_grad():
        same(small.module(three), small(three))


# -- what it keeps -------------------------------------------------------------------------------


def test_modes_hooks_and_gradients_are_kept() -> None:
    model = Attention().train()
    model.out.weight.requires_grad_(False)
    calls: list[int] = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    small = compiled(model, (X,), sparsity=0.5)
    assert model.training
    assert small.module.training
    assert not small.module.out.weight.requires_grad
    calls.clear()
    small(X).sum().backward()
    assert calls == [1]
    assert small.module.up.weight.grad is small.get_parameter("up.weight").grad
    assert small.module.up.weight.grad is not None


def test_the_module_follows_what_happens_to_the_compiled_model() -> None:
    small = compiled(Attention().eval(), (X,), sparsity=0.5)
    y = small(X)
    twin = copy.deepcopy(small)
    assert twin.module is not small.module
    small.double()
    # float32 against float64 weights of the same values.
    torch.testing.assert_close(small.module(X.double()), y.double(), rtol=1e-4, atol=1e-5)
    zeros = {name: torch.zeros_like(t) for name, t in small.state_dict().items()}
    small.load_state_dict(zeros, assign=True)
    assert not small(X.double()).any()
    assert torch.equal(twin(X), y)


def test_erasing_goes_on_from_a_compiled_model() -> None:
    model = Attention().eval()
    once = compiled(model, (X,), sparsity=0.3)
    twice = tl.compile(
        once, "structured-erase{sparsity=0.3}", (X,), backend="module", measure_latency=False
    )
    assert twice.module.up.out_features <= once.module.up.out_features
    same(twice.module(X), twice.zeroed_reference(model)(X))


def test_without_passes_it_is_the_model() -> None:
    model = Attention().eval()
    small = tl.compile(model, (), (X,), backend="module", measure_latency=False)
    assert torch.equal(small.module(X), model(X))


# -- what it refuses -----------------------------------------------------------------------------


def test_a_size_in_a_closure_is_refused_with_the_family() -> None:
    with pytest.raises(BackendError, match="own code cannot say what was erased") as caught:
        compiled(Closure().eval(), (torch.randn(2, 6),), sparsity=0.5)
    assert 'exclude=["up.weight:0/' in str(caught.value)
    assert 'backend="eager"' in str(caught.value)


def test_a_scale_that_code_takes_from_its_sizes_is_refused() -> None:
    model, x = DefaultScale().eval(), torch.randn(2, 5, 16)
    dims = next(n for n in families((model, (x,), {})) if n.endswith("/2"))
    with pytest.raises(BackendError, match="differs by") as caught:
        compiled(model, (x,), sparsity={dims: 0.5})
    assert dims in str(caught.value)
    heads = compiled(model, (x,), sparsity=0.5, exclude=(dims,))
    assert heads.module.heads < 4


def test_a_module_that_cannot_be_copied_is_named() -> None:
    model: Any = Attention().eval()
    model.lock = threading.Lock()
    with pytest.raises(BackendError, match="Attention cannot be copied"):
        compiled(model, (X,), sparsity=0.5)


def test_without_a_module_there_is_nothing_to_rebuild(tmp_path: Path) -> None:
    model = Attention().eval()
    with pytest.raises(BackendError, match="there is none here"):
        CompiledModel(capture(model, (X,)), "module")
    small = compiled(model, (X,), sparsity=0.5)
    small.save(tmp_path / "small.tl")
    assert torch.equal(tl.load(tmp_path / "small.tl")(X), tl.load(tmp_path / "small.tl")(X))
    with pytest.raises(BackendError, match="there is none here"):
        tl.load(tmp_path / "small.tl", backend="module")
    with pytest.raises(UnsupportedError, match="makes no module"):
        _ = tl.load(tmp_path / "small.tl").module


# -- our own parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "batch-second"])
@pytest.mark.parametrize("keys", [None, 12], ids=["self", "cross"])
def test_compact_attention_is_multihead_attention(batch_first: bool, keys: int | None) -> None:
    full = nn.MultiheadAttention(16, 4, batch_first=batch_first, kdim=keys, vdim=keys)
    full = full.double().eval()
    own = CompactAttention(full, num_heads=4, head_dim=4, scale=0.5)
    q, k = torch.randn(3, 5, 16).double(), torch.randn(3, 7, keys or 16).double()
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    given = (q, k, k) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, k))
    single = (q[0], k[0], k[0])
    for mask in (None, torch.randn(5, 7).double(), torch.randn(12, 5, 7) > 1.2):
        if mask is not None:  # torch would have both masks of one kind
            padding = torch.zeros(3, 7, dtype=mask.dtype)
            padding[1, 5:] = True if mask.dtype is torch.bool else -torch.inf
        for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            for pad in (None, padding):
                want = full(*given, key_padding_mask=pad, attn_mask=mask, **options)
                got = own(*given, key_padding_mask=pad, attn_mask=mask, **options)
                torch.testing.assert_close(got, want)
    torch.testing.assert_close(own(*single), full(*single))


def test_compensated_layer_norm_counts_channels_that_are_gone() -> None:
    full = nn.LayerNorm(8, eps=1e-3).double()
    nn.init.normal_(full.weight)
    nn.init.normal_(full.bias)
    x = torch.randn(2, 8, 3).double()
    x[:, 5:] = 0
    own = CompensatedLayerNorm(
        nn.Parameter(full.weight[:5]), nn.Parameter(full.bias[:5]), total=8, eps=1e-3, axis=1
    )
    want = full(x.transpose(1, 2))[..., :5].transpose(1, 2)
    torch.testing.assert_close(own(x[:, :5]), want, rtol=1e-12, atol=1e-12)


# -- libraries -----------------------------------------------------------------------------------


def _held_to_its_twin(make: Callable[[], Call], **options: Any) -> CompiledModel:
    torch.manual_seed(0)
    model, args, kwargs = make()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a head that starts at zero would hide all else
                parameter.normal_(std=0.1)
    if not options:
        options = {"sparsity": whole(families((model, args, kwargs)))}
    small = compiled(model, args, kwargs, **options)
    assert type(small.module) is type(model)
    with torch.no_grad():
        got, want = small.module(*args, **kwargs), small.zeroed_reference(model)(*args, **kwargs)
    same(got, want)
    count = sum(p.numel() for p in small.module.parameters())
    assert count < 0.85 * sum(p.numel() for p in model.parameters())
    return small


def _some(names: Iterable[str], fast: set[str]) -> list[Any]:
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", _some(VISION, {"resnet", "vit", "timm-vit"}))
def test_vision_models(name: str) -> None:
    _held_to_its_twin(VISION[name], sparsity=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LARGER))
def test_larger_vision_models(name: str) -> None:
    _held_to_its_twin(LARGER[name], sparsity=0.5)


@pytest.mark.parametrize("name", _some(TEXT, {"bert", "llama"}))
def test_transformers_models(name: str) -> None:
    _held_to_its_twin(TEXT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "t5", "bart", "gemma"])
def test_generate_with_a_cache(name: str) -> None:
    model, _, kwargs = TEXT[name]()
    model.eval()
    small = _held_to_its_twin(lambda: (model, (), kwargs))
    twin: Any = small.zeroed_reference(model)
    module: Any = small.module
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": True}
    mask = torch.ones_like(kwargs["input_ids"])
    want = twin.generate(kwargs["input_ids"], attention_mask=mask, **how)
    assert torch.equal(module.generate(kwargs["input_ids"], attention_mask=mask, **how), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_counts_positions_in_attention_that_is_gone(name: str) -> None:
    model, _, kwargs = TEXT[name]()
    first = "*h.0.attn*" if name == "gpt2" else "*layers.0.self_attn*"
    passes = EraseOperators(count=1, include=(first,))
    small = tl.compile(
        model.eval(), passes, example_kwargs=kwargs, backend="module", measure_latency=False
    )
    module: Any = small.module
    ids = kwargs["input_ids"]
    with torch.no_grad():
        cache = module(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = module(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
        same(last[:, -1], module(**kwargs).logits[:, -1])


# What the config of each can say: heads need a head size of their own in it, and a shorter
# stream a norm without a mean.
ROUND_TRIPS = {
    "llama": ("*embed_tokens.weight:1", "*gate_proj.weight:0", "*q_proj.weight:0/0"),
    "qwen3": ("*embed_tokens.weight:1", "*gate_proj.weight:0", "*q_proj.weight:0/0"),
    "gpt2": ("*c_fc.weight:1",),
    "bert": ("*intermediate.dense.weight:0",),
    "t5": ("*.wi.weight:0", "*.q.weight:0/0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROUND_TRIPS))
def test_save_and_from_pretrained(name: str, tmp_path: Path) -> None:
    model: Any
    model, _, kwargs = TEXT[name]()
    small = compiled(model.eval(), (), kwargs, sparsity=dict.fromkeys(ROUND_TRIPS[name], 0.5))
    module: Any = small.module
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path).eval()
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }
    with torch.no_grad():
        same(loaded(**kwargs)[0], small.zeroed_reference(model)(**kwargs)[0])
    assert model.config.to_dict() != module.config.to_dict()


def test_saving_is_refused_where_the_config_cannot_say_it() -> None:
    model: Any
    model, _, kwargs = TEXT["gpt2"]()
    small = compiled(model.eval(), (), kwargs, sparsity={"*c_attn.weight:1/0/0": 0.5})
    module: Any = small.module
    assert module.config.to_dict() == model.config.to_dict()
    with pytest.raises(UnsupportedError, match="no config gives"):
        module.save_pretrained("never")
    small = compiled(model.eval(), (), kwargs, sparsity={"transformer.wte.weight:1": 0.5})
    assert isinstance(small.module.transformer.h[0].ln_1, CompensatedLayerNorm)
    with pytest.raises(UnsupportedError, match="CompensatedLayerNorm now"):
        copy.deepcopy(small.module).save_pretrained("never")
