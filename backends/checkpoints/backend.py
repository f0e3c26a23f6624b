"""The checkpoint backend: the model's own classes around stored layers, and a folder of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.checkpoints.coding import numbers_of
from torchlathe.backends.checkpoints.finding import stored_layers
from torchlathe.backends.checkpoints.stored import Stored, StoredLinear
from torchlathe.backends.checkpoints.writing import SHARD_BYTES, is_pretrained, save_checkpoint
from torchlathe.backends.module.backend import ModuleRun
from torchlathe.backends.module.config import Savable
from torchlathe.backends.module.copying import tensors_of
from torchlathe.ir import BackendError, OptionError, Program, TensorKind, UnsupportedError

__all__ = ["Checkpoint", "CheckpointRun"]


@dataclass(frozen=True)
class Checkpoint(Configured):
    """Puts stored layers into the transformers model that was compiled, and writes its folder.

    ``compiled.export(folder)`` writes what ``from_pretrained``, vLLM and
    `torchlathe.load_checkpoint` read. ``compiled.module`` is the model, of its own classes but for
    the quantised layers; calls go through it, and it is held against the program. What passes did
    besides quantising has to be sayable by the values of tensors alone: a program with other
    shapes, with ops that passes added, or with fused ones, is refused.

    Args:
        format: ``compressed-tensors`` keeps numbers as they are stored; ``dense`` writes what they
            stand for, as floating weights that need no package to be read.
        shard_bytes: Tensors of more than this are spread over several files.

    Source: own; the format is that of the package compressed-tensors.
    """

    name: ClassVar[str] = "checkpoint"

    format: Literal["compressed-tensors", "dense"] = "compressed-tensors"
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        """Hold the options to their types and ranges.

        Raises:
            OptionError: A value that cannot be.
        """
        super().__post_init__()
        if self.shard_bytes < 1:
            raise OptionError(f"shard_bytes must be at least 1, got {self.shard_bytes}")

    @property
    def capabilities(self) -> Capabilities:
        """All that the model's own code can do."""
        return Capabilities(live=self.format != "dense")

    def lower(self, source: Lowerable) -> CheckpointRun:
        """Rebuild the model, and return it as a function of the program's flat inputs.

        Raises:
            BackendError: There is no model of transformers to go back to.
            UnsupportedError: The program has what the format has no place for.
        """
        origin, program = source.origin.module, source.program
        if origin is None:
            raise BackendError(
                "a checkpoint is written around the model that was compiled, and there is none "
                "here",
                hint="compile from the nn.Module itself; of a file that compiled.save wrote, "
                "`torchlathe export` takes the config as well",
            )
        path = _pretrained(origin)
        layers = stored_layers(program)
        for where, layer in layers.items():
            if self.format == "dense" and layer.activations is not None:
                raise UnsupportedError(
                    "a dense checkpoint cannot say that inputs are rounded",
                    where=where,
                    hint="a scheme that leaves activations alone, such as w8a16 or w4a16",
                )
            if self.format != "dense":
                numbers_of(layer, where)
            if not where.startswith(path):
                raise UnsupportedError(f"{where} is outside of the model of transformers")
        module = _rebuilt(origin, program, layers, dense=self.format == "dense")
        return CheckpointRun(module, source, path.removesuffix("."), self, set(layers))


class CheckpointRun(ModuleRun):
    """A model with stored layers as a function of flat inputs.

    Args:
        module: The module that was compiled, rebuilt.
        source: The program and its tensors.
        path: Of the model of transformers in it.
        backend: The options.
        layers: Paths of quantised layers.
    """

    def __init__(
        self, module: nn.Module, source: Lowerable, path: str, backend: Checkpoint, layers: set[str]
    ) -> None:
        self._path, self._backend, self._layers = path, backend, layers
        super().__init__(module, source, Savable())

    def _link(self, name: str, path: str, tensors: nn.Module) -> None:
        # Of dense layers the numbers are not the module's.
        if self._backend.format != "dense" or name.rpartition(".")[0] not in self._layers:
            super()._link(name, path, tensors)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the folder of the checkpoint; see `save_checkpoint`."""
        self.follow()
        model = self.module.get_submodule(self._path)
        save_checkpoint(model, path, shard_bytes=self._backend.shard_bytes)


def _pretrained(origin: nn.Module) -> str:
    """Path of the model of transformers, with a dot behind it if it is not empty."""
    found = [path for path, module in origin.named_modules() if is_pretrained(module)]
    tops = [p for p in found if not any(p != q and _below(p, q) for q in found)]
    if len(tops) != 1:
        what = f"holds {len(tops)} models" if tops else "is no model"
        raise BackendError(
            f"{type(origin).__name__} {what} of transformers, whose config a checkpoint needs",
            hint="compiled.save(path) keeps every model; of a file that it wrote, `torchlathe "
            "export` takes the config as well",
        )
    return f"{tops[0]}." if tops[0] else ""


def _below(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}.")


def _rebuilt(
    origin: nn.Module, program: Program, layers: Mapping[str, Stored], *, dense: bool
) -> nn.Module:
    """A copy of the module that was compiled with the program's tensors; none is copied."""
    memo: dict[int, Any] = {}
    own = tensors_of(origin)
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        stored = path in layers and leaf != "bias"
        memo[id(tensor)] = tensor if stored else _tensor_for(program, origin, name, tensor)
    _refuse_more(program, own, layers, type(origin).__name__)
    module = copy.deepcopy(origin, memo)
    for path, layer in layers.items():
        old = module.get_submodule(path)
        if not isinstance(old, nn.Linear | StoredLinear):
            raise UnsupportedError(
                f"the format stores the weights of nn.Linear, and this is a {type(old).__name__}",
                where=path,
                hint=f'leave it out of quantize, exclude=["{path}"]',
            )
        bias: Any = old.bias
        new: nn.Module = _linear(layer, bias) if dense else StoredLinear(layer, bias)
        if not path:
            raise UnsupportedError("a single layer is no model of transformers")
        module.set_submodule(path, new)
    return module.eval()


def _linear(layer: Stored, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        found = nn.Linear(layer.columns, layer.rows, bias=False)
    found.weight = nn.Parameter(layer.dequantised(), requires_grad=False)
    found.bias = bias  # type: ignore[assignment]
    return found


def _tensor_for(
    program: Program, origin: nn.Module, name: str, tensor: torch.Tensor
) -> torch.Tensor:
    """What the program has for a tensor of the module.

    Raises:
        UnsupportedError: It has none, or one of another shape.
    """
    if name in program.dropped and not tensor.is_meta:
        return tensor
    entry = program.entries.get(program.aliases.get(name, name)) or program.carried.get(name)
    if entry is None:
        raise UnsupportedError(
            f"passes took {name} apart, and {type(origin).__name__} needs it whole",
            where=name,
            hint="a checkpoint holds what quantize and sparsify-nm make; compiled.save(path) keeps "
            "every model",
        )
    if entry.tensor.shape != tensor.shape:
        raise UnsupportedError(
            f"{name} is {tuple(entry.tensor.shape)}, and the config says {tuple(tensor.shape)}",
            where=name,
            hint='erase first with backend="module", and compile its compiled.module, whose '
            "config fits, for the checkpoint",
        )
    return entry.tensor


def _refuse_more(
    program: Program, own: Mapping[str, torch.Tensor], layers: Mapping[str, Stored], kind: str
) -> None:
    for name, entry in program.entries.items():
        path = name.rpartition(".")[0]
        if name not in own and entry.kind is not TensorKind.CONSTANT and path not in layers:
            raise UnsupportedError(
                f"passes added {name}, which {kind} has no place for",
                where=name,
                hint="compiled.save(path) keeps every model",
            )
