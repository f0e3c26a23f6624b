"""The ``quantization_config`` of a checkpoint: which layers it means, and how they are stored.

Source: the reference library (``compressed_tensors`` 0.20, ``quantization/quant_config.py`` and
``utils/match.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from torchlathe.backends.checkpoints.coding import Numbers
from torchlathe.backends.checkpoints.names import file_paths
from torchlathe.ir import ArtifactError, UnsupportedError

__all__ = ["described", "quantised_modules"]

_METHOD = "compressed-tensors"
_INTS, _FLOATS = ("pack-quantized", "int-quantized"), ("float-quantized", "naive-quantized")
_PACKED_FLOATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_STATUS = "compressed"


def described(layers: Mapping[str, Numbers], linear: Mapping[str, str]) -> dict[str, Any]:
    """The ``quantization_config`` of layers.

    Args:
        layers: How each quantised layer is stored, by its path.
        linear: The paths that all linear layers of the model have in files. Where one is another,
            both are named: which of them a loader compares with is up to it.

    Returns:
        What JSON takes. Where all quantised layers are stored alike, the target is the class
        ``Linear``, and the others are on the list of those to ignore; else every layer is named.
    """
    groups: dict[Numbers, list[str]] = {}
    for path, numbers in layers.items():
        groups.setdefault(numbers, []).append(path)
    alike = len(groups) == 1
    layouts = sorted({numbers.layout for numbers in groups})
    return {
        "quant_method": _METHOD,
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "quantization_status": _STATUS,
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if alike else _both(paths, linear),
                "weights": _weights(numbers),
                "input_activations": _activations(numbers),
                "output_activations": None,
                "format": numbers.layout,
            }
            for index, (numbers, paths) in enumerate(groups.items())
        },
        "ignore": _both([path for path in linear if path not in layers], linear),
        "kv_cache_scheme": None,
    }


def _both(paths: Iterable[str], linear: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(name for path in paths for name in (path, linear[path])))


def _weights(numbers: Numbers) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_bits": numbers.bits,
        "type": "int" if numbers.integer else "float",
        "symmetric": numbers.symmetric,
        "strategy": numbers.strategy,
        "group_size": numbers.group or None,
        "dynamic": False,
    }
    if numbers.layout == "nvfp4-pack-quantized":
        found |= dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
    if numbers.layout == "mxfp4-pack-quantized":
        found |= dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.uint8")
    return found


def _activations(numbers: Numbers) -> dict[str, Any] | None:
    if numbers.activations is None:
        return None
    return {
        "num_bits": 8,
        "type": "int" if numbers.activations == "int8" else "float",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }


# -- reading ---------------------------------------------------------------------------------


def quantised_modules(
    config: Mapping[str, Any], model: nn.Module, *, round_inputs: bool = True
) -> dict[str, Numbers]:
    """How each quantised layer is stored, by the path of its module.

    Args:
        config: The ``quantization_config``.
        model: The module that the tensors are for.
        round_inputs: Whether what the config says of inputs counts.

    Raises:
        UnsupportedError: Something that has no logical form here.
        ArtifactError: Not the config of the format.
    """
    _refuse_other_parts(config)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ArtifactError(
            "quantization_config has no config_groups that say how layers are stored"
        )
    targets: dict[str, Numbers] = {}
    for name, group in groups.items():
        numbers = _numbers(group, str(config.get("format")), name, round_inputs)
        targets |= {str(target): numbers for target in group.get("targets", ())}
    ignore = [str(target) for target in config.get("ignore") or ()]
    found: dict[str, Numbers] = {}
    known = dict(model.named_modules())
    written: dict[str, str] = file_paths(
        model, [p for p, m in known.items() if isinstance(m, nn.Linear)]
    )
    for path, module in known.items():
        names = [path, written.get(path, path)]
        if _matches(names, module, ignore) or not (hits := _matches(names, module, list(targets))):
            continue
        if isinstance(module, nn.Linear):
            found[path] = targets[hits[0]]
        elif isinstance(module, nn.Embedding):
            raise UnsupportedError("an embedding is quantised, and only linear layers are read",
                                   where=path)  # fmt: skip
    if not found:
        raise ArtifactError("no layer of the model is one that quantization_config means")
    return found


def _refuse_other_parts(config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if method != _METHOD:
        raise UnsupportedError(
            f"the checkpoint's quant_method is {method!r}", hint=f"{_METHOD} is what is read"
        )
    for part in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(part):
            raise UnsupportedError(f"the checkpoint has a {part}, which has no form here")


def _numbers(group: Mapping[str, Any], layout: str, where: str, round_inputs: bool) -> Numbers:
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise UnsupportedError("a group that quantises inputs alone has no form here", where=where)
    if group.get("output_activations"):
        raise UnsupportedError(
            "outputs of layers are quantised, which has no form here", where=where
        )
    bits, integer = int(weights.get("num_bits", 8)), weights.get("type", "int") == "int"
    layout = str(group.get("format") or layout)
    group_size = int(weights.get("group_size") or 0)
    group_size = max(group_size, 0)  # -1 is a whole row
    strategy = weights.get("strategy") or ("group" if group_size else "tensor")
    block = weights.get("block_structure")
    known = _INTS if integer else _FLOATS if bits == 8 else _PACKED_FLOATS
    strategies: tuple[str, ...] = ("channel", "group", "tensor", "block")
    if not integer and bits == 4:
        strategies = ("tensor_group",) if group_size == 16 else ("group",)
    if layout not in known or bits > 8 or strategy not in strategies or weights.get("dynamic"):
        raise UnsupportedError(
            f"weights of {bits} bits, {weights.get('type', 'int')}, by {strategy}, in the layout "
            f"{layout!r} have no form here",
            where=where,
            hint=f"read are {', '.join((*_INTS, *_FLOATS, *_PACKED_FLOATS))}",
        )
    sides = None if block is None else (int(block[0]), int(block[1]))
    symmetric = bool(weights.get("symmetric", True))
    numbers = Numbers(layout, bits, integer, symmetric, strategy, group_size, sides)
    inputs = group.get("input_activations") if round_inputs else None
    return replace(numbers, activations=_rounding(inputs, where))


def _rounding(inputs: Any, where: str) -> str | None:
    if not inputs:
        return None
    wanted = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    found = {key: inputs.get(key, value if key == "symmetric" else None)
             for key, value in wanted.items()}  # fmt: skip
    if found != wanted:
        raise UnsupportedError(
            f"inputs are rounded in a way that has no form here: {found}",
            where=where,
            hint="round_inputs=False leaves inputs as they are; a scale for each token is what "
            "there is",
        )
    return "int8" if inputs.get("type", "int") == "int" else "fp8"


def _matches(paths: Sequence[str], module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Targets that mean a module, the most specific first: its name, a pattern, its class."""
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    names = [t for t in ordered if any(_is_named(path, t) for path in paths)]
    classes = {cls.__name__ for cls in type(module).__mro__}
    return names + [t for t in ordered if t in classes and t not in names]


def _is_named(path: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), path) is not None
    return target == path
