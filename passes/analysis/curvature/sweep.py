"""One sweep over the batches that gathers everything that a sensitivity is made of.

For each batch one run forward serves: vectors drawn from the Gauss-Newton matrix (one pass back
each; they give K-FAC's factors, the diagonal and a trace), the gradient (one pass back), and
Hutchinson's probes of the Hessian (one pass back through that pass each). What a pass back finds is
added up as it arrives, so that no whole vector of gradients is alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from torchlathe.passes.analysis.curvature.objective import Batch, Objective, Vector
from torchlathe.passes.analysis.curvature.outputs import OutputHessian
from torchlathe.passes.analysis.curvature.products import Mode, Products
from torchlathe.passes.analysis.curvature.sums import (
    LayerSums,
    ParameterSums,
    grouped,
    largest,
    layer_sums,
)
from torchlathe.passes.analysis.curvature.traces import rademacher
from torchlathe.passes.statistics.accumulators import Accumulator, Samples
from torchlathe.passes.statistics.calibration import Calibration
from torchlathe.passes.statistics.gradients import samples_of
from torchlathe.passes.statistics.layers import LayerMoments
from torchlathe.passes.statistics.readers import Reader
from torchlathe.passes.statistics.storage import DEFAULT_LIMIT, MatrixStore
from torchlathe.passes.statistics.streaming import Stream
from torchlathe.passes.statistics.telling import callable_text

__all__ = ["Diagonal", "Findings", "Plan", "Sweep"]

Consumer: TypeAlias = Callable[[str, torch.Tensor], None]
Diagonal: TypeAlias = Literal["ggn", "fisher", "fisher-per-sample", "hessian"]

# Of the memory: for the vectors of the Hessian of the outputs, and for one vector of a probe, of
# which two are alive: the signs, and the gradient that is derived again.
_ROOT_SHARE, _PROBE_SHARE = 8, 4


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
        limit_bytes: Memory for all that is kept and for vectors of parameters; what is kept beyond
            it is in files. None for what the calibration says.
    """

    factors: bool = True
    diagonal: Diagonal = "ggn"
    draws: int | None = 1
    probes: int = 0
    mode: Mode = "reverse"
    rows: int = 0
    limit_bytes: int | None = None


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
        spilled_bytes: How much of it is in files.
    """

    losses: list[float] = field(default_factory=list)
    gradient: Vector = field(default_factory=dict)
    diagonal: Vector = field(default_factory=dict)
    layers: dict[fx.Node, LayerMoments] = field(default_factory=dict)
    hessian_samples: dict[str, list[list[float]]] = field(default_factory=dict)
    ggn_samples: dict[str, list[list[float]]] = field(default_factory=dict)
    spilled_bytes: int = 0


@dataclass
class _Draw:
    """The vector that is on its way back.

    Attributes:
        share: What its squares count.
        first: Whether it is the first of its batch.
        squares: Its squared norm at each parameter.
    """

    share: float
    first: bool
    squares: dict[str, float] = field(default_factory=dict)


class Sweep:
    """One sweep; `run` it once."""

    def __init__(self, objective: Objective, plan: Plan) -> None:
        self.objective = objective
        self.plan = plan
        self.setting = Calibration.of(objective.ctx.calibration, limit_bytes=plan.limit_bytes)
        limit = self.setting.limit_bytes
        limit = DEFAULT_LIMIT if limit is None else limit
        parameters = objective.parameters()
        self.root_bytes = limit // _ROOT_SHARE
        # Where every tensor would be a group of its own there is nothing more to save.
        self.groups = grouped(parameters, limit // _PROBE_SHARE)
        working = largest(parameters, self.groups if plan.probes else [(n,) for n in parameters])
        kept = limit - self.root_bytes - working * (2 if plan.probes else 1)
        self.store = MatrixStore(max(0, kept), self.setting.spill)
        self.losses, self.taken = Samples(), Samples()
        self.sums = {n: ParameterSums(t, self.store.zeros) for n, t in parameters.items()}
        self.layers = LayerSums()
        if plan.factors and plan.draws is not None:
            wide = any(t.dtype is torch.float64 for t in parameters.values())
            dtype = torch.float64 if wide else torch.float32
            names = objective.names
            self.layers = layer_sums(objective.program, names, dtype, self.store.zeros)
        self._readers = {reader.node: reader for reader in self.layers.outputs}
        self._draw: _Draw | None = None
        self._forward: dict[tuple[str, ...], Products] = {}
        self._total = 0

    def run(self) -> Findings:
        """Go over the batches, or over those that an interrupted run has not seen."""
        objective = self.objective
        self._total = len(objective)
        stream = Stream(
            objective.program,
            objective.ctx,
            self.setting,
            dict(self._accumulators()),
            chain(
                map(str, (self.plan, self.groups, self._total, objective.ctx.seed)),
                map(callable_text, (objective.ctx.loss,)),
            ),
            self.store,
            what="curvature",
            limit=objective.limit,
        )
        stream.run(lambda index, given, flat: self._batch(Batch(index, given, flat)))
        return self._findings()

    def _accumulators(self) -> Iterator[tuple[str, Accumulator]]:
        yield "losses", self.losses
        yield "taken", self.taken
        for name, sums in self.sums.items():
            yield f"{name} gradient", sums.gradient
            yield f"{name} diagonal", sums.diagonal
            yield f"{name} hessian", sums.hessian
            yield f"{name} ggn", sums.ggn
        yield from self.layers.accumulators()

    def _findings(self) -> Findings:
        found = Findings([loss for batch in self.losses.values for loss in batch])
        found.spilled_bytes = self.store.spilled_bytes
        found.layers = self.layers.moments()
        batches = len(found.losses)
        counts = {
            "hessian": min(batches, self.plan.probes),
            "fisher-per-sample": sum(count for batch in self.taken.values for count in batch),
        }
        for name, sums in self.sums.items():
            found.gradient[name] = sums.gradient.value.div_(batches)
            count = counts.get(self.plan.diagonal, batches)
            found.diagonal[name] = sums.diagonal.value.div_(count)
            if sums.hessian.values:
                found.hessian_samples[name] = sums.hessian.values
            if sums.ggn.values:
                found.ggn_samples[name] = sums.ggn.values
        return found

    # -- a batch ---------------------------------------------------------------------------------

    def _batch(self, batch: Batch) -> None:
        plan = self.plan
        reached = [plan.probes * (batch.index + i) // self._total for i in (0, 1)]
        probes = reached[1] - reached[0]
        generator = torch.Generator().manual_seed(_mixed(self.objective.ctx.seed, batch.index))
        with self.objective.running(batch):
            leaves = self.objective.leaves()
            for node, value in zip(self.objective.program.input_nodes, batch.flat, strict=True):
                self._observe(generator, node, value)
            outputs = self.objective.outputs(leaves, batch, partial(self._observe, generator))
            if plan.draws is not None:
                self._draw_all(batch, leaves, outputs, generator)
            loss = self.objective.loss_from(outputs, batch)
            del outputs
            self.losses.add(loss)
            if probes and plan.mode == "reverse":
                self._probe_again(leaves, loss, probes, generator)
            else:
                with _consumed(leaves, self._add_gradient):
                    torch.autograd.backward(loss, inputs=list(leaves.values()))
            del loss
        if probes and plan.mode == "forward":
            self._probe_forward(batch, probes, generator)
        if plan.diagonal == "fisher-per-sample":
            self._per_sample(batch)

    def _add_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.sums[name].gradient.add(gradient)
        if self.plan.diagonal == "fisher":
            self.sums[name].diagonal.add_squares(gradient)

    def _per_sample(self, batch: Batch) -> None:
        """Squares of the gradients of single samples."""
        count = 0
        for given, flat in samples_of(batch.given, batch.flat):
            one = Batch(batch.index, given, flat)
            with self.objective.running(one):
                leaves = self.objective.leaves()
                loss = self.objective.loss(leaves, one)
                with _consumed(leaves, lambda name, g: self.sums[name].diagonal.add_squares(g)):
                    torch.autograd.backward(loss, inputs=list(leaves.values()))
            count += 1
        self.taken.add(torch.tensor([count]))

    # -- probes of the Hessian -------------------------------------------------------------------

    def _probe_again(
        self, leaves: Vector, loss: torch.Tensor, probes: int, generator: torch.Generator
    ) -> None:
        """Probes by double backward; the gradient comes with it."""
        for group in self.groups:
            mine = {name: leaves[name] for name in group}
            values = list(mine.values())
            first = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
            named = {n: g for n, g in zip(mine, first, strict=True) if g is not None}
            del first
            for name, gradient in named.items():
                self._add_gradient(name, gradient.detach())
            named = {n: g for n, g in named.items() if g.requires_grad}

            def product(
                signs: Vector,
                last: bool,
                use: Consumer,
                named: Vector = named,
                mine: Vector = mine,
            ) -> None:
                if not named:  # the loss is linear in these parameters
                    return
                with _consumed(mine, use):
                    torch.autograd.backward(
                        list(named.values()),
                        [signs[name] for name in named],
                        retain_graph=not last,
                        inputs=list(mine.values()),
                    )

            self._probe(mine, probes, generator, product, group is self.groups[-1])

    def _probe_forward(self, batch: Batch, probes: int, generator: torch.Generator) -> None:
        """Probes by forward over reverse."""
        parameters = self.objective.parameters()
        for group in self.groups:
            if group not in self._forward:
                self._forward[group] = Products(self.objective.only(group), "hessian", "forward")
            products = self._forward[group]

            def product(
                signs: Vector, last: bool, use: Consumer, products: Products = products
            ) -> None:
                found = next(products.on_batch(batch, [signs]))
                for name, value in found.items():
                    use(name, value)

            self._probe({n: parameters[n] for n in group}, probes, generator, product, True)

    def _probe(
        self,
        like: Vector,
        probes: int,
        generator: torch.Generator,
        product: Callable[[Vector, bool, Consumer], None],
        final: bool,
    ) -> None:
        """Hutchinson: ``E[z' H z]`` over signs z is the trace, of every block at once."""
        samples: dict[str, list[float]] = {name: [0.0] * probes for name in like}
        for number in range(probes):
            signs = {n: rademacher(t.detach(), generator) for n, t in like.items()}

            def use(
                name: str, value: torch.Tensor, number: int = number, signs: Vector = signs
            ) -> None:
                part = value.detach() * signs[name]
                samples[name][number] = float(part.sum(dtype=torch.float64))
                if self.plan.diagonal == "hessian":
                    self.sums[name].diagonal.add(part, weight=1 / probes)

            product(signs, final and number == probes - 1, use)
        for name, values in samples.items():
            self.sums[name].hessian.add(torch.tensor(values, dtype=torch.float64))

    # -- vectors drawn from the Gauss-Newton matrix ----------------------------------------------

    def _draw_all(
        self, batch: Batch, leaves: Vector, outputs: list[Any], generator: torch.Generator
    ) -> None:
        """Vectors with the covariance of the Gauss-Newton matrix, and their gradients at layers."""
        hessian = OutputHessian(self.objective, outputs, batch)
        heads = [outputs[i] for i in hessian.places]
        draws = self.plan.draws or 0
        share = 1 / draws if draws else 1.0
        samples: dict[str, list[float]] = {name: [] for name in leaves}
        with _consumed(leaves, self._add_drawn):
            for number, seed in enumerate(_seeds(heads, draws, generator)):
                # The root runs through heads, at which there may be hooks: nothing is drawn yet.
                drawn = hessian.root(seed, room=self.root_bytes)
                self._draw = _Draw(share, number == 0)
                torch.autograd.backward(
                    heads, drawn, retain_graph=True, inputs=list(leaves.values())
                )
                for name, values in samples.items():
                    values.append(self._draw.squares.get(name, 0.0))
                self._draw = None
        for name, values in samples.items():
            one = values if draws else [sum(values)]
            self.sums[name].ggn.add(torch.tensor(one, dtype=torch.float64))

    def _add_drawn(self, name: str, value: torch.Tensor) -> None:
        assert self._draw is not None
        self._draw.squares[name] = _square(value)
        if self.plan.diagonal == "ggn":
            self.sums[name].diagonal.add_squares(value, weight=self._draw.share)

    def _observe(self, generator: torch.Generator, node: fx.Node, value: Any) -> None:
        for moments, rows in self.layers.observed.get(node, ()):
            moments.add(self._thinned(rows(value.detach()), generator)[0])
        reader = self._readers.get(node)
        if reader is not None and value.requires_grad:
            value.register_hook(partial(self._add_result, reader, generator))

    def _add_result(self, reader: Reader, generator: torch.Generator, value: torch.Tensor) -> None:
        if self._draw is not None:
            rows, scale = self._thinned(reader.result_rows(value), generator)
            weight = math.sqrt(self._draw.share * scale)
            self.layers.outputs[reader].add(rows * weight, count=int(self._draw.first))

    def _thinned(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        """At most so many of the rows, drawn at random, and how many each stands for."""
        count = rows.shape[1]
        if not self.plan.rows or count <= self.plan.rows:
            return rows, 1.0
        chosen = torch.randperm(count, generator=generator)[: self.plan.rows]
        return rows[:, chosen.to(rows.device)], count / self.plan.rows


@contextmanager
def _consumed(leaves: Mapping[str, torch.Tensor], use: Consumer) -> Iterator[None]:
    """Within, what a pass back finds at a leaf is used at once, and is gone."""

    def arrived(name: str, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            use(name, gradient)

    handles = [
        leaf.register_post_accumulate_grad_hook(partial(arrived, name))
        for name, leaf in leaves.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seeds(
    heads: Sequence[torch.Tensor], draws: int, generator: torch.Generator
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
