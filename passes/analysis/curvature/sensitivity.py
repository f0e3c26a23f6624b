"""What is known of a program's curvature, and what it predicts of a change of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.curvature.blocks import Block
from torchlathe.passes.analysis.curvature.costs import Over, pair_costs, parts_of, sliced
from torchlathe.passes.analysis.curvature.deltas import erase_delta
from torchlathe.passes.analysis.curvature.drawn import drawn_quadratics
from torchlathe.passes.analysis.curvature.factors import LayerCurvature
from torchlathe.passes.analysis.curvature.objective import Objective, Vector
from torchlathe.passes.analysis.curvature.products import Along, Matrix, Mode, Products
from torchlathe.passes.analysis.curvature.spectrum import End, eigenvalues
from torchlathe.passes.analysis.curvature.sweep import Findings
from torchlathe.passes.analysis.curvature.traces import TraceEstimate
from torchlathe.passes.analysis.families import Families, Family, ParameterSlice
from torchlathe.passes.importance.criterion import Scoring

__all__ = ["Method", "Prediction", "Sensitivity"]

Method: TypeAlias = Literal["auto", "kfac", "diagonal", "drawn", "ggn", "hessian"]


@dataclass(frozen=True)
class Prediction:
    """The change of the mean loss that a perturbation is predicted to make.

    Attributes:
        first: ``g'd``.
        second: ``d'Md / 2``.
        standard_error: Of the total, over batches; None where there is none per batch.
        method: Where M comes from.
        parts: The second-order part per tensor; a bias is in its weight's. Empty for whole
            matrices, where tensors cannot be told apart.
    """

    first: float
    second: float
    standard_error: float | None
    method: Method
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """``g'd + d'Md / 2``."""
        return self.first + self.second


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The gradient and curvature of the mean loss over the calibration batches.

    Attributes:
        objective: The loss, for what is computed on demand.
        method: What `predict` uses unless told otherwise.
        mode: How products with the Hessian are computed.
        loss: The mean loss.
        layers: Kronecker factors, by name of the call.
        extremes: Top and bottom eigenvalue of each tensor's block of the Hessian, where asked for.
        families: Of the program.
    """

    objective: Objective
    method: Method
    mode: Mode
    loss: float
    layers: Mapping[str, LayerCurvature]
    extremes: Mapping[str, tuple[float, float]]
    families: Families
    _found: Findings = field(repr=False)
    _scoring: Scoring = field(repr=False)

    # -- what is stored --------------------------------------------------------------------------

    def layer(self, node: fx.Node | str) -> LayerCurvature:
        """The factors of a layer, by its call or the name of that.

        Raises:
            KeyError: It has none.
        """
        return self.layers[node if isinstance(node, str) else node.name]

    def layers_of(self, weight: str) -> tuple[LayerCurvature, ...]:
        """The layers that read a weight."""
        name = self._name(weight)
        return tuple(layer for layer in self.layers.values() if layer.weight == name)

    def gradient(self, name: str) -> torch.Tensor:
        """Of the mean loss with respect to a parameter."""
        return self._found.gradient[self._name(name)]

    def diagonal(self, name: str) -> torch.Tensor:
        """Of the curvature with respect to a parameter, in its shape."""
        return self._found.diagonal[self._name(name)]

    @property
    def has_trace(self) -> bool:
        """Whether there are samples of the trace of either matrix."""
        return bool(self._found.hessian_samples or self._found.ggn_samples)

    def trace(self, *names: str, matrix: Matrix | None = None) -> TraceEstimate:
        """Of the block of these parameters together; of all, if none is named.

        Args:
            *names: Parameters.
            matrix: By default the Hessian where it was probed, else the Gauss-Newton matrix.

        Raises:
            OptionError: There are no samples of this matrix.
        """
        if matrix is None:
            matrix = "hessian" if self._found.hessian_samples else "ggn"
        hessian = matrix == "hessian"
        samples = self._found.hessian_samples if hessian else self._found.ggn_samples
        if not samples:
            raise OptionError(
                f"the trace of the {matrix} was not estimated", hint="set samples above 0"
            )
        chosen = [samples[self._name(name)] for name in names] or list(samples.values())
        batches = zip(*chosen, strict=True)
        return TraceEstimate.of(
            [[sum(parts) for parts in zip(*batch, strict=True)] for batch in batches]
        )

    def unit_traces(self, family: Family | str) -> torch.Tensor:
        """The diagonal, summed over what each unit of a family owns; (extent,) float64."""
        family = self._family(family)
        total = torch.zeros(family.extent, dtype=torch.float64)
        for part in parts_of(family, self.objective.names, "all"):
            values = self._along(self.diagonal(part.name), part.axis)
            total += self._scoring.per_unit(family, part, values)
        return total

    # -- what is predicted -----------------------------------------------------------------------

    def predict(
        self, delta: Mapping[str, torch.Tensor], method: Method | None = None
    ) -> Prediction:
        """How the mean loss changes if parameters move by ``delta``, to second order.

        Args:
            delta: Per parameter, ``after - before`` in its shape.
            method: "auto" is "ggn". "kfac" (the diagonal where a tensor has no factors) and
                "diagonal" cost no run; "hessian" and "ggn" run over the data, and neglect nothing
                of second order ("ggn" the network's own curvature); "drawn" estimates "ggn" from
                random vectors.

        Raises:
            OptionError: A name or a shape that is not a parameter's.
        """
        method = method or self.method
        method = "ggn" if method == "auto" else method
        given = self._checked(delta)
        if method in ("hessian", "ggn"):
            return self._exact(given, "hessian" if method == "hessian" else "ggn", method)
        first = sum(_inner(self.gradient(name), value) for name, value in given.items())
        if method == "drawn":
            second = drawn_quadratics(
                self.objective.only(given),
                lambda s: torch.tensor(sum(_inner(s[n], d) for n, d in given.items())),
            )
            return Prediction(first, float(second) / 2, None, method)
        parts: dict[str, float] = {}
        if method == "kfac":
            parts = self._kronecker(given)
        joined = {layer.bias for name in parts for layer in self.layers_of(name)}
        for name, value in given.items():
            if name not in parts and name not in joined:
                parts[name] = _inner(self.diagonal(name), value.double().square()) / 2
        return Prediction(first, sum(parts.values()), None, method, parts)

    def unit_costs(
        self, family: Family | str, over: Over = "writers", method: Method | None = None
    ) -> torch.Tensor:
        """Predicted change of the mean loss for erasing each unit of a family alone.

        Args:
            family: One of the program's, or its name.
            over: Which slices are zeroed, see `erase`.
            method: As for `predict`, but "auto" is "drawn". "hessian" and "ggn" run over the data
                once per unit, "drawn" once for all of them.

        Returns:
            Shape (extent,), float64 on the CPU.
        """
        (found,) = self.costs_of([family], over, method).values()
        return found

    def costs_of(
        self,
        families: Iterable[Family | str],
        over: Over = "writers",
        method: Method | None = None,
    ) -> dict[Family, torch.Tensor]:
        """`unit_costs` of several families; "drawn" runs over the data once for all together."""
        chosen = [self._family(family) for family in families]
        method = method or self.method
        if method in ("auto", "drawn"):
            return self._drawn_costs(chosen, over)
        if method in ("hessian", "ggn"):
            each = [[self.erase(f, [unit], over) for unit in range(f.extent)] for f in chosen]
            found = [[self.predict(d, method).total for d in deltas] for deltas in each]
            costs = [torch.tensor(numbers, dtype=torch.float64) for numbers in found]
        else:
            costs = [self._stored_costs(family, over, method) for family in chosen]
        return dict(zip(chosen, costs, strict=True))

    def _drawn_costs(self, families: Sequence[Family], over: Over) -> dict[Family, torch.Tensor]:
        parts = {f: parts_of(f, self.objective.names, over) for f in families}
        costs = {f: -self._slopes(f, mine, self._found.gradient) for f, mine in parts.items()}
        owned = {part.name for mine in parts.values() for part in mine}
        if owned:
            squares = drawn_quadratics(
                self.objective.only(owned),
                lambda s: torch.cat([self._slopes(f, mine, s) for f, mine in parts.items()]),
            )
            pieces = squares.split([family.extent for family in families])
            for family, piece in zip(families, pieces, strict=True):
                costs[family] = costs[family] + piece / 2
        return costs

    def _stored_costs(self, family: Family, over: Over, method: Method) -> torch.Tensor:
        """From Kronecker factors and the diagonal, without a run."""
        parts = parts_of(family, self.objective.names, over)
        owned = {part.name for part in parts}
        done: set[str] = set()
        total = -self._slopes(family, parts, self._found.gradient)
        for part in parts:
            costs = None
            if method == "kfac":
                costs = self._pair_costs(family, part, owned, done)
            if costs is not None:
                total += costs / 2
        for part in parts:
            if part.name not in done:
                tensor = self._scoring.tensor(part.name)
                terms = self._along(self.diagonal(part.name) * tensor.square(), part.axis)
                total += self._scoring.per_unit(family, part, terms) / 2
        return total

    def erase(
        self, family: Family | str, units: Sequence[int] | torch.Tensor, over: Over = "writers"
    ) -> Vector:
        """The change of the parameters if units of a family are zeroed.

        Args:
            family: One of the program's, or its name.
            units: Which.
            over: "writers" for the slices that the equal full-size model has at zero, "readers" for
                those that read the units, "all" for both.
        """
        family = self._family(family)
        wanted = torch.as_tensor(units, dtype=torch.int64)
        delta: Vector = {}
        for part in parts_of(family, self.objective.names, over):
            indices = torch.isin(self._scoring.owner(family, part), wanted).nonzero().flatten()
            tensor = self._scoring.tensor(part.name)
            moved = tensor + delta[part.name] if part.name in delta else tensor
            change = erase_delta(moved, part.axis, indices)
            delta[part.name] = delta[part.name] + change if part.name in delta else change
        return delta

    # -- what is computed on demand --------------------------------------------------------------

    def product(self, vector: Mapping[str, torch.Tensor], matrix: Matrix = "hessian") -> Vector:
        """The exact product of a matrix with a vector; what is not named counts as zero."""
        return Products(self.objective, matrix, self.mode)(self._checked(vector))

    def along(self, delta: Mapping[str, torch.Tensor], matrix: Matrix = "hessian") -> Along:
        """Slope and curvature along a direction, batch by batch."""
        return Products(self.objective, matrix, self.mode).along(self._checked(delta))

    def eigenvalues(
        self,
        *names: str,
        count: int = 1,
        end: End = "top",
        matrix: Matrix = "hessian",
        tolerance: float = 1e-3,
    ) -> list[float]:
        """Ends of the spectrum of the block of some parameters (of all), in descending order.

        Args:
            *names: Parameters.
            count: How many; with "both" half from each end.
            end: Which end.
            matrix: Of which.
            tolerance: Relative accuracy.

        Raises:
            UnsupportedError: Lanczos does not converge.
        """
        objective = self.objective.only(names) if names else self.objective
        return eigenvalues(
            Products(objective, matrix, self.mode),
            objective.parameters(),
            count=count,
            end=end,
            seed=objective.ctx.seed,
            tolerance=tolerance,
        )

    def family_trace(
        self, family: Family | str, matrix: Matrix = "hessian", samples: int = 2
    ) -> TraceEstimate:
        """Hutchinson's estimate for the block of all that a family owns; runs over the data.

        Args:
            family: One of the program's, or its name.
            matrix: Of which.
            samples: Probes on each batch.

        Raises:
            OptionError: The family owns no parameter whose curvature is known.
        """
        return self._block(family).trace(matrix, self.mode, samples)

    def family_eigenvalues(
        self,
        family: Family | str,
        *,
        count: int = 1,
        end: End = "top",
        matrix: Matrix = "hessian",
        tolerance: float = 1e-3,
    ) -> list[float]:
        """`eigenvalues` of the block of all that a family owns.

        Raises:
            OptionError: The family owns no parameter whose curvature is known.
            UnsupportedError: Lanczos does not converge.
        """
        block = self._block(family)
        products = Products(block.objective, matrix, self.mode)
        return eigenvalues(
            lambda vector: block.product(products, vector),
            block.like,
            count=count,
            end=end,
            seed=self.objective.ctx.seed,
            tolerance=tolerance,
        )

    # -- parts -----------------------------------------------------------------------------------

    def _exact(self, delta: Vector, matrix: Matrix, method: Method) -> Prediction:
        found = Products(self.objective.only(delta), matrix, self.mode).along(delta)
        count = len(found.first)
        totals = [f + s / 2 for f, s in zip(found.first, found.second, strict=True)]
        mean = sum(totals) / count
        spread = sum((x - mean) ** 2 for x in totals) / max(1, count - 1)
        error = math.sqrt(spread / count) if count > 1 else None
        return Prediction(sum(found.first) / count, sum(found.second) / count / 2, error, method)

    def _kronecker(self, delta: Vector) -> dict[str, float]:
        """Second-order parts of the weights that have factors, each with its bias."""
        parts: dict[str, float] = {}
        for layer in self.layers.values():
            weight, bias = delta.get(layer.weight), delta.get(layer.bias or "")
            if weight is None and bias is None:
                continue
            if weight is None:
                weight = torch.zeros_like(self._scoring.tensor(layer.weight))
            cost = layer.quadratic(weight, bias) / 2
            parts[layer.weight] = parts.get(layer.weight, 0.0) + cost
        return parts

    def _pair_costs(
        self, family: Family, part: Any, owned: set[str], done: set[str]
    ) -> torch.Tensor | None:
        """Of a weight with factors, and of its bias where the family owns both."""
        total = None
        for layer in self.layers_of(part.name):
            bias = layer.bias if layer.bias in owned else None
            costs = pair_costs(
                layer,
                self._scoring.tensor(part.name),
                self._scoring.tensor(bias) if bias is not None else None,
                part,
                self._scoring.owner(family, part),
                family.extent,
            )
            if costs is None:
                return None
            done |= {part.name} | ({bias} if bias is not None else set())
            total = costs if total is None else total + costs
        return total

    def _block(self, family: Family | str) -> Block:
        family = self._family(family)
        chosen: Vector = {}
        for part in parts_of(family, self.objective.names, "all"):
            tensor = self._scoring.tensor(part.name)
            mine = sliced(tensor, part.axis, self._scoring.owner(family, part) >= 0)
            chosen[part.name] = chosen[part.name] | mine if part.name in chosen else mine
        if not chosen:
            raise OptionError(f"{family.name} owns no parameter whose curvature is known")
        return Block(self.objective.only(chosen), chosen)

    def _slopes(
        self, family: Family, parts: Sequence[ParameterSlice], vector: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The inner product of a vector with what each unit owns; (extent,) float64."""
        total = torch.zeros(family.extent, dtype=torch.float64)
        for part in parts:
            products = vector[part.name] * self._scoring.tensor(part.name)
            total += self._scoring.per_unit(family, part, self._along(products, part.axis))
        return total

    def _along(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        others = [d for d in range(values.dim()) if d != axis]
        return values.sum(others, dtype=torch.float64) if others else values.double()

    def _family(self, family: Family | str) -> Family:
        name = family if isinstance(family, str) else family.name
        try:
            return self.families.by_name(name)
        except KeyError:
            raise OptionError(f"{name} is not a family of the program that was analysed") from None

    def _name(self, name: str) -> str:
        found = self.objective.program.aliases.get(name, name)
        if found not in self.objective.names:
            raise OptionError(
                f"{name} is not a parameter whose curvature is known",
                hint="those of the program when it was analysed are",
            )
        return found

    def _checked(self, delta: Mapping[str, torch.Tensor]) -> Vector:
        found: Vector = {}
        for given, value in delta.items():
            name = self._name(given)
            shape = self.objective.program.entries[name].tensor.shape
            if value.shape != shape:
                raise OptionError(
                    f"the change of {given} has shape {tuple(value.shape)}, expected {tuple(shape)}"
                )
            found[name] = value.detach()
        return found


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.to(a.device).double()).sum())
