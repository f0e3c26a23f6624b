"""What one model of the coverage benchmark is, and the weights that it gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

__all__ = ["Entry", "Inputs", "builder", "image", "images_of", "randomised", "text"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

VOCABULARY = 97
SMALL = 0.1  # of a matrix: root mean square of a row's length


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: ``package/model``.
        make: Builds the module; weights come from the seed that `build` sets.
        inputs: Makes ``(args, kwargs)`` for a batch size.
        dynamic_shapes: As ``torchlathe.ir.capture`` takes them.
        batches: The batch of the capture, and another one to run at.
        note: What a reader of the table should know, such as what was left out.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    dynamic_shapes: Any = "auto"
    batches: tuple[int, int] = (2, 3)
    note: str = ""

    @property
    def package(self) -> str:
        """The package that the model is from."""
        return self.name.partition("/")[0]

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode; equal weights for equal seeds."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = randomised(self.make())
        return model.eval()

    def example(self, which: int = 0, seed: int = 1) -> Inputs:
        """Random inputs at ``batches[which]``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + which)
            return self.inputs(self.batches[which])


def builder(path: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Builder of a model from the path of its class or function; imports when called."""

    def make() -> nn.Module:
        module, _, name = path.rpartition(".")
        built = getattr(import_module(module), name)(*args, **options)
        assert isinstance(built, nn.Module)
        return built

    return make


def image(*shape: int) -> Callable[[int], Inputs]:
    """One positional tensor of shape ``(batch, *shape)``."""
    return lambda batch: ((torch.randn(batch, *shape),), {})


def images_of(name: str, *shape: int) -> Callable[[int], Inputs]:
    """The same by keyword."""
    return lambda batch: ((), {name: torch.randn(batch, *shape)})


def text(length: int = 12, *, mask: bool = True, **more: int) -> Callable[[int], Inputs]:
    """Token ids, with a mask that leaves out the tail of every row but the first.

    Args:
        length: Tokens per row.
        mask: Whether there is an attention mask.
        **more: Further inputs of token ids by name, with their lengths.
    """

    def make(batch: int) -> Inputs:
        kwargs = {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}
        if mask:
            kwargs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
            kwargs["attention_mask"][1:, -2:] = 0
        for name, size in more.items():
            kwargs[name] = torch.randint(3, VOCABULARY, (batch, size))
        return (), kwargs

    return make


def randomised(model: nn.Module) -> nn.Module:
    """Draw what initialisers leave at zeros and ones, where many mistakes would not show.

    Biases, norm scales and running statistics are all equal after the usual initialisation, so
    that keeping the wrong channels of them would change nothing. Matrices that start out so small
    that biases drown them (heads scaled by a thousandth) are drawn anew too.
    """
    with torch.no_grad():
        for tensor in map(torch.Tensor.detach, model.parameters()):
            if tensor.is_floating_point() and tensor.dim() <= 1:
                centre = 1.0 if tensor.numel() and bool((tensor == 1).all()) else 0.0
                tensor.copy_(centre + 0.3 * torch.randn_like(tensor))
            elif tensor.is_floating_point() and tensor.numel():
                inputs = tensor[0].numel()
                if float(tensor.square().mean() * inputs) < SMALL**2:
                    tensor.copy_(torch.randn_like(tensor) / inputs**0.5)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return model
