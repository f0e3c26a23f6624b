"""Random networks as plain data: drawn by hypothesis, built as modules.

A plan is a list of steps; each names an op and the earlier values that it reads. Every value has
a kind (image, sequence or vector) and a width, so that a drawn plan always builds. Widths come
from a small set, so that values meet in additions and products often, and equal extents that
have nothing to do with each other are common.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from tests.properties.random_ops import KEEPING, fitting
from tests.properties.random_parts import Make
from tests.properties.random_sequences import Attention, FusedAttention
from tests.zoo.zoo_model import Inputs, randomised

__all__ = ["SOURCES", "Plan", "RandomNet", "Step", "build", "inputs", "plans"]

SOURCES = ("image", "sequence", "tokens", "vector")
WIDTHS = (4, 6, 8, 12)
EDGE = 8
VOCABULARY = 11
LENGTH = 6


@dataclass(frozen=True)
class Value:
    """What a step makes: kind, channels, and the edge of an image."""

    kind: str
    width: int
    edge: int = 0


@dataclass(frozen=True)
class Step:
    """One op of a plan.

    Attributes:
        op: Name of the op.
        reads: Indices of the values that it reads.
        makes: What it makes; more than one value for a split.
        options: Numbers of the op.
    """

    op: str
    reads: tuple[int, ...]
    makes: tuple[Value, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A network: what goes in, the steps, and the width of the last layer."""

    source: str
    width: int
    steps: tuple[Step, ...]


ANY = ("image", "sequence", "vector")
TOKENWISE = ("sequence", "vector")
UNARY = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")


# -- drawing ---------------------------------------------------------------------------------


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _draw_step(draw: Any, values: list[Value]) -> Step:
    """One step that fits the values there are."""
    index = draw(st.integers(max(0, len(values) - 4), len(values) - 1))
    value = values[index]
    width = draw(st.sampled_from(WIDTHS))

    def step(op: str, *makes: Value, reads: tuple[int, ...] = (index,), **options: Any) -> Step:
        return Step(op, reads, makes or (value,), options)

    others = [i for i, v in enumerate(values) if v == value and i != index]
    beside = [
        i
        for i, v in enumerate(values)
        if (v.kind, v.edge) == (value.kind, value.edge) and v.width + value.width <= 24
    ]
    twice = [
        i for i, v in enumerate(values) if v.kind == value.kind and i != index and v.kind != "image"
    ]
    choices = ["unary", "unary", "norm", "linear", "linear", "residual", *["keeping"] * 6]
    if others:
        choices += ["add", "add", "mul"]
    if beside:
        choices.append("cat")
    if value.width % 2 == 0 and value.width > 4:
        choices += ["chunk", "glu"]
    if value.kind == "image":
        choices += ["conv", "grouped", "depthwise", "excite", "to_sequence", "flatten", "shared"]
        if value.edge >= 4:
            choices.append("pool")
        if value.width % 4 == 0 and value.edge <= EDGE:
            choices.append("shuffle")
    if value.kind == "sequence":
        choices += ["attention", "attention", "fused_attention", "swiglu", "shared", "mean"]
    if value.kind == "vector":
        choices += ["shared", "regroup"] if value.width % 2 == 0 else ["shared"]
    if twice:
        choices.append("tied")
    op = draw(st.sampled_from(choices))

    if op == "keeping":
        name = draw(st.sampled_from(fitting(value.kind, value.width, value.edge)))
        return step("keeping", name=name, hidden=width, seed=draw(st.integers(0, 383)))
    wider = Value(value.kind, width, value.edge)
    half = Value(value.kind, value.width // 2, value.edge)
    match op:
        case "unary":
            return step(draw(st.sampled_from(UNARY)))
        case "norm" if value.kind == "image":
            kind = draw(st.sampled_from(["batch", "batch", "group", "instance"]))
            return step(kind + "_norm", groups=draw(st.sampled_from(_divisors(value.width))))
        case "norm":
            return step(draw(st.sampled_from(["layer_norm", "rms_norm"])))
        case "linear" if value.kind == "image":
            return step("conv", wider, size=1, bias=draw(st.booleans()))
        case "linear":
            return step("linear", wider, bias=draw(st.booleans()))
        case "conv":
            return step("conv", wider, size=3, bias=draw(st.booleans()))
        case "grouped":
            groups = draw(st.sampled_from(_divisors(value.width)))
            out = Value("image", groups * draw(st.integers(1, 3)), value.edge)
            return step("grouped", out, groups=groups)
        case "depthwise":
            multiplier = draw(st.integers(1, 2))
            return step("depthwise", Value("image", value.width * multiplier, value.edge))
        case "add" | "mul":
            return step(op, reads=(index, draw(st.sampled_from(others))))
        case "cat":
            other = draw(st.sampled_from(beside))
            joined = Value(value.kind, value.width + values[other].width, value.edge)
            return step("cat", joined, reads=(index, other))
        case "chunk":
            return step("chunk", half, half)
        case "glu":
            return step("glu", half)
        case "pool":
            small = Value("image", value.width, value.edge // 2)
            return step(draw(st.sampled_from(["max_pool", "avg_pool"])), small)
        case "shuffle":
            return step("shuffle", Value("image", value.width // 4, value.edge * 2))
        case "to_sequence":
            return step("to_sequence", Value("sequence", value.width))
        case "flatten":
            return step("flatten", Value("vector", width))
        case "mean":
            return step("mean", Value("vector", value.width))
        case "tied":
            other = draw(st.sampled_from(twice))
            return step("tied", wider, values[other], reads=(index, other))
        case "attention":
            heads, size = draw(st.sampled_from([(2, 3), (2, 4), (3, 2), (4, 2)]))
            kv = draw(st.sampled_from(_divisors(heads)))
            return step("attention", heads=heads, kv=kv, size=size)
        case "fused_attention":
            heads, size = draw(st.sampled_from([(2, 3), (2, 4), (4, 2)]))
            layout = draw(st.sampled_from(["unbind", "chunk", "interleaved"]))
            return step("fused_attention", heads=heads, size=size, layout=layout)
        case _:  # residual, excite, swiglu, shared, regroup: the value keeps its shape
            return step(op, hidden=width)


@st.composite
def plans(draw: Any, source: str, *, steps: int = 10) -> Plan:
    """A random plan of up to this many steps, on one of `SOURCES`."""
    width = draw(st.sampled_from(WIDTHS))
    kind = "sequence" if source == "tokens" else source
    values = [Value(kind, width, EDGE if kind == "image" else 0)]
    drawn: list[Step] = []
    for _ in range(draw(st.integers(min(4, steps), steps))):
        drawn.append(_draw_step(draw, values))
        values.extend(drawn[-1].makes)
    return Plan(source, width, tuple(drawn))


# -- building --------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """A plan as a module; heads on all values that nothing reads.

    Args:
        plan: What to build.
        identities: Puts an op that changes nothing after each step.
    """

    def __init__(self, plan: Plan, *, identities: bool = False) -> None:
        super().__init__()
        self.plan, self.identities = plan, identities
        values = [_first(plan)]
        self.enter: Any = _enter(plan)
        self.ops = nn.ModuleList()
        for step in plan.steps:
            self.ops.append(_module(step, values))
            values.extend(step.makes)
        read = {i for step in plan.steps for i in step.reads}
        self.ends = [i for i in range(len(values)) if i not in read]
        self.heads = nn.ModuleList(nn.Linear(values[i].width, 3) for i in self.ends)
        # The output embedding of a language model: the input's, read the other way round.
        fits = plan.source == "tokens"
        self.tied = [i for i in self.ends if fits and values[i] == values[0]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [self.enter(x)]
        for count, (step, op) in enumerate(zip(self.plan.steps, self.ops, strict=True)):
            made = op(*(values[i] for i in step.reads))
            made = made if isinstance(made, tuple) else (made,)
            if self.identities:
                made = tuple(_identity(y, count + k) for k, y in enumerate(made))
            values.extend(made)
        ends = [head(_pooled(values[i])) for i, head in zip(self.ends, self.heads, strict=True)]
        ends += [F.linear(values[i], self.enter.weight) for i in self.tied]
        return tuple(ends)


def build(plan: Plan, *, identities: bool = False) -> nn.Module:
    """The net of a plan in float64 and eval mode; equal weights for equal plans."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(RandomNet(plan, identities=identities)).double().eval()


def inputs(plan: Plan, batch: int = 2, seed: int = 0) -> tuple[Inputs, Any]:
    """Example inputs of a plan, and its dynamic shapes."""
    generator = torch.Generator().manual_seed(seed + 100 * batch)
    length = LENGTH + batch
    match plan.source:
        case "image":
            x = torch.randn(batch, 3, EDGE, EDGE, generator=generator, dtype=torch.float64)
        case "vector":
            x = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
        case "sequence":
            x = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)
        case _:
            x = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    both = plan.source in ("sequence", "tokens")
    return ((x,), {}), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if both else {0: Dim.DYNAMIC},)


def _first(plan: Plan) -> Value:
    kind = "sequence" if plan.source == "tokens" else plan.source
    return Value(kind, plan.width, EDGE if kind == "image" else 0)


def _enter(plan: Plan) -> nn.Module:
    if plan.source == "image":
        return nn.Conv2d(3, plan.width, 3, padding=1)
    if plan.source == "tokens":
        return nn.Embedding(VOCABULARY, plan.width)
    return nn.Linear(5, plan.width)


def _pooled(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.dim() == 3 else x


def _identity(x: Tensor, which: int) -> Tensor:
    match which % 6:
        case 0:
            return x.clone()
        case 1:
            return x.unsqueeze(0).squeeze(0)
        case 2:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        case 3:
            return x.reshape(x.shape)
        case 4:
            return x * 1
        case _:
            return torch.cat([x], 1)


def _layer(value: Value, cin: int, cout: int, *, bias: bool = True, size: int = 1) -> nn.Module:
    if value.kind == "image":
        return nn.Conv2d(cin, cout, size, padding=size // 2, bias=bias)
    return nn.Linear(cin, cout, bias=bias)


class _Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Any:
        return self.function(*x)


class _Residual(nn.Module):
    def __init__(self, value: Value, hidden: int) -> None:
        super().__init__()
        self.up = _layer(value, value.width, hidden, size=3)
        self.down = _layer(value, hidden, value.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class _Excite(nn.Module):
    def __init__(self, value: Value, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(value.width, hidden, 1)
        self.up = nn.Conv2d(hidden, value.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Shared(nn.Module):
    """One layer called twice in a row."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self.layer = _layer(value, value.width, value.width, size=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class _Tied(nn.Module):
    """A layer on one value; its weight, transposed, is added through another value's layer."""

    def __init__(self, one: Value, other: Value, width: int) -> None:
        super().__init__()
        self.one = nn.Linear(one.width, width)
        self.other = nn.Linear(other.width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), F.linear(F.relu(self.other(y)), self.other.weight.T)


class _Flatten(nn.Module):
    def __init__(self, value: Value, width: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * value.width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))


class _Regroup(nn.Module):
    """A vector viewed as pairs, mixed by a layer over the pairs, and viewed back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pairs = width // 2
        self.mix = nn.Linear(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x.view(x.shape[0], self.pairs, 2).transpose(1, 2))
        return F.silu(y).transpose(1, 2).reshape(x.shape[0], 2 * self.pairs)


def _pixel_shuffle(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def _glu(x: Tensor) -> Tensor:
    return F.glu(x, 1 if x.dim() == 4 else -1)


def _chunk(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.chunk(2, 1 if x.dim() == 4 else -1))


def _cat(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 1 if x.dim() == 4 else -1)


_FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "add": torch.add,
    "mul": torch.mul,
    "cat": _cat,
    "chunk": _chunk,
    "glu": _glu,
    "shuffle": _pixel_shuffle,
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "to_sequence": lambda x: x.flatten(2).transpose(1, 2),
    "mean": lambda x: x.mean(1),
}


def _module(step: Step, values: list[Value]) -> nn.Module:
    if step.op in _FUNCTIONS:
        return _Apply(_FUNCTIONS[step.op])
    value, made, options = values[step.reads[0]], step.makes[0], step.options
    width = value.width
    match step.op:
        case "keeping":
            make = Make(value.kind, width, value.edge, options["hidden"], options["seed"])
            return KEEPING[value.kind][options["name"]](make)
        case "batch_norm":
            return nn.BatchNorm2d(width)
        case "group_norm":
            return nn.GroupNorm(options["groups"], width)
        case "instance_norm":
            return nn.InstanceNorm2d(width, affine=True)
        case "layer_norm":
            return nn.LayerNorm(width)
        case "rms_norm":
            return nn.RMSNorm(width, eps=1e-3)
        case "linear":
            return nn.Linear(width, made.width, bias=options["bias"])
        case "conv":
            size = options["size"]
            return _layer(value, width, made.width, bias=options["bias"], size=size)
        case "grouped":
            return nn.Conv2d(width, made.width, 3, padding=1, groups=options["groups"])
        case "depthwise":
            return nn.Conv2d(width, made.width, 3, padding=1, groups=width)
        case "residual":
            return _Residual(value, options["hidden"])
        case "excite":
            return _Excite(value, options["hidden"])
        case "swiglu":
            return _SwiGLU(width, options["hidden"])
        case "shared":
            return _Shared(value)
        case "tied":
            return _Tied(value, step.makes[1], made.width)
        case "flatten":
            return _Flatten(value, made.width)
        case "regroup":
            return _Regroup(width)
        case "attention":
            return Attention(width, options["heads"], options["kv"], options["size"])
        case "fused_attention":
            return FusedAttention(width, options["heads"], options["size"], options["layout"])
    raise AssertionError(step.op)
