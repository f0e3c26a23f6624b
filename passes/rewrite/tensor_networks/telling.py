"""What a pass that writes networks tells: numbers, a line for each layer, and their profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torchlathe.passes.base import Diagnostic
from torchlathe.passes.rewrite.factorising.choosing import Option
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkPlan
from torchlathe.passes.rewrite.tensor_networks.writing import Lowered

__all__ = ["profile", "statistics", "told"]


def statistics(
    sites: Sequence[Site],
    plans: Mapping[Site, NetworkPlan],
    lowered: Mapping[Site, Sequence[Lowered]],
) -> dict[str, int | float | str]:
    """Numbers of all layers together."""
    before = sum(site.parameters for site in sites)
    gone = sum(site.parameters - plan.parameters for site, plan in plans.items())
    found: dict[str, int | float | str] = {
        "layers": len(sites),
        "split": len(plans),
        "built_in_each_run": sum(any(call.builds for call in calls) for calls in lowered.values()),
        "parameters_of_layers": before,
        "kept_of_layers": before - gone,
    }
    errors = [plan.error for plan in plans.values()]
    if errors:
        found["mean_error"] = sum(errors) / len(errors)
        found["largest_error"] = max(errors)
    return found


def told(
    plans: Mapping[Site, NetworkPlan], lowered: Mapping[Site, Sequence[Lowered]]
) -> Iterator[Diagnostic]:
    """A line for each layer, and one more for each that is slower than it was."""
    for site, plan in plans.items():
        bonds = " and ".join(map(str, plan.bonds))
        calls = lowered[site]
        ways = {"builds its matrix" if call.builds else "is contracted" for call in calls}
        dense = sum(2 * call.rows * site.outs * site.ins for call in calls)
        flops = sum(call.flops for call in calls) / max(dense, 1)
        rows = " and ".join(f"{rows:,}" for rows in sorted({call.rows for call in calls}))
        yield Diagnostic(
            "note",
            f"bond {bonds} between {plan.legs}: {plan.parameters / site.parameters:.0%} of its "
            f"parameters, relative squared error {plan.error:.2g}; {' or '.join(sorted(ways))} for "
            f"{rows} rows of input, {flops:.2g} times the FLOPs",
            name=site.weight,
        )
        yield from _slower(site, calls)


def _slower(site: Site, calls: Sequence[Lowered]) -> Iterator[Diagnostic]:
    for call in calls:
        if call.measured is None:
            continue
        own, dense = call.measured[call.builds], call.measured[2]
        if own > dense:
            yield Diagnostic(
                "warning",
                f"does not pay in time: {own * 1e3:.3g} ms instead of {dense * 1e3:.3g} ms for "
                f"{call.rows:,} rows of input",
                name=site.weight,
            )


def profile(
    sites: Sequence[Site],
    options: Sequence[Option],
    plans: Mapping[Site, NetworkPlan],
    *,
    estimated: bool,
) -> list[dict[str, Any]]:
    """Error against size of each layer, with what was chosen; of JSON types, as that of products.

    Args:
        sites: The layers, in order of execution.
        options: What there was to choose from; empty where nothing was chosen.
        plans: What was chosen, with the errors that it has.
        estimated: Whether the errors of the options are estimates.
    """
    found: dict[Site, dict[str, Any]] = {
        site: {
            "weight": site.weight,
            "parameters": site.parameters,
            "methods": {},
            "estimated": [],
            "chosen": {"method": "dense", "kept": 1.0, "error": 0.0},
        }
        for site in sites
    }
    expected: dict[object, float] = {}
    for option in options:
        plan: Any = option.plan
        if plan is not None:
            (site,) = option.sites
            point = [round(plan.parameters / site.parameters, 6), plan.error]
            found[site]["methods"].setdefault(plan.kind, []).append(point)
            if estimated:
                found[site]["estimated"] = [plan.kind]
                expected[site, plan.bonds] = plan.error
    for site, chosen in plans.items():
        found[site]["chosen"] = {
            "method": chosen.kind,
            "kept": round(chosen.parameters / site.parameters, 6),
            "error": chosen.error,
        }
        if (site, chosen.bonds) in expected:
            found[site]["chosen"]["expected"] = expected[site, chosen.bonds]
    return list(found.values())
