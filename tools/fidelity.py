"""How far the outputs of a compiled model are from those of the original."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["OutputFidelity", "as_call", "compare_outputs"]


@dataclass(frozen=True)
class OutputFidelity:
    """Agreement of one output tensor over all batches; computed in float64.

    Attributes:
        name: Where the tensor is in the outputs, as a caller would write it.
        shape: Of the last batch.
        dtype: As in ``float32``.
        batches: How many batches it was compared on.
        cosine: Cosine similarity of all values, taken as one vector; None where it says nothing
            (not floating, or one of the two all zero).
        worst_cosine: The least cosine of any one row of the first dimension.
        relative_error: Norm of the difference over the norm of the original.
        max_abs_error: Largest difference of any one value.
        top1: Share of positions at which the largest value of the last dimension is at the same
            index; None unless the output is floating, at least 2-D, and more than 1 wide.
        equal: Share of values that are equal bit for bit.
        note: What kept it from being compared in full; "" if nothing did.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    batches: int = 0
    cosine: float | None = None
    worst_cosine: float | None = None
    relative_error: float | None = None
    max_abs_error: float | None = None
    top1: float | None = None
    equal: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OutputFidelity:
        """The inverse of `to_dict`."""
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{**known, "shape": tuple(data["shape"])})


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of a batch.

    A mapping gives keywords, ``(args, kwargs)`` with a tuple and a dict is taken as it is, another
    tuple or list gives positional arguments, and anything else is the one argument.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if (
        isinstance(batch, tuple)
        and len(batch) == 2
        and isinstance(batch[0], tuple)
        and isinstance(batch[1], dict)
    ):
        return batch[0], batch[1]
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def compare_outputs(
    original: Callable[..., Any], compiled: Callable[..., Any], batches: Iterable[Any]
) -> list[OutputFidelity]:
    """Run both on each batch, and compare their outputs tensor by tensor.

    Args:
        original: The model before.
        compiled: The model after, with the same calling convention and structure of outputs.
        batches: Each as `as_call` reads it.

    Returns:
        One entry for each tensor in the outputs. What is not a tensor, or is inside of a container
        that pytree cannot flatten (a cache), is left out.
    """
    found: dict[str, _Sums] = {}
    with torch.inference_mode():
        for batch in batches:
            args, kwargs = as_call(batch)
            before = _tensors(_called(original, args, kwargs))
            after = _tensors(_called(compiled, args, kwargs))
            for name, value in before.items():
                found.setdefault(name, _Sums(name)).add(value, after.get(name))
    return [sums.result() for sums in found.values()]


def _called(model: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a model on containers and tensors of its own: it may grow a cache that it is given."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(own, spec)
    return model(*args, **kwargs)


def _tensors(outputs: Any) -> dict[str, torch.Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(outputs)
    return {output_name(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def output_name(path: Any) -> str:
    """The pytree path of an output, as a caller would write it; ``output`` for a lone one."""
    text = re.sub(r"\['([A-Za-z_]\w*)'\]", r".\1", pytree.keystr(path))
    return text.removeprefix(".") or "output"


@dataclass
class _Sums:
    """What the batches add up to for one output."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    batches: int = 0
    count: int = 0
    equal: int = 0
    dot: float = 0.0
    square_before: float = 0.0
    square_after: float = 0.0
    square_error: float = 0.0
    largest_error: float = 0.0
    worst_cosine: float = math.inf
    rows: int = 0
    same_top: int = 0
    notes: dict[str, None] = field(default_factory=dict)  # ordered, each once

    def add(self, before: torch.Tensor, after: torch.Tensor | None) -> None:
        self.shape, self.dtype = tuple(before.shape), before.dtype
        if after is None:
            self.notes["missing in the compiled model's outputs"] = None
            return
        if after.shape != before.shape:
            self.notes[f"shape {tuple(after.shape)} instead of {tuple(before.shape)}"] = None
            return
        if after.dtype != before.dtype:
            self.notes[f"{after.dtype} instead of {before.dtype}"] = None
        before, after = before.detach().cpu(), after.detach().cpu()
        self.batches += 1
        self.count += before.numel()
        self.equal += int((before == after).sum())
        if not (before.is_floating_point() and after.is_floating_point()) or not before.numel():
            return
        if bool((~torch.isfinite(after) & torch.isfinite(before)).any()):
            self.notes["the compiled model gives NaN or infinity"] = None
        if bool(torch.isnan(before).any()):
            self.notes["the original gives NaN"] = None
        self._add_floating(before.double(), after.double())

    def _add_floating(self, before: torch.Tensor, after: torch.Tensor) -> None:
        if before.dim() >= 2 and before.shape[-1] > 1:
            self.rows += before[..., 0].numel()
            self.same_top += int((before.argmax(-1) == after.argmax(-1)).sum())
        # A mask of -inf is no value to compare; NaN in the original is.
        masked = torch.isinf(before) & (before == after)
        before = before.masked_fill(masked, 0.0)
        after = after.masked_fill(masked, 0.0)
        error = after - before
        self.largest_error = _larger(self.largest_error, error.abs().max().item())
        rows = before.shape[0] if before.dim() else 1
        a, b = before.reshape(rows, -1), after.reshape(rows, -1)
        dots, squares_a, squares_b = (a * b).sum(1), (a * a).sum(1), (b * b).sum(1)
        norms = (squares_a * squares_b).sqrt()
        told = norms != 0
        if bool(told.any()):
            self.worst_cosine = _smaller(self.worst_cosine, (dots / norms)[told].min().item())
        self.dot += dots.sum().item()
        self.square_before += squares_a.sum().item()
        self.square_after += squares_b.sum().item()
        self.square_error += (error * error).sum().item()

    def result(self) -> OutputFidelity:
        floating = self.dtype.is_floating_point and self.batches > 0 and self.count > 0
        norms = math.sqrt(self.square_before * self.square_after)
        error, size = math.sqrt(self.square_error), math.sqrt(self.square_before)
        return OutputFidelity(
            name=self.name,
            shape=self.shape,
            dtype=str(self.dtype).removeprefix("torch."),
            batches=self.batches,
            cosine=_cosine(self.dot / norms) if floating and norms else None,
            worst_cosine=_cosine(self.worst_cosine) if floating and norms else None,
            relative_error=_finite(error / size if size else error) if floating else None,
            max_abs_error=_finite(self.largest_error) if floating else None,
            top1=self.same_top / self.rows if self.rows else None,
            equal=self.equal / self.count if self.count else None,
            note="; ".join(self.notes),
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity; ``note`` says what there was."""
    return value if math.isfinite(value) else None


def _cosine(value: float) -> float | None:
    """Rounding may take it past 1."""
    return None if math.isnan(value) else max(-1.0, min(1.0, value))


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _smaller(a: float, b: float) -> float:
    return b if math.isnan(b) or b < a else a
