"""Calling ``torch.export``, and telling in one error what it could not do and where.

Non-strict export first (it runs the module's Python as it is), strict as the second try.
"""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from torchlathe.ir.errors import CaptureError, Error, InputError
from torchlathe.ir.quiet import error_chain, quiet_torch

__all__ = ["eval_mode", "export", "functional"]

log = logging.getLogger("torchlathe")


def export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Export a module in eval mode; its modes are as before at the end.

    Raises:
        InputError: The model does not run on the inputs.
        CaptureError: The model runs, but cannot be captured as one graph.
    """
    _register_containers()
    with eval_mode(model):
        return _export(model, args, kwargs, dynamic_shapes)


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same program without in-place writes, and with nothing else decomposed.

    Raises:
        CaptureError: Torch cannot.
    """
    try:
        with quiet_torch():
            flat: ExportedProgram = exported.run_decompositions({})
            return flat
    except Exception as error:
        raise CaptureError(
            "torch could not take the in-place writes, or the wrapped regions, out of the graph: "
            f"{type(error).__name__}: {_first_lines(error)}",
            where=_user_frame(error),
            hint="write slices and views out of place (torch.where, torch.cat, index_put)",
        ) from error


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for all modules; each one's own mode is back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    first: Exception | None = None
    for strict in (False, True):
        try:
            with quiet_torch():
                return torch.export.export(
                    model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict
                )
        except Exception as error:
            log.debug("export with strict=%s failed", strict, exc_info=True)
            if first is None:
                first = error
                _check_runs(model, args, kwargs)
            if _violates_constraints(error):
                break
    assert first is not None
    raise _capture_error(first) from first


def _check_runs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a model that does not run on its inputs from one that cannot be captured."""
    # The model's buffers, the inputs and the random state are not for this run to change.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copied: Any = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    devices = {t.device for t in (*model.parameters(), *buffers.values()) if t.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.func.functional_call(model, buffers, *copied)
    except Exception as error:
        shapes = pytree.tree_map(
            lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
        raise InputError(
            f"the model does not run on the example inputs: {type(error).__name__}: "
            f"{_first_lines(error)}",
            where=_user_frame(error),
            hint=f"check shapes and dtypes; given were args={shapes[0]} kwargs={shapes[1]}",
        ) from error


def _violates_constraints(error: Exception) -> bool:
    return "Constraints violated" in str(error) or "ConstraintViolation" in type(error).__name__


def _capture_error(error: Exception) -> Error:
    text = str(error)
    kind = type(error).__name__
    where = _user_frame(error)
    if "data-dependent" in text or "DataDependent" in kind:
        return CaptureError(
            "the forward code branches on the values of a tensor, so it is not one graph: "
            + _first_lines(error, 1),
            where=where,
            hint="write the branch with torch.where, or decide it outside of forward; a known "
            "range can be stated with torch._check",
        )
    if _violates_constraints(error):
        return CaptureError(
            "dynamic_shapes allows more than the model does: " + _constraints(text),
            where=where,
            hint="narrow the range as suggested, leave that dimension out of dynamic_shapes, or "
            "use Dim.AUTO for it",
        )
    if "pytree flattening function" in text:
        return CaptureError(
            "an input or output holds a cache that torch.export cannot flatten: "
            + _first_lines(error, 1),
            where=where,
            hint="capture without it: use_cache=False",
        )
    if "not a known type" in text or "register a pytree" in text:
        return CaptureError(
            "an input or output is of a type that torch.export cannot flatten: "
            + _first_lines(error, 1).partition(" See ")[0],
            where=where,
            hint="return tensors, tuples, dicts or dataclasses, or register the type with "
            "torch.utils._pytree.register_pytree_node",
        )
    return CaptureError(
        f"torch.export could not capture the model: {kind}: {_first_lines(error)}",
        where=where,
        hint="the place above is the last line of the model's own code that ran"
        if where
        else "the cause of this error has torch's own account of it",
    )


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:600]


def _constraints(text: str) -> str:
    """What torch says of violated constraints, without its advice on logging."""
    lines = [line.strip() for line in text.partition("The error above occurred")[0].splitlines()]
    lines[0] = lines[0].partition(" For more information")[0]
    return " ".join(filter(None, lines))[:600]


def _user_frame(error: BaseException) -> str | None:
    """The deepest frame of the traceback that is in the model's own code."""
    found = None
    for link in error_chain(error):
        for frame in traceback.extract_tb(link.__traceback__):
            if _is_user_code(frame.filename):
                found = f"{frame.filename}:{frame.lineno} ({frame.name}): {frame.line}"
    return found


def _is_user_code(filename: str) -> bool:
    if filename.startswith(("<", torch.__path__[0])) or filename == __file__:
        return False
    library = sysconfig.get_path("stdlib")
    return not filename.startswith(library) or "site-packages" in filename


def _register_containers() -> None:
    """Let export flatten the containers of libraries that are loaded already."""
    if "transformers.cache_utils" not in sys.modules:
        return
    try:
        support = import_module("transformers.integrations.executorch")
        support.register_dynamic_cache_export_support()
    except (ImportError, AttributeError, ValueError) as error:
        # A version without it, or types that are registered already.
        log.debug("transformers' caches are not registered: %s", error)
