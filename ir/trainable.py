"""A program as a module that can be trained, and what training changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.ir.errors import InputError, UnsupportedError
from torchlathe.ir.program import TensorKind

if TYPE_CHECKING:
    from torchlathe.ir.program import Program, TensorEntry

__all__ = ["TrainableProgram"]


class TrainableProgram(torch.nn.Module):
    """Runs a program on its own copies of the tensors; gradients reach its parameters.

    ``named_parameters`` and ``state_dict`` have the names of the captured model, tied tensors are
    tied. The graph is the captured one, so that batch norm and dropout behave as they did then,
    whatever ``train()`` says.

    Args:
        program: What to run. Nothing that is done to this module changes it; `changed` tells what
            there is to write back.

    Raises:
        UnsupportedError: The program was captured without values.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        places: dict[str, tuple[torch.nn.Module, str]] = {}
        for name, entry in program.entries.items():
            if hasattr(entry.tensor, "fake_mode") or entry.tensor.is_meta:
                raise UnsupportedError(f"{name} has a shape but no values, so it cannot be trained")
            constant = entry.kind is TensorKind.CONSTANT
            path = f"_constants.c{len(places)}" if constant else name
            names = [] if constant else [a for a, n in program.aliases.items() if n == name]
            places[name] = self._register((path, *names), entry)
        # One attribute, which is no module, so that no name of a tensor can clash with it.
        self.__dict__["_torchlathe"] = (program, places)

    def _register(self, paths: Iterable[str], entry: TensorEntry) -> tuple[torch.nn.Module, str]:
        tensor = entry.tensor.detach().clone()
        places = []
        for path in paths:
            *prefix, leaf = path.split(".")
            owner: torch.nn.Module = self
            for part in prefix:
                owner = owner._modules.setdefault(part, torch.nn.Module()) or owner
            places.append((owner, leaf))
        if entry.kind is TensorKind.PARAMETER:
            trains = entry.tensor.requires_grad and tensor.is_floating_point()
            tensor = torch.nn.Parameter(tensor, requires_grad=trains)
        for owner, leaf in places:
            if isinstance(tensor, torch.nn.Parameter):
                owner._parameters[leaf] = tensor
            else:
                owner._buffers[leaf] = tensor
                if not entry.persistent or entry.kind is TensorKind.CONSTANT:
                    owner._non_persistent_buffers_set.add(leaf)
        return places[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, on arguments as the captured model takes them."""
        program: Program = self.__dict__["_torchlathe"][0]
        flat = program.flatten_inputs(args, kwargs)
        tensors = self._tensors()
        return program.unflatten_outputs(
            program.graph_module(*(tensors[n] for n in program.tensor_nodes), *flat)
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        places: dict[str, tuple[torch.nn.Module, str]] = self.__dict__["_torchlathe"][1]
        return {name: getattr(owner, leaf) for name, (owner, leaf) in places.items()}

    def changed(self) -> dict[str, torch.Tensor]:
        """Tensors that do not hold any more what the program has; copies, by name.

        Raises:
            InputError: One has another shape or dtype, or is gone.
        """
        program: Program = self.__dict__["_torchlathe"][0]
        found = {}
        for name, tensor in self._tensors().items():
            old = program.entries[name].tensor
            if not isinstance(tensor, torch.Tensor) or tensor.shape != old.shape:
                raise InputError(f"training replaced {name} by something of another shape")
            new = tensor.detach().to(old.device, old.dtype)
            if not torch.equal(new, old.detach()):
                found[name] = new.clone()
        return found
