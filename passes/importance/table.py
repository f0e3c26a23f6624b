"""Which criteria have a name: a literal table; each is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from torchlathe.ir import OptionError
from torchlathe.passes.importance.criterion import Criterion
from torchlathe.passes.options import did_you_mean

__all__ = ["TABLE", "criterion_names", "get_criterion"]

TABLE = {
    "bn-scale": "torchlathe.passes.importance.weights:BnScale",
    "fisher": "torchlathe.passes.importance.gradients:Fisher",
    "flap": "torchlathe.passes.importance.activations:Flap",
    "geometric-median": "torchlathe.passes.importance.distances:GeometricMedian",
    "l1": "torchlathe.passes.importance.weights:L1",
    "l2": "torchlathe.passes.importance.weights:L2",
    "lamp": "torchlathe.passes.importance.weights:Lamp",
    "random": "torchlathe.passes.importance.weights:Random",
    "sensitivity": "torchlathe.passes.importance.curvature:SensitivityCost",
    "taylor": "torchlathe.passes.importance.gradients:Taylor",
    "wanda": "torchlathe.passes.importance.activations:Wanda",
}


def criterion_names() -> tuple[str, ...]:
    """Names of all criteria, without importing any of them."""
    return tuple(TABLE)


def get_criterion(name: str) -> type[Criterion]:
    """The class of the criterion of this name; dashes and underscores mean the same.

    Raises:
        OptionError: There is none; the nearest names are given.
    """
    target = TABLE.get(name.replace("_", "-"))
    if target is None:
        raise OptionError(
            f"importance={name!r} is not known",
            hint=f"{did_you_mean(name, TABLE)} From Python also a criterion, a callable "
            "(family, program), or scores",
        )
    module, _, attribute = target.partition(":")
    found: type[Criterion] = getattr(import_module(module), attribute)
    return found
