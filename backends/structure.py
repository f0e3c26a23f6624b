"""Structures of inputs and outputs (pytree specs) as JSON.

``torch.utils._pytree.treespec_loads`` imports whatever module the text names, for default
factories and enum keys; a file may not decide that. Here a type is one of the builtin containers,
one that is registered already, or one of a model library's own outputs and caches. Every other
comes back as a plain dict or tuple, with a warning.
"""

from __future__ import annotations

import collections
import re
import sys
import warnings
from collections import OrderedDict, deque
from importlib import import_module
from typing import Any

from torch.utils import _pytree as pytree

from torchlathe.backends.encoding import decode, encode
from torchlathe.ir import ArtifactError

__all__ = ["decode_structure", "encode_structure"]

_PLAIN: dict[str, Any] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "OrderedDict": OrderedDict,
    "deque": deque,
}
# pytree files every named tuple under the function that makes their classes.
_NAMED_TUPLE: Any = collections.namedtuple  # noqa: PYI024
_PLAIN_NAMES = {kind: name for name, kind in _PLAIN.items()}

# Modules that hold nothing but models and their containers; a file may have them imported.
_IMPORTABLE = re.compile(
    r"(transformers|diffusers)(\.\w+)*\.(modeling_\w+|cache_utils|utils\.generic)", re.ASCII
)


# -- writing ---------------------------------------------------------------------------------


def encode_structure(spec: pytree.TreeSpec) -> Any:
    """A spec as JSON: None for a leaf, else a table with type, context and children."""
    if spec.is_leaf():
        return None
    children = _children(spec)
    context = spec.context
    data: dict[str, Any] = {"children": [encode_structure(child) for child in children]}
    if spec.type in _PLAIN_NAMES:
        data["type"] = _PLAIN_NAMES[spec.type]
    elif spec.type is _NAMED_TUPLE:
        data["type"] = "namedtuple"
        data["class"] = _type_name(context)
        data["keys"] = list(context._fields)
        return data
    else:
        data["type"] = "registered"
        data["class"] = _type_name(spec.type)
        if (keys := _keys(context, len(children))) is not None:
            data["keys"] = keys
    try:
        data["context"] = encode(context)
    except ArtifactError:
        # Without its context the type cannot be made again; the keys serve in its place.
        if data["type"] != "registered":
            raise
    return data


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    # torch < 2.10 has an attribute where later ones have a method.
    found = spec.children() if hasattr(spec, "children") else spec.children_specs
    return list(found)


def _type_name(kind: Any) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _keys(context: Any, count: int) -> list[Any] | None:
    """Names of the children, as dict-like and dataclass-like types have them in their context."""
    candidates = [context, *(context if isinstance(context, list | tuple) else ())]
    for keys in candidates:
        if (
            isinstance(keys, list | tuple)
            and len(keys) == count
            and all(type(key) in (str, int) for key in keys)
        ):
            return list(keys)
    return None


# -- reading ---------------------------------------------------------------------------------


def decode_structure(data: Any) -> pytree.TreeSpec:
    """The spec that `encode_structure` encoded.

    Raises:
        ArtifactError: Anything that it does not write.
    """
    if data is None:
        return pytree.tree_structure(0)
    if not isinstance(data, dict) or not isinstance(data.get("children"), list):
        raise _unreadable(data)
    children = [decode_structure(child) for child in data["children"]]
    kind = data.get("type")
    if kind in ("tuple", "list"):
        return pytree.TreeSpec(_PLAIN[kind], None, children)
    context = decode(data.get("context"), {})
    if kind in ("dict", "OrderedDict"):
        return pytree.TreeSpec(_PLAIN[kind], _checked_keys(context, children), children)
    if kind == "deque" and (context is None or type(context) is int):
        return pytree.TreeSpec(deque, context, children)
    if kind not in ("namedtuple", "registered") or not isinstance(data.get("class"), str):
        raise _unreadable(data)
    found = _registered(data["class"]) if kind == "registered" and "context" in data else None
    if found is not None:
        return pytree.TreeSpec(found, context, children)
    return _plain_twin(data, children)


def _plain_twin(data: dict[str, Any], children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    keyed = data["type"] == "registered" and data.get("keys") is not None
    if not (data["type"] == "namedtuple" and (twin := _named_tuple(data)) is not None):
        warnings.warn(
            f"{data['class']} is not known here: a {'dict' if keyed else 'tuple'} takes its "
            "place; import its module before loading to have it back",
            stacklevel=2,
        )
        twin = None
    if twin is not None:
        return pytree.TreeSpec(_NAMED_TUPLE, twin, children)
    if keyed:
        return pytree.TreeSpec(dict, _checked_keys(data["keys"], children), children)
    return pytree.TreeSpec(tuple, None, children)


def _named_tuple(data: dict[str, Any]) -> Any:
    """The class of a named tuple if its module is loaded and the class is what it was."""
    module, _, name = data["class"].partition(":")
    # Not by getattr: a module's own __getattr__ may import whatever it is asked for.
    found = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    if isinstance(found, type) and pytree.is_namedtuple_class(found):
        same: bool = list(found._fields) == data.get("keys")  # type: ignore[attr-defined]
        return found if same else None
    return None


def _registered(name: str) -> Any:
    """The registered type of this name, after importing it where that is allowed."""
    found = _lookup(name)
    module = name.partition(":")[0]
    if found is None and _IMPORTABLE.fullmatch(module):
        try:
            import_module(module)
            _register_caches(module)
        except Exception:  # the library may be missing, or too old for the module
            return None
        found = _lookup(name)
    return found


def _lookup(name: str) -> Any:
    for kind in pytree.SUPPORTED_NODES:
        if isinstance(kind, type) and kind not in pytree.BUILTIN_TYPES and _type_name(kind) == name:
            return kind
    return None


def _register_caches(module: str) -> None:
    # transformers registers its caches on request only; ir does it when it captures.
    if module == "transformers.cache_utils":
        import_module(
            "transformers.integrations.executorch"
        ).register_dynamic_cache_export_support()


def _checked_keys(keys: Any, children: list[pytree.TreeSpec]) -> list[Any]:
    plain = isinstance(keys, list) and all(type(k) in (str, int, float, bool) for k in keys)
    if not plain or len(set(keys)) != len(children) or len(keys) != len(children):
        raise ArtifactError("the graph holds a dict structure without its keys")
    checked: list[Any] = keys
    return checked


def _unreadable(data: Any) -> ArtifactError:
    return ArtifactError(f"the graph holds a structure that cannot be read: {str(data)[:80]}")
