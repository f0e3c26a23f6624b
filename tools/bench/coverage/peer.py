"""What Torch-Pruning does with one model, with the hints that its examples give.

Half of the channels of every group (its default, uniform ratio); layers that make the outputs are
left alone; attention layers are told their number of heads, and what they keep of their sizes as
attributes is patched afterwards. Where that fails it is tried once more without the hints, and the
better of the two counts.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.tools.bench.coverage.entry import Entry, Inputs
from torchlathe.tools.bench.coverage.ours import LONG, Timer

__all__ = ["measure"]

Report = Callable[[dict[str, Any]], None]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_QUERIES = ("q", "query", "q_proj", "q_lin", "qkv", "query_key_value", "c_attn", "to_q", "q_linear")
_KEYS = ("k", "key", "k_proj", "k_lin", "to_k", "v", "value", "v_proj", "v_lin", "to_v")


def measure(entry: Entry, report: Report) -> None:
    """Prune one model with and, if that fails, without hints; report the better result."""
    report({"outcome": "build"})
    model = entry.build()
    parameters = sum(p.numel() for p in model.parameters())
    inputs = entry.example()
    with torch.no_grad():
        shapes = _shapes(model(*inputs[0], **inputs[1]))
    report({"outcome": "prune", "parameters": parameters})
    for hints in (True, False):
        row = _attempt(model, inputs, shapes, parameters, hints)
        report({**row, "hints": hints})
        if row["outcome"] == "ok":
            return


def _attempt(
    model: nn.Module, inputs: Inputs, shapes: list[Any], parameters: int, hints: bool
) -> dict[str, Any]:
    stage = "prune"
    found: list[float] = []
    original = model
    try:
        with _quiet():
            while len(found) < 3 and sum(found) < LONG:
                model = copy.deepcopy(original)
                found.append(_prune(model, inputs, hints))
            left = sum(p.numel() for p in model.parameters())
            stage = "run"
            with torch.no_grad():
                after = _shapes(model(*inputs[0], **inputs[1]))
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:160]
        return {"outcome": stage, "error": f"{type(error).__name__}: {first}"}
    same = after == shapes
    outcome = "ok" if left < parameters else "nothing erased"
    if outcome == "ok" and not same:
        outcome = "other output shape"
    row = {"outcome": outcome, "parameters_after": left, "total_s": min(found), "same_shape": same}
    return {**row, "error": None}


def _prune(model: nn.Module, inputs: Inputs, hints: bool) -> float:
    import torch_pruning  # type: ignore[import-untyped,unused-ignore]

    args, kwargs = inputs
    heads = _heads(model) if hints else {}
    ignored = _output_layers(model, inputs)
    with Timer() as timer:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            kwargs or args,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads=heads,
        )
        pruner.step()
    if hints:
        _patch(model)
    return timer.seconds


def _output_layers(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """Layers whose result is an output of the model; else the last one that runs."""
    made: dict[int, nn.Module] = {}
    alive = []

    def note(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            made[id(out)] = module
            alive.append(out)  # an id is one only while its object lives

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        result = model(*inputs[0], **inputs[1])
    for handle in handles:
        handle.remove()
    found = [made[id(x)] for x in pytree.tree_leaves(result) if id(x) in made]
    return found or list(made.values())[-1:]


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def _attentions(model: nn.Module) -> list[tuple[nn.Module, int, list[tuple[nn.Linear, int]]]]:
    """Modules with heads, and the layers of each with their number of heads."""
    found = []
    for module in model.modules():
        heads = _number(module, _HEADS)
        if heads is None:
            heads = _number(getattr(module, "config", nn.Module()), _HEADS)
        if heads is None:
            continue
        key_heads = _number(module, _KEY_HEADS)
        if key_heads is None:
            key_heads = _number(getattr(module, "config", nn.Module()), _KEY_HEADS)
        children = [(n, c) for n, c in module.named_children() if isinstance(c, nn.Linear)]
        layers = [(c, heads) for n, c in children if n in _QUERIES]
        layers += [(c, key_heads or heads) for n, c in children if n in _KEYS]
        if layers:
            found.append((module, heads, layers))
    return found


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {layer: heads for _, _, layers in _attentions(model) for layer, heads in layers}


def _patch(model: nn.Module) -> None:
    """What its examples patch by hand: sizes that modules keep as attributes."""
    embedding = getattr(model, "conv_proj", None)
    if isinstance(embedding, nn.Conv2d) and isinstance(getattr(model, "hidden_dim", None), int):
        width: Any = embedding.out_channels
        model.hidden_dim = width  # torchvision's vision transformer
    for module, heads, layers in _attentions(model):
        names = {id(c): n for n, c in module.named_children()}
        layer = layers[0][0]
        width = layer.out_features // (3 if "qkv" in names[id(layer)] else 1)
        for name in ("head_dim", "attention_head_size", "head_size"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, width // heads)
        for name in ("all_head_size", "attn_dim"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, width)


def _shapes(result: Any) -> list[Any]:
    return [tuple(x.shape) for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
