"""GPTQ over a whole program: layer by layer, each on the inputs that the quantised ones give it.

The graph reads stored numbers already, at first none but zeros. All batches run through it in
lockstep; where they arrive at a layer, its inputs are summed up to a second moment, its numbers are
swept, and the batches go on through the new ones. What other calls of the layer are to read cannot
be there yet: to the moment is added that of what they read before any layer was rounded. So one
layer is in work at a time: what is held beside the model that was given are the stored numbers so
far, what is alive of the batches, and of one layer a wide copy or two and three matrices of its
columns squared, or four if it has other calls.
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

from torchlathe.ir import ArtifactError, Edit, Program
from torchlathe.ir.files import atomic
from torchlathe.ir.memory import give_back
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.quantising.grids import (
    Clip,
    Quantised,
    stacked,
    total_of,
)
from torchlathe.passes.rewrite.quantising.rounding import grids_of, swept
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.writing import DEQUANTIZE, Written, matrix_of, rewrite
from torchlathe.passes.rewrite.sweeping.masking import Masking
from torchlathe.passes.rewrite.sweeping.patterns import Pattern
from torchlathe.passes.rewrite.sweeping.sweep import (
    check_finite,
    damping_of,
    naming,
    order_by_activity,
    relative_error,
)
from torchlathe.passes.statistics import Reader
from torchlathe.passes.statistics.arriving import arrivals
from torchlathe.passes.statistics.later import LaterCalls
from torchlathe.passes.statistics.routed import Routed
from torchlathe.passes.statistics.running import flat_batches
from torchlathe.passes.statistics.saving import batch_digest, state_key

__all__ = ["Gptq", "Job", "Outcome", "stream"]

# Of the files of a checkpoint; those of another form are not looked for.
_FORM = 4
# An expert with fewer rows than this share of its columns is rounded to nearest: what its rows do
# not show, the sweep would spoil. Where the spectrum of the data falls as 1/k, held-out errors are
# below those of rounding to nearest from a sixteenth on; where it is flat, only past four times.
_ENOUGH = 0.25


@dataclass(frozen=True)
class Gptq:
    """How layers are swept.

    Attributes:
        damping: Added to the diagonal of the moment at least, relative to its mean.
        act_order: Whether the columns that the data excites most come first.
        clip: How ranges are chosen.
        pattern: N:M zeros to choose in the same sweep, or None.
        checkpoint: Folder that takes each finished layer, or None.
        key: What layers of another run cannot be told from by their weights: options.
    """

    damping: float
    act_order: bool
    clip: Clip
    pattern: Pattern | None
    checkpoint: Path | None
    key: str


@dataclass(frozen=True, eq=False)
class Job:
    """One layer to be swept.

    Attributes:
        written: Where its numbers are.
        weight: The parameter as it was; the model's own tensor, not a copy.
        scheme: What it becomes.
        reader: How its first call read its input, in the order of execution.
    """

    written: Written
    weight: Tensor
    scheme: Scheme
    reader: Reader | Routed


@dataclass(frozen=True)
class Outcome:
    """What became of one layer.

    Attributes:
        nearest: Relative squared error of its outputs, rounded to nearest.
        error: The same as it is now; never more.
        weight: Relative squared error of the weight itself.
        damping: What was used.
        rows: Rows of data that the moment is of; the fewest that any group has.
        few: How many experts were rounded to nearest, for they have too few rows.
        resumed: Whether it was read from the checkpoint.
    """

    nearest: float
    error: float
    weight: float
    damping: float
    rows: int
    few: int = 0
    resumed: bool = False


def stream(
    edit: Edit, ctx: PassContext, jobs: Sequence[Job], how: Gptq, later: LaterCalls
) -> dict[str, Outcome]:
    """Sweep the layers in the order in which the program runs them.

    Args:
        edit: An edit of the program that reads stored numbers.
        ctx: The batches, and where progress goes.
        jobs: The layers.
        how: Options.
        later: The calls after the first of each layer, in the program before it was rounded.

    Returns:
        By name of the site's parameter.

    Raises:
        ArtifactError: A file of the checkpoint cannot be read.
    """
    batches, digest = [], ""
    for batch, flat in flat_batches(edit.program, ctx):
        batches.append(flat)
        digest = batch_digest(digest, batch) if how.checkpoint else ""
    place = {node: i for i, node in enumerate(edit.program.graph.nodes)}
    first = {job: min(job.written.calls, key=place.__getitem__) for job in jobs}
    ordered = sorted(jobs, key=lambda job: place[first[job]])
    if how.checkpoint and later.program is not None:
        # What later calls read depends on layers that come after the first call, as they were.
        digest = state_key(later.program, [digest])
    files = _files(edit.program, how, ordered, digest)
    found: dict[str, Outcome] = {}
    todo: dict[Reader | Routed, Job] = {}
    for job, file in files.items():
        saved = None if file is None else _load(file)
        if saved is not None:
            rewrite(edit, job.written, saved[0])
            found[job.written.site.weight] = saved[1]
        else:
            todo[_reader(job, first[job])] = job
    stops = {reader: _weight_of(reader.node) for reader in todo}
    for arrival in arrivals(edit.program, batches, list(todo), stops):
        job = todo[arrival.reader]
        name = job.written.site.weight
        ctx.report(f"gptq of {name} ({len(found) + 1}/{len(ordered)})")
        arrival = later.joined(name, arrival, batches)
        with naming(name):
            stored, outcome = _swept(job, arrival.moments, arrival.counts, how)
        rewrite(edit, job.written, stored)
        found[name] = outcome
        if (file := files[job]) is not None:
            _save(file, stored, outcome)
        # Between large pieces that are freed lie small ones that stay: the next would not fit in.
        give_back()
    for job in ordered:
        for told in _warnings(job, found[job.written.site.weight], how):
            ctx.tell(told)
    return found


def _warnings(job: Job, outcome: Outcome, how: Gptq) -> Iterator[Diagnostic]:
    site = job.written.site
    if how.pattern is not None and (reason := how.pattern.why_not(site.outs, site.channels)):
        text = f"no zeros in {how.pattern} were chosen: {reason}"
        yield Diagnostic("warning", text, name=site.weight)
    if outcome.few:
        text = (
            f"{outcome.few} of {site.groups} experts were rounded to nearest: fewer than "
            f"{_ENOUGH * site.ins:.0f} rows of calibration data were routed to them"
        )
        yield Diagnostic("warning", text, name=site.weight)
    elif outcome.rows < site.ins:
        text = (
            f"{outcome.rows} rows of calibration data for {site.ins} columns: the "
            f"directions that they do not show are damped by {outcome.damping:g}"
        )
        yield Diagnostic("warning", text, name=site.weight)


def _reader(job: Job, call: fx.Node) -> Reader | Routed:
    """How a call of the layer reads its input now."""
    data = call.args[0]
    assert isinstance(data, fx.Node)
    return replace(job.reader, node=call, operand=data)


def _weight_of(call: fx.Node) -> fx.Node:
    """The node that dequantises what a layer multiplies."""
    node: Any = call.args[1]
    while node.target is not DEQUANTIZE:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _swept(
    job: Job, moments: Sequence[Tensor], counts: Sequence[int], how: Gptq
) -> tuple[Quantised, Outcome]:
    """One layer, group of channels by group, or expert by expert."""
    site, form = job.written.site, job.scheme
    matrices = matrix_of(site, job.weight).chunk(len(counts))
    # One scale for all of a layer cannot be had from one group of it.
    total = total_of(job.weight, form.weights)
    parts: list[Quantised] = []
    lost = [0.0, 0.0, 0.0]
    used, few = how.damping, 0
    for weight, moment, count in zip(matrices, moments, counts, strict=True):
        enough = site.kind != "experts" or count >= _ENOUGH * site.ins
        few += not enough
        damping = damping_of(moment, count, how.damping) if enough else how.damping
        stored, errors, damping = _one(job, weight, moment, how, damping, total, sweeps=enough)
        parts.append(stored)
        used = max(used, damping)
        lost = [whole + error / len(counts) for whole, error in zip(lost, errors, strict=True)]
    nearest, error, own = lost
    return stacked(parts), Outcome(nearest, error, own, used, min(counts), few)


def _one(
    job: Job,
    weight: Tensor,
    moment: Tensor,
    how: Gptq,
    damping: float,
    total: Tensor | None,
    *,
    sweeps: bool,
) -> tuple[Quantised, tuple[float, float, float], float]:
    """One matrix, its errors as `Outcome` has them, and the damping."""
    check_finite(moment)
    counts = moment.diagonal()
    grids = grids_of(
        weight,
        job.scheme,
        ("mse", "none") if sweeps and how.clip == "mse" else (how.clip,),
        counts + damping * counts.mean() if sweeps else None,
        total,
    )
    grid = grids[0]
    matrix = weight.to(grid.scales.dtype)
    order, masking, plain = _zeros(job, matrix, moment, how, len(grids))
    codes = grid.codes(matrix.masked_fill(~plain, 0))
    before = after = relative_error(matrix, grid.decoded(codes), moment)
    if sweeps:
        # What rounding to nearest was computed in need not stand beside the factor of the moment.
        give_back()
        best, damping = swept(grids, matrix, moment, damping=damping, order=order, masking=masking)
        # Damping is against the moment: where it wins, rounding to nearest may be better.
        if (error := relative_error(matrix, best.grid.decoded(best.codes), moment)) <= before:
            grid, codes, after = best.grid, best.codes, error
    lost = relative_error(matrix, grid.decoded(codes))
    return grid.quantised(codes), (before, after, lost), damping


def _zeros(
    job: Job, matrix: Tensor, moment: Tensor, how: Gptq, times: int
) -> tuple[Tensor | None, Masking | None, Tensor]:
    """The order of the columns, how zeros come about in the sweep, and a mask without a sweep.

    The sweep is of the matrix several times below itself.
    """
    shape = (times * matrix.shape[0], matrix.shape[1])
    # What is zero was made so, and stays.
    kept = matrix != 0
    below = kept.repeat(times, 1)
    site = job.written.site
    if how.pattern is not None and how.pattern.why_not(len(matrix), site.channels) is None:
        # Neighbours stand next to each other in the order of the sweep.
        near = site.channels_last(matrix.device)
        scores = (matrix.square() * moment.diagonal().clamp_min(0))[:, near]
        plain = how.pattern.mask_among(kept[:, near], scores)[:, near.argsort()]
        return near, Masking(shape, pattern=how.pattern, mask=below), plain
    order = order_by_activity(moment) if how.act_order else None
    return order, None if bool(kept.all()) else Masking(shape, mask=below), kept


# -- checkpoints -----------------------------------------------------------------------------


def _files(
    program: Program, how: Gptq, ordered: Sequence[Job], data: str
) -> dict[Job, Path | None]:
    """The file of each layer, under a name that another layer, run or calibration does not have.

    What a layer becomes depends on all that runs before it, so that its name does too: on what is
    not swept, and on each layer that is swept first.
    """
    if how.checkpoint is None:
        return dict.fromkeys(ordered)
    # The program has nothing but zeros for the layers yet; all else of it is as it will be.
    key = state_key(program, [str(_FORM), how.key, data])
    digest = hashlib.sha256(key.encode())
    files: dict[Job, Path | None] = {}
    for number, job in enumerate(ordered):
        digest.update(f"|{job.scheme}|".encode())
        flat = job.weight.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        files[job] = how.checkpoint / f"{number:04d}-{digest.hexdigest()[:24]}.safetensors"
    return files


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
