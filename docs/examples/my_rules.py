"""A custom op, and the rule that tells the compiler how its axes relate."""

import torch

from torchlathe.ir.axes import Signature


@torch.library.custom_op("mylib::scaled_linear", mutates_args=())
def scaled_linear(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """A linear layer whose result is scaled."""
    return torch.nn.functional.linear(x, weight) * scale


@scaled_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


RULES = {"mylib::scaled_linear": Signature("x[*b, i] * weight[o, i] -> [*b, o]")}
