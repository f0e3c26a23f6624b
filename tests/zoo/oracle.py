"""The oracle: an erased model against the full-size model with zeros in its place.

A model whose slices that write some units are zero, and the model without these units, must be
one function where the erase was declared exact. In float64 nothing but a right grouping passes:
a unit too many, one too few or one from the neighbour shows at the first digits.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.zoo_model import Inputs, ZooModel
from torchlathe.ir import Program, capture
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.shrink import erase_units

__all__ = [
    "EXACT",
    "F32_LIMIT",
    "F64_LIMIT",
    "Captured",
    "captured",
    "check_erased",
    "check_family",
    "check_structure",
    "erased",
    "erased_elements",
    "flat",
    "in_float64",
    "outputs",
    "parameter_count",
    "relative_error",
    "same_tensors",
    "zeroed_twin",
]

F64_LIMIT = 1e-9
F32_LIMIT = 1e-4
EXACT = frozenset({"exact", "exact-after-fold", "exact-after-correction"})

Indices = Mapping[str, Mapping[int, Tensor]]


# -- comparing -------------------------------------------------------------------------------


def flat(result: Any) -> list[Tensor]:
    """The tensors of an output, as float64."""
    return [x.detach().double() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def outputs(module: Any, inputs: Inputs) -> list[Tensor]:
    """The tensors that a module returns for ``(args, kwargs)``."""
    args, kwargs = inputs
    with torch.no_grad():
        return flat(module(*args, **kwargs))


def in_float64(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A program's ``run`` with casts to float32 inside the graph turned into float64 too."""
    return functools.partial(run, dtype=torch.float64, **options)


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest absolute difference over the largest magnitude, the worst of all outputs.

    An output of other shape, or one that is not finite, is an infinite error.
    """
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape or not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
            return float("inf")
        if b.numel():
            scale = max(float(b.abs().max()), 1e-30)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def same_tensors(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether parameters and buffers are bit for bit what they were."""
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return after.keys() == before.keys() and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def zeroed_twin(model: nn.Module, zeroed: Indices) -> nn.Module:
    """A copy of the module with zeros at these indices of these tensors' axes.

    Made from the names alone, with none of the machinery that it checks.
    """
    twin = copy.deepcopy(model)
    tensors: dict[str, Tensor] = dict(twin.named_parameters(remove_duplicate=False))
    tensors.update(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in zeroed.items():
            for axis, indices in axes.items():
                if not len(indices):
                    continue  # of a bias that a fold added: nothing of it is in the original
                tensors[name].index_fill_(axis, indices, 0)
    return twin


# -- one model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """A model of the zoo, its program and its tensors as they were built."""

    zoo: ZooModel
    model: nn.Module
    program: Program
    dtype: torch.dtype
    before: dict[str, Tensor]

    def inputs(self, which: int) -> Inputs:
        return self.zoo.example(which, self.dtype)

    @property
    def limit(self) -> float:
        """Largest difference between the module and its graph in float64."""
        return 1e-5 if self.zoo.casts else F64_LIMIT

    @property
    def shapes(self) -> range:
        return range(len(self.zoo.sizes))

    def unchanged(self) -> bool:
        return same_tensors(self.model, self.before)


@functools.lru_cache(maxsize=2)
def captured(zoo: ZooModel, dtype: torch.dtype = torch.float64) -> Captured:
    """Build a model and capture it with its dynamic shapes."""
    model = zoo.build(dtype)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in before.items()}
    args, kwargs = zoo.example(0, dtype)
    program = capture(model, args, kwargs, dynamic_shapes=zoo.dynamic_shapes)
    return Captured(zoo, model, program, dtype, before)


# -- erasing chosen units --------------------------------------------------------------------


def erased(program: Program, units: Mapping[str, Tensor]) -> tuple[Program, Any]:
    """A copy of the program without these units, by family name; and the zeroing function."""
    work = program.copy()
    families = work.analysis(ZeroInvariantGroups)
    chosen = {families.by_name(name): indices for name, indices in units.items()}
    return work, erase_units(work, chosen, by="test")


def parameter_count(program: Program) -> int:
    """Parameters of a program, each tied one once."""
    return sum(t.numel() for t in program.parameters.values())


def erased_elements(before: Program, after: Program) -> dict[tuple[str, int], set[int]]:
    """Per tensor and axis, the original indices that are gone."""
    gone = {}
    for name, axes in after.kept.items():
        if name not in before.entries:
            continue
        for axis, kept in axes.items():
            extent = before.entries[name].tensor.shape[axis]
            missing = set(range(extent)) - set(kept.tolist())
            if missing:
                gone[name, axis] = missing
    return gone


def check_structure(before: Program, after: Program) -> None:
    """What is left has the shape that the kept indices say, and the values that it had."""
    for name, entry in after.entries.items():
        if name not in before.entries:
            continue  # added by a correction
        old = before.entries[name].tensor
        expected = old
        for axis, kept in after.kept.get(name, {}).items():
            assert bool((kept[1:] > kept[:-1]).all()), f"{name}[{axis}]: kept is not ascending"
            expected = expected.index_select(axis, kept)
        assert entry.tensor.shape == expected.shape, (name, entry.tensor.shape, expected.shape)
        matrix = sum(extent > 1 for extent in expected.shape) > 1
        if matrix and name in before.parameters and "norm" not in name:
            # Vectors may hold a fold or a correction, matrices never do.
            assert torch.equal(entry.tensor, expected), f"{name}: other values than were kept"
    values = {n.name: n.meta["val"] for n in after.tensor_nodes.values()}
    for name, node in after.tensor_nodes.items():
        assert tuple(values[node.name].shape) == tuple(after.entries[name].tensor.shape), name


def check_erased(
    case: Captured, after: Program, zeroing: Any, *, limit: float = F64_LIMIT, vacuous: bool = False
) -> float:
    """Hold an erased program against both twins at every size; returns the worst error.

    Args:
        case: What it was before.
        after: The erased program.
        zeroing: Function ``(name, tensor) -> tensor`` that makes the full-size twin.
        limit: Largest relative error.
        vacuous: Whether zeroing the units may change nothing.
    """
    twin = zeroed_twin(case.model, after.zeroed)
    worst, moved = 0.0, 0.0
    for which in case.shapes:
        inputs = case.inputs(which)
        got = outputs(in_float64(after.run), inputs)
        graph_twin = outputs(in_float64(case.program.run, replace_tensor=zeroing), inputs)
        module_twin = outputs(twin, inputs)
        error = relative_error(got, graph_twin)
        assert error <= limit, f"erased against the zeroed graph at size {which}: {error:.2e}"
        worst = max(worst, error)
        error = relative_error(graph_twin, module_twin)
        assert error <= case.limit, f"zeroed graph against the zeroed module: {error:.2e}"
        moved = max(moved, relative_error(module_twin, outputs(case.model, inputs)))
    assert vacuous or moved > 1e-6, f"zeroing moved the output by {moved:.1e}: nothing is tested"
    return worst


def check_family(case: Captured, family: Any, units: Tensor) -> float:
    """Erase units of one family alone, and hold everything that is declared about it."""
    after, zeroing = erased(case.program, {family.name: units})
    check_structure(case.program, after)
    removed = parameter_count(case.program) - parameter_count(after)
    predicted = family.parameters_per_unit * len(units)
    owned = [s.name for s in family.slices]
    if len(owned) == len(set(owned)):
        assert removed == predicted, f"{removed} parameters are gone, {predicted} were predicted"
    else:  # a tensor with the atom on two axes loses less with each further unit
        assert 0 < removed <= predicted, f"{removed} parameters are gone, at most {predicted} can"

    gone = erased_elements(case.program, after)
    expected = {(s.name, s.axis): s.repeat * len(units) for s in family.slices}
    lengths = {key: len(elements) for key, elements in gone.items()}
    wrong = {
        key: (lengths.get(key), expected.get(key))
        for key in lengths.keys() | expected.keys()
        if lengths.get(key) != expected.get(key)
    }
    assert not wrong, f"elements gone and expected differ: {wrong}"
    zeroed = {(s.name, s.axis) for s in family.zeroed or family.writers}
    for name, axes in after.zeroed.items():
        for axis, indices in axes.items():
            assert (name, axis) in zeroed, f"{name}[{axis}] is zeroed, which nothing announced"
            assert set(indices.tolist()) == gone[name, axis], f"{name}[{axis}]: zeroed is not gone"

    limit = F64_LIMIT if family.exactness in EXACT else float("inf")
    return check_erased(case, after, zeroing, limit=limit, vacuous=True)
