"""What passes on experts check and report alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.analysis.routing import RoutingStatistics

__all__ = ["EXPERTS_HELP", "check_count", "class_text", "routing_numbers"]


# What both passes say of their option ``experts``, which `check_count` checks.
EXPERTS_HELP = "experts to keep: a share of all if below 1, else the number per layer on average"


def check_count(experts: float, who: str) -> None:
    """Refuse a number of experts that cannot be.

    Raises:
        OptionError: It is not positive.
    """
    if not 0 < experts < float("inf"):
        raise OptionError(
            f"experts is {experts:g}, but at least one expert has to stay",
            where=who,
            hint="give a share below 1, as 0.5, or how many to keep per layer, as 4",
        )


def class_text(classes: torch.Tensor) -> str:
    """Members of each class: ``{0, 3} {1} {2}``."""
    members = [(classes == c).nonzero().flatten().tolist() for c in range(int(classes.max()) + 1)]
    return " ".join("{" + ", ".join(map(str, each)) + "}" for each in members)


def routing_numbers(
    layers: Sequence[ExpertLayer],
    counts: Sequence[int],
    routing: Mapping[ExpertLayer, RoutingStatistics],
) -> dict[str, int | float | str]:
    """The statistics of a pass that leaves so many experts in each layer."""
    return {
        "layers": len(layers),
        "experts_before": sum(layer.experts for layer in layers),
        "experts_after": sum(counts),
        "experts_per_layer": ", ".join(map(str, counts)),
        "never_used": sum(int((routing[layer].counts == 0).sum()) for layer in layers),
        "rows": sum(routing[layer].rows for layer in layers),
    }
