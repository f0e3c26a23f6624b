"""Configs of transformers models: sizes that ``from_pretrained`` builds a model of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchlathe.backends.module.checking import Trial
from torchlathe.backends.module.search import options_for
from torchlathe.backends.module.sizes import Sizes
from torchlathe.ir import UnsupportedError

__all__ = ["CannotSave", "Savable", "fit_config"]

# Models that are built, on the meta device, to find the values of a config.
_MOST_BUILDS = 60


class CannotSave:
    """Stands in for ``save_pretrained`` of a module whose sizes its config cannot say.

    Args:
        reason: Why not.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"from_pretrained could not load this model again: {self.reason}",
            hint="the compiled model's own save(path) and torchlathe.load(path) keep it; or erase "
            'the same count everywhere, scope="local"',
        )


@dataclass(frozen=True)
class Savable:
    """Whether a config says the sizes of a module.

    Attributes:
        ok: Whether it does; also where there is no config at all.
        reason: Why not.
        undo: The config's values before, by config object and name.
    """

    ok: bool = True
    reason: str = ""
    undo: list[tuple[Any, str, Any]] = field(default_factory=list)

    def held_to(self, module: nn.Module, trial: Trial) -> Savable:
        """Build the model that the config says, and hold it to the program.

        The config gets its old values back where that is another function. A module that cannot
        be saved gets a `CannotSave` in place of ``save_pretrained``.
        """
        if not hasattr(module, "save_pretrained") or not _config(module):
            return self
        reason = self.reason
        if self.ok and self.undo:
            problem = _twin_problem(module, trial)
            if problem is None:
                return self
            reason = f"the model that the config builds computes something else ({problem})"
            for config, name, value in self.undo:
                setattr(config, name, value)
        elif self.ok:
            return self
        vars(module)["save_pretrained"] = CannotSave(reason)
        return Savable(False, reason)


def fit_config(
    module: nn.Module,
    sizes: Sizes,
    floats: Mapping[str, Mapping[float, float]],
    replaced: Sequence[str] = (),
) -> Savable:
    """Give a module's config the values from which its class builds these shapes.

    Args:
        module: With its new parameters; its config is changed if values are found.
        sizes: What became of the sizes.
        floats: Float arguments that passes changed, by module.
        replaced: Paths of modules that are of another class than the one it builds.

    Returns:
        Whether such values were found.
    """
    config = _config(module)
    if config is None:
        return Savable()
    if replaced:
        kind = type(module.get_submodule(replaced[0])).__name__
        return Savable(False, f"{replaced[0]} is a {kind} now, which no config builds")
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    undo = [
        (owner, name, copy.copy(value))
        for owner in _configs(config)
        for name, value in vars(owner).items()
    ]
    _fit_floats(config, floats)
    fit = _Fit(module, config, wanted, sizes)
    problem = fit.run()
    if problem is None:
        return Savable(True, "", undo)
    for owner, name, value in undo:
        setattr(owner, name, value)
    return Savable(False, problem)


class _Fit:
    """Coordinate search over the ints of a config, by how many shapes come out right."""

    def __init__(
        self, module: nn.Module, config: Any, wanted: dict[str, tuple[int, ...]], sizes: Sizes
    ) -> None:
        self.kind, self.config, self.wanted = type(module), config, wanted
        self.builds = 0
        self.slots = list(_slots(config, sizes))

    def run(self) -> str | None:
        """Set the values; None, or what does not fit."""
        start = self.score()
        for set_value, options, known in self.slots:
            if known:
                set_value(options[0])
        best = self.score()
        if start > best:
            for set_value, options, _ in self.slots:
                set_value(options[-1])
            best = start
        improved = True
        while best < self.full and improved and self.builds < _MOST_BUILDS:
            improved = False
            for slot in self.slots:
                found = self._improve(slot, best)
                improved = improved or found > best
                best = found
        return None if best == self.full else self._misfit()

    @property
    def full(self) -> int:
        """The score of a config that says everything."""
        return len(self.wanted)

    def _improve(self, slot: Any, best: int) -> int:
        set_value, options, _ = slot
        current = set_value.current()
        for value in options:
            if value == current:
                continue
            set_value(value)
            score = self.score()
            if score > best:
                best, current = score, value
        set_value(current)
        return best

    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the model that the config builds; None if it builds none."""
        self.builds += 1
        try:
            with torch.device("meta"):
                twin = self.kind(copy.deepcopy(self.config))
            return {name: tuple(t.shape) for name, t in twin.state_dict().items()}
        except Exception:
            return None  # whatever a class raises for sizes that do not go together

    def score(self) -> int:
        """How many tensors would be right."""
        found = self.shapes()
        if found is None or found.keys() != self.wanted.keys():
            return -1 if found is None else 0
        return sum(found[name] == shape for name, shape in self.wanted.items())

    def _misfit(self) -> str:
        found = self.shapes()
        if found is None:
            return "its config builds no model of these sizes"
        for name, shape in self.wanted.items():
            if found.get(name) != shape:
                return f"no config gives {name} the shape {shape}"
        return f"the module has no tensor {next(iter(found.keys() - self.wanted.keys()), '')}"


class _Slot:
    """One place in a config that an int is written to."""

    def __init__(self, owner: Any, name: str, index: int | None) -> None:
        self.owner, self.name, self.index = owner, name, index

    def current(self) -> Any:
        found = getattr(self.owner, self.name)
        return found if self.index is None else found[self.index]

    def __call__(self, value: Any) -> None:
        if self.index is not None:
            entries = list(getattr(self.owner, self.name))
            entries[self.index] = value
            value = entries
        setattr(self.owner, self.name, value)


def _slots(config: Any, sizes: Sizes) -> Iterator[tuple[_Slot, tuple[Any, ...], bool]]:
    """Places to write to, with their options, likeliest first, and whether one is likely."""
    below = sizes.below("")
    new = list(dict.fromkeys(s.new for s in below if s.new != s.old and "axis" in s.roles))
    for owner in _configs(config):
        for name, value in list(vars(owner).items()):
            if name.startswith("_") or name.endswith(("_token_id", "vocab_size")):
                continue
            if type(value) is int and value > 1:
                if options := options_for(name, value, [], below):
                    yield _Slot(owner, name, None), options, True
            elif isinstance(value, list) and 0 < len(value) <= 16:
                for index, entry in enumerate(value):
                    options = options_for(name, entry, [], below) if type(entry) is int else ()
                    if options:
                        yield _Slot(owner, name, index), options, True
            elif value is None and any(w in name for w in ("inner", "dim", "size", "head", "ffn")):
                # A size that follows from another one unless it is given.
                yield _Slot(owner, name, None), (*new[:6], None), False


def _fit_floats(config: Any, floats: Mapping[str, Mapping[float, float]]) -> None:
    changed: dict[float, set[float]] = {}
    for table in floats.values():
        for old, new in table.items():
            changed.setdefault(old, set()).add(new)
    for owner in _configs(config):
        for name, value in list(vars(owner).items()):
            if type(value) is float and "eps" in name and len(changed.get(value, ())) == 1:
                setattr(owner, name, next(iter(changed[value])))


def _twin_problem(module: nn.Module, trial: Trial) -> str | None:
    """What differs if the class builds a model from the config and takes over the tensors."""
    try:
        with torch.random.fork_rng(devices=[]):
            twin = type(module)(copy.deepcopy(module.config))
        twin.load_state_dict(module.state_dict(), assign=True)
        if callable(tie := getattr(twin, "tie_weights", None)):
            tie()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return trial.check(twin)


def _config(module: nn.Module) -> Any:
    config = vars(module).get("config")
    if config is not None and hasattr(config, "to_dict") and hasattr(module, "save_pretrained"):
        return config
    return None


def _configs(config: Any) -> Iterator[Any]:
    """A config and the configs in it."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _configs(value)
