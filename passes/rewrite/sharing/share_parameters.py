"""Store parameters once for several layers: tied weights, shared bases, a base with corrections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torchlathe.ir import OptionError, Program
from torchlathe.passes.analysis.sharing.coloring import SharedClass, SharingColoring
from torchlathe.passes.analysis.sharing.options import SharingOptions
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.sharing.applying import apply_coloring

__all__ = ["ShareParameters"]


@dataclass(frozen=True)
class ShareParameters(SharingOptions, RewritePass):
    """Lets layers share weights, or the bases of their weights, where that costs least.

    Keeps: names of the weights that are tied; the outputs approximately. Changes: a class of tied
    layers reads one weight (and one bias), stored and trained once; with a basis each layer becomes
    ``linear(linear(x, B), M)``, with B stored once for its class; with a base,
    ``linear(x, W) + linear(linear(x, V), U)``.

    Source: own reconstruction of Geo-Sharing (arXiv 2511.06786); see `SharingColoring`.
    """

    name: ClassVar[str] = "share-parameters"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    rounds: int = field(
        default=3, metadata={"help": "how often a shared basis and its coefficients are refitted"}
    )

    biases: bool = field(
        default=False, metadata={"help": "with mode=tied, layers with one weight get one bias too"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of its range, or two exclude each other.
        """
        super().__post_init__()
        if self.rounds < 0:
            raise OptionError(f"rounds is {self.rounds}, but must be at least 0", where=self.name)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse a curvature of a loss where there is none.

        Raises:
            PreconditionError: No loss was given, and the model has none of its own.
        """
        SharingColoring.of(self).check(program, ctx)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Find the classes, and let each of them share."""
        analysis = SharingColoring.of(self)
        coloring = ctx.analysis(analysis)
        before = sum(tensor.numel() for tensor in program.parameters.values())
        statistics: dict[str, int | float | str] = {**analysis.statistics(coloring)}
        sharing = [one for one in coloring if len(one.layers) > 1 or one.rank]
        if not sharing:
            told = Diagnostic("warning", "no two layers share anything, so nothing was changed")
            return PassResult(False, statistics, [told])
        apply_coloring(
            program,
            coloring,
            by=ctx.spec,
            rounds=self.rounds,
            biases=self.biases,
            report=ctx.report,
        )
        after = sum(tensor.numel() for tensor in program.parameters.values())
        statistics["saved"] = before - after
        diagnostics = [_told(coloring.mode, one) for one in sharing]
        if after > before:
            text = f"what layers keep for themselves takes {after - before} parameters more than "
            text += "sharing saves: a smaller rank would help"
            diagnostics.append(Diagnostic("warning", text))
        return PassResult(True, statistics, diagnostics, details={"sharing": coloring.to_dict()})


def _told(mode: str, one: SharedClass) -> Diagnostic:
    what = {
        "tied": "one weight",
        "basis": f"one basis of rank {one.rank}",
        "base": f"one weight, with corrections of rank {one.rank}",
    }[mode]
    who = f"{len(one.layers)} layers share {what}" if len(one.layers) > 1 else f"{what} of its own"
    names = ", ".join(one.layers[1:])
    return Diagnostic(
        "note",
        f"{who}, at a cost of {one.cost:.3g}" + (f": also {names}" if names else ""),
        name=one.layers[0],
    )
