"""fuse-kernels where an op may be slower than the dense layer: it says so, or leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.passes.rewrite.lowering.speeds import Speeds

BRAIN, FULL = torch.bfloat16, torch.float32
RULES = ("runtime=inductor", "choose=rule", "runtime=inductor,choose=rule")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "cache"))


def measured(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Let ops take these seconds on every machine."""

    def of(self: Speeds, site: Any, names: list[str]) -> dict[str, float]:
        return {name: seconds[name] for name in names}

    monkeypatch.setattr(Speeds, "of", of)


def linear(rows: int, dtype: torch.dtype, outs: int = 128) -> Program:
    return capture(nn.Linear(256, outs).eval().to(dtype), (torch.randn(rows, 256).to(dtype),))


def convolution(channels: int, groups: int = 1) -> Program:
    conv = nn.Conv2d(channels, channels, 3, groups=groups).eval()
    return capture(conv, (torch.randn(1, channels, 5, 5),))


def fused(program: Program, scheme: str, options: str) -> tuple[list[str], str, str]:
    """Ops, and severity and text of what is told of the one layer."""
    spec = f"quantize{{scheme={scheme}}},fuse-kernels{{device=cpu,{options}}}"
    after = PassManager(spec, verify=False).run(program)
    (told,) = after.history[-1].diagnostics
    names = [str(node.target) for node in after.nodes if node.op == "call_function"]
    ops = [name.split(".")[1] for name in names if name.startswith("torchlathe.")]
    return ops, str(told["severity"]), str(told["message"])


SURE = [
    ("w8a8", FULL, 1, "w8a8_linear"),
    ("w8a8", BRAIN, 300, "w8a8_linear"),
    ("w4a16,group=32", BRAIN, 8, "w4a16_cpu_linear"),
    ("w8a16", BRAIN, 8, "w8a16_cpu_linear"),
    ("w4a8,group=0", FULL, 128, "w4a8_linear"),
]
DOUBTFUL = [
    ("w4a16,group=32", BRAIN, 9, "w4a16_cpu_linear"),
    ("w4a16,group=32", BRAIN, 256, "w4a16_cpu_linear"),
    ("w8a16", BRAIN, 64, "w8a16_cpu_linear"),
    ("w4a8,group=0", FULL, 127, "w4a8_linear"),
]
SLOW = [
    ("w4a16,group=32", BRAIN, 257, "w4a16_cpu_linear is slow for 257 rows"),
    ("w8a16", BRAIN, 65, "w8a16_cpu_linear is slow for 65 rows"),
    ("w4a16,group=32", FULL, 1, "w4a16_cpu_linear is fast for 16-bit activations alone"),
    ("w4a8,group=128", FULL, 300, "w4a8_linear is slow for groups on a CPU"),
    ("w2a16,group=32", BRAIN, 1, "w8a8_linear: its numbers are int2"),
]


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize(("scheme", "dtype", "rows", "op"), SURE)
def test_what_is_known_to_be_fast_is_a_note(
    scheme: str, dtype: torch.dtype, rows: int, op: str, options: str
) -> None:
    ops, severity, text = fused(linear(rows, dtype), scheme, options)
    assert ops[-1] == op
    assert (severity, text) == ("note", f"{op}, by rule")


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize(("scheme", "dtype", "rows", "op"), DOUBTFUL)
def test_what_nobody_knows_is_a_warning(
    scheme: str, dtype: torch.dtype, rows: int, op: str, options: str
) -> None:
    program = linear(rows, dtype)
    ops, severity, text = fused(program, scheme, options)
    assert ops[-1] == op
    doubt = f"may be slower than dense: not measured for {rows} rows, 256 to 128 features"
    assert (severity, text) == ("warning", f"{op}, by rule; {doubt}")
    ops, severity, text = fused(program, scheme, f"{options},fallback=dense")
    assert "dequantize" not in ops
    assert op not in ops
    assert severity == "note"
    assert text.startswith("dense again: ")


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize(("scheme", "dtype", "rows", "reason"), SLOW)
def test_what_is_slower_than_unpacking_stays_stored(
    scheme: str, dtype: torch.dtype, rows: int, reason: str, options: str
) -> None:
    ops, severity, text = fused(linear(rows, dtype), scheme, options)
    assert "dequantize" in ops
    assert severity == "warning"
    assert text.startswith(f"as it is, slower than dense: {reason}")


@pytest.mark.parametrize("runtime", ["eager", "inductor"])
def test_convolutions_are_timed_for_both_runtimes(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, options = convolution(16), f"runtime={runtime}"
    measured(monkeypatch, dense=1.0, stored=2.0, w8a8_conv2d=0.5)
    ops, severity, text = fused(program, "w8a8", options)
    assert "w8a8_conv2d" in ops
    assert severity == "note"
    assert "2.00 times as fast as dense" in text
    assert text.endswith("timed as they are, not compiled") == (runtime == "inductor")
    for stored, winner in ((2.0, "dequantize"), (5.0, "w8a8_conv2d")):
        measured(monkeypatch, dense=1.0, stored=stored, w8a8_conv2d=4.0)
        ops, severity, text = fused(program, "w8a8", options)
        assert winner in ops
        assert severity == "warning"
        assert f"{1 / min(stored, 4.0):.2f} times as fast as dense" in text
    ops, severity, _ = fused(program, "w8a8", f"{options},fallback=dense")
    assert ops == ["quantize_dequantize_tokens"]


def test_small_layers_were_not_measured() -> None:
    ops, severity, text = fused(linear(4, FULL, outs=127), "w8a8", "choose=rule")
    assert ops[-1] == "w8a8_linear"
    assert severity == "warning"
    assert "may be slower than dense: not measured for 4 rows, 256 to 127 features" in text


def test_convolutions_of_few_channels_stay_stored_by_rule() -> None:
    ops, severity, text = fused(convolution(64), "w8a8", "choose=rule")
    assert "w8a8_conv2d" not in ops
    assert severity == "warning"
    assert "w8a8_conv2d takes 128 channels to gain, and 64 become 64" in text
    ops, severity, text = fused(convolution(128), "w8a8", "choose=rule")
    assert "w8a8_conv2d" in ops
    assert (severity, text) == ("note", "w8a8_conv2d, by rule")


def test_linear_layers_are_not_timed_for_the_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    # One by one, the rounding of inputs costs much that it does not cost when it is compiled.
    measured(monkeypatch)
    ops, severity, _ = fused(linear(4, FULL), "w8a8", "runtime=inductor")
    assert ops == ["quantize_tokens", "w8a8_linear"]
    assert severity == "note"
