"""One sweep over the batches that gathers everything that a sensitivity is made of.

For each batch one run forward serves: vectors drawn from the Gauss-Newton matrix (one pass back
each; they give K-FAC's factors, the diagonal and a trace), the gradient (one pass back), and
Hutchinson's probes of the Hessian (one pass back through that pass each).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from torchlathe.ir import describe
from torchlathe.ir.axes import rule_of
from torchlathe.ir.axes.rules.contraction import Convolution
from torchlathe.passes.analysis.curvature.objective import Batch, Objective, Vector
from torchlathe.passes.analysis.curvature.outputs import OutputHessian
from torchlathe.passes.analysis.curvature.products import Again, Mode, Products
from torchlathe.passes.analysis.curvature.traces import rademacher
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.statistics.layers import LayerMoments
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.readers import Reader, patches, readers_of, unfolds

__all__ = ["Diagonal", "Findings", "Plan", "Sweep"]

Diagonal: TypeAlias = Literal["ggn", "fisher", "hessian"]


@dataclass(frozen=True)
class Plan:
    """What to gather.

    Attributes:
        factors: Whether to gather K-FAC's factors.
        diagonal: Which diagonal.
        draws: Vectors drawn from the Gauss-Newton matrix per batch; 0 for every output of a sample
            in turn, None for none.
        probes: Hutchinson's probes of the Hessian, in all, spread evenly over the batches.
        mode: How products with the Hessian are computed.
        rows: At most so many rows of a batch enter a layer's factors; 0 for all.
        limit_bytes: Memory for all factors; layers beyond it have none.
    """

    factors: bool = True
    diagonal: Diagonal = "ggn"
    draws: int | None = 1
    probes: int = 0
    mode: Mode = "reverse"
    rows: int = 0
    limit_bytes: int = 2**31


@dataclass
class Findings:
    """What a sweep found; means over the batches.

    Attributes:
        losses: Of each batch.
        gradient: Of the loss.
        diagonal: As the plan says.
        layers: Moments by node, with the gradients drawn from the Gauss-Newton matrix.
        hessian_samples: Per parameter and batch, samples of the trace of the Hessian's block.
        ggn_samples: The same of the Gauss-Newton matrix.
    """

    losses: list[float] = field(default_factory=list)
    gradient: Vector = field(default_factory=dict)
    diagonal: Vector = field(default_factory=dict)
    layers: dict[fx.Node, LayerMoments] = field(default_factory=dict)
    hessian_samples: dict[str, list[list[float]]] = field(default_factory=dict)
    ggn_samples: dict[str, list[list[float]]] = field(default_factory=dict)


class Sweep:
    """One sweep; `run` it once."""

    def __init__(self, objective: Objective, plan: Plan) -> None:
        self.objective = objective
        self.plan = plan
        self.found = Findings()
        self._count = 0
        self._layers: dict[Reader, tuple[Moments, Moments]] = {}
        self._inputs: dict[fx.Node, list[tuple[Moments, Callable[..., torch.Tensor]]]] = {}
        if plan.factors and plan.draws is not None:
            self._plan_layers()
        self._readers = {reader.node: reader for reader in self._layers}

    def run(self) -> Findings:
        """Go over the batches."""
        total = len(self.objective)
        for name, tensor in self.objective.parameters().items():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            self.found.gradient[name] = torch.zeros_like(tensor, dtype=wide)
            self.found.diagonal[name] = torch.zeros_like(tensor, dtype=wide)
        for batch in self.objective:
            self.objective.ctx.report(f"curvature: batch {batch.index + 1}/{total}")
            reached = [self.plan.probes * (batch.index + i) // total for i in (0, 1)]
            self._batch(batch, reached[1] - reached[0])
            self._count += 1
        probed = min(self._count, self.plan.probes)
        for name in self.objective.names:
            self.found.gradient[name] /= self._count
            self.found.diagonal[name] /= probed if self.plan.diagonal == "hessian" else self._count
        for reader, (inputs, outputs) in self._layers.items():
            if outputs.count and inputs.count:  # the loss depends on it
                moments = LayerMoments(reader, inputs, outputs, unfolds(reader))
                self.found.layers[reader.node] = moments
        return self.found

    # -- a batch ---------------------------------------------------------------------------------

    def _batch(self, batch: Batch, probes: int) -> None:
        plan, found = self.plan, self.found
        generator = torch.Generator().manual_seed(_mixed(self.objective.ctx.seed, batch.index))
        results: dict[Reader, torch.Tensor] = {}
        with self.objective.running(batch):
            leaves = self.objective.leaves()
            observe = partial(self._observe, results, generator)
            inputs = zip(self.objective.program.input_nodes, batch.flat, strict=True)
            for node, value in inputs:
                self._observe(results, generator, node, value)
            outputs = self.objective.outputs(leaves, batch, observe)
            if plan.draws is not None:
                self._draw(batch, leaves, results, outputs, generator)
            loss = self.objective.loss_from(outputs, batch)
            del outputs, results
            again_follows = bool(probes) and plan.mode == "reverse"
            first = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=again_follows, allow_unused=True
            )
            found.losses.append(float(loss.detach()))
            for name, gradient in zip(leaves, first, strict=True):
                if gradient is not None:
                    found.gradient[name] += gradient.detach()
                    if plan.diagonal == "fisher":
                        found.diagonal[name].addcmul_(gradient.detach(), gradient.detach())
            if again_follows:
                again = Again(leaves, first)
                del first, loss
                self._probe(leaves, probes, generator, again)
        if probes and plan.mode == "forward":
            forward = Products(self.objective, "hessian", "forward")
            self._probe(
                self.objective.parameters(),
                probes,
                generator,
                lambda z, last: next(forward.on_batch(batch, [z])),
            )

    def _probe(
        self,
        like: Vector,
        probes: int,
        generator: torch.Generator,
        product: Callable[[Vector, bool], Vector],
    ) -> None:
        """Hutchinson: ``E[z' H z]`` over signs z is the trace, of every block at once."""
        samples: dict[str, list[float]] = {name: [] for name in like}
        for number in range(probes):
            signs = {n: rademacher(t.detach(), generator) for n, t in like.items()}
            found = product(signs, number == probes - 1)
            for name, value in found.items():
                value.mul_(signs[name])
                samples[name].append(float(value.sum(dtype=torch.float64)))
                if self.plan.diagonal == "hessian":
                    self.found.diagonal[name].add_(value, alpha=1 / probes)
        for name, values in samples.items():
            self.found.hessian_samples.setdefault(name, []).append(values)

    def _draw(
        self,
        batch: Batch,
        leaves: Vector,
        results: dict[Reader, torch.Tensor],
        outputs: list[Any],
        generator: torch.Generator,
    ) -> None:
        """Vectors with the covariance of the Gauss-Newton matrix, and their gradients at layers."""
        hessian = OutputHessian(self.objective, outputs, batch)
        heads = [outputs[i] for i in hessian.places]
        readers = [reader for reader, value in results.items() if value.requires_grad]
        targets = [*leaves.values(), *(results[reader] for reader in readers)]
        seeds = list(_seeds(heads, self.plan.draws or 0, generator))
        share = 1 / len(seeds) if self.plan.draws else 1.0
        samples: dict[str, list[float]] = {name: [] for name in leaves}
        for number, seed in enumerate(seeds):
            drawn = hessian.root(seed)
            found = torch.autograd.grad(heads, targets, drawn, retain_graph=True, allow_unused=True)
            for name, value in zip(leaves, found, strict=False):
                samples[name].append(0.0 if value is None else _square(value))
                if value is not None and self.plan.diagonal == "ggn":
                    self.found.diagonal[name].addcmul_(value, value, value=share)
            for reader, value in zip(readers, found[len(leaves) :], strict=True):
                if value is not None:
                    rows, scale = self._thinned(reader.result_rows(value), generator)
                    weight = math.sqrt(share * scale)
                    self._layers[reader][1].add(rows * weight, count=int(number == 0))
        for name, values in samples.items():
            one = values if self.plan.draws else [sum(values)]
            self.found.ggn_samples.setdefault(name, []).append(one)

    def _observe(
        self,
        results: dict[Reader, torch.Tensor],
        generator: torch.Generator,
        node: fx.Node,
        value: Any,
    ) -> None:
        for moments, rows in self._inputs.get(node, ()):
            moments.add(self._thinned(rows(value.detach()), generator)[0])
        reader = self._readers.get(node)
        if reader is not None:
            results[reader] = value

    def _thinned(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        """At most so many of the rows, drawn at random, and how many each stands for."""
        count = rows.shape[1]
        if not self.plan.rows or count <= self.plan.rows:
            return rows, 1.0
        chosen = torch.randperm(count, generator=generator)[: self.plan.rows]
        return rows[:, chosen.to(rows.device)], count / self.plan.rows

    # -- layers ----------------------------------------------------------------------------------

    def _plan_layers(self) -> None:
        names = set(self.objective.names)
        program = self.objective.program
        found = [r for r in readers_of(program).values() if r.weight in names and _factored(r)]
        shared: dict[tuple[Any, ...], Moments] = {}
        used, left_out = 0, []
        dtype = torch.float64 if self._wide() else torch.float32
        for reader in found:
            # Layers that read one value in the same way share its moments.
            key: tuple[Any, ...] = (reader.operand, reader.data_axes, reader.groups, reader.read)
            if unfolds(reader):
                key = (reader,)
            ins, outs = _sizes(reader, program.entries[reader.weight].tensor)
            size = dtype.itemsize * (outs + (0 if key in shared else ins))
            if used + size > self.plan.limit_bytes:
                left_out.append(reader)
                continue
            used += size
            if key not in shared:
                shared[key] = Moments(matrix=True, dtype=dtype)
                rows = partial(patches, reader) if unfolds(reader) else reader.data_rows
                self._inputs.setdefault(reader.operand, []).append((shared[key], rows))  # type: ignore[arg-type]
            self._layers[reader] = (shared[key], Moments(matrix=True, dtype=dtype))
        if left_out:
            message = (
                f"{len(left_out)} of {len(found)} layers have no factors, for those of all would "
                f"take more than limit_bytes={self.plan.limit_bytes}; their diagonal is used"
            )
            place = describe(left_out[0].node)
            self.objective.ctx.tell(Diagnostic("warning", message, left_out[0].weight, place))

    def _wide(self) -> bool:
        return any(t.dtype is torch.float64 for t in self.objective.parameters().values())


def _factored(reader: Reader) -> bool:
    """Whether the weight has the rows of the layer's result: all but unusual convolutions."""
    return unfolds(reader) or not isinstance(rule_of(reader.node), Convolution)


def _sizes(reader: Reader, weight: torch.Tensor) -> tuple[int, int]:
    """Elements of A and of G."""
    matrix = LayerMoments(reader, Moments(), None, unfolds(reader)).weight_matrix(
        torch.empty(weight.shape, device="meta")
    )
    groups, outs, features = matrix.shape
    return groups * features**2, groups * outs**2


def _seeds(
    heads: list[torch.Tensor], draws: int, generator: torch.Generator
) -> Iterator[list[torch.Tensor]]:
    """Vectors of outputs: signs, or each output of a sample in turn with a sign per sample."""
    for _ in range(draws):
        yield [rademacher(head.detach(), generator) for head in heads]
    if draws:
        return
    for place, head in enumerate(heads):
        samples = head.shape[0] if head.dim() else 1
        for index in range(head.numel() // max(1, samples)):
            seed = [torch.zeros_like(h, requires_grad=False) for h in heads]
            signs = rademacher(seed[place].reshape(samples, -1)[:, 0], generator)
            seed[place].view(samples, -1)[:, index] = signs
            yield seed


def _square(value: torch.Tensor) -> float:
    """The squared norm, summed up in float64."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2


def _mixed(seed: int, index: int) -> int:
    """Another seed for each batch."""
    return (seed * 1_000_003 + index) % 2**63
