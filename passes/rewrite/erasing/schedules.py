"""Erasing in several steps: what they add up to, and training between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from torchlathe.ir import Program
from torchlathe.ir.trainable import TrainableProgram
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.rewrite.erasing.shrink import ZeroedSlices, erase_units

__all__ = ["Composition", "train_between"]

Between = Callable[[torch.nn.Module, int], object]


@dataclass
class Composition:
    """Several erases of one program, as the one erase that they amount to.

    Attributes:
        kept: What was on record as kept before the first of them, for every tensor that there was.
        slices: Per tensor of it and axis, the indices that the erased units write.
        units: How many units went, by the name of their family.
    """

    kept: Mapping[str, Mapping[int, torch.Tensor]]
    slices: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Composition:
        """Of no erase yet."""
        return cls({name: dict(program.kept.get(name, {})) for name in program.entries})

    def erase(self, program: Program, units: Mapping[Family, torch.Tensor], by: str) -> None:
        """Erase from what is left of the program, and note what that is in the one before."""
        now = {name: dict(axes) for name, axes in program.kept.items()}
        done = erase_units(program, units, by=by)
        for family, indices in units.items():
            self.units[family.name] = self.units.get(family.name, 0) + len(indices)
        for name, axes in done.slices.items():
            if name not in self.kept:
                continue  # a bias that an earlier step added
            for axis, indices in axes.items():
                there = self._place(name, axis, indices, now)
                known = self.slices.setdefault(name, {}).get(axis)
                self.slices[name][axis] = (
                    there if known is None else torch.cat([known, there]).unique()
                )

    def _place(
        self,
        name: str,
        axis: int,
        indices: torch.Tensor,
        now: Mapping[str, Mapping[int, torch.Tensor]],
    ) -> torch.Tensor:
        """Where indices of an axis were before the first erase."""
        kept = now.get(name, {}).get(axis)
        original = indices if kept is None else kept[indices]
        first = self.kept[name].get(axis)
        return original if first is None else torch.searchsorted(first, original)

    @property
    def reference(self) -> ZeroedSlices:
        """What makes the program before equal to the one after."""
        return ZeroedSlices(self.slices)


def train_between(program: Program, between: Between, step: int, by: str) -> int:
    """Let the user train what is left, and take over what they changed.

    Args:
        program: Changed in place, through one edit, if training changed anything.
        between: Called with a module that has the program's tensors under their names, and the
            number of the step, from 1.
        step: The number of the step.
        by: Text form of the pass, for provenance.

    Returns:
        How many tensors changed.

    Raises:
        InputError: The callback gave a tensor another shape.
    """
    module = TrainableProgram(program)
    with torch.enable_grad():
        between(module, step)
    changed = module.changed()
    if changed:
        with program.edit(by) as edit:
            for name, tensor in changed.items():
                edit.set_tensor(name, tensor)
    return len(changed)
