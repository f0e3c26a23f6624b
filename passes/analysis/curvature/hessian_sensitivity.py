"""The analysis ``hessian-sensitivity``: what a change of the parameters costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.analysis.curvature.factors import LayerCurvature
from torchlathe.passes.analysis.curvature.objective import Objective
from torchlathe.passes.analysis.curvature.products import Products
from torchlathe.passes.analysis.curvature.sensitivity import Method, Sensitivity
from torchlathe.passes.analysis.curvature.spectrum import eigenvalues
from torchlathe.passes.analysis.curvature.sweep import Findings, Plan, Sweep
from torchlathe.passes.analysis.curvature.traces import TraceEstimate
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import DataAnalysis, PassContext
from torchlathe.passes.importance.criterion import Scoring
from torchlathe.passes.statistics import Calibration
from torchlathe.passes.statistics.losses import check_loss

__all__ = ["HessianSensitivity"]


@dataclass(frozen=True)
class HessianSensitivity(DataAnalysis[Sensitivity]):
    """The gradient and curvature of the loss over the calibration batches, in one sweep.

    Each batch counts the same, and its loss is what ``loss`` gives. See `Sensitivity` for what can
    be asked.

    Attributes:
        method: What predictions use. Kronecker factors or the diagonal cost nothing; exact products
            with the Hessian or the Gauss-Newton matrix run over the data for each prediction, and
            vectors drawn from the latter once for the costs of all units. "auto" takes the exact
            Gauss-Newton matrix for single changes and drawn vectors for units.
        samples: Hutchinson's probes of the Hessian in all, for the traces, spread evenly over the
            batches: fewer than batches leave some out, and are the cheaper for it. 0 for none:
            traces are of the Gauss-Newton matrix then.
        draws: Vectors drawn from the Gauss-Newton matrix per batch, for the factors; 0 takes every
            output of a sample in turn, which is exact per layer and as much dearer.
        factors: Whether to gather factors at all; without them predictions by "kfac" use the
            diagonal.
        rescale: Give each layer's factors the trace that the draws show, which the factors alone
            miss where positions that share a weight are correlated. Source: own.
        diagonal: Of the Gauss-Newton matrix (from the draws), the empirical Fisher of batches or
            of samples, or the Hessian (from the probes, with its negative values).
        eigenvalues: Whether to find top and bottom of the Hessian's block of each parameter, some
            30 sweeps each.
        mode: Products with the Hessian by double backward ("reverse") or forward over reverse.
        batches: Take so many batches at most; 0 for all.
        rows: At most so many rows (tokens, positions) of a batch enter a layer's factors; 0 for
            all.
        limit_bytes: Memory for all that is kept (factors, gradient, diagonal) and for vectors of
            parameters, besides the model and the values of one batch; what is kept beyond it is in
            memory-mapped files. By default what the calibration says, or 2 GiB.
    """

    name: ClassVar[str] = "hessian-sensitivity"

    method: Method = field(default="auto", metadata={"help": "what predictions use"})
    samples: int = field(default=8, metadata={"help": "probes of the Hessian's trace, in all"})
    draws: int = field(default=1, metadata={"help": "draws per batch for the factors; 0: all"})
    factors: bool = field(default=True, metadata={"help": "whether to gather Kronecker factors"})
    rescale: bool = field(default=True, metadata={"help": "factors with the trace of the draws"})
    diagonal: Literal["ggn", "fisher", "fisher-per-sample", "hessian"] = field(
        default="ggn", metadata={"help": "which diagonal is kept"}
    )
    eigenvalues: bool = field(default=False, metadata={"help": "ends of each block's spectrum"})
    mode: Literal["reverse", "forward"] = field(
        default="reverse", metadata={"help": "double backward, or forward over reverse"}
    )
    batches: int = field(default=0, metadata={"help": "batches to take; 0: all"})
    rows: int = field(default=4096, metadata={"help": "rows of a batch in the factors; 0: all"})
    limit_bytes: int | None = field(
        default=None, metadata={"help": "memory for what is kept; the rest is in files"}
    )

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: A negative number, or a diagonal without what it is made of.
        """
        super().__post_init__()
        for option in ("samples", "draws", "batches", "rows", "limit_bytes"):
            if (getattr(self, option) or 0) < 0:
                raise OptionError(f"{option} of {self.name} must not be negative")
        if self.diagonal == "hessian" and not self.samples:
            raise OptionError(
                f"diagonal=hessian of {self.name} comes from its probes, and samples=0",
                hint="set samples, or take another diagonal",
            )

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse to begin without values, a loss and batches.

        Raises:
            PreconditionError: One of them is missing.
        """
        check_loss(program, ctx)
        if reason := cannot_run(program):
            raise PreconditionError(
                f"{self.name} runs the program: {reason}",
                hint="capture the model with its weights",
            )

    def compute_with(self, program: Program, ctx: PassContext) -> Sensitivity:
        """Sweep over the data once, and once more for what the options ask besides."""
        self.check(program, ctx)
        families = ctx.analysis(ZeroInvariantGroups)
        objective = Objective(program, ctx, batches=self.batches or None)
        scoring = Scoring(program, families, (), ctx)
        assert scoring.nodes  # kept: the axis terms know the nodes of this program
        scoring.program = objective.program  # whose tensors stay what they are now
        found = Sweep(objective, self._plan()).run()
        return Sensitivity(
            objective=objective,
            method=self.method,
            mode=self.mode,
            loss=sum(found.losses) / len(found.losses),
            layers=self._layers(found),
            extremes=self._extremes(objective) if self.eigenvalues else {},
            families=families,
            _found=found,
            _scoring=scoring,
        )

    def same(self, a: Sensitivity, b: Sensitivity) -> bool:
        """Whether both have the same gradient and diagonal, bit by bit."""
        vectors = ((a._found.gradient, b._found.gradient), (a._found.diagonal, b._found.diagonal))
        return all(
            x.keys() == y.keys() and all(bool((x[n] == y[n]).all()) for n in x) for x, y in vectors
        )

    def statistics(self, result: Sensitivity) -> dict[str, int | float]:
        """The loss, the trace with its error, and how many layers have factors."""
        numbers: dict[str, int | float] = {
            "loss": result.loss,
            "layers": len(result.layers),
            "parameters": len(result.objective.names),
        }
        if result.has_trace:
            trace = result.trace()
            numbers |= {"trace": trace.value, "trace_error": trace.standard_error}
        if result.extremes:
            numbers["top"] = max(top for top, _ in result.extremes.values())
            numbers["bottom"] = min(bottom for _, bottom in result.extremes.values())
        return numbers

    def _layers(self, found: Findings) -> dict[str, LayerCurvature]:
        layers = {node.name: LayerCurvature.of(m) for node, m in found.layers.items()}
        if not self.rescale:
            return layers
        traces: dict[str, float] = {}
        for layer in layers.values():
            traces[layer.weight] = traces.get(layer.weight, 0.0) + layer.trace
        scales = {
            weight: TraceEstimate.of(found.ggn_samples[weight]).value / trace if trace else 1.0
            for weight, trace in traces.items()
        }
        return {n: replace(layer, scale=scales[layer.weight]) for n, layer in layers.items()}

    def _plan(self) -> Plan:
        return Plan(
            factors=self.factors,
            diagonal=self.diagonal,
            draws=self.draws if self.factors or self.diagonal == "ggn" else None,
            probes=self.samples,
            mode=self.mode,
            rows=self.rows,
            limit_bytes=self.limit_bytes,
        )

    def _extremes(self, objective: Objective) -> dict[str, tuple[float, float]]:
        found = {}
        limit = Calibration.of(objective.ctx.calibration, limit_bytes=self.limit_bytes).limit_bytes
        for name in objective.names:
            objective.ctx.report(f"curvature: spectrum of {name}")
            one = objective.only([name])
            products = Products(one, "hessian", self.mode)
            values = eigenvalues(
                products,
                one.parameters(),
                count=2,
                end="both",
                seed=objective.ctx.seed,
                room=limit,
            )
            found[name] = (values[0], values[-1])
        return found
