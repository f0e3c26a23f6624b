"""GPTQ over a whole program: layer by layer, each on the inputs that the quantised ones give it.

The graph reads stored numbers already, at first rounded to nearest. All batches run through it in
lockstep; where they arrive at a layer, its inputs are summed up to a second moment, its numbers are
swept, and the batches go on through the new ones. So one layer is in work at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from torchlathe.ir import ArtifactError, Edit
from torchlathe.ir.files import atomic
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.quantising.grids import (
    Clip,
    Quantised,
    fit_grid,
    relative_error,
    stacked,
)
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.sweep import Rounding, order_by_activity, sweep
from torchlathe.passes.rewrite.quantising.writing import DEQUANTIZE, Written, rewrite
from torchlathe.passes.statistics import LockstepRun, Reader, patches
from torchlathe.passes.statistics.running import flat_batches
from torchlathe.passes.statistics.saving import batch_digest

__all__ = ["Gptq", "Job", "Outcome", "stream"]

# Up to so many columns a moment is kept in float64.
_WIDE = 1024


@dataclass(frozen=True)
class Gptq:
    """How layers are swept.

    Attributes:
        damping: Added to the diagonal of the moment, relative to its mean.
        act_order: Whether the columns that the data excites most come first.
        clip: How ranges are chosen.
        checkpoint: Folder that takes each finished layer, or None.
        key: What layers of another run cannot be told from by their weights: options.
    """

    damping: float
    act_order: bool
    clip: Clip
    checkpoint: Path | None
    key: str


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to be swept.

    Attributes:
        written: Where its numbers are.
        weight: The floating matrix, (rows, columns).
        scheme: What it becomes.
        reader: How its first call reads its input; None if that is not known.
    """

    written: Written
    weight: Tensor
    scheme: Scheme
    reader: Reader | None


@dataclass(frozen=True)
class Outcome:
    """What became of one layer.

    Attributes:
        nearest: Relative squared error of its outputs, rounded to nearest.
        error: The same as it is now; never more.
        damping: What was used.
        rows: Rows of data that the moment is of.
        resumed: Whether it was read from the checkpoint.
    """

    nearest: float
    error: float
    damping: float
    rows: int
    resumed: bool = False


def stream(edit: Edit, ctx: PassContext, jobs: Sequence[Job], how: Gptq) -> dict[str, Outcome]:
    """Sweep the layers in the order in which the program runs them.

    Args:
        edit: An edit of the program that reads stored numbers.
        ctx: The batches, and where progress goes.
        jobs: The layers.
        how: Options.

    Returns:
        By name of the site's parameter.

    Raises:
        ArtifactError: A file of the checkpoint cannot be read.
    """
    batches, digest = [], ""
    for batch, flat in flat_batches(edit.program, ctx):
        batches.append(flat)
        digest = batch_digest(digest, batch) if how.checkpoint else ""
    run = LockstepRun(edit.program, batches)
    place = {node: i for i, node in enumerate(edit.program.graph.nodes)}
    found: dict[str, Outcome] = {}
    ordered = sorted(jobs, key=lambda job: place[job.written.calls[0]])
    kept: tuple[fx.Node, Any, Tensor, int] | None = None
    for number, job in enumerate(ordered):
        name = job.written.site.weight
        ctx.report(f"gptq of {name} ({number + 1}/{len(ordered)})")
        file = _file(how, number, job, digest)
        saved = None if file is None else _load(file)
        if saved is not None:
            rewrite(edit, job.written, saved[0])
            found[name] = saved[1]
            continue
        call = job.written.calls[0]
        # Up to where the numbers are read, and no further: the layer is to run on the new ones.
        run.run_until(_weight_of(call))
        data = call.args[0]
        assert isinstance(data, fx.Node)
        key = (job.written.site.kernel, str(call.args[3:]))
        if kept is None or kept[0] is not data or kept[1] != key:
            kept = None  # two moments at a time would be one too many
            kept = (data, key, *_moment(job, run.value(data)))
        stored, outcome = _swept(job, kept[2], kept[3], how)
        rewrite(edit, job.written, stored)
        found[name] = outcome
        if outcome.rows < job.weight.shape[1]:
            text = (
                f"{outcome.rows} rows of calibration data for {job.weight.shape[1]} columns: the "
                f"directions that they do not show are damped by {outcome.damping:g}"
            )
            ctx.tell(Diagnostic("warning", text, name=name))
        if file is not None:
            _save(file, stored, outcome)
    return found


def _weight_of(call: fx.Node) -> fx.Node:
    """The node that dequantises what a layer multiplies."""
    node: Any = call.args[1]
    while node.target is not DEQUANTIZE:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _swept(job: Job, moments: Tensor, rows: int, how: Gptq) -> tuple[Quantised, Outcome]:
    """One layer, group of channels by group."""
    groups = len(moments)
    parts: list[Quantised] = []
    lost = [0.0, 0.0]
    used = how.damping
    for weight, moment in zip(job.weight.detach().chunk(groups), moments, strict=True):
        form = job.scheme
        grid = fit_grid(
            weight,
            form.weights,
            group=form.group,
            symmetric=form.symmetric,
            clip=how.clip,
            importance=moment.diagonal(),
        )
        matrix = weight.to(grid.scales.dtype)
        nearest = grid.codes(matrix)
        rounding = Rounding(grid)
        order = order_by_activity(moment) if how.act_order else None
        swept = sweep(matrix, moment, rounding, damping=how.damping, order=order)
        used = max(used, swept.damping)
        before = relative_error(matrix, grid.decoded(nearest), moment)
        after = relative_error(matrix, swept.weight, moment)
        # Damping is against the moment: where it wins, rounding to nearest may be better.
        better = after <= before
        parts.append(grid.quantised(rounding.codes if better else nearest))
        lost[0] += before / groups
        lost[1] += min(before, after) / groups
    return stacked(parts), Outcome(lost[0], lost[1], used, rows)


def _moment(job: Job, values: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The second moment of what a layer reads, (groups, columns, columns), and its rows."""
    columns = job.weight.shape[1]
    dtype = torch.float64 if columns <= _WIDE else torch.float32
    total: Tensor | None = None
    count = 0
    for rows in _rows(job, values):
        part = rows.to(dtype)
        count += part.shape[1]
        if total is None:
            total = part.transpose(1, 2) @ part
        else:
            total.baddbmm_(part.transpose(1, 2), part)
    assert total is not None
    return total.div_(max(count, 1)), count


def _rows(job: Job, values: Sequence[Tensor]) -> Iterator[Tensor]:
    """(groups, rows, columns) of each batch."""
    for value in values:
        if job.written.site.kind != "convolution":
            yield value.reshape(1, -1, value.shape[-1])
            continue
        assert job.reader is not None
        few = max(1, 2**24 // max(1, value[0].numel() * 9))
        for part in value.split(few):
            found = patches(job.reader, part)
            assert found is not None
            yield found


# -- checkpoints -----------------------------------------------------------------------------


def _file(how: Gptq, number: int, job: Job, data: str) -> Path | None:
    """The file of a layer, under a name that another layer, run or calibration does not have."""
    if how.checkpoint is None:
        return None
    digest = hashlib.sha256(f"{how.key}|{number}|{job.scheme}|{data}".encode())
    flat = job.weight.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return how.checkpoint / f"{number:04d}-{digest.hexdigest()[:24]}.safetensors"


def _save(path: Path, stored: Quantised, outcome: Outcome) -> None:
    from safetensors.torch import save_file

    tensors = {
        name: tensor.contiguous()
        for name in ("values", "scales", "zeros", "total")
        if (tensor := getattr(stored, name)) is not None
    }
    about = {"columns": stored.columns, "group": stored.group, "format": stored.format}
    about |= {"outcome": vars(outcome)}
    with atomic(path) as draft:
        save_file(tensors, draft, {"about": json.dumps(about)})


def _load(path: Path) -> tuple[Quantised, Outcome] | None:
    if not path.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        outcome = replace(Outcome(**about.pop("outcome")), resumed=True)
        parts = [tensors.get(name) for name in ("values", "scales", "zeros", "total")]
        return Quantised(*parts, **about), outcome  # type: ignore[arg-type]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ArtifactError(
            f"a finished layer cannot be read: {error}",
            where=str(path),
            hint="delete the file to quantise the layer again",
        ) from error
