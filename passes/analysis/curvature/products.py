"""Products of the loss' Hessian, and of its Gauss-Newton matrix, with vectors of parameters.

Hessian: by double backward (Pearlmutter 1994), or by forward over reverse, which differentiates
the backward pass along the vector and keeps no graph of it. Both are exact. Gauss-Newton
(Schraudolph 2002): ``J' H J v``, forward, through the loss, backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch.autograd import forward_ad

from torchlathe.passes.analysis.curvature.objective import Batch, Objective, Vector
from torchlathe.passes.analysis.curvature.outputs import OutputHessian
from torchlathe.passes.base import Diagnostic

__all__ = ["Again", "Along", "Matrix", "Mode", "Products", "dot"]

Matrix: TypeAlias = Literal["hessian", "ggn"]
Mode: TypeAlias = Literal["reverse", "forward"]


class Along:
    """How the loss changes along one direction, batch by batch.

    Attributes:
        first: Slopes ``g'd``, one per batch.
        second: Curvatures ``d'Md``, one per batch.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.second: list[float] = []


class Products:
    """Products with the mean over batches of the Hessian or the Gauss-Newton matrix.

    Args:
        objective: The loss and the parameters.
        matrix: Which of the two.
        mode: "reverse" for double backward, "forward" for forward over reverse; where an op has
            no forward rule, double backward is used from then on, and the user is told. The
            Gauss-Newton matrix always goes forward if it can.

    Attributes:
        mode: As it is now.
    """

    def __init__(
        self, objective: Objective, matrix: Matrix = "hessian", mode: Mode = "reverse"
    ) -> None:
        self.objective = objective
        self.matrix: Matrix = matrix
        self.mode: Mode = "forward" if matrix == "ggn" else mode

    def __call__(self, vector: Mapping[str, torch.Tensor]) -> Vector:
        """``M v``; parameters that ``vector`` does not name count as zero in it."""
        return self.each([vector])[0]

    def each(self, vectors: Sequence[Mapping[str, torch.Tensor]]) -> list[Vector]:
        """``M v`` for several vectors, in one sweep over the data."""
        filled = [self._filled(vector) for vector in vectors]
        total: list[Vector] = [{n: torch.zeros_like(t) for n, t in v.items()} for v in filled]
        count = 0
        for batch in self.objective:
            for mine, product in zip(total, self.on_batch(batch, filled), strict=True):
                for name, value in product.items():
                    mine[name] += value
            count += 1
        return [{n: t / count for n, t in mine.items()} for mine in total]

    def on_batch(self, batch: Batch, vectors: Sequence[Vector]) -> Iterator[Vector]:
        """``M v`` of one batch, for each vector in turn.

        Args:
            batch: The batch.
            vectors: With a tensor for each of the objective's parameters.
        """
        if self.matrix == "ggn":
            return iter([self._gauss_newton(batch, vector) for vector in vectors])
        if self.mode == "forward":
            try:
                return iter([self._forward_over_reverse(batch, vector) for vector in vectors])
            except (NotImplementedError, RuntimeError) as error:
                self._fall_back(error)
        with self.objective.running(batch):
            leaves = self.objective.leaves()
            loss = self.objective.loss(leaves, batch)
            first = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=True, allow_unused=True
            )
            products = Again(leaves, first)
            return iter([products(vector) for vector in vectors])

    def along(self, delta: Mapping[str, torch.Tensor]) -> Along:
        """Slope and curvature along one direction."""
        found = Along()
        vector = self._filled(delta)
        for batch in self.objective:
            if self.matrix == "ggn":
                first, second = self._gauss_newton_along(batch, vector)
            else:
                with self.objective.running(batch):
                    leaves = self.objective.leaves()
                    loss = self.objective.loss(leaves, batch)
                    grads = torch.autograd.grad(
                        loss, list(leaves.values()), create_graph=True, allow_unused=True
                    )
                    first = sum(
                        float((g.detach().double() * v.double()).sum())
                        for g, v in zip(grads, vector.values(), strict=True)
                        if g is not None
                    )
                    second = dot(Again(leaves, grads)(vector), vector)
            found.first.append(first)
            found.second.append(second)
        return found

    def _filled(self, vector: Mapping[str, torch.Tensor]) -> Vector:
        aliases = self.objective.program.aliases
        given = {aliases.get(name, name): value for name, value in vector.items()}
        values = self.objective.parameters()
        return {
            name: given[name].detach().to(t) if name in given else torch.zeros_like(t)
            for name, t in values.items()
        }

    def _fall_back(self, error: Exception) -> None:
        self.mode = "reverse"
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        message = f"double backward is used, because an op cannot go forward: {reason}"
        self.objective.ctx.tell(Diagnostic("note", message))

    def _forward_over_reverse(self, batch: Batch, vector: Vector) -> Vector:
        with self.objective.running(batch), forward_ad.dual_level():
            leaves = self.objective.leaves()
            duals = {n: forward_ad.make_dual(t, vector[n]) for n, t in leaves.items()}
            loss = self.objective.loss(duals, batch)
            first = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            found = {}
            for (name, leaf), gradient in zip(leaves.items(), first, strict=True):
                tangent = None if gradient is None else forward_ad.unpack_dual(gradient).tangent
                found[name] = torch.zeros_like(leaf) if tangent is None else tangent.detach()
            return found

    # -- Gauss-Newton ----------------------------------------------------------------------------

    def _gauss_newton(self, batch: Batch, vector: Vector) -> Vector:
        with self.objective.running(batch):
            leaves = self.objective.leaves()
            outputs = self.objective.outputs(leaves, batch)
            hessian = OutputHessian(self.objective, outputs, batch)
            heads = [outputs[i] for i in hessian.places]
            pushed = self._pushed(batch, vector, hessian.places, leaves, heads)
            found = torch.autograd.grad(
                heads, list(leaves.values()), hessian(pushed), allow_unused=True
            )
            return {
                name: torch.zeros_like(leaf) if g is None else g
                for (name, leaf), g in zip(leaves.items(), found, strict=True)
            }

    def _gauss_newton_along(self, batch: Batch, vector: Vector) -> tuple[float, float]:
        with self.objective.running(batch):
            leaves = self.objective.leaves()
            outputs = self.objective.outputs(leaves, batch)
            hessian = OutputHessian(self.objective, outputs, batch)
            heads = [outputs[i] for i in hessian.places]
            pushed = self._pushed(batch, vector, hessian.places, leaves, heads)
            return _inner(hessian.gradient, pushed), _inner(hessian(pushed), pushed)

    def _pushed(
        self,
        batch: Batch,
        vector: Vector,
        places: list[int],
        leaves: Vector,
        heads: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """``J v`` for the outputs at these places."""
        if self.mode == "forward":
            try:
                with torch.no_grad(), forward_ad.dual_level(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.objective.ctx.seed + batch.index)
                    values = self.objective.parameters()
                    duals = {n: forward_ad.make_dual(t, vector[n]) for n, t in values.items()}
                    outputs = self.objective.outputs(duals, batch)
                    found = [forward_ad.unpack_dual(outputs[i]) for i in places]
                    return [
                        torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
                        for pair in found
                    ]
            except (NotImplementedError, RuntimeError) as error:
                self._fall_back(error)
        # J'w is linear in w, and so its gradient along v is J v, whatever w is.
        dummies = [torch.zeros_like(head, requires_grad=True) for head in heads]
        pulled = torch.autograd.grad(
            heads, list(leaves.values()), dummies, create_graph=True, allow_unused=True
        )
        pairs = [(g, v) for g, v in zip(pulled, vector.values(), strict=True) if g is not None]
        found_ = torch.autograd.grad(
            [g for g, _ in pairs],
            dummies,
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        both = zip(dummies, found_, strict=True)
        return [torch.zeros_like(d) if f is None else f for d, f in both]


class Again:
    """The second derivative of a loss whose first has a graph.

    Args:
        leaves: The parameters.
        first: The gradient with respect to each; None where the loss does not depend on it.
    """

    def __init__(self, leaves: Vector, first: Sequence[torch.Tensor | None]) -> None:
        self.leaves = leaves
        self.places = [i for i, g in enumerate(first) if g is not None and g.requires_grad]
        self.first = [g for g in first if g is not None and g.requires_grad]

    def __call__(self, vector: Vector, last: bool = False) -> Vector:
        """``H v``; ``last`` frees the graph."""
        values = list(vector.values())
        if not self.first:  # the loss is linear in the parameters
            return {n: torch.zeros_like(t) for n, t in self.leaves.items()}
        found = torch.autograd.grad(
            self.first,
            list(self.leaves.values()),
            [values[i] for i in self.places],
            retain_graph=not last,
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(leaf) if h is None else h.detach()
            for (name, leaf), h in zip(self.leaves.items(), found, strict=True)
        }


def dot(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The inner product of two vectors, summed up in float64."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _inner(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
