"""From the logical form of quantised layers to the ops that compute with what is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.provenance import info
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.lowering.forms import Form, Maker, forms_for
from torchlathe.passes.rewrite.lowering.layers import Layer, logical_layers
from torchlathe.passes.rewrite.lowering.norms import fuse_norms
from torchlathe.passes.rewrite.lowering.speeds import Speeds
from torchlathe.passes.rewrite.quantising.facts import Unpacked

__all__ = ["FuseKernels"]

# Ops that pass gradients to what lies around the weights.
_TRAINED = ("w4a16_linear", "w8a16_linear")


@dataclass(frozen=True)
class Choice:
    """What a layer becomes.

    Attributes:
        layer: The layer.
        of: Name of its weight.
        form: A fused op; None to go on as it is, or densely.
        why: What was chosen and why, for the report.
        ratio: Seconds of the dense layer over those of what was chosen; None if not measured.
        dense: Whether the weight is stored as floating numbers again.
    """

    layer: Layer
    of: str
    form: Form | None
    why: str
    ratio: float | None = None
    dense: bool = False

    @property
    def name(self) -> str:
        """As the report counts it."""
        return self.form.name if self.form else "dense" if self.dense else "stored"


@dataclass(frozen=True)
class FuseKernels(RewritePass):
    """Puts one fused op in the place of each quantised linear layer, with what follows it.

    Keeps: the function, up to rounding. Changes: the op multiplies the stored numbers; bias,
    activation and residual that alone follow a layer go into it, and on a GPU the rounding of
    inputs goes into the norm before it. Weights may be packed for the device, so that no later
    pass can change them; with 8-bit activations no parameter takes gradients any more.

    Source: own; which op is fastest is measured on this machine, or known from measurements.
    """

    name: ClassVar[str] = "fuse-kernels"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    breaks: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "what to choose ops for; auto is where the weights are"}
    )
    runtime: Literal["eager", "inductor"] = field(
        default="eager",
        metadata={"help": "what will run the program: ops are chosen by what is fast there"},
    )
    choose: Literal["measured", "rule"] = field(
        default="measured",
        metadata={
            "help": "for eager on a CPU: time the ops on layers of the same size, or go by rule"
        },
    )
    fallback: Literal["stored", "dense"] = field(
        default="stored",
        metadata={
            "help": "where no op is as fast as the dense layer: keep what is stored small and say "
            "so, or store floating weights again"
        },
    )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Choose for every layer, then write."""
        layers = logical_layers(program)
        if not layers:
            told = [Diagnostic("note", "no layer reads stored numbers: there is nothing to fuse")]
            return PassResult(False, {"layers": 0}, told)
        device = self._device(program)
        chosen = list(self._choices(program, ctx, layers, device))
        counts = dict(Counter(choice.name for choice in chosen))
        norms = 0
        with program.edit(by=ctx.spec) as edit:
            maker = Maker(edit)
            for choice in chosen:
                if choice.form is not None:
                    maker.fuse(choice.layer, choice.form)
                elif choice.dense:
                    _make_dense(maker, choice.layer)
            if any(c.form and c.form.name not in _TRAINED for c in chosen):
                _stop_training(program)
            if device == "cuda":
                norms = fuse_norms(edit)
            changed = bool(edit.count)
        statistics: dict[str, int | float | str] = {"layers": len(layers), **counts}
        epilogues = sum(
            c.form is not None and c.layer.last is not c.layer.call for c in chosen
        )  # fmt: skip
        statistics |= {"with_epilogue": epilogues, "norms": norms}
        return PassResult(changed, statistics, list(_told(chosen)))

    def _device(self, program: Program) -> str:
        if self.device != "auto":
            return self.device
        kinds = {entry.tensor.device.type for entry in program.entries.values()}
        return "cuda" if "cuda" in kinds else "cpu"

    def _choices(
        self, program: Program, ctx: PassContext, layers: Sequence[Layer], device: str
    ) -> Iterator[Choice]:
        timed = self.runtime == "eager" and self.choose == "measured" and device == "cpu"
        timed = timed and cannot_run(program) is None
        speeds = Speeds() if timed else None
        for number, layer in enumerate(layers):
            ctx.report(f"choosing an op for {_name(layer)} ({number + 1}/{len(layers)})")
            forms, reasons = forms_for(layer, device)
            if layer.kind != "linear":
                yield Choice(layer, _name(layer), None, f"as it is: {layer.kind} has no fused op")
            elif speeds is not None and layer.rows:
                yield self._fastest(layer, forms, reasons, speeds)
            else:
                yield self._by_rule(layer, forms, reasons)
        if speeds is not None:
            speeds.save()

    def _fastest(
        self, layer: Layer, forms: Sequence[Form], reasons: Sequence[str], speeds: Speeds
    ) -> Choice:
        names = [form.name for form in forms]
        seconds = speeds.of(layer, ["dense", "stored", *names])
        dense = seconds.pop("dense")
        best = min(seconds, key=seconds.__getitem__)
        ratio = dense / seconds[best]
        size = f"{layer.rows} x {layer.shape[1]} x {layer.shape[0]}"
        others = ", ".join(f"{n} {s * 1e6:.0f} us" for n, s in seconds.items() if n != best)
        text = f"{best}, {ratio:.2f} times as fast as dense at {size}"
        text += f" ({seconds[best] * 1e6:.0f} us; dense {dense * 1e6:.0f} us"
        text += f"; {others})" if others else ")"
        if best == "stored" and reasons and not names:
            text += f"; no op takes it: {reasons[0]}"
        form = next((form for form in forms if form.name == best), None)
        if ratio < 1 and self.fallback == "dense":
            return Choice(layer, _name(layer), None, f"dense again: {text}", 1.0, dense=True)
        return Choice(layer, _name(layer), form, text, ratio)

    def _by_rule(self, layer: Layer, forms: Sequence[Form], reasons: Sequence[str]) -> Choice:
        """What measurements of others say: see the page on quantisation."""
        for form in forms:
            # Torch's packed 4-bit product is fast for 16-bit activations alone.
            slow = form.name == "w4a16_cpu_linear" and layer.dtype == torch.float32
            grouped = form.name == "w4a8_linear" and form.device == "cpu" and layer.group != 0
            slow = slow or grouped
            if not slow:
                return Choice(layer, _name(layer), form, f"{form.name}, by rule")
        why = reasons[0] if reasons else "its ops are slow for these activations"
        if self.fallback == "dense":
            return Choice(layer, _name(layer), None, f"dense again: {why}", 1.0, dense=True)
        return Choice(layer, _name(layer), None, f"as it is, slower than dense: {why}", 0.0)


def _stop_training(program: Program) -> None:
    """No gradient goes through numbers of 8 bits, and compilers would ask for one."""
    for name, entry in program.entries.items():
        if entry.tensor.requires_grad:
            frozen = torch.nn.Parameter(entry.tensor.detach(), requires_grad=False)
            program.entries[name] = replace(entry, tensor=frozen)


def _make_dense(maker: Maker, layer: Layer) -> None:
    """Store the floating weight that the numbers stand for."""
    program, edit = maker.edit.program, maker.edit
    args = [
        program.tensor(str(info(a).tensor)).detach() if isinstance(a, fx.Node) else a
        for a in layer.weight.args
    ]
    assert callable(layer.weight.target)
    (node,) = maker.tensors(layer, "dense", lambda: [layer.weight.target(*args)])  # type: ignore[operator]
    assert node is not None
    edit.replace(layer.weight, node)


def _name(layer: Layer) -> str:
    values = layer.node("values")
    return str(info(values).tensor) if values is not None else layer.call.name


def _told(chosen: Sequence[Choice]) -> Iterator[Diagnostic]:
    """A line for each layer; a warning for those that are slower than dense ones."""
    for choice in chosen:
        slower = choice.ratio is not None and choice.ratio < 1
        yield Diagnostic("warning" if slower else "note", choice.why, name=choice.of)
