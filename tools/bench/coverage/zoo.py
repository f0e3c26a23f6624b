"""All models of the benchmark, by name."""

from __future__ import annotations

from typing import Final

from torchlathe.tools.bench.coverage.entry import Entry
from torchlathe.tools.bench.coverage.models_other import OTHER
from torchlathe.tools.bench.coverage.models_timm import TIMM
from torchlathe.tools.bench.coverage.models_torchvision import TORCHVISION
from torchlathe.tools.bench.coverage.models_transformers import TRANSFORMERS

__all__ = ["ENTRIES"]

ENTRIES: Final[dict[str, Entry]] = {
    entry.name: entry for entry in (*TORCHVISION, *TIMM, *TRANSFORMERS, *OTHER)
}
