"""How much each group matters: a weighted sum of normalised criteria.

Source: HESSO, arXiv 2409.09085, and its code: criteria of group variables x and of the direction d
that the step moves them in, each divided by its norm over all groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch

from torchlathe.ir import OptionError
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.tune.optim.groups import Sums

__all__ = ["CRITERIA", "Saliency", "cosines", "saliency_of"]

CRITERIA = ("magnitude", "average", "cosine", "taylor1", "taylor2")


@dataclass(frozen=True)
class Saliency:
    """Weights of the criteria; the groups with the lowest sum become zero.

    Attributes:
        magnitude: Of ``||x||``.
        average: Of ``||x|| / size``.
        cosine: Of ``1 + sign * cos(x, d)``.
        taylor1: Of ``|x . d|``, the change of the loss to first order where d is the gradient.
        taylor2: Of ``(x . d)^2 / 2``, with the Hessian taken as ``d d'``.
        cosine_sign: 1 for HESSO's reading, that a group whose step makes it larger (a low cosine,
            since a step subtracts d) is redundant; -1 for DHSPG's, that one whose step makes it
            smaller is.
    """

    magnitude: float = 0.2
    average: float = 0.2
    cosine: float = 0.2
    taylor1: float = 0.2
    taylor2: float = 0.2
    cosine_sign: Literal[1, -1] = 1

    def __post_init__(self) -> None:
        """Refuse weights that rank nothing.

        Raises:
            OptionError: A negative weight, none above zero, or a sign that is no sign.
        """
        weights = [getattr(self, name) for name in CRITERIA]
        if not (all(w >= 0 for w in weights) and any(weights)):
            raise OptionError(
                f"the weights of the criteria are {weights}, but none may be negative and one must "
                "be above zero"
            )
        if self.cosine_sign not in (1, -1):
            raise OptionError(f"cosine_sign is {self.cosine_sign}, but must be 1 or -1")

    def scores(self, sums: Sums) -> torch.Tensor:
        """The weighted sum; shape (groups,) float64. Higher stays."""
        norms = sums.weights.sqrt()
        products = sums.products.abs()
        values = {
            "magnitude": norms,
            "average": norms / sums.sizes.clamp_min(1),
            "cosine": 1 + self.cosine_sign * cosines(sums),
            "taylor1": products,
            "taylor2": products.square() / 2,
        }
        total = torch.zeros_like(norms)
        for name, value in values.items():
            weight = getattr(self, name)
            if weight:
                total += weight * value / (value.norm() + 1e-8)
        return total


def cosines(sums: Sums) -> torch.Tensor:
    """``cos(x, d)`` of each group; 0 where one of them is zero."""
    scale = (sums.weights * sums.directions).sqrt()
    found = torch.where(scale > 0, sums.products / scale, torch.zeros_like(scale))
    return found.clamp(-1, 1)


def saliency_of(given: Saliency | Mapping[str, float] | str) -> Saliency:
    """A saliency from weights by name (those left out are 0), or from one criterion's name.

    Raises:
        OptionError: An unknown name, or impossible weights.
    """
    if isinstance(given, Saliency):
        return given
    weights = {given: 1.0} if isinstance(given, str) else dict(given)
    if weights == {"default": 1.0}:
        return Saliency()
    known = [f.name for f in fields(Saliency)]
    for name in weights:
        if name not in known:
            raise OptionError(
                f"there is no criterion {name}", where="saliency", hint=did_you_mean(name, known)
            )
    sign = weights.pop("cosine_sign", 1)
    if sign not in (1, -1):
        raise OptionError(f"cosine_sign is {sign}, but must be 1 or -1")
    return Saliency(
        **{**dict.fromkeys(CRITERIA, 0.0), **weights}, cosine_sign=1 if sign == 1 else -1
    )
