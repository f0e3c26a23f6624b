"""Statistics that a benchmark collects once, for many splits of copies of one program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from torchlathe.ir import Program
from torchlathe.ir.cost.latency import cache_directory
from torchlathe.ir.files import write_text
from torchlathe.passes import PassContext
from torchlathe.passes.rewrite.factorising.low_rank import Sources
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.networks import plans_of_networks
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sensitivity import output_weights
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkKind, NetworkPlan

__all__ = ["Remembered"]


class Remembered:
    """What each method collects, by the names of layers; for one choice of layers.

    Args:
        name: Of the model and its data. Effects and profiles of networks, which take long, are kept
            on disk under it, so that a benchmark that was ended goes on where it was.
    """

    def __init__(self, name: str | None = None) -> None:
        self._metrics: dict[str, Metrics] = {}
        self._effects: dict[str, dict[str, float]] = {}
        self._networks: dict[str, list[dict[str, Any]]] = {}
        self._file = None if name is None else cache_directory() / "benchmarks" / f"{name}.json"
        if self._file is not None and self._file.is_file():
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._effects, self._networks = kept["effects"], kept["networks"]

    def _keep(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            kept = {"effects": self._effects, "networks": self._networks}
            write_text(self._file, json.dumps(kept))

    @property
    def sources(self) -> Sources:
        """For `LowRankSplit.run_with`."""
        return Sources(self.metrics, self.effects, self.networks)

    def metrics(
        self, program: Program, ctx: PassContext, sites: Sequence[Site], method: str
    ) -> Metrics:
        """As `collect_metrics`."""
        key = "whitened-svd" if method == "mixed" else method
        if key not in self._metrics:
            self._metrics[key] = collect_metrics(program, ctx, sites, key)
        found = self._metrics[key]
        by_name = {site.weight: site for site in sites}

        def moved(values: Any) -> dict[Site, Any]:
            return {by_name[site.weight]: value for site, value in values.items()}

        return replace(
            found, inputs=moved(found.inputs), means=moved(found.means), rows=moved(found.rows)
        )

    def effects(
        self,
        program: Program,
        ctx: PassContext,
        sites: Sequence[Site],
        metrics: Metrics,
        method: str,
        damping: float,
    ) -> dict[Site, float]:
        """As `output_weights`."""
        if method not in self._effects:
            found = output_weights(program, ctx, sites, metrics, method, damping)
            self._effects[method] = {site.weight: value for site, value in found.items()}
            self._keep()
        return {site: self._effects[method][site.weight] for site in sites}

    def networks(
        self, site: Site, kind: NetworkKind, program: Program, metrics: Metrics, damping: float
    ) -> Iterator[Plan]:
        """As `plans_of_networks`."""
        key = f"{site.weight} {kind}"
        if key not in self._networks:
            found = plans_of_networks(site, kind, program, metrics, damping)
            self._networks[key] = [asdict(plan.network) for plan in found if plan.network]
            self._keep()
        for fields in self._networks[key]:
            values: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
            network = NetworkPlan(**values)
            method = "svd" if metrics.moment([site]) is None else "whitened-svd"
            numbers = network.bonds, network.parameters, network.error
            yield Plan((site,), method, "network", *numbers, network=network)
