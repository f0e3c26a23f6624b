"""Stacks of equal blocks as polynomials in depth: ``W_l = sum over k of phi_k(l / (L - 1)) T_k``.

Source: TLEG (arXiv 2312.05614) is the case of two components, a constant and a linear one; more
of them, and Chebyshev polynomials instead of powers, are a reconstruction. The fit is least
squares in closed form, ``T = pinv(Phi) W``, and with the second moments A_l of the layers' inputs
that of ``sum over l of |(W_l - sum phi_k T_k) A_l^1/2|^2`` (own).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from torchlathe.ir import InputError, Program
from torchlathe.passes.analysis.sharing.curvature import damped

__all__ = [
    "FORMS",
    "LayerStack",
    "Polynomials",
    "find_stacks",
    "fit_components",
    "layer_basis",
    "recompose",
]

Polynomials = Literal["chebyshev", "monomials"]
FORMS: tuple[Polynomials, ...] = ("chebyshev", "monomials")
# Stands in names where the number of the layer was.
PLACE = "basis"


@dataclass(frozen=True)
class LayerStack:
    """Blocks whose parameters have the same names and shapes.

    Attributes:
        prefix: What their names begin with, up to the number; "" or ending in a dot.
        numbers: Of the blocks, in order.
        shapes: Shape of each parameter, by the name after the number.
    """

    prefix: str
    numbers: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def name(self, number: int, suffix: str) -> str:
        """Of one block's parameter."""
        return f"{self.prefix}{number}.{suffix}"

    def theta(self, suffix: str) -> str:
        """Of the components of a parameter."""
        return f"{self.prefix}{PLACE}.{suffix}"

    def __len__(self) -> int:
        return len(self.numbers)


def layer_basis(count: int, components: int, form: Polynomials = "chebyshev") -> torch.Tensor:
    """The values of the polynomials at the layers, the first at 0 and the last at 1.

    Args:
        count: Number of layers, L; a single one is at 0.
        components: K.
        form: Chebyshev polynomials of ``2 t - 1``, or powers of t.

    Returns:
        Shape (L, K) float64.
    """
    places = torch.arange(count, dtype=torch.float64) / max(1, count - 1)
    if form == "monomials":
        return places[:, None] ** torch.arange(components)
    columns = [torch.ones_like(places), 2 * places - 1]
    while len(columns) < components:
        columns.append(2 * (2 * places - 1) * columns[-1] - columns[-2])
    return torch.stack(columns[:components], 1)


def find_stacks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[LayerStack, ...]:
    """The stacks of equal blocks among named parameters, outermost first.

    Args:
        shapes: Of the parameters, by name. A stack is what has the numbers from 0 on at one place
            of its names, and is equal after them.
    """
    blocks: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part.isdigit():
                prefix = "".join(f"{p}." for p in parts[:place])
                inside = blocks.setdefault(prefix, {}).setdefault(int(part), {})
                inside[".".join(parts[place + 1 :])] = shape
    found: list[LayerStack] = []
    for prefix in sorted(blocks, key=lambda p: (p.count("."), p)):
        if any(prefix.startswith(f"{s.prefix}{n}.") for s in found for n in s.numbers):
            continue
        kinds = Counter(tuple(sorted(block.items())) for block in blocks[prefix].values())
        kind, count = kinds.most_common(1)[0]
        numbers = [n for n in blocks[prefix] if tuple(sorted(blocks[prefix][n].items())) == kind]
        # Otherwise nobody could tell what the blocks of another depth are called.
        if count > 1 and sorted(numbers) == list(range(count)):
            found.append(LayerStack(prefix, tuple(sorted(numbers)), dict(kind)))
    return tuple(found)


def fit_components(
    weights: Sequence[torch.Tensor],
    values: torch.Tensor,
    inputs: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The components that fit a stack best.

    Args:
        weights: One per layer, of one shape; (outs, features) if inputs are given.
        values: Of the polynomials, (layers, components).
        inputs: Second moments of the layers' inputs, (features, features), to weigh errors by.

    Returns:
        Shape (components, *shape) float64.
    """
    stack = torch.stack([weight.detach().double() for weight in weights])
    values = values.to(stack.device)
    if inputs is None:
        flat = torch.linalg.pinv(values) @ stack.flatten(1)
        unflattened: torch.Tensor = flat.reshape(values.shape[1], *stack.shape[1:])
        return unflattened
    count, outs, features = values.shape[1], stack.shape[1], stack.shape[2]
    moments = torch.stack(list(inputs))
    system = torch.einsum("lj,lk,lab->jakb", values, values, moments)
    right = torch.einsum("lk,loa,lab->okb", values, stack, moments)
    matrix = damped(system.reshape(count * features, count * features))
    solved: torch.Tensor = torch.linalg.solve(matrix, right.reshape(outs, count * features).T)
    return solved.T.reshape(outs, count, features).transpose(0, 1).contiguous()


def recompose(program: Program, depth: int) -> dict[str, torch.Tensor]:
    """The state of the same model with another number of blocks.

    What was fitted is evaluated at the new depth; what else the blocks have (buffers, parameters
    that were left out) is that of the nearest block, and everything outside the stacks is copied.

    Args:
        program: One that `FitLayerBasis` changed, trained since or not.
        depth: How many blocks each stack gets.

    Returns:
        A state dict for the model of that depth: ``model.load_state_dict(recompose(program, 12))``.

    Raises:
        InputError: The depth is below 1, or the program has no fitted stack.
    """
    if depth < 1:
        raise InputError(f"a depth of {depth}, but a stack has at least one block")
    stacks = {prefix: (form, values) for prefix, form, values in _fitted(program)}
    if not stacks:
        raise InputError(
            "no stack of this program has a basis", hint="run fit-layer-basis on it first"
        )
    state: dict[str, torch.Tensor] = {}
    held = {n: e.tensor for n, e in program.entries.items() if e.persistent}
    held |= {alias: program.entries[name].tensor for alias, name in program.aliases.items()}
    held |= {n: e.tensor for n, e in program.carried.items() if e.persistent}
    for name, tensor in held.items():
        stack = next((p for p in stacks if name.startswith(p) and _inside(name, p)), None)
        if stack is None:
            state[name] = tensor.detach().clone()
            continue
        form, values = stacks[stack]
        first, _, rest = name.removeprefix(stack).partition(".")
        if rest in FORMS and first == PLACE:
            continue
        if first == PLACE:
            new = layer_basis(depth, len(tensor), form)
            rows = torch.tensordot(new.to(tensor.device), tensor.detach().double(), 1)
            for number, row in enumerate(rows):
                state[f"{stack}{number}.{rest}"] = row.to(tensor.dtype)
            continue
        for number in range(depth):
            nearest = round(number / max(1, depth - 1) * (len(values) - 1))
            if nearest == int(first):
                state[f"{stack}{number}.{rest}"] = tensor.detach().clone()
    return state


def _fitted(program: Program) -> Iterator[tuple[str, Polynomials, torch.Tensor]]:
    for name, entry in program.entries.items():
        for form in FORMS:
            ending = f"{PLACE}.{form}"
            if name == ending or name.endswith(f".{ending}"):
                yield name.removesuffix(ending), form, entry.tensor


def _inside(name: str, prefix: str) -> bool:
    first = name.removeprefix(prefix).partition(".")[0]
    return first == PLACE or first.isdigit()
