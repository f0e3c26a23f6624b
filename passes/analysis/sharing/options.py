"""The options that finding classes and applying them have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.sharing.budgets import Solver
from torchlathe.passes.analysis.sharing.candidates import Across
from torchlathe.passes.analysis.sharing.costs import Limits
from torchlathe.passes.analysis.sharing.weighing import CurvatureName
from torchlathe.passes.base import Pass
from torchlathe.passes.quantities import COUNT, Quantity, quantity

__all__ = ["Mode", "SharingOptions"]

Mode = Literal["tied", "basis", "base"]


@dataclass(frozen=True)
class SharingOptions(Pass):
    """What is shared, among which layers, and how much."""

    mode: Mode = field(
        default="tied",
        metadata={
            "help": "tied: one weight per class; basis: one input basis, with coefficients per "
            "layer; base: one weight, with a correction of low rank per layer"
        },
    )
    classes: int | None = field(
        default=None,
        metadata={"help": "classes of each type of layer; 2 unless something else says how much"},
    )
    params: float | str | None = field(
        default=None,
        metadata={
            "help": "parameters of the whole model to keep: a share up to 1, or a count such as 20M"
        },
    )
    theta: float | None = field(
        default=None,
        metadata={"help": "the most that one weight for any two layers of a class may cost"},
    )
    curvature: CurvatureName = field(
        default="inputs",
        metadata={
            "help": "what a change of a weight costs: the error of the layer's result (inputs), "
            "of the model's outputs (outputs) or of the loss by K-FAC (kfac), the diagonal of the "
            "Gauss-Newton matrix (diagonal) or of the Fisher matrix (fisher), or plain distance "
            "(none)"
        },
    )
    across: Across = field(
        default="role",
        metadata={
            "help": "layers share with those of equal shape and name but for numbers (role), of "
            "equal shape, or with equally many inputs (basis only)"
        },
    )
    solver: Solver = field(
        default="auto",
        metadata={
            "help": "exact looks at every partition; ward merges and refines; dsatur colours the "
            "graph of conflicts; auto is exact for up to 10 layers of a type, else ward"
        },
    )
    rank: int = field(default=8, metadata={"help": "rank of the private corrections of mode=base"})
    leakage: float | None = field(
        default=None,
        metadata={"help": "the most of a change that may lie in sharp directions, 0 to 1"},
    )
    trust: float | None = field(
        default=None,
        metadata={"help": "the most that a change may cost, relative to leaving the layer out"},
    )
    align: bool = field(
        default=True,
        metadata={"help": "first bring hidden units and heads of the layers into one order"},
    )
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "only these: patterns of weights, or of names with stars"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of weights"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of its range, or two exclude each other.
        """
        super().__post_init__()
        given = [name for name in ("classes", "params", "theta") if self._given(name)]
        if len(given) > 1 and not (self.mode == "basis" and set(given) == {"classes", "params"}):
            raise OptionError(
                f"{' and '.join(given)} all say how much to share",
                where=self.name,
                hint="give one of them; mode=basis takes classes beside params",
            )
        self._check_ranges()
        self._check_basis()
        if self.params is not None:
            quantity(self.params, COUNT, name="params", where=self.name)

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check_ranges(self) -> None:
        for name, low, high in (("leakage", 0, 1), ("trust", 0, None), ("theta", 0, None)):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                text = f"between {low} and {high}" if high is not None else f"at least {low}"
                raise OptionError(f"{name} is {value}, but must be {text}", where=self.name)
        for name in ("classes", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}, but must be at least 1", where=self.name)

    def _check_basis(self) -> None:
        if self.mode != "basis":
            if self.across == "inputs":
                raise OptionError(
                    "across=inputs needs mode=basis: one weight is for layers of one shape",
                    where=self.name,
                    hint="across=shape is for all layers of one shape",
                )
            if self.solver == "dsatur" and self.mode == "base" and self.params is not None:
                raise OptionError("dsatur does not allocate params to mode=base", where=self.name)
            return
        for name, unfit in (
            ("theta", self.theta is not None),
            ("leakage", self.leakage is not None),
            ("trust", self.trust is not None),
            ("solver=dsatur", self.solver == "dsatur"),
            (f"curvature={self.curvature}", self.curvature in ("diagonal", "fisher")),
            ("classes without params", self.classes is not None and self.params is None),
        ):
            if unfit:
                raise OptionError(
                    f"{name} does not go with mode=basis",
                    where=self.name,
                    hint="give params: the ranks of all bases follow from it",
                )

    @property
    def budget(self) -> Quantity | None:
        """The budget of parameters; None if classes or theta say how much."""
        if self.params is not None:
            return quantity(self.params, COUNT, name="params", where=self.name)
        return quantity(0.8, COUNT, name="params") if self.mode == "basis" else None

    @property
    def limits(self) -> Limits:
        """What each layer's change must hold to."""
        return Limits(self.leakage, self.trust)
