"""The module backend: a smaller copy of the module's own classes, checked against the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.module.checking import Outcome, Trial, nodes_by_module, other_batch
from torchlathe.backends.module.config import Savable, fit_config
from torchlathe.backends.module.copying import changed_floats, copy_with, correct_floats, tensors_of
from torchlathe.backends.module.forms import write_norms_as_code
from torchlathe.backends.module.layers import correct_layer
from torchlathe.backends.module.parts import leave_out_branches, replace_parts
from torchlathe.backends.module.search import Choice, choices, search
from torchlathe.backends.module.sizes import Sizes
from torchlathe.backends.module.stand_ins import Erased, Nothing
from torchlathe.ir import BackendError, Program, TensorKind, capture, describe, info
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.capturing import eval_mode

__all__ = ["ModuleBackend", "ModuleRun"]

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class ModuleBackend(Configured):
    """Gives back the module's own classes, with small parameters and attributes that fit them.

    ``compiled.module`` is the copy. It is held against the program on the example inputs, in
    float64 where its code takes that, and at another batch size where that is dynamic; what the
    classes cannot say is an error that names the families to leave alone.

    Source: own.
    """

    name: ClassVar[str] = "module"

    @property
    def capabilities(self) -> Capabilities:
        """All that torch can do; it checks itself, with random values in place of zeros."""
        return Capabilities(training=True, live=True, checked=False)

    def prepare(self, program: Program) -> None:
        """Write corrections as the code of a module can say them, before tensors are placed."""
        write_norms_as_code(program)

    def lower(self, source: Lowerable) -> ModuleRun:
        """Rebuild the module, and return it as a function of the program's flat inputs.

        Raises:
            BackendError: There is no module to go back to, it cannot be copied, or its classes
                cannot express the program.
        """
        origin = source.origin
        if origin.module is None or not _has_tensors_of(origin.module, source.program):
            raise BackendError(
                "the module backend rebuilds the module that was compiled, and there is none here",
                hint="compile from the nn.Module itself, with all passes in one pipeline; a "
                "program, a file or a model of another backend does not have it",
            )
        if origin.finished:
            run = ModuleRun(origin.module, source, Savable())
            run.move_rest()
            return run
        program = source.program
        module = copy_with(origin.module, program)
        trial = Trial(program, program.flatten_inputs(*program.example_inputs))
        savable = Savable()
        if _changed(origin.module, program):
            savable = _correct(module, origin.module, origin.before, program, trial)
        _check(module, program, trial)
        return ModuleRun(module, source, savable)


class ModuleRun:
    """A rebuilt module as a function of flat inputs.

    Attributes:
        module: The module; its tensors are those of the compiled model.
        savable: Whether ``save_pretrained`` can say its sizes.
    """

    def __init__(self, module: nn.Module, source: Lowerable, savable: Savable) -> None:
        self.module = module
        self.savable = savable
        self._in_spec = source._program.in_spec
        # Per tensor: the two registries that have it, and its name in each.
        self._links: list[tuple[dict[str, Any], dict[str, Any], str, str]] = []
        for name, path in source.paths.items():
            self._link(name, path, source.tensors)
        self.follow()

    def _link(self, name: str, path: str, tensors: nn.Module) -> None:
        owner, _, leaf = name.rpartition(".")
        tree_owner, _, tree_leaf = path.rpartition(".")
        try:
            mine, tree = self.module.get_submodule(owner), tensors.get_submodule(tree_owner)
        except AttributeError:
            return  # a tensor literal, which no module has
        for own in (mine._parameters, mine._buffers, vars(mine)):
            if isinstance(own.get(leaf), torch.Tensor):
                for held in (tree._parameters, tree._buffers):
                    if tree_leaf in held:
                        self._links.append((own, held, leaf, tree_leaf))
                return

    def follow(self) -> None:
        """Take over the tensors that the compiled model has now."""
        for mine, tree, leaf, tree_leaf in self._links:
            if mine[leaf] is not tree[tree_leaf]:
                mine[leaf] = tree[tree_leaf]

    def move_rest(self) -> None:
        """Bring buffers that the graph does not read to where the others are."""
        places = {tree[leaf].device for _, tree, _, leaf in self._links}
        linked = {id(mine[leaf]) for mine, _, leaf, _ in self._links}
        for part in self.module.modules() if len(places) == 1 else ():
            for name, buffer in part._buffers.items():
                if buffer is not None and id(buffer) not in linked:
                    part._buffers[name] = buffer.to(next(iter(places)))

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run the module in eval mode, as every backend does."""
        self.follow()
        args, kwargs = pytree.tree_unflatten(list(inputs), self._in_spec)
        if any(part.training for part in self.module.modules()):
            with eval_mode(self.module):
                return pytree.tree_leaves(self.module(*args, **kwargs))
        return pytree.tree_leaves(self.module(*args, **kwargs))


def _has_tensors_of(module: nn.Module, program: Program) -> bool:
    """Whether a module can be what the program came from."""
    names = {name for name, e in program.entries.items() if e.kind is not TensorKind.CONSTANT}
    return not names or not names.isdisjoint(tensors_of(module))


def _changed(module: nn.Module, program: Program) -> bool:
    """Whether the program has other tensors than the module."""
    own = tensors_of(module)
    known = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    return not own.keys() <= known or any(
        name in own and own[name].shape != entry.tensor.shape
        for name, entry in program.entries.items()
    )


def _correct(
    module: nn.Module, source: nn.Module, before: Program | None, program: Program, trial: Trial
) -> Savable:
    if before is None:
        args, kwargs = program.example_inputs
        before = capture(source, args, kwargs)
    sizes = Sizes(before, program)
    nodes = nodes_by_module(program)
    erased = leave_out_branches(module, source, sizes)
    replaced = [*replace_parts(module, sizes, nodes), *_paths_of(module, erased)]
    readers = _readers(program)
    known: set[int] = set()
    for path, part in module.named_modules():
        if correct_layer(part, readers.get(path) or next(iter(nodes.get(path, ())), None)):
            known.add(id(part))
    floats = changed_floats(before, program)
    correct_floats(module, floats)
    _keep_scales(module, nodes)
    savable = fit_config(module, sizes, floats, replaced)
    found = choices(module, sizes, known, config=not savable.undo)
    outcome = _search(module, found, trial, erased)
    if not outcome.ok:
        raise _refusal(outcome, module, sizes, nodes)
    return savable.held_to(module, trial)


def _search(
    module: nn.Module, found: list[Choice], trial: Trial, erased: Sequence[Erased]
) -> Outcome:
    """Find attributes, and what modules that were left out have to return."""
    best = search(module, found, trial)
    for part in erased:
        kept = part.gives
        for kind in get_args(Nothing):
            if best.ok:
                return best
            part.gives = kind
            outcome = trial.run(module)
            if outcome.ok or outcome.reached > best.reached:
                best, kept = outcome, kind
        part.gives = kept
    return best if best.ok or not erased else search(module, found, trial)


def _paths_of(module: nn.Module, parts: Sequence[nn.Module]) -> list[str]:
    return [path for path, part in module.named_modules() if any(part is p for p in parts)]


def _readers(program: Program) -> dict[str, fx.Node]:
    """Per module path, the op that reads its weight."""
    found: dict[str, fx.Node] = {}
    names = {name: name for name in program.entries} | program.aliases
    nodes = program.tensor_nodes
    for name, canonical in names.items():
        owner, _, leaf = name.rpartition(".")
        users = list(nodes[canonical].users) if canonical in nodes else []
        if leaf in ("weight", "running_mean") and users:
            found.setdefault(owner, users[0])
    return found


def _keep_scales(module: nn.Module, nodes: dict[str, list[fx.Node]]) -> None:
    """Let attention with a scale of its own use it, where the fused op would take a new one."""
    for path, part in module.named_modules():
        scaled = any(
            node.target is _ATTENTION and argument(node, "scale") is not None
            for node in nodes.get(path, ())
        )
        if (
            scaled
            and vars(part).get("fused_attn") is True
            and type(vars(part).get("scale")) is float
        ):
            part.fused_attn = False


def _refusal(
    outcome: Outcome, module: nn.Module, sizes: Sizes, nodes: dict[str, list[fx.Node]]
) -> BackendError:
    """Say what failed, where, and which families to leave alone."""
    path = outcome.path
    # A layer of torch does what its owner's code has it do.
    while path and (
        type(module.get_submodule(path)).__module__.startswith("torch.nn.")
        or not sizes.families(path)
    ):
        path = path.rpartition(".")[0]
    made = [n for n in nodes.get(outcome.path, ()) if info(n).created_by]
    text = f"the module's own code cannot say what was erased: {outcome.text}"
    if made:
        text += f"; a pass had to add {describe(made[0])}"
    # What holds for one layer holds for those like it.
    kind = type(module.get_submodule(path))
    alike = [p for p, m in module.named_modules() if type(m) is kind]
    names = [name for where in alike for name in sizes.families(where)]
    patterns = dict.fromkeys(_LAYER.sub(lambda found: "?" * len(found[0]), name) for name in names)
    shown = ", ".join(f'"{name}"' for name in list(patterns)[:6])
    more = f" and {len(patterns) - 6} more" if len(patterns) > 6 else ""
    return BackendError(
        text,
        where=outcome.path or None,
        hint=f"leave alone what is erased there, exclude=[{shown}]{more}, or use "
        'backend="eager", which runs every program',
    )


def _check(module: nn.Module, program: Program, trial: Trial) -> None:
    problem = trial.check(module)
    if problem is None and (other := _other_trial(program)) is not None:
        problem = other.check(module)
        problem = None if problem is None else f"at another batch size, {problem}"
    if problem is not None:
        raise BackendError(
            f"the rebuilt module does not compute what the graph does: {problem}",
            hint='backend="eager" runs every program',
        )


def _other_trial(program: Program) -> Trial | None:
    """A trial at another size of the dynamic dimensions, if the program runs at it."""
    grown = other_batch(program)
    if grown is None:
        return None
    try:
        return Trial(program, grown)
    except (RuntimeError, IndexError, ValueError):
        return None  # what else has to grow along is not known
