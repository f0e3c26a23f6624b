"""Which passes there are: a literal table, installed entry points, and plugin files.

Nothing is imported before it is asked for, and importing a module registers nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from torchlathe.ir import SpecError
from torchlathe.passes.base import Pass
from torchlathe.passes.options import did_you_mean, options_of

__all__ = [
    "ENTRY_POINTS",
    "TABLE",
    "all_passes",
    "get_pass",
    "load_plugin",
    "pass_names",
    "plugin_of",
]

ENTRY_POINTS = "torchlathe.passes"

TABLE = {
    "distill": "torchlathe.passes.tune.distill:Distill",
    "erase-operators": "torchlathe.passes.rewrite.branches.erase_operators:EraseOperators",
    "expert-layers": "torchlathe.passes.analysis.experts:ExpertLayers",
    "fit-layer-basis": "torchlathe.passes.rewrite.sharing.fit_layer_basis:FitLayerBasis",
    "fuse-kernels": "torchlathe.passes.rewrite.lowering.fuse_kernels:FuseKernels",
    "heal": "torchlathe.passes.tune.heal:Heal",
    "hessian-sensitivity": "torchlathe.passes.analysis.curvature:HessianSensitivity",
    "insert-adapters": "torchlathe.passes.rewrite.tensor_networks.insert_adapters:InsertAdapters",
    "insert-lora": "torchlathe.passes.tune.adapting.lora:InsertLora",
    "kronecker-split": "torchlathe.passes.rewrite.tensor_networks.kronecker_split:KroneckerSplit",
    "low-rank-split": "torchlathe.passes.rewrite.factorising.low_rank:LowRankSplit",
    "merge-experts": "torchlathe.passes.rewrite.experts.merge_experts:MergeExperts",
    "merge-lora": "torchlathe.passes.tune.adapting.lora:MergeLora",
    "permute-channels": "torchlathe.passes.rewrite.sparsifying.permute_channels:PermuteChannels",
    "prune-experts": "torchlathe.passes.rewrite.experts.prune_experts:PruneExperts",
    "quantize": "torchlathe.passes.rewrite.quantising.quantize:Quantize",
    "quantize-cache": "torchlathe.passes.rewrite.quantising.quantize_cache:QuantizeCache",
    "quantize-cores": "torchlathe.passes.rewrite.tensor_networks.quantize_cores:QuantizeCores",
    "reorder-linear": "torchlathe.passes.rewrite.reordering.reorder_linear:ReorderLinear",
    "segments": "torchlathe.passes.analysis.segments:Segments",
    "share-parameters": "torchlathe.passes.rewrite.sharing.share_parameters:ShareParameters",
    "sharing-coloring": "torchlathe.passes.analysis.sharing.coloring:SharingColoring",
    "sparse-train": "torchlathe.passes.tune.sparse_train:SparseTrain",
    "sparsify-nm": "torchlathe.passes.rewrite.sparsifying.sparsify_nm:SparsifyNM",
    "structured-erase": "torchlathe.passes.rewrite.erasing.structured_erase:StructuredErase",
    "tensor-train-split": (
        "torchlathe.passes.rewrite.tensor_networks.tensor_train_split:TensorTrainSplit"
    ),
    "zero-invariant-groups": "torchlathe.passes.analysis.families:ZeroInvariantGroups",
}

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class _Plugin:
    """A loaded plugin: the file or module name, a hash of its text, and what it defines."""

    origin: str
    digest: str
    passes: tuple[type[Pass], ...]


_plugins: dict[str, _Plugin] = {}


def pass_names() -> list[str]:
    """Names of all passes, without importing any of them."""
    loaded = (cls.name for plugin in _plugins.values() for cls in plugin.passes)
    return sorted({*TABLE, *_installed(), *loaded})


def all_passes() -> dict[str, type[Pass]]:
    """All pass classes by name; imports them."""
    return {name: get_pass(name) for name in pass_names()}


def get_pass(name: str) -> type[Pass]:
    """The pass class of this name; dashes and underscores mean the same.

    Raises:
        SpecError: There is none (the nearest names are given), it is defined twice, or it cannot
            be imported.
    """
    name = name.replace("_", "-")
    installed = _installed()
    for plugin in _plugins.values():
        for cls in plugin.passes:
            if cls.name == name:
                return cls
    if name in TABLE:
        module, _, attribute = TABLE[name].partition(":")
        return _checked(getattr(importlib.import_module(module), attribute), TABLE[name], name)
    if name in installed:
        return _load_entry_point(installed[name])
    raise SpecError(f"there is no pass {name}", hint=did_you_mean(name, pass_names()))


def plugin_of(cls: type[Pass]) -> str | None:
    """The file or module that `load_plugin` took this pass from."""
    return next((p.origin for p in _plugins.values() if cls in p.passes), None)


def load_plugin(plugin: str | Path | ModuleType) -> tuple[type[Pass], ...]:
    """Make the passes that a Python file or module defines known by their names.

    Takes every pass class that the module itself defines, and the rules for axis terms of a
    module-level ``RULES = {"namespace::op": rule}``. Loading a file again, or a copy of it, does
    nothing unless its text has changed.

    Args:
        plugin: Path of a ``.py`` file, dotted name of a module, or a module.

    Raises:
        SpecError: The file is missing or fails to run, it defines neither passes nor rules, or one
            of its names is taken.
    """
    origin, digest = _identify(plugin)
    for known in list(_plugins.values()):
        if known.digest == digest and (digest or known.origin == origin):
            del _plugins[known.origin]
            _plugins[origin] = dataclasses.replace(known, origin=origin)
            return known.passes
    module = plugin if isinstance(plugin, ModuleType) else _import(plugin, origin)
    passes = tuple(
        _checked(value, origin)
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Pass)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    )
    rules: dict[str, Any] = getattr(module, "RULES", {})
    if not passes and not rules:
        raise SpecError(f"{origin} defines neither a pass nor RULES for axis terms")
    _refuse_clashes(passes, origin)
    _register_rules(rules, origin)
    _plugins[origin] = _Plugin(origin, digest, passes)
    return passes


# -- plugins -----------------------------------------------------------------------------------


def _identify(plugin: str | Path | ModuleType) -> tuple[str, str]:
    """What tells this plugin from others, and a digest of its text."""
    if isinstance(plugin, ModuleType):
        return plugin.__name__, ""
    if not _is_path(plugin):
        return str(plugin), ""
    path = Path(plugin).resolve()
    try:
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SpecError(f"the plugin {plugin} cannot be read: {error.strerror}") from error


def _is_path(plugin: str | Path) -> bool:
    text = str(plugin)
    return isinstance(plugin, Path) or text.endswith(".py") or "/" in text or "\\" in text


def _import(plugin: str | Path, origin: str) -> ModuleType:
    try:
        return _import_file(origin) if _is_path(plugin) else importlib.import_module(origin)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(
            f"the plugin {plugin} failed to load: {type(error).__name__}: {error}",
            where=_place(error),
        ) from error


def _import_file(path: str) -> ModuleType:
    # Not under the file's own name, which an installed module may have.
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    name = f"torchlathe_plugin_{Path(path).stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"the plugin {path} is not a Python file", hint="name a .py file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up while they are being made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(error: Exception) -> str | None:
    """File and line of the plugin's own code that an error came from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.lineno]
    own = [frame for frame in own if frame.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None


def _register_rules(rules: dict[str, Any], origin: str) -> None:
    if not rules:
        return
    from torchlathe.ir.axes import Rule, register_rule

    for name, rule in rules.items():
        if "::" not in name or not isinstance(rule, Rule):
            raise SpecError(
                f"RULES of {origin} has {name!r}: {rule!r}",
                hint='map names of ops, as "mylib::my_op", to objects of torchlathe.ir.axes.Rule',
            )
    for name, rule in rules.items():
        register_rule(name, rule)


def _refuse_clashes(passes: tuple[type[Pass], ...], origin: str) -> None:
    taken = {**TABLE, **{name: entry.value for name, entry in _installed().items()}}
    for plugin in _plugins.values():
        if plugin.origin != origin:
            taken.update({cls.name: plugin.origin for cls in plugin.passes})
    for cls in passes:
        if cls.name in taken:
            raise SpecError(
                f"the pass {cls.name} of {origin} is defined by {taken[cls.name]} as well"
            )
        if any(other.name == cls.name and other is not cls for other in passes):
            raise SpecError(f"{origin} defines two passes called {cls.name}")


# -- entry points ------------------------------------------------------------------------------


def _installed() -> dict[str, EntryPoint]:
    """Entry points by pass name."""
    return _entry_points(tuple(sys.path))


@functools.lru_cache(maxsize=1)
def _entry_points(path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """The scan, which reads every installed distribution, kept until ``sys.path`` changes."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=ENTRY_POINTS):
        other = TABLE.get(entry.name) or (found[entry.name].value if entry.name in found else None)
        if other is not None and other != entry.value:
            raise SpecError(
                f"the pass {entry.name} of {entry.value} is defined by {other} as well",
                hint="uninstall one of the two distributions",
            )
        found[entry.name] = entry
    return found


def _load_entry_point(entry: EntryPoint) -> type[Pass]:
    try:
        cls = entry.load()
    except Exception as error:
        raise SpecError(
            f"the pass {entry.name} cannot be imported from {entry.value}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _checked(cls, entry.value, entry.name)


# -- classes -----------------------------------------------------------------------------------


def _checked(cls: Any, origin: str, name: str | None = None) -> type[Pass]:
    """The class, if it is one that a pipeline can build."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise SpecError(f"{origin} is not a pass class")

    def refuse(message: str, hint: str) -> SpecError:
        return SpecError(f"{cls.__name__} of {origin} {message}", hint=hint)

    own_name = getattr(cls, "name", None)
    if not isinstance(own_name, str) or not _NAME.fullmatch(own_name):
        raise refuse(f"has the name {own_name!r}", 'set name: ClassVar[str] = "lower-case-dashes"')
    if name is not None and own_name != name:
        raise refuse(f"is called {own_name}, not {name}", "give both the same name")
    if "__dataclass_params__" not in vars(cls):
        raise refuse("is not a dataclass", "decorate it with @dataclass(frozen=True)")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise refuse(f"does not define {missing}", "define it")
    options_of(cls)
    return cls
