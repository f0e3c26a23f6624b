"""What an analysis is, to the Program that caches its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["Analysis", "Result"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Analysis(ABC, Generic[Result]):
    """A pure function of a Program, whose options are the fields of a frozen dataclass.

    ``program.analysis(MyAnalysis)`` or ``program.analysis(MyAnalysis(option=1))`` computes the
    result once and keeps it until the program changes. The instance itself is the cache key, so
    two analyses with equal options share one result.
    """

    name: ClassVar[str]

    @property
    def kind(self) -> type[Analysis[Any]]:
        """The class by which passes say that they preserve its result."""
        return type(self)

    @abstractmethod
    def compute(self, program: Program) -> Result:
        """Compute the result without changing anything in ``program``."""

    def same(self, a: Any, b: Any) -> bool:
        """Whether two results are equal; the manager compares with it at level ``full``."""
        return bool(a == b)
