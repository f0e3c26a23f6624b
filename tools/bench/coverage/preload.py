"""What the fork server imports, and does once, before it forks a process for each model."""

from __future__ import annotations

import gc
import importlib
import os
import warnings

import torch

from torchlathe.tools.compat import define_torchvision_ops

__all__: list[str] = []

# What is imported or built at first use is not any one model's time.
_MODULES = (
    "torchvision",
    "timm",
    "transformers",
    "transformers.modeling_utils",
    "transformers.integrations.executorch",
    "torch_pruning",
    "torchlathe.tools.bench.coverage.zoo",
    "torchlathe.tools.bench.coverage.ours",
    "torchlathe.tools.bench.coverage.peer",
)


def _warm_up() -> None:
    from torchlathe.tools.bench.coverage import ours, peer
    from torchlathe.tools.bench.coverage.entry import Entry, image

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(8 * 36, 16), torch.nn.GELU(), torch.nn.LayerNorm(16),
            torch.nn.Linear(16, 4),
        )  # fmt: skip

    entry = Entry("warm/up", make, image(3, 8, 8))
    ours.measure(entry, lambda _: None)
    peer.measure(entry, lambda _: None)


def _load() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    define_torchvision_ops()
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # its models will say so
    _warm_up()
    # Collections in the forked processes would otherwise walk, and so copy, all that was imported.
    gc.collect()
    gc.freeze()


# A fork server only imports; everywhere else this module has no business.
_load()
