"""Switch Transformers in a form that can be captured: the experts of a layer in one tensor.

transformers runs the experts of `SwitchTransformers` in a loop over those that some token chose,
so that which modules run depends on the data, and `torch.export` cannot follow. The layer here
computes the same with the weights of all experts stacked, and picks them by number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["StackedSwitch", "stack_switch_experts"]


class StackedSwitch(nn.Module):
    """What a ``SwitchTransformersSparseMLP`` computes in eval mode, without a loop.

    Attributes:
        classifier: The router.
        up: Shape (experts, hidden, inputs).
        down: Shape (experts, inputs, hidden).
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        router, experts = layer.router, layer.experts
        self.classifier: nn.Linear = router.classifier
        self.capacity = int(router.expert_capacity)
        members = [experts[f"expert_{i}"] for i in range(router.num_experts)]
        self.up = nn.Parameter(torch.stack([m.wi.weight.detach() for m in members]))
        self.down = nn.Parameter(torch.stack([m.wo.weight.detach() for m in members]))
        self.act: Callable[[torch.Tensor], torch.Tensor] = members[0].act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, tokens, inputs) to the same shape; tokens beyond the capacity give zero."""
        logits = self.classifier(x.to(self.classifier.weight.dtype))
        scores = logits.softmax(-1).to(x.dtype)
        chosen = scores.argmax(-1)
        # The place of each token in the queue of its expert, along its own sequence.
        queue = nn.functional.one_hot(chosen, scores.shape[-1]).cumsum(-2)
        place = queue.gather(-1, chosen.unsqueeze(-1))
        gates = scores.amax(-1, keepdim=True) * (place <= self.capacity)
        numbers = chosen.flatten()
        hidden = self.act(torch.bmm(self.up[numbers], x.reshape(-1, x.shape[-1], 1)))
        out = torch.bmm(self.down[numbers], hidden).squeeze(-1)
        result: torch.Tensor = (out * gates.reshape(-1, 1)).view(x.shape)
        return result


def stack_switch_experts(model: nn.Module) -> nn.Module:
    """Replace the sparse layers of a Switch Transformer by ones that can be captured.

    Args:
        model: Changed in place; has to be in eval mode, since jitter and dropout inside of
            experts are left out.

    Returns:
        The same model.

    Raises:
        ValueError: The model is training, or has no such layer.
    """
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    found = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "SwitchTransformersSparseMLP":
                setattr(module, name, StackedSwitch(child).eval())
                found += 1
    if not found:
        raise ValueError("the model has no SwitchTransformersSparseMLP")
    return model
