"""Three passes of my own: count dead channels, fold BatchNorm, drop idle residual branches."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from torchlathe.ir import Edit, OptionError, Program, TensorKind, info
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.verifying import check_equivalence
from torchlathe.passes import (
    AnalysisPass,
    Diagnostic,
    Exactness,
    PassContext,
    PassResult,
    RewritePass,
)

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True)
class DeadChannels(AnalysisPass[dict[str, int]]):
    """Count the output channels of each layer whose weights are all zero."""

    name: ClassVar[str] = "dead-channels"
    threshold: float = field(default=0.0, metadata={"help": "magnitude that still counts as zero"})

    def compute(self, program: Program) -> dict[str, int]:
        """Dead channels by the name of the weight; layers without any are left out."""
        dead = {}
        for node in program.nodes:
            if node.target in (aten.linear.default, *CONVOLUTIONS):
                weight = info(node.args[1]).tensor
                if weight is None:  # computed by the forward code
                    continue
                magnitudes = program.tensor(weight).detach().abs().flatten(1).amax(1)
                if count := int((magnitudes <= self.threshold).sum()):
                    dead[weight] = count
        return dead

    def statistics(self, result: dict[str, int]) -> dict[str, int | float]:
        """What the report shows."""
        return {"layers": len(result), "channels": sum(result.values())}


@dataclass(frozen=True)
class FoldBatchNorm(RewritePass):
    """Fold BatchNorm into the convolution before it: ``norm(conv(x))`` becomes ``conv(x)``.

    Exact: in eval mode the norm scales and shifts each channel by constants.
    """

    name: ClassVar[str] = "fold-batch-norm"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Fold each norm that alone reads a convolution with weights of its own."""
        folded = 0
        with program.edit(by=ctx.spec) as edit:
            for norm, result, eps in batch_norms(program):
                conv = norm.args[0]
                if conv.target not in CONVOLUTIONS or len(conv.users) > 1:
                    continue
                weight, bias = [*conv.args, None][1:3]
                operands = [node for node in (weight, bias) if node is not None]
                if any(info(n).tensor is None or len(n.users) > 1 for n in operands):
                    continue
                self.fold(edit, conv, norm.args[1:5], eps)
                edit.replace(result, conv)
                folded += 1
        return PassResult(bool(edit.count), {"folded": folded})

    def fold(self, edit: Edit, conv: fx.Node, norm: tuple[Any, ...], eps: float) -> None:
        """Give the convolution the weights that do the norm's work too."""
        weight_node, bias_node = [*conv.args, None][1:3]
        weight_name = info(weight_node).tensor
        weight = edit.program.tensor(weight_name).detach()
        count, wide = weight.shape[0], {"dtype": torch.float64, "device": weight.device}

        def values(node: fx.Node | None, default: float) -> torch.Tensor:
            if node is None:
                return torch.full((count,), default, **wide)
            return edit.program.tensor(info(node).tensor).detach().to(**wide)

        gain, shift, mean, var = map(values, norm, (1.0, 0.0, 0.0, 1.0))
        scale = gain * (var + eps).rsqrt()
        new_bias = ((values(bias_node, 0.0) - mean) * scale + shift).to(weight.dtype)
        new_weight = weight.to(**wide) * scale.reshape(-1, *[1] * (weight.dim() - 1))
        edit.set_tensor(weight_name, new_weight.to(weight.dtype))
        if bias_node is not None:
            edit.set_tensor(info(bias_node).tensor, new_bias)
        else:
            bias_name = weight_name.removesuffix("weight") + "bias"
            added = edit.add_tensor(bias_name, new_bias, TensorKind.PARAMETER)
            edit.set_args(conv, (*conv.args[:2], added, *conv.args[3:]))


def batch_norms(program: Program) -> Iterator[tuple[fx.Node, fx.Node, float]]:
    """Each BatchNorm in eval mode, the node that holds its result, and its epsilon."""
    for node in list(program.nodes):
        if node.target is aten.batch_norm.default and not node.args[5]:
            yield node, node, node.args[7]
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            results = (u for u in node.users if u.target is operator.getitem and u.args[1] == 0)
            yield from ((node, result, node.args[6]) for result in results)


@dataclass(frozen=True)
class DropResidual(RewritePass):
    """Drop residual branches that are nearly idle: ``x + f(x)`` becomes ``x``."""

    name: ClassVar[str] = "drop-residual"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    threshold: float = field(default=0.01, metadata={"help": "largest share of a dropped branch"})

    def __post_init__(self) -> None:
        """Refuse what makes no sense before any work starts."""
        super().__post_init__()
        if not 0.0 <= self.threshold < 1.0:
            raise OptionError(f"threshold must be in [0, 1), got {self.threshold}")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Drop the branches that are small on the calibration data, or the example inputs."""
        before, notes = program.copy(), []
        shares = self.shares(program, ctx)
        with program.edit(by=ctx.spec) as edit:
            for node, share in shares.items():
                if share <= self.threshold:
                    edit.replace(node, residual(node)[0])
                    notes.append(Diagnostic.at(node, f"dropped a branch of {share:.2%}"))
        checks = [check_equivalence(before, program, inputs=inputs) for inputs in ctx.inputs()]
        error = max(check.max_rel_error for check in checks)
        return PassResult(bool(edit.count), {"dropped": len(notes), "error": error}, notes)

    def shares(self, program: Program, ctx: PassContext) -> dict[fx.Node, float]:
        """How large each branch is, as a share of the sum: ``|f(x)| / |x + f(x)|``."""
        squares: dict[fx.Node, float] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                squares[node] = squares.get(node, 0.0) + float(value.double().square().sum())

        with torch.no_grad():
            for args, kwargs in ctx.inputs():
                run_flat(program, program.flatten_inputs(args, kwargs), observe=observe)
        adds = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        branches = {node: residual(node)[1] for node in adds if residual(node)}
        return {n: (squares[f] / squares[n]) ** 0.5 for n, f in branches.items() if squares[n]}


def residual(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(x, f(x))`` of a node that adds the two, in either order and of one shape."""
    for x, branch in (add.args, add.args[::-1]):
        if not all(isinstance(node, fx.Node) for node in (x, branch)) or add.kwargs:
            return None
        seen, stack = set(), [branch]
        while stack and x not in seen:
            node = stack.pop()
            stack += [used for used in node.all_input_nodes if used not in seen]
            seen.add(node)
        if x in seen and x.meta["val"].shape == branch.meta["val"].shape:
            return x, branch
    return None
