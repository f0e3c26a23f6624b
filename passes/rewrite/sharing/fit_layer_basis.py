"""Express a stack of equal blocks by a few components that depend on depth."""

from __future__ import annotations

import fnmatch
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import Edit, InputError, OptionError, Program, TensorKind
from torchlathe.passes.analysis.sharing.candidates import Candidate, find_candidates
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.sharing.layer_stacks import (
    PLACE,
    LayerStack,
    Polynomials,
    find_stacks,
    fit_components,
    layer_basis,
    recompose,
)
from torchlathe.passes.statistics import collect_layers
from torchlathe.passes.statistics.running import need_data

__all__ = ["FitLayerBasis", "recompose"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FitLayerBasis(RewritePass):
    """Stores a stack of L equal blocks as K < L components, and each layer as a combination.

    Keeps: the outputs approximately, exactly if the layers lie on polynomials of degree K - 1.
    Changes: every parameter of the blocks is computed from components ``T_k``, stored once, by
    ``W_l = sum of phi_k(l / (L - 1)) T_k``; `recompose` evaluates them at another depth.

    Source: TLEG (arXiv 2312.05614) for two components; see `layer_stacks` for the rest.
    """

    name: ClassVar[str] = "fit-layer-basis"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    components: int = field(default=3, metadata={"help": "components that are stored per stack"})
    form: Polynomials = field(
        default="chebyshev", metadata={"help": "polynomials in the depth: chebyshev or monomials"}
    )
    curvature: Literal["none", "inputs"] = field(
        default="none",
        metadata={
            "help": "fit the weights themselves, or (inputs) what the linear layers give for the "
            "calibration data"
        },
    )
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "only these: patterns of stacks, such as encoder.layer"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these parameters alone: patterns of names in a block"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: There are no components.
        """
        super().__post_init__()
        if self.components < 1:
            raise OptionError(
                f"components is {self.components}, but must be at least 1", where=self.name
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Fit each stack that has more layers than components."""
        stacks = self._stacks(program)
        diagnostics = []
        chosen = []
        for stack in stacks:
            if len(stack) > self.components:
                chosen.append(stack)
                continue
            text = f"{len(stack)} layers are not more than {self.components} components"
            diagnostics.append(Diagnostic("note", text, name=stack.prefix.rstrip(".")))
        if not chosen:
            text = "there is no stack of more equal blocks than components"
            return PassResult(False, {"stacks": 0}, [*diagnostics, Diagnostic("warning", text)])
        before = sum(tensor.numel() for tensor in program.parameters.values())
        moments = self._moments(program, ctx, chosen)
        with program.edit(by=ctx.spec) as edit:
            for stack in chosen:
                ctx.report(f"layer basis of {stack.prefix.rstrip('.') or 'the model'}")
                lost = self._fit(edit, stack, moments)
                text = (
                    f"{len(stack)} layers are {self.components} components, which miss "
                    f"{lost:.1%} of the squares of the weights"
                )
                diagnostics.append(Diagnostic("note", text, name=stack.prefix.rstrip(".")))
        after = sum(tensor.numel() for tensor in program.parameters.values())
        counts: dict[str, int | float | str] = {
            "stacks": len(chosen),
            "layers": sum(map(len, chosen)),
            "saved": before - after,
        }
        return PassResult(True, counts, diagnostics)

    def _stacks(self, program: Program) -> list[LayerStack]:
        shapes = {
            name: tuple(entry.tensor.shape)
            for name, entry in program.entries.items()
            if entry.kind is TensorKind.PARAMETER
            and entry.tensor.is_floating_point()
            and name not in program.aliases.values()
            and name not in program.frozen
        }
        stacks = find_stacks(shapes)
        names = [stack.prefix.rstrip(".") for stack in stacks]
        for pattern in self.include:
            if not fnmatch.filter(names, pattern):
                raise OptionError(
                    f"the pattern {pattern!r} matches no stack of equal blocks",
                    where=self.name,
                    hint=f"there are {', '.join(names)}" if names else "there is none",
                )
        found = []
        for stack, name in zip(stacks, names, strict=True):
            if self.include and not any(fnmatch.fnmatch(name, p) for p in self.include):
                continue
            left = {
                suffix: shape
                for suffix, shape in stack.shapes.items()
                if not any(fnmatch.fnmatch(suffix, p) for p in self.exclude)
            }
            found.append(LayerStack(stack.prefix, stack.numbers, left))
        return found

    def _moments(
        self, program: Program, ctx: PassContext, stacks: Sequence[LayerStack]
    ) -> dict[str, tuple[Candidate, torch.Tensor]]:
        """Per weight, what reads it and the second moment of its inputs."""
        if self.curvature == "none":
            return {}
        need_data(ctx, "it says which errors of the weights matter")
        names = {s.name(n, suffix) for s in stacks for n in s.numbers for suffix in s.shapes}
        layers = [layer for layer in find_candidates(program) if layer.name in names]
        readers = [layer.readers[0] for layer in layers]
        found = collect_layers(program, ctx, readers)
        return {
            layer.name: (layer, found[layer.readers[0].node].inputs.second[0].double())
            for layer in layers
        }

    def _fit(
        self,
        edit: Edit,
        stack: LayerStack,
        moments: Mapping[str, tuple[Candidate, torch.Tensor]],
    ) -> float:
        """Replace the parameters of a stack; the share of their squares that is lost."""
        program = edit.program
        values = layer_basis(len(stack), self.components, self.form)
        like = program.tensor(stack.name(stack.numbers[0], next(iter(stack.shapes))))
        phi = edit.add_tensor(
            f"{stack.prefix}{PLACE}.{self.form}", values.to(device=like.device, dtype=like.dtype)
        )
        program.rewritten |= {f"{stack.prefix}{PLACE}.{self.form}"}
        lost = whole = 0.0
        for suffix in stack.shapes:
            names = [stack.name(number, suffix) for number in stack.numbers]
            tensors = [program.tensor(name).detach() for name in names]
            theta = self._components(names, tensors, values, moments)
            fitted = torch.tensordot(values.to(theta.device), theta, 1)
            stacked = torch.stack(tensors).double()
            if not bool(stacked.isfinite().all() and theta.isfinite().all()):
                raise InputError(
                    f"{stack.theta(suffix)} would hold numbers that are not finite",
                    where=self.name,
                    hint="look for NaN or infinite weights, or inputs that overflow",
                )
            lost += float((fitted - stacked).square().sum())
            whole += float(stacked.square().sum())
            self._write(edit, stack, suffix, theta, phi)
        return lost / whole if whole else 0.0

    def _components(
        self,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        values: torch.Tensor,
        moments: Mapping[str, tuple[Candidate, torch.Tensor]],
    ) -> torch.Tensor:
        if not all(name in moments for name in names):
            return fit_components(tensors, values)
        layers = [moments[name][0] for name in names]
        weights = [layer.matrix(t) for layer, t in zip(layers, tensors, strict=True)]
        found = fit_components(weights, values, [moments[name][1] for name in names])
        wide = tensors[0].double()
        return torch.stack([layers[0].tensor(one, wide) for one in found])

    def _write(
        self, edit: Edit, stack: LayerStack, suffix: str, theta: torch.Tensor, phi: fx.Node
    ) -> None:
        program = edit.program
        like = program.tensor(stack.name(stack.numbers[0], suffix))
        name = stack.theta(suffix)
        parameter = torch.nn.Parameter(theta.to(like.dtype), requires_grad=like.requires_grad)
        node = edit.add_tensor(name, parameter, TensorKind.PARAMETER)
        program.rewritten |= {name}
        nodes = program.tensor_nodes
        letters = string.ascii_lowercase[: theta.dim()]
        equation = f"{letters[0]},{letters}->{letters[1:]}"
        for place, number in enumerate(stack.numbers):
            old = nodes[stack.name(number, suffix)]
            users = list(old.users)
            first = min(users)
            row = edit.call(aten.select.int, (phi, 0, place), like=first, before=first)
            made = edit.call(aten.einsum.default, (equation, [row, node]), like=first, before=first)
            edit.replace(old, made, users)
