"""A program as a module that trains, and what training changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from torchlathe.ir import OptionError, PreconditionError, Program, TensorKind
from torchlathe.ir.provenance import info
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.tune.training.blocks import Piece, cut, starts_of_blocks
from torchlathe.passes.tune.training.train_mode import (
    computing_again,
    statistics_of_norms,
    training_graph,
)

__all__ = ["TrainingModule", "choose_trainable", "like", "masks_of_zeros", "store", "whole"]


class TrainingModule(torch.nn.Module):
    """Runs a program on flat inputs, with copies of the tensors that training changes.

    ``train()`` and ``eval()`` do what they do to the model that was captured, as far as the graph
    tells: see `torchlathe.passes.tune.training.train_mode`. Tied tensors are tied.

    Args:
        program: What to run; it never changes.
        trainable: Names of the parameters that get gradients.
        taps: Names of nodes whose values are wanted too.
        batch_norm: In training, normalise by the batch and follow its statistics.
        dropout: In training, draw dropout.
        split: Run block by block, each with the parameters that it alone reads.
        recompute: In training, compute a block's activations again for its gradients.
        local: Run block by block, and let no gradient go from one block to another.
        written: Names of further tensors that are written to.

    Raises:
        PreconditionError: The program has no values.
    """

    def __init__(
        self,
        program: Program,
        trainable: Iterable[str],
        *,
        taps: Sequence[str] = (),
        batch_norm: bool = True,
        dropout: bool = True,
        split: bool = False,
        recompute: bool = False,
        local: bool = False,
        written: Iterable[str] = (),
    ) -> None:
        super().__init__()
        if reason := cannot_run(program):
            raise PreconditionError(f"a program that trains needs values: {reason}")
        self._recompute, self._local = recompute, local
        split = split or recompute or local
        self._inputs = [node.name for node in program.input_nodes]
        self._outputs: Any = fx.map_arg(program.output_node.args[0], lambda node: node)
        graph = program.graph
        # Tensors of the model are no block's to give: a mask that is a buffer, say.
        placeholders = graph.find_nodes(op="placeholder")
        tensors = {node.name: info(node).tensor for node in placeholders}
        self._held = {tap: name for tap in taps if (name := tensors.get(tap)) is not None}
        self._taps = tuple(tap for tap in taps if tap not in self._held)
        training = training_graph(graph, batch_norm=batch_norm, dropout=dropout)
        starts = starts_of_blocks(graph) if split else starts_of_blocks(graph)[:1]
        pieces = cut(graph, starts, self._taps)
        self._written = {*written, *(statistics_of_norms(graph) if batch_norm else ())}
        self._last = self._last_reads(pieces)
        self.blocks = torch.nn.ModuleList(
            _Block(ours, theirs)
            for ours, theirs in zip(pieces, cut(training, starts, self._taps), strict=True)
        )
        self._places: dict[str, tuple[torch.nn.Module, str]] = {}
        self._place_tensors(program, self._owners(pieces), set(trainable))

    def _place_tensors(self, program: Program, owners: dict[str, int], trainable: set[str]) -> None:
        for index, name in enumerate(program.entries):
            module = self.blocks[owners[name]] if name in owners else self
            tensor = self._register(program, name, name in trainable)
            if isinstance(tensor, torch.nn.Parameter):
                module.register_parameter(f"t{index}", tensor)
            else:
                module.register_buffer(f"t{index}", tensor)
            self._places[name] = (module, f"t{index}")
        for block in self.blocks:
            assert isinstance(block, _Block)
            block.bind(self._places)

    def _register(self, program: Program, name: str, trains: bool) -> torch.Tensor:
        """The tensor to use: a copy of what training changes, else the one that there is."""
        entry = program.entries[name]
        tensor = entry.tensor.detach()
        if trains or name in self._written or tensor.is_inference():
            tensor = tensor.clone()
        if entry.kind is TensorKind.PARAMETER:
            return torch.nn.Parameter(tensor, requires_grad=trains)
        return tensor

    @staticmethod
    def _owners(pieces: Sequence[Piece]) -> dict[str, int]:
        """The block of each tensor that only one block reads."""
        readers: dict[str, list[int]] = {}
        for index, piece in enumerate(pieces):
            for name in piece.tensors:
                readers.setdefault(name, []).append(index)
        return {name: blocks[0] for name, blocks in readers.items() if len(blocks) == 1}

    def _last_reads(self, pieces: Sequence[Piece]) -> list[list[str]]:
        """Per block, the values that nothing reads after it."""
        last = {name: index for index, piece in enumerate(pieces) for name in piece.inputs}
        kept = {node.name for node in _nodes_in(self._outputs)} | set(self._taps)
        dying: list[list[str]] = [[] for _ in pieces]
        for name, index in last.items():
            if name not in kept:
                dying[index].append(name)
        return dying

    def forward(self, *flat: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
        """Flat outputs, and the values of the taps by name."""
        values: dict[str, Any] = dict(zip(self._inputs, flat, strict=True))
        for block, dying in zip(self.blocks, self._last, strict=True):
            assert isinstance(block, _Block)
            shared = [self.tensor(n) for n in block.tensors if self._places[n][0] is self]
            given = (shared, *(self._given(values[name]) for name in block.inputs))
            if self._recompute and self.training:
                found = checkpoint(block, *given, use_reentrant=False, context_fn=_contexts)
            else:
                found = block(*given)
            values.update(zip(block.outputs, found, strict=True))
            for name in dying:
                values.pop(name, None)
        outputs = fx.map_arg(self._outputs, lambda node: self._value(node, values))
        held = {tap: self.tensor(name) for tap, name in self._held.items()}
        return list(outputs), {name: values[name] for name in self._taps} | held

    def _given(self, value: Any) -> Any:
        """A value as the next block has it."""
        return value.detach() if self._local and isinstance(value, torch.Tensor) else value

    def _value(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        if node.name in values:
            return values[node.name]
        name = info(node).tensor  # an output that is a tensor of the model
        assert name is not None
        return self.tensor(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the program as it is now; a DTensor if it is sharded."""
        owner, leaf = self._places[name]
        value: torch.Tensor = getattr(owner, leaf)
        return value

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name."""
        return {name: self.tensor(name) for name in self._places}

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that get gradients, by the names that the program has for them."""
        found = self.tensors().items()
        return {
            name: value
            for name, value in found
            if isinstance(value, torch.nn.Parameter) and value.requires_grad
        }

    def changing(self) -> list[str]:
        """Names of the tensors that training changes: parameters, and running statistics."""
        trained = self.trainable()
        return [name for name in self._places if name in trained or name in self._written]

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of these tensors, whole; every process has to ask for them together."""
        return {name: whole(self.tensor(name)).clone() for name in self.changing()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take values that `state` gave, whole in each process."""
        for name, value in state.items():
            own = self.tensor(name)
            own.copy_(like(value, own))


class _Block(torch.nn.Module):
    """One part of the graph, as in training and as in eval mode."""

    def __init__(self, evaluating: Piece, training: Piece) -> None:
        super().__init__()
        self.tensors, self.inputs = evaluating.tensors, evaluating.inputs
        self.outputs = evaluating.outputs
        # In a list, for modules in modules would have FSDP look for parameters there.
        self._codes = [
            fx.GraphModule(torch.nn.Module(), piece.graph, "Block").forward
            for piece in (evaluating, training)
        ]
        self.own: tuple[str | None, ...] = ()

    def bind(self, places: Mapping[str, tuple[torch.nn.Module, str]]) -> None:
        """Learn under which names the block has its own tensors."""
        self.own = tuple(
            places[name][1] if places[name][0] is self else None for name in self.tensors
        )

    def forward(self, shared: Sequence[torch.Tensor], *given: Any) -> Any:
        others = iter(shared)
        tensors = [next(others) if leaf is None else getattr(self, leaf) for leaf in self.own]
        return self._codes[self.training](*tensors, *given)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What the first computation of a block is in, and the one for its gradients."""
    return nullcontext(), computing_again()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gradients, put together from all processes if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as another is, if that is."""
    value = value.to(own.device, own.dtype)
    if not hasattr(own, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value, own.device_mesh, own.placements)


def choose_trainable(
    program: Program, trainable: Sequence[str] = (), frozen: Sequence[str] = ()
) -> list[str]:
    """Names of the parameters to train.

    Args:
        program: Whose parameters.
        trainable: Patterns; none for the parameters that ask for gradients.
        frozen: Patterns of those that are not trained.

    Raises:
        OptionError: A pattern that fits no parameter.
        PreconditionError: Nothing is left to train.
    """
    names = {name: {name} for name in program.parameters}
    for alias, name in program.aliases.items():
        names.get(name, set()).add(alias)
    for option, patterns in (("trainable", trainable), ("frozen", frozen)):
        for pattern in patterns:
            if not any(_fits(known, [pattern]) for known in names.values()):
                raise OptionError(
                    f"{option} has {pattern!r}, which fits no parameter",
                    hint=did_you_mean(pattern, program.parameters),
                )
    chosen = []
    for name, known in names.items():
        tensor = program.tensor(name)
        wanted = _fits(known, trainable) if trainable else tensor.requires_grad
        # Integers, as of quantised weights, have no gradients.
        if wanted and tensor.is_floating_point() and not _fits(known, frozen):
            chosen.append(name)
    if not chosen:
        raise PreconditionError(
            f"{program.model_name} has no parameter to train",
            hint='if all are frozen, name those to train: trainable=["*"]',
        )
    return chosen


def _fits(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def masks_of_zeros(program: Program, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Per tensor that is partly zero, where it is not: what training has to leave at zero.

    A tensor that is zero as a whole is how a layer begins that adds nothing yet, so it is left
    to training.
    """
    masks = {}
    for name in names:
        mask = program.tensor(name).detach() != 0
        if bool(mask.any()) and not bool(mask.all()):
            masks[name] = mask
    return masks


def store(program: Program, tensors: Mapping[str, torch.Tensor], by: str) -> list[str]:
    """Put trained tensors into a program.

    Args:
        program: What was trained.
        tensors: Values by name.
        by: Text form of the pass.

    Returns:
        Names of those that are not what they were.
    """
    changed = []
    with program.edit(by=by) as edit:
        for name, value in tensors.items():
            old = program.tensor(name).detach()
            new = value.detach().to(old.device, old.dtype)
            if not torch.equal(old, new):
                edit.set_tensor(name, new)
                changed.append(name)
    return changed


def _nodes_in(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return found
