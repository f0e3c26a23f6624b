"""Finding the ints in third-party modules that hold sizes, by trying them against the program.

The axis terms say what each size in a module's code became; which attribute holds which size is
guessed from its value and name, and held to the program's own values. Where an attribute fits
several sizes, they are tried in turn, in the module in which a run first goes wrong.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import types
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchlathe.backends.module import stand_ins
from torchlathe.backends.module.checking import Outcome, Trial
from torchlathe.backends.module.sizes import Size, Sizes

__all__ = ["Choice", "choices", "options_for", "search"]

# Runs of the module that a search may take.
_MOST_RUNS = 80
_MOST_ENTRIES = 8

# Words of names that hold no size which an erase changes.
_NEVER = re.compile(
    r"(^|_)(idx|index|ids?|strides?|padding|pad|dilation|kernel|patch(es)?|window|image|img|"
    r"layers?|depths?|levels?|stages?|seed|version|vocab|max|min|positions?|seq|length|labels|"
    r"classes|rank|steps?|chunk|buckets|distance|start|end|token|interval|blocks?|conv)($|_)"
)
_LIKELY = re.compile(
    r"head|dim|size|hidden|embed|feature|channel|width|inner|ffn|group|plane|model|unit|expan|"
    r"proj|^n[fx]$|embd|d_ff|d_kv|repeat|_rep$|split|intermediate|in_|out_|mult"
)
_ROLES: tuple[tuple[re.Pattern[str], frozenset[str]], ...] = (
    (re.compile(r"groups|n_rep|repeat"), frozenset({"middle"})),
    (re.compile(r"all_head|inner|attn_dim|split|proj_dim|qkv_dim|value_dim|key_dim$"),
     frozenset({"product"})),
    (re.compile(r"head_dim|head_size|dim_head|per_head|d_kv|proj_dim|head_channels"),
     frozenset({"inner"})),
    (re.compile(r"heads|n_?head"), frozenset({"outer", "part"})),
)  # fmt: skip
_PLAIN = frozenset({"axis"})


@dataclass
class Choice:
    """One int attribute, and what it may become.

    Attributes:
        owner: The object that has it.
        path: Path of the module in which it is used.
        name: The attribute.
        index: Place in a tuple or list; None for an int.
        old: Its value before.
        options: What it may be, likeliest first.
        rank: Which option it has now.
    """

    owner: Any
    path: str
    name: str
    index: int | None
    old: int
    options: tuple[int, ...]
    rank: int = 0
    group: tuple[Any, ...] = field(default=())

    def apply(self) -> None:
        """Give the attribute its value."""
        value: Any = self.options[self.rank]
        if self.index is not None:
            found = getattr(self.owner, self.name)
            entries = list(found)
            entries[self.index] = value
            value = entries if isinstance(found, list) else tuple(entries)
        try:
            setattr(self.owner, self.name, value)
        except dataclasses.FrozenInstanceError:
            object.__setattr__(self.owner, self.name, value)


def search(root: nn.Module, found: list[Choice], trial: Trial) -> Outcome:
    """Give every choice a value with which the module does what the program does.

    Args:
        root: The module; its attributes are changed.
        found: From `choices`.
        trial: Runs it.

    Returns:
        How far the best assignment gets, which is in place then.
    """
    for choice in found:
        choice.apply()
    best = trial.run(root)
    runs = 1
    while not best.ok and runs < _MOST_RUNS:
        better = None
        for move in _moves(found, best.path):
            before = [(choice, choice.rank) for choice, _ in move]
            _set(move)
            outcome = trial.run(root)
            runs += 1
            if outcome.ok or outcome.reached > best.reached:
                better = outcome
                break
            _set(before)
            if runs >= _MOST_RUNS:
                break
        if better is None:
            break
        best = better
    return best


def _set(move: list[tuple[Choice, int]]) -> None:
    for choice, rank in move:
        choice.rank = rank
        choice.apply()


def _moves(found: list[Choice], path: str) -> Iterator[list[tuple[Choice, int]]]:
    """Changes worth a try after a failure in a module: all of a kind first, then one alone."""
    open_ = [choice for choice in found if len(choice.options) > 1]
    near = [c for c in open_ if _near(c.path, path)]
    seen: set[tuple[Any, ...]] = set()
    for choice in near:
        if choice.group in seen:
            continue
        seen.add(choice.group)
        alike = [c for c in open_ if c.group == choice.group]
        for rank in range(len(choice.options)):
            if rank != choice.rank:
                yield [(c, min(rank, len(c.options) - 1)) for c in alike]
    for choice in near:
        for rank in range(len(choice.options)):
            if rank != choice.rank:
                yield [(choice, rank)]
    # Two attributes may have to change together.
    for i, first in enumerate(near[:6]):
        for second in near[i + 1 : 6]:
            for a in range(len(first.options)):
                for b in range(len(second.options)):
                    if a != first.rank and b != second.rank:
                        yield [(first, a), (second, b)]


def _near(path: str, failed: str) -> bool:
    """Whether one of two modules is the other or in it."""
    first, second = f"{path}.", f"{failed}."
    return not path or not failed or first.startswith(second) or second.startswith(first)


# -- what may change -------------------------------------------------------------------------


def choices(root: nn.Module, sizes: Sizes, known: Container[int], *, config: bool) -> list[Choice]:
    """The attributes of the modules' own classes that may hold a size that changed.

    Args:
        root: The module.
        sizes: What became of the sizes.
        known: Identities of layers whose attributes are right already.
        config: Whether ints of a config object that a module reads while it runs take part; such
            a module gets a copy of it.
    """
    found: list[Choice] = []
    names: dict[type, frozenset[str]] = {}
    for path, module in root.named_modules():
        kind = type(module)
        if kind.__module__.startswith(("torch.nn.", stand_ins.__name__)):
            continue
        if kind not in names:
            names[kind] = _names_read(kind)
        read = names[kind]
        if id(module) not in known or isinstance(module, _EXTENDED):
            found += _of(module, path, kind, sizes, read, strict=False)
        for name, held in list(vars(module).items()) if config else ():
            if name in read and _is_config(held):
                own = copy.copy(held)
                if mine := list(_of(own, path, (kind, name), sizes, read, strict=True)):
                    setattr(module, name, own)
                    found += mine
    return found


def _is_config(held: Any) -> bool:
    """Whether an attribute is a record of options."""
    if isinstance(held, type | nn.Module) or not hasattr(held, "__dict__"):
        return False
    record = dataclasses.is_dataclass(held) or hasattr(held, "to_dict")
    return record or isinstance(held, types.SimpleNamespace | argparse.Namespace)


def _of(
    owner: Any, path: str, kind: Any, sizes: Sizes, read: frozenset[str], *, strict: bool
) -> Iterator[Choice]:
    fixed = set(getattr(owner, "__constants__", ())) if isinstance(owner, _EXTENDED) else ()
    for name, value in list(vars(owner).items()):
        if name in fixed or not _may_hold_size(name, read, strict):
            continue
        entries = [(None, value)] if not isinstance(value, tuple | list) else list(enumerate(value))
        if len(entries) > _MOST_ENTRIES or type(value) not in (int, tuple, list):
            continue
        for index, old in entries:
            if type(old) is not int or old < 2:
                continue
            options = options_for(name, old, sizes.own(path), sizes.below(path))
            if options and options != (old,):
                yield Choice(owner, path, name, index, old, options, group=(kind, name, index, old))


# Layers that others derive from, adding attributes; what the layer itself has is a constant of it.
_EXTENDED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
)


def _may_hold_size(name: str, read: frozenset[str], strict: bool) -> bool:
    if name.startswith("_") or _NEVER.search(name.lower()):
        return False
    return name in read or (not strict and _LIKELY.search(name.lower()) is not None)


def options_for(name: str, old: int, own: list[Size], below: list[Size]) -> tuple[int, ...]:
    """What an int of this name and value may become, likeliest first; the last is itself."""
    wanted = next((roles for pattern, roles in _ROLES if pattern.search(name.lower())), _PLAIN)

    def rank(size: Size) -> tuple[bool, bool]:
        fits = bool(size.roles & wanted)
        # A stream is an axis wherever it is met; heads are a factor somewhere.
        whole = wanted is not _PLAIN or not size.roles & {"outer", "inner", "middle", "part"}
        return not fits, not whole

    matching = [s for s in own if s.old == old]
    ordered = [s.new for s in sorted(matching, key=rank)]
    inside = [s for s in below if s.old == old]
    ordered += [s.new for s in sorted(inside, key=lambda s: (*rank(s), -s.uses))][:4]
    if all(new == old for new in ordered):
        return ()
    return tuple(dict.fromkeys([*ordered, old]))


def _names_read(kind: type) -> frozenset[str]:
    """Names that the methods of a class read, but for those that only set it up."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, value in vars(base).items():
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if name in ("__init__", "extra_repr", "reset_parameters"):
                continue
            while hasattr(function, "__wrapped__"):
                function = function.__wrapped__
            if isinstance(function, types.FunctionType):
                names |= _names_of(function.__code__)
    return frozenset(names)


def _names_of(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_of(constant)
    return names
