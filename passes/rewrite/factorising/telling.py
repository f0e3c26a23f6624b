"""What a pass that splits layers tells: numbers, a line for each layer, and their profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torchlathe.passes.base import Diagnostic
from torchlathe.passes.rewrite.factorising.choosing import Option
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site

__all__ = ["left_alone", "listed", "profile", "statistics", "told"]

# Of each layer and method, so many points are kept for the report.
_POINTS = 12


def statistics(sites: Sequence[Site], plans: Sequence[Plan]) -> dict[str, int | float | str]:
    """Numbers of all layers together."""
    split = [site for plan in plans for site in plan.sites]
    before = sum(site.parameters for site in sites)
    after = before - sum(s.parameters for s in split) + sum(plan.parameters for plan in plans)
    errors = [plan.error for plan in plans]
    found: dict[str, int | float | str] = {
        "layers": len(sites),
        "split": len(split),
        "joint": sum(len(plan.sites) for plan in plans if len(plan.sites) > 1),
        "parameters_of_layers": before,
        "kept_of_layers": after,
    }
    if errors:
        found["mean_error"] = sum(errors) / len(errors)
        found["largest_error"] = max(errors)
    return found


def told(plans: Sequence[Plan]) -> Iterator[Diagnostic]:
    """A line for each split, in order of execution."""
    for plan in plans:
        whole = sum(site.parameters for site in plan.sites)
        others = f", with {listed([s.weight for s in plan.sites[1:]])}" if plan.sites[1:] else ""
        form = {"matrix": "", "network": f"{plan.label}, "}.get(plan.form, f"{plan.form}, ")
        size = "bond" if plan.network else "rank"
        rows = f" and {plan.kept} rows as they are" if plan.kept else ""
        yield Diagnostic(
            "note",
            f"{size} {' and '.join(map(str, plan.ranks))}{rows} by {form}{plan.method}{others}: "
            f"{plan.parameters / whole:.0%} of its parameters, relative squared error "
            f"{plan.error:.2g}",
            name=plan.sites[0].weight,
        )


def left_alone(
    left: Mapping[str, str], severity: Literal["note", "warning"] = "note"
) -> Iterator[Diagnostic]:
    """One line for each reason, with the layers."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield Diagnostic(severity, f"left alone, since {reason}: {listed(names)}", name=names[0])


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def profile(
    sites: Sequence[Site], options: Sequence[Option], plans: Sequence[Plan]
) -> list[dict[str, Any]]:
    """Error against size of each layer, by method, with what was chosen; of JSON types.

    Errors of what was chosen are measured. Those of the curves are too, but for the methods that
    are named under ``"estimated"``; what was expected of a choice among these stands beside it.

    Args:
        sites: The layers, in order of execution.
        options: What there was to choose from; empty where nothing was chosen.
        plans: What was chosen, with the errors that it has.
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
        plan = option.plan
        if plan is None:
            continue
        for site in option.sites:
            curve = found[site]["methods"].setdefault(plan.label, [])
            curve.append([_kept(plan), plan.error])
            if plan.estimated and plan.label not in found[site]["estimated"]:
                found[site]["estimated"].append(plan.label)
        if plan.estimated:
            expected[plan.sites, plan.label, plan.ranks] = plan.error
    for one in found.values():
        one["methods"] = {name: _thinned(curve) for name, curve in one["methods"].items()}
    for plan in plans:
        chosen = {"method": plan.label, "kept": _kept(plan), "error": plan.error}
        if (guess := expected.get((plan.sites, plan.label, plan.ranks))) is not None:
            chosen["expected"] = guess
        for site in plan.sites:
            found[site]["chosen"] = chosen
    return list(found.values())


def _kept(plan: Plan) -> float:
    return round(plan.parameters / sum(site.parameters for site in plan.sites), 6)


def _thinned(curve: list[list[float]]) -> list[list[float]]:
    """Points in order of size, few of many, the first and the last among them."""
    ordered = sorted(curve)
    if len(ordered) <= _POINTS:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
