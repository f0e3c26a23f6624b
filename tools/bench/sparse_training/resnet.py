"""ResNet-18 for 32 x 32 images and 10 classes, as OTO's tutorial trains it: groups and sizes.

There is no such data set here, so images are drawn: a class is a fixed pattern under noise. The
number of groups depends on the architecture alone; what is left after the erase also on which
groups go, and so on the training.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe import optim
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.tune.optim.groups import GroupTable, named_tensors

__all__ = ["STAGES", "ResNet18", "evenly", "resnet18"]

# Families by how many channels they have, which is by the size of their images.
STAGES = (64, 128, 256, 512)


class _Block(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or ins != outs:
            self.short = nn.Sequential(
                nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet18(nn.Module):
    """The variant for small images: a 3 x 3 stem and no pooling before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        blocks: list[nn.Module] = []
        for i, (ins, outs) in enumerate(itertools.pairwise(widths)):
            blocks += [_Block(ins, outs, 1 if i == 0 else 2), _Block(outs, outs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 3, 32, 32)."""
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def resnet18(keep_at_least: float | None, seed: int = 0, steps: int = 24) -> dict[str, Any]:
    """Counts of groups, and sizes after the erase, at a target of 0.7.

    Args:
        keep_at_least: Of the optimizer; None for its default, 1 for as OTO does.
        seed: Of weights and data.
        steps: Of training.
    """
    torch.manual_seed(seed)
    model = ResNet18().eval()
    x = torch.randn(1, 3, 32, 32)
    program = tl.capture(model, (x,))
    optimizer = optim.HESSO(
        program.analysis(ZeroInvariantGroups),
        model,
        base=torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        target_sparsity=0.7,
        start_step=steps // 4,
        pruning_steps=steps // 2,
        periods=min(10, steps // 2),
        keep_at_least=keep_at_least,
    )
    patterns = torch.randn(10, 3, 32, 32)
    model.train()
    for _ in range(steps):
        labels = torch.randint(0, 10, (16,))
        loss = F.cross_entropy(model(patterns[labels] + torch.randn(16, 3, 32, 32)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"keep_at_least": keep_at_least, "steps": steps, **_erased(model, optimizer.table)}


def evenly(seed: int = 0) -> dict[str, Any]:
    """The same counts where every family keeps the same share, whatever it holds."""
    torch.manual_seed(seed)
    model = ResNet18().eval()
    families = tl.capture(model, (torch.randn(1, 3, 32, 32),)).analysis(ZeroInvariantGroups)
    table = GroupTable(families, families.prunable, named_tensors(model))
    gone = int(table.count * 0.7)
    factors = torch.ones(table.count, dtype=torch.float64)
    for place, (family, start) in enumerate(zip(table.chosen, table.starts, strict=True)):
        left = sum(f.extent for f in table.chosen[place:])
        share = round(gone * family.extent / left)
        factors[start : start + share] = 0.0
        gone -= share
    table.watch(factors == 0)
    table.multiply(factors)
    return _erased(model, table)


def _erased(model: nn.Module, table: GroupTable) -> dict[str, Any]:
    """Counts, sizes and kept shares of a model with zero groups, before and after the erase."""
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    zero = table.zero()
    program = tl.capture(model, (x,))
    small = tl.compile(model, "structured-erase{zeros=true}", (x,), measure_latency=False)
    with torch.no_grad():
        error = float((small(x) - model(x)).abs().max() / model(x).abs().max())
    kept = {}
    for stage in STAGES:
        members = [i for i, family in enumerate(table.chosen) if family.extent == stage]
        mine = torch.isin(table.family, torch.tensor(members))
        kept[str(stage)] = float((mine & ~zero).sum() / mine.sum())
    return {
        "groups": table.count,
        "kept": int((~zero).sum()),
        "kept_shares": kept,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_after": sum(p.numel() for p in small.parameters()),
        "flops": program.cost().flops_at(),
        "flops_after": small.program.cost().flops_at(),
        "error": error,
    }
