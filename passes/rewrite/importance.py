"""How much each unit of a family matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from torchlathe.ir import InputError, OptionError, Program
from torchlathe.passes.analysis.families import Families, Family
from torchlathe.passes.rewrite.units import unit_indices

__all__ = ["CRITERIA", "Importance", "scores"]

# A criterion's name; a function of (family, program); or the scores themselves, by family name.
Importance: TypeAlias = (
    str | Callable[[Family, Program], torch.Tensor] | torch.Tensor | Mapping[str, torch.Tensor]
)

CRITERIA = ("l2", "l1", "random")


def scores(
    program: Program,
    families: Families,
    chosen: tuple[Family, ...],
    importance: Importance,
    seed: int = 0,
) -> dict[Family, torch.Tensor]:
    """Scores of all units; the lowest are erased first.

    Args:
        program: Where the tensors are.
        families: The analysis that ``chosen`` comes from.
        chosen: The families to score.
        importance: "l2" and "l1": root mean square, or mean absolute value, of the parameters
            that a unit owns; "random"; a function; or given scores.
        seed: For "random".

    Returns:
        Per family, float64 of shape (extent,).

    Raises:
        OptionError: An unknown criterion, or scores of the wrong shape.
        InputError: NaN among the scores, for instance because a weight holds NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = _Norms(program, families)
    found: dict[Family, torch.Tensor] = {}
    for family in chosen:
        if isinstance(importance, str):
            if importance == "random":
                score = torch.rand(family.extent, generator=generator, dtype=torch.float64)
            elif importance in CRITERIA:
                score = norms.of(family, 2 if importance == "l2" else 1)
            else:
                raise OptionError(
                    f"importance={importance!r} is not known",
                    hint=f"one of {', '.join(CRITERIA)}, a callable (family, program), or scores",
                )
        else:
            score = _tensor(_given(importance, family, program, len(chosen)), family)
        score = score.detach().to("cpu", torch.float64)
        if score.shape != (family.extent,):
            raise OptionError(
                f"scores of {family.name} have shape {tuple(score.shape)}, "
                f"expected ({family.extent},)"
            )
        if bool(score.isnan().any()):
            raise InputError(
                f"the importance of {family.name} is NaN",
                where=", ".join(_with_nan(family, program)),
                hint="look for what made it diverge",
            )
        found[family] = score
    return found


def _tensor(score: object, family: Family) -> torch.Tensor:
    try:
        return torch.as_tensor(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"scores of {family.name} are not numbers but {type(score).__name__}",
            hint=f"give {family.extent} numbers, the higher the more important",
        ) from error


def _with_nan(family: Family, program: Program) -> list[str]:
    """The tensors of a family that hold NaN."""
    names = dict.fromkeys(s.name for s in family.slices)
    return [n for n in names if bool(program.entries[n].tensor.detach().isnan().any())]


def _given(
    importance: Callable[[Family, Program], torch.Tensor]
    | torch.Tensor
    | Mapping[str, torch.Tensor],
    family: Family,
    program: Program,
    count: int,
) -> torch.Tensor:
    if isinstance(importance, torch.Tensor):
        if count != 1:
            raise OptionError(
                f"one tensor of scores was given for {count} families",
                hint="give a dict from family name to scores, or select one family by include",
            )
        return importance
    if isinstance(importance, Mapping):
        if family.name not in importance:
            raise OptionError(
                f"no scores were given for {family.name}",
                hint="give scores for each family that may be erased, or exclude it",
            )
        return importance[family.name]
    return importance(family, program)


class _Norms:
    """Norms of slices; each (tensor, axis, order) is reduced once for all families on it."""

    def __init__(self, program: Program, families: Families) -> None:
        self.program = program
        self.axis_map = families.axis_map
        self.nodes = program.tensor_nodes
        self._cache: dict[tuple[str, int, int], torch.Tensor] = {}
        self._matrices: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, family: Family, order: int) -> torch.Tensor:
        """Mean absolute value, or root mean square, of what each unit owns."""
        total = torch.zeros(family.extent, dtype=torch.float64)
        count = torch.zeros(family.extent, dtype=torch.float64)
        for part in family.slices:
            tensor = self.program.entries[part.name].tensor
            if not tensor.is_floating_point() or part.kind.value != "parameter":
                continue
            term = self.axis_map.terms(self.nodes[part.name])[part.axis]
            owner = unit_indices(term, family.atom.number)
            mine = owner >= 0
            sums = self._sums(part.name, part.axis, order)
            total.index_add_(0, owner[mine], sums[mine])
            each = tensor.numel() / tensor.shape[part.axis]
            count.index_add_(0, owner[mine], torch.full((int(mine.sum()),), each).double())
        mean = total / count.clamp_min(1)
        return mean.sqrt() if order == 2 else mean

    def _sums(self, name: str, axis: int, order: int) -> torch.Tensor:
        """Per index of an axis, the sum of squares (or absolute values); shape (extent,)."""
        key = (name, axis, order)
        if key not in self._cache:
            tensor = self._tensor(name, order, kernels=axis > 1)
            others = [d for d in range(tensor.dim()) if d != axis]
            norm = torch.linalg.vector_norm(tensor, order, dim=others) if others else tensor.abs()
            norm = norm.to("cpu", torch.float64)
            self._cache[key] = norm.square() if order == 2 else norm
        return self._cache[key]

    def _tensor(self, name: str, order: int, *, kernels: bool) -> torch.Tensor:
        """A tensor, or a matrix with the norms of its kernels.

        Both channel axes of a convolution are reduced from the matrix, so that the tensor, which
        is many times larger, is read once. A vector norm needs no temporary of its size.
        """
        tensor = self.program.entries[name].tensor.detach()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if kernels or tensor.dim() < 3:
            return tensor
        key = (name, order)
        if key not in self._matrices:
            dims = list(range(2, tensor.dim()))
            self._matrices[key] = torch.linalg.vector_norm(tensor, order, dim=dims)
        return self._matrices[key]
