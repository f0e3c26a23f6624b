"""How long layers take in each scheme, by the table of measured ops.

A layer is written in a scheme, alone and with zeros for numbers, into a copy of the program,
`fuse-kernels` puts an op in place as it will later, and what the sum over all ops differs by is
what the scheme costs: the rounding of inputs, and neighbours that move into the op, included.
Layers of one shape with like neighbours are timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchlathe.ir import Program
from torchlathe.ir.cost.calls import value_of
from torchlathe.ir.extents import as_int, example_sizes
from torchlathe.passes.rewrite.factorising.sites import Site, find_sites
from torchlathe.passes.rewrite.factorising.timing import Timed
from torchlathe.passes.rewrite.quantising.grids import blank
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.writing import matrix_of, write

__all__ = ["SchemeTimes"]


@dataclass
class SchemeTimes:
    """Seconds of a program's layers, dense and by scheme, in the sum of ops.

    Attributes:
        program: Left as it is.
        timed: What it and its layers take as they are.
        report: Called with what is being done.
    """

    program: Program
    timed: Timed
    report: Callable[[str], None]
    _known: dict[tuple[Any, ...], float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, program: Program, sites: Sequence[Site], report: Callable[[str], None]
    ) -> SchemeTimes:
        """Measure a program and its layers as they are."""
        return cls(program, Timed.of(program, sites, report), report)

    @property
    def dense(self) -> Mapping[Site, float]:
        """Seconds of the calls of each layer as it is."""
        return self.timed.spent

    def allowed(self, asked: float | str, where: str) -> float:
        """What the layers may take, in seconds of the sum of ops.

        Raises:
            OptionError: The rest of the program takes more than the whole may.
        """
        return self.timed.budget(asked, where).amount

    def whole(self, layers: float) -> float:
        """Seconds of the whole program, if its layers take so many in the sum of ops."""
        return (self.timed.rest + layers) * self.timed.factor

    def seconds(self, site: Site, scheme: Scheme) -> float:
        """Seconds of a layer in a scheme."""
        key = (*self._key(site), scheme)
        if key not in self._known:
            self._known[key] = self._measured(site, scheme) - self.dense[site]
        return max(0.0, self.dense[site] + self._known[key])

    def _measured(self, site: Site, scheme: Scheme) -> float:
        from torchlathe.passes.manager import PassManager
        from torchlathe.passes.rewrite.lowering.fuse_kernels import FuseKernels

        self.report(f"latency: {site.weight} as {scheme.weights}")
        copy = self.program.copy()
        own = next(other for other in find_sites(copy)[0] if other.weight == site.weight)
        matrix = matrix_of(own, copy.tensor(site.weight).detach())
        stored = blank(matrix, scheme.weights, group=scheme.group, symmetric=scheme.symmetric)
        with copy.edit(by="latency") as edit:
            write(edit, own, stored, scheme.activations, {})
        fused = PassManager([FuseKernels()], verify=False).run(copy)
        whole = self.timed.rest + sum(self.dense.values())
        return self.dense[site] + self.timed.table.program(fused).seconds - whole

    def _key(self, site: Site) -> tuple[Any, ...]:
        """What the time of a scheme depends on: the layer, and the ops around it."""
        sizes = example_sizes(self.program)
        calls = []
        for call in site.calls:
            data = site.operand(call)
            shape: tuple[Any, ...] = value_of(data.meta["val"]).shape
            extents = tuple(as_int(e, sizes) if hasattr(e, "free_symbols") else e for e in shape)
            readers = tuple(sorted(str(user.target) for user in call.users))
            calls.append((str(call.target), extents, str(data.target), readers))
        kind = self.program.tensor(site.weight).dtype
        return (site.kind, site.shape, site.groups, kind, site.biased, *calls)
