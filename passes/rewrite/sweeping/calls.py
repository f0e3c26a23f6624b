"""How the calls of the parameters that are swept read their data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from torchlathe.ir import Program
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.statistics import Reader, readers_of
from torchlathe.passes.statistics.readers import unfolds
from torchlathe.passes.statistics.routed import Routed, routed_reader

__all__ = ["readers_of_sites"]


def readers_of_sites(program: Program, sites: Iterable[Site]) -> dict[Site, list[Reader | Routed]]:
    """The readers of each site's calls, in order of execution.

    Left out are sites whose first call reads columns that cannot be told apart, and later calls
    that do.
    """
    chosen = list(sites)
    if not chosen:
        return {}
    readers = readers_of(program)
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    found: dict[Site, list[Reader | Routed]] = {}
    for site in chosen:
        calls = sorted(site.calls, key=place.__getitem__)
        own = [_reader(site, call, readers) for call in calls]
        if own and own[0] is not None:
            found[site] = [reader for reader in own if reader is not None]
    return found


def _reader(site: Site, call: fx.Node, readers: Mapping[fx.Node, Reader]) -> Reader | Routed | None:
    if site.kind == "experts":
        return routed_reader(call)
    reader = readers.get(call)
    # Rows of a tied embedding are looked up long before its product is swept.
    if reader is None or site.kind == "embedding":
        return None
    return reader if site.kind == "linear" or unfolds(reader) else None
