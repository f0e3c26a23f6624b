"""quantize-cache: rows of bytes that are joined and written as floating rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from torchlathe import PassManager, capture
from torchlathe.ir import Error, OptionError, Program
from torchlathe.ir.verifying import verify
from torchlathe.kernels.dequantize.cache import (
    cached_columns,
    dequantize_cache,
    quantize_cache,
    row_bytes,
)
from torchlathe.passes import QuantizeCache
from torchlathe.passes.rewrite.quantising.caches import find_caches, holds_keys, token_axis
from torchlathe.passes.rewrite.quantising.quantize_cache import stored_inputs
from torchlathe.tools.compat import define_torchvision_ops


def _llama() -> Any:
    define_torchvision_ops()
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def _cache(model: Any, ids: torch.Tensor) -> Any:
    from transformers import DynamicCache

    found = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=found)
    return found


def _step(model: Any, tokens: int = 8) -> tuple[Program, dict[str, Any]]:
    """One step of decoding, with any number of tokens before it."""
    ids = torch.randint(0, 60, (2, tokens))
    kwargs = {"input_ids": ids[:, :1], "past_key_values": _cache(model, ids)}
    length = torch.export.Dim.AUTO
    axes = [{2: length}, {2: length}]
    shapes = {"input_ids": None, "past_key_values": [axes, axes]}
    return capture(model, (), kwargs, dynamic_shapes=shapes), kwargs


# -- the form --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([8, 4]),
    st.sampled_from([0, 16, 32]),
    st.booleans(),
    st.sampled_from([32, 64, 96]),
    st.integers(0, 2**31),
)
def test_rows_come_back_within_half_a_step(
    bits: int, group: int, rotate: bool, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 5, columns, generator=generator)
    x = x * torch.rand(2, 3, 5, 1, generator=generator).exp()
    rows = quantize_cache(x, bits, group, rotate)
    assert rows.shape == (2, 3, 5, row_bytes(columns, bits, group))
    assert cached_columns(rows.shape[-1], bits, group) == columns
    found = dequantize_cache(rows, columns, bits, group, rotate, torch.float32)
    if rotate:
        # What is rotated has the same norm, and at most that in any channel: each is off by half
        # a step of the whole range at most, the root of their number times that together.
        step = x.norm(dim=-1) * (1 / 127 if bits == 8 else 2 / 16)
        assert bool(((found - x).norm(dim=-1) <= step * columns**0.5).all())
        return
    parts = x.unflatten(-1, (1 if group == 0 else columns // group, -1))
    gap = (found - x).unflatten(-1, parts.shape[-2:]).abs().amax(-1)
    if bits == 8:
        # fp16 moves the step by up to 2^-11 of it, 127 times.
        step = parts.abs().amax(-1) / 127
        assert bool((gap <= step * (0.5 + 127 * 2**-11 + 1e-3)).all())
    else:
        # And the least value, and the step of 4 bits up to 16 times.
        size = parts.abs().amax(-1)
        step = (parts.amax(-1) - parts.amin(-1)) / 16
        assert bool((gap <= step * (0.5 + 16 * 2**-11) + size * 2**-11 + 1e-6).all())


def test_zero_bytes_are_zeros_and_zeros_stay() -> None:
    # A cache that is allocated beforehand is full of them.
    for bits in (8, 4):
        empty = torch.zeros(2, row_bytes(64, bits, 32), dtype=torch.uint8)
        zeros = torch.zeros(2, 64)
        assert torch.equal(dequantize_cache(empty, 64, bits, 32, True, torch.float32), zeros)
        rows = quantize_cache(zeros, bits, 32, False)
        assert torch.equal(dequantize_cache(rows, 64, bits, 32, False, torch.float32), zeros)


def test_rotating_helps_where_few_channels_are_large() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 100, 64)
    x[..., 5] *= 30
    errors = []
    for rotate in (False, True):
        rows = quantize_cache(x, 4, 0, rotate)
        errors.append(float((dequantize_cache(rows, 64, 4, 0, rotate, x.dtype) - x).norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_ops_hold_to_what_they_declare(bits: int) -> None:
    ops = torch.ops.torchlathe
    x = torch.randn(2, 3, 64)
    torch.library.opcheck(ops.quantize_cache.default, (x, bits, 32, True))
    rows = ops.quantize_cache(x, bits, 32, True)
    torch.library.opcheck(ops.dequantize_cache.default, (rows, 64, bits, 32, True, torch.float32))
    own = torch.randn(64)
    rest = (64, bits, 32, True, torch.float32)
    torch.library.opcheck(ops.quantize_cache.default, (x, bits, 32, True, own))
    torch.library.opcheck(ops.dequantize_cache.default, (rows, *rest, own))
    # One row alone, whose steps lie in the middle of its memory.
    alone = ops.dequantize_cache(rows[0, 0], 64, bits, 32, True, torch.float32)
    whole = ops.dequantize_cache(rows, 64, bits, 32, True, torch.float32)
    torch.testing.assert_close(alone, whole[0, 0])


# -- programs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "bound"), [pytest.param(8, 0.01, id="8"), pytest.param(4, 0.1, id="4")]
)
def test_a_step_of_a_llama(bits: int, bound: float) -> None:
    model = _llama()
    program, _ = _step(model)
    after = PassManager(f"quantize-cache{{bits={bits}}}").run(program)
    verify(after, "full")
    record = after.history[-1]
    assert record.statistics["caches"] == 4
    assert record.statistics["bytes_of_a_row"] == {8: 18, 4: 12}[bits]
    assert record.statistics["bytes_of_a_row_before"] == 64
    rows = 4 * 2 * 2 * 8  # caches, samples, heads, tokens
    saved = int(record.statistics["bytes_of_inputs_before"]) - int(
        record.statistics["bytes_of_inputs"]
    )
    assert saved == rows * (64 - {8: 18, 4: 12}[bits])
    # Random weights; some three times what was found.
    assert 0 < float(record.statistics["output_error"]) ** 0.5 < bound
    assert record.verification is not None
    assert "changed the type of inputs" in record.verification["skipped"]
    kinds = {str(n.meta["val"].dtype) for n in after.input_nodes}
    assert kinds == {"torch.int64", "torch.uint8"}


class Counting(nn.Module):
    """Attention that scales by how many rows there were, and by how many there are."""

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        joined = torch.cat([past, x], 2)
        read = F.scaled_dot_product_attention(x, joined, joined)
        return read * past.shape[2] + joined.shape[2], joined


@pytest.mark.parametrize("model", ["llama", "counting"])
def test_how_many_rows_there_are_is_read_from_bytes(model: str) -> None:
    if model == "llama":
        program, _ = _step(_llama())
    else:
        length = torch.export.Dim("length", min=2, max=64)
        inputs = (torch.randn(1, 2, 1, 16), torch.randn(1, 2, 5, 16))
        program = capture(Counting(), inputs, dynamic_shapes=({}, {2: length}))
    size = torch.ops.aten.sym_size.int
    assert program.graph.find_nodes(op="call_function", target=size)
    after = PassManager("quantize-cache").run(program)
    verify(after, "full")
    reads = after.graph.find_nodes(
        op="call_function", target=torch.ops.torchlathe.dequantize_cache.default
    )
    # One for each cache, of all of it; none of the rows before, which nothing but sizes wanted.
    assert len(reads) == int(after.history[-1].statistics["caches"])
    for node in reads:
        assert any(user.target is not size for user in node.users)
    if model == "counting":
        x = torch.randn(1, 2, 1, 16)
        (_, stored), _ = stored_inputs(after, (x, torch.randn(1, 2, 9, 16)), {})
        read, _ = after.run(x, stored)
        assert 9 * x.abs().max() + 10 + 9 > read.mean() > 10 - 9 * x.abs().max()


def test_a_prompt_and_many_steps() -> None:
    model = _llama()
    step, _ = _step(model)
    prompt = torch.randint(0, 60, (2, 8))
    first = capture(model, (), {"input_ids": prompt, "use_cache": True})
    quantised = [PassManager("quantize-cache").run(p) for p in (first, step)]
    tokens = torch.randint(0, 60, (2, 6))
    with torch.no_grad():
        found = quantised[0].run(input_ids=prompt, use_cache=True)
        cache, wanted = found.past_key_values, _cache(model, prompt)
        for place in range(tokens.shape[1]):
            token = tokens[:, place : place + 1]
            found = quantised[1].run(input_ids=token, past_key_values=cache)
            cache = found.past_key_values
            old = model(token, past_key_values=wanted).logits
            assert float((found.logits - old).norm() / old.norm()) < 0.01
    assert cache.layers[0].keys.shape == (2, 2, 14, 18)
    # What is stored once is not rounded again: rows of the prompt are the bytes that they were.
    again = quantised[0].run(input_ids=prompt, use_cache=True).past_key_values
    assert torch.equal(cache.layers[1].values[:, :, :8], again.layers[1].values)


def test_floating_caches_can_be_stored_by_the_caller(tmp_path: Path) -> None:
    model = _llama()
    program, kwargs = _step(model)
    after = PassManager("quantize{scheme=w8a16},quantize-cache").run(program)
    with pytest.raises(Error, match=r"expected torch\.uint8"):
        after.run(**kwargs)
    args, stored = stored_inputs(after, (), kwargs)
    found = after.run(*args, **stored)
    assert float((found.logits - program.run(**kwargs).logits).norm()) < 0.1
    compiled = tl.backends.CompiledModel(after)
    compiled.save(tmp_path / "step.tl")
    loaded = tl.load(tmp_path / "step.tl")
    assert torch.equal(loaded(**stored).logits, found.logits)


def test_compile_compares_on_stored_inputs(tmp_path: Path) -> None:
    model = _llama()
    _, kwargs = _step(model)
    compiled = tl.compile(model, "quantize-cache", example_kwargs=kwargs, example_inputs=())
    (logits,) = [row for row in compiled.report.fidelity if row.name == "logits"]
    assert logits.cosine is not None
    assert logits.cosine > 0.999  # half of a 255th of what a row spans
    assert compiled.report.latency is None
    assert any("other types" in note for note in compiled.report.notes)
    compiled.save(tmp_path / "step.tl")
    _, stored = stored_inputs(compiled.program, (), kwargs)
    with torch.no_grad():
        found = tl.load(tmp_path / "step.tl")(**stored)
        assert torch.equal(found["logits"], compiled(**stored)["logits"])


class Static(nn.Module):
    """Attention over a cache that is allocated beforehand; new rows are written in place of old."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(
        self, x: torch.Tensor, place: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (
            layer(x).unflatten(-1, (2, 32)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        keys = keys.index_copy(2, place, k)
        values = values.index_copy(2, place, v)
        mask = torch.arange(keys.shape[2])[None] <= place[:, None]
        found = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return found.transpose(1, 2).flatten(2), keys, values


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_that_is_written_into(bits: int) -> None:
    torch.manual_seed(0)
    model = Static().eval()
    empty = [torch.zeros(1, 2, 10, 32) for _ in range(2)]
    program = capture(model, (torch.randn(1, 1, 64), torch.tensor([0]), *empty))
    after = PassManager(f"quantize-cache{{bits={bits}}}").run(program)
    verify(after, "full")
    assert after.history[-1].statistics["caches"] == 2
    stored = [torch.zeros(1, 2, 10, row_bytes(32, bits, 0), dtype=torch.uint8) for _ in range(2)]
    with torch.no_grad():
        for place in range(4):
            x, at = torch.randn(1, 1, 64), torch.tensor([place])
            wanted, *empty = program.run(x, at, *empty)
            found, *stored = after.run(x, at, *stored)
            error = float((found - wanted).norm() / wanted.norm())
            assert error < {8: 0.02, 4: 0.3}[bits]


# -- keys by channel -----------------------------------------------------------------------------


def _biased(attention: str = "sdpa") -> Any:
    """A Llama whose keys have a few channels that are far from zero, as those of Qwen have.

    They are those that positions turn least: others have any sign.
    """
    model = _llama()
    model.set_attn_implementation(attention)
    for layer in model.model.layers:
        proj = layer.self_attn.k_proj
        proj.bias = nn.Parameter(torch.zeros(proj.out_features))
        with torch.no_grad():
            proj.bias[7::8] = 3
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_are_what_queries_are_compared_with(attention: str) -> None:
    program, _ = _step(_biased(attention))
    caches = find_caches(program)
    assert len(caches) == 4
    for cache in caches:
        assert holds_keys(cache) == ("key_cache" in cache.name)
    assert {token_axis(cache) for cache in caches} == {2}


def test_channels_that_are_far_from_zero_have_their_own_middle(tmp_path: Path) -> None:
    model = _biased()
    program, kwargs = _step(model)
    data = [_step(model, 12)[1] for _ in range(3)]
    keys = kwargs["past_key_values"].layers[0].keys
    errors = []
    for option in ("token", "channel"):
        spec = f"quantize-cache{{bits=4,rotate=false,keys={option}}}"
        after = PassManager(spec).run(program, calibration=data)
        verify(after, "full")
        statistics = after.history[-1].statistics
        # As many bytes: zero points are of the program, not of a row.
        assert statistics["bytes_of_a_row"] == 12
        own = () if option == "token" else (after.tensor("key_middles_0"),)
        assert statistics["keys_by_channel"] == 2 * len(own)
        _, stored = stored_inputs(after, (), kwargs)
        rows = stored["past_key_values"].layers[0].keys
        found = dequantize_cache(rows, 16, 4, 0, False, torch.float32, *own)
        errors.append(float((found - keys).norm()))
    # The range of a row is that of two channels of sixteen, unless their middles are taken off.
    assert errors[1] < 0.3 * errors[0]
    found = after.run(**stored)
    compiled = tl.backends.CompiledModel(after)
    compiled.save(tmp_path / "step.tl")
    assert torch.equal(tl.load(tmp_path / "step.tl")(**stored).logits, found.logits)
    # What is stored is not rounded again.
    assert torch.equal(found.past_key_values.layers[0].keys[:, :, :8], rows)


def test_keys_of_a_prompt_are_stored_by_those_who_read_them() -> None:
    model = _biased()
    step, _ = _step(model)
    ids = torch.randint(0, 60, (2, 8))
    prompt = capture(model, (), {"input_ids": ids, "use_cache": True})
    spec = "quantize-cache{bits=8,keys=channel}"
    first, second = (PassManager(spec).run(p) for p in (prompt, step))
    told = [str(d["message"]) for d in first.history[-1].diagnostics]
    assert sum("convert it by stored_inputs" in text for text in told) == 4
    assert not first.history[-1].changed
    cache = first.run(input_ids=ids, use_cache=True).past_key_values
    token = torch.randint(0, 60, (2, 1))
    inputs = {"input_ids": token, "past_key_values": cache}
    _, stored = stored_inputs(second, (), inputs)
    with torch.no_grad():
        found = second.run(**stored).logits
        wanted = model(token, past_key_values=_cache(model, ids)).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_rows_that_are_keys_and_values_are_stored_as_each() -> None:
    class Shared(nn.Module):
        def forward(
            self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            new = 2 * x
            keys, values = torch.cat([keys, new], 2), torch.cat([values, new], 2)
            return F.scaled_dot_product_attention(x, keys, values), keys, values

    torch.manual_seed(0)
    inputs = tuple(torch.randn(1, 2, n, 16) + 3 for n in (1, 5, 5))
    program = capture(Shared(), inputs)
    after = PassManager("quantize-cache{keys=channel}").run(program)
    args, _ = stored_inputs(after, inputs, {})
    found, wanted = after.run(*args)[0], program.run(*inputs)[0]
    # Half of a 127th of what a row spans, and as much again of the keys.
    assert float((found - wanted).abs().max()) < 2 * float(wanted.abs().max()) / 127


def test_without_attention_there_are_no_keys() -> None:
    class Summing(nn.Module):
        def forward(self, past: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
            joined = torch.cat([past, 2 * new], 2)
            return joined.sum(2), joined

    rows = (torch.randn(1, 2, 4, 16), torch.randn(1, 2, 1, 16))
    after = PassManager("quantize-cache{keys=channel}").run(capture(Summing(), rows))
    assert after.history[-1].statistics["keys_by_channel"] == 0
    assert any("no cache holds keys" in str(d["message"]) for d in after.history[-1].diagnostics)


# -- what cannot be ------------------------------------------------------------------------------


def test_programs_without_a_cache_are_left_alone() -> None:
    program = capture(nn.Linear(8, 8), (torch.randn(2, 8),))
    after = PassManager("quantize-cache").run(program)
    assert not after.history[-1].changed
    assert "no input of four axes" in str(after.history[-1].diagnostics[0]["message"])


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="group is 3"):
        QuantizeCache(group=3)
    with pytest.raises(OptionError, match="bits of quantize-cache"):
        QuantizeCache(bits=2)  # type: ignore[arg-type]
    program, _ = _step(_llama())
    after = PassManager("quantize-cache{group=12}").run(program)
    assert not after.history[-1].changed
    told = [str(d["message"]) for d in after.history[-1].diagnostics]
    assert any("16 channels of a head are no multiple of 12" in text for text in told)


def test_a_second_time_changes_nothing() -> None:
    program, _ = _step(_llama())
    after = PassManager("quantize-cache,quantize-cache").run(program)
    assert [record.changed for record in after.history] == [True, False]


def test_rows_that_are_only_passed_on_stay_floating() -> None:
    class Crossing(nn.Module):
        def forward(
            self, past: torch.Tensor, new: torch.Tensor, cross: torch.Tensor
        ) -> dict[str, Any]:
            joined = torch.cat([past, 2 * new], 2)
            read = joined.sum(2) + cross.sum(2)
            return {"past_key_values": (joined, cross), "read": read}

    rows = [torch.randn(1, 2, n, 16) for n in (4, 1, 5)]
    small = PassManager("quantize-cache").run(capture(Crossing(), tuple(rows)))
    kinds = [node.meta["val"].dtype for node in small.input_nodes]
    assert kinds == [torch.uint8, torch.float32, torch.float32]
    outputs: Any = small.output_node.args[0]
    joined, cross, _ = outputs
    assert joined.meta["val"].dtype == torch.uint8
    assert cross.meta["val"].dtype == torch.float32
