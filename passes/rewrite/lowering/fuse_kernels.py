"""From the logical form of quantised layers to the ops that compute with what is stored."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.provenance import info
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.lowering.convolutions import Convolution, convolution_of
from torchlathe.passes.rewrite.lowering.experts import Experts, expert_layers
from torchlathe.passes.rewrite.lowering.floating import Blocks, Fours, Thin, floating_layers
from torchlathe.passes.rewrite.lowering.forms import Form, Maker, forms_for
from torchlathe.passes.rewrite.lowering.layers import Layer, logical_layers
from torchlathe.passes.rewrite.lowering.norms import fuse_norms
from torchlathe.passes.rewrite.lowering.speeds import Speeds
from torchlathe.passes.rewrite.lowering.tables import tables
from torchlathe.passes.rewrite.quantising.facts import Unpacked

__all__ = ["FuseKernels"]

# Ops that pass gradients to what lies around the weights.
_TRAINED = ("w4a16_linear", "w8a16_linear")

# On a CPU, compiled as one by one, for more rows than these unpacking comes cheaper than the op.
_MOST_ROWS = {"w4a16_cpu_linear": 256, "w8a16_cpu_linear": 64}
# Up to so many rows the ops on 16-bit activations were measured to be faster than dense layers; in
# between nothing is. The op on 4 bits and int8 unpacks, which so many rows make up for.
_SURE_ROWS = {
    "w4a16_cpu_linear": range(9),
    "w8a16_cpu_linear": range(9),
    "w4a8_linear": range(128, sys.maxsize),
    "w8a8_linear": range(sys.maxsize),
}
_SURE_FEATURES = 128  # smaller layers were not measured
# Of 8-bit convolutions on a CPU, of what is read and of what is given: fewer are no faster.
_LEAST_CHANNELS = 128
_DOUBT = "may be slower than dense: not measured"


@dataclass(frozen=True)
class Choice:
    """What something becomes.

    Attributes:
        of: Name of its weight.
        why: What was chosen and why, for the report.
        name: The op, as the report counts it; ``stored`` or ``dense`` without one.
        write: Puts the op in place; None to go on as it is.
        ratio: Seconds of the dense layer over those of what was chosen; None if not measured.
        doubt: Whether it may be slower than the dense layer, and nobody knows.
        epilogue: Whether the op does what follows the layer, too.
        trains: Whether gradients go through it.
    """

    of: str
    why: str
    name: str = "stored"
    write: Callable[[Maker], None] | None = None
    ratio: float | None = None
    doubt: bool = False
    epilogue: bool = False
    trains: bool = True


@dataclass(frozen=True)
class FuseKernels(RewritePass):
    """Puts one fused op in the place of each quantised or sparse layer, with what follows it.

    Keeps: the function, up to rounding. Changes: the op multiplies the stored numbers; bias,
    activation and residual that alone follow a layer go into it. On a GPU so do gates and low-rank
    terms, and the rounding of inputs goes into the norm before it. Weights may be packed for the
    device, so that no later pass can change them; with 8-bit activations no parameter takes
    gradients any more.

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
            "help": "on a CPU: time the ops on layers of the same size (for the inductor those of "
            "convolutions), or go by rule"
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
        device = self._device(program)
        timed = self.choose == "measured" and device == "cpu"
        speeds = Speeds() if timed and cannot_run(program) is None else None
        chooser = Chooser(program, device, self.runtime, speeds, self.fallback)
        chosen = list(chooser.choices(ctx.report))
        if speeds is not None:
            speeds.save()
        if not chosen:
            told = [Diagnostic("note", "no layer reads stored numbers: there is nothing to fuse")]
            return PassResult(False, {"layers": 0}, told)
        norms = 0
        with program.edit(by=ctx.spec) as edit:
            maker = Maker(edit)
            for choice in chosen:
                if choice.write is not None:
                    choice.write(maker)
            if not all(choice.trains for choice in chosen):
                _stop_training(program)
            if device == "cuda":
                norms = fuse_norms(edit)
            changed = bool(edit.count)
        counts = Counter(choice.name for choice in chosen)
        statistics: dict[str, int | float | str] = {"layers": len(chosen), **counts}
        epilogues = sum(choice.epilogue for choice in chosen)
        statistics |= {"with_epilogue": epilogues, "norms": norms}
        return PassResult(changed, statistics, list(_told(chosen)))

    def _device(self, program: Program) -> str:
        if self.device != "auto":
            return self.device
        kinds = {entry.tensor.device.type for entry in program.entries.values()}
        return "cuda" if "cuda" in kinds else "cpu"


@dataclass(frozen=True)
class Chooser:
    """Chooses an op for everything that could become one.

    Attributes:
        program: The program.
        device: Type of device that ops are for.
        runtime: As the pass has it.
        speeds: Measures them; None to go by rule.
        fallback: As the pass has it.
    """

    program: Program
    device: str
    runtime: str
    speeds: Speeds | None
    fallback: str

    @property
    def _linear_speeds(self) -> Speeds | None:
        """What times linear layers: one by one they cost what a compiler does not make them cost.

        It puts the rounding of inputs in one loop with what is around; in eager these are many ops.
        """
        return self.speeds if self.runtime == "eager" else None

    def choices(self, report: Callable[[str], None]) -> Iterator[Choice]:
        """One choice for each layer and each look-up."""
        for table in tables(self.program):
            why = f"{table.op}: only the rows that are looked up are dequantised"
            yield Choice(table.name, why, table.op, table.write)
        layers = logical_layers(self.program, self.device)
        experts = {found.call: found for found in expert_layers(self.program)}
        for number, layer in enumerate(layers):
            report(f"choosing an op for {_name(layer)} ({number + 1}/{len(layers)})")
            if layer.kind == "linear":
                choice = self._linear(layer)
                yield choice
                if layer.gated is not None and choice.name in ("stored", "dense"):
                    yield self._linear(layer.gated)  # which no op took with its gate either
            elif layer.call in experts:
                yield self._experts(layer, experts[layer.call])
            elif (convolution := convolution_of(self.program, layer)) is not None:
                yield self._convolution(convolution)
            else:
                yield self._as_it_is(layer, f"{layer.kind} has no fused op")
        taken = {node for layer in layers for node in (layer.call, layer.last)}
        taken |= {user for layer in layers for node in layer.low_rank or () for user in node.users}
        for floating in floating_layers(self.program, self.device, taken):
            yield self._floating(floating)

    def _linear(self, layer: Layer) -> Choice:
        forms, reasons = forms_for(layer, self.device)
        if (speeds := self._linear_speeds) is not None and layer.rows:
            names = [form.name for form in forms]
            size = f"{layer.rows} x {layer.shape[1]} x {layer.shape[0]}"
            best, text, ratio = _fastest(speeds, layer, ["stored", *names], size)
            if best == "stored" and reasons and not names:
                text += f"; no op takes it: {reasons[0]}"
            if ratio < 1 and self.fallback == "dense":
                return self._dense(layer, text)
            form = next((form for form in forms if form.name == best), None)
            return _chosen(layer, form, text, ratio)
        slow = []
        for form in forms:
            if (reason := _slow(form, layer)) is not None:
                slow.append(reason)
                continue
            text = f"{form.name}{_also(layer)}, by rule"
            if _sure(form, layer):
                return _chosen(layer, form, text)
            outs, ins = layer.shape
            text += f"; {_DOUBT} for {layer.rows} rows, {ins} to {outs} features"
            if self.fallback == "dense":
                return self._dense(layer, text)
            return _chosen(layer, form, text, doubt=True)
        return self._as_it_is(layer, (*slow, *reasons)[0])

    def _as_it_is(self, layer: Layer, why: str) -> Choice:
        """Unpack the weight at each call, or once and for all."""
        if self.fallback == "dense":
            return self._dense(layer, why)
        return Choice(_name(layer), f"as it is, slower than dense: {why}", ratio=0.0)

    def _dense(self, layer: Layer, why: str) -> Choice:
        return Choice(
            _name(layer), f"dense again: {why}", "dense", partial(_make_dense, layer), 1.0
        )

    def _experts(self, layer: Layer, experts: Experts) -> Choice:
        if self.device == "cpu":
            # Which experts are read is not known before, and torch has no such product.
            return self._as_it_is(layer, "torch has no product for experts of few bits on a CPU")
        if reason := experts.refuses():
            return self._as_it_is(layer, reason)
        gate = f" with {experts.activation}" if experts.halves else ""
        why = f"{experts.op}{gate}, by rule: one launch for all experts"
        return Choice(experts.name, why, experts.op, experts.write, epilogue=experts.halves)

    def _convolution(self, convolution: Convolution) -> Choice:
        layer, reason = convolution.layer, convolution.refuses()
        names = ["stored"] if reason else ["stored", convolution.op]
        ratio = None
        if self.speeds is not None:
            size = " x ".join(map(str, convolution.shape))
            best, text, ratio = _fastest(self.speeds, convolution, names, size)
            text += "" if self.runtime == "eager" else "; timed as they are, not compiled"
            text += f"; no op takes it: {reason}" if reason else ""
            if ratio < 1 and self.fallback == "dense":
                return self._dense(layer, text)
        elif reason is not None or (reason := self._narrow(convolution)) is not None:
            return self._as_it_is(layer, reason)
        else:
            best, text = convolution.op, f"{convolution.op}, by rule"
        if best == "stored":
            return Choice(_name(layer), text, ratio=ratio)
        epilogue = layer.last is not layer.call
        write = convolution.write
        return Choice(_name(layer), text, best, write, ratio, epilogue=epilogue, trains=False)

    def _narrow(self, convolution: Convolution) -> str | None:
        """Why a convolution of few channels is no faster in 8 bits, or None."""
        outs, ins = convolution.weights[:2]
        if self.device != "cpu" or min(outs, ins) >= _LEAST_CHANNELS:
            return None
        return f"{convolution.op} takes {_LEAST_CHANNELS} channels to gain, and {ins} become {outs}"

    def _floating(self, found: Blocks | Fours | Thin) -> Choice:
        """Sparse and thin layers: the dense ones are there already, and stay where they win."""
        dense = partial(Choice, found.name, name="dense")
        if reason := found.refuses():
            return dense(f"dense: {reason}")
        speeds = self._linear_speeds
        if isinstance(found, Blocks) and speeds is not None and found.layer.rows:
            outs, ins = found.layer.shape
            size = f"{found.layer.rows} x {ins} x {outs}, {found.stored:.0%} of blocks"
            best, text, ratio = _fastest(speeds, found, [found.op], size)
            if ratio < 1:
                return dense(f"dense: {text}")
        elif reason := found.by_rule():
            return dense(f"dense: {reason}")
        else:
            best, text, ratio = found.op, f"{found.op}, by rule", None
        epilogue = found.layer.last is not found.layer.call
        return Choice(found.name, text, best, found.write, ratio, epilogue=epilogue)


def _fastest(
    speeds: Speeds, site: Layer | Convolution | Blocks, names: list[str], size: str
) -> tuple[str, str, float]:
    """The fastest of the names, what to say of it, and seconds of the dense layer over its own."""
    seconds = speeds.of(site, ["dense", *names])
    dense = seconds.pop("dense")
    best = min(seconds, key=seconds.__getitem__)
    ratio = dense / seconds[best]
    others = ", ".join(f"{n} {s * 1e6:.0f} us" for n, s in seconds.items() if n != best)
    text = f"{best}, {ratio:.2f} times as fast as dense at {size}"
    text += f" ({seconds[best] * 1e6:.0f} us; dense {dense * 1e6:.0f} us"
    return best, text + (f"; {others})" if others else ")"), ratio


def _chosen(
    layer: Layer, form: Form | None, why: str, ratio: float | None = None, *, doubt: bool = False
) -> Choice:
    if form is None:
        return Choice(_name(layer), why, ratio=ratio)
    epilogue = layer.last is not layer.call
    trains = form.name in _TRAINED
    write = partial(Maker.fuse, layer=layer, form=form)
    return Choice(_name(layer), why, _op_of(form, layer), write, ratio, doubt, epilogue, trains)


def _op_of(form: Form, layer: Layer) -> str:
    return form.name if layer.low_rank is None else form.name.replace("_linear", "_low_rank_linear")


def _also(layer: Layer) -> str:
    """What a kernel does besides, for the report."""
    parts = []
    if layer.gated is not None:
        parts.append(f"{layer.activation} of {_name(layer.gated)}")
    elif layer.halves:
        parts.append(f"{layer.activation} of its halves")
    if layer.low_rank is not None:
        parts.append(f"a term of rank {layer.low_rank[1].meta['val'].shape[1]}")
    return "".join(f" with {part}" for part in parts)


def _slow(form: Form, layer: Layer) -> str | None:
    """Why unpacking the weight is faster than the op, as measurements say, or None."""
    if form.device != "cpu":
        return None
    if form.name == "w4a16_cpu_linear" and layer.dtype == torch.float32:
        return f"{form.name} is fast for 16-bit activations alone"
    if form.name == "w4a8_linear" and layer.group != 0:
        return f"{form.name} is slow for groups on a CPU"
    most = _MOST_ROWS.get(form.name)
    if most is None or layer.rows <= most:
        return None
    return f"{form.name} is slow for {layer.rows} rows, and unpacking fast from {most} on"


def _sure(form: Form, layer: Layer) -> bool:
    """Whether an op is known to be no slower than the dense layer."""
    if form.device != "cpu":
        return True
    return layer.rows in _SURE_ROWS[form.name] and min(layer.shape) >= _SURE_FEATURES


def _stop_training(program: Program) -> None:
    """No gradient goes through numbers of 8 bits, and compilers would ask for one."""
    for name, entry in program.entries.items():
        if entry.tensor.requires_grad:
            frozen = torch.nn.Parameter(entry.tensor.detach(), requires_grad=False)
            program.entries[name] = replace(entry, tensor=frozen)


def _make_dense(layer: Layer, maker: Maker) -> None:
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
        slower = choice.doubt or (choice.ratio is not None and choice.ratio < 1)
        yield Diagnostic("warning" if slower else "note", choice.why, name=choice.of)
