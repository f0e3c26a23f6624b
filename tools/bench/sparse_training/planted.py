"""A unit of the smallest weights that the whole model depends on: who removes it."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

import torchlathe as tl
from torchlathe import optim
from torchlathe.passes import ZeroInvariantGroups

__all__ = ["CONTESTANTS", "planted"]

CONTESTANTS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "magnitude": (optim.HESSO, {"saliency": "magnitude"}),
    "HESSO": (optim.HESSO, {"periods": 5}),
    "HESSO-CRIC": (optim.HESSOCRIC, {"sampling_steps": 5}),
}


class Gate(nn.Module):
    """Twelve hidden units: the first has weights of 0.01, and all that matters goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 1, bias=False)
        with torch.no_grad():
            self.up.weight.normal_()
            self.up.bias.zero_()
            self.up.weight[0] = torch.tensor([0.01, 0.0, 0.0, 0.0])
            self.down.weight.fill_(1e-3)
            self.down.weight[0, 0] = 100.0

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1) of (n, 4): about the positive part of the first column."""
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def planted(seed: int, steps: int = 120) -> dict[str, Any]:
    """Per method, whether the unit stayed, and the error before and after over the signal."""
    found = {}
    for name, (make, more) in CONTESTANTS.items():
        torch.manual_seed(seed)
        model, x = Gate(), torch.randn(256, 4)
        groups = tl.capture(model.eval(), (x,)).analysis(ZeroInvariantGroups)
        optimizer = make(
            groups, model, base=torch.optim.SGD, lr=1e-6, target_sparsity=0.6, start_step=2,
            pruning_steps=20, **more,
        )  # fmt: skip
        want = torch.relu(x[:, 0])
        errors = []
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(x)[:, 0], want)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss.detach())
            errors.append(float(loss.detach() / want.square().mean()))
        units = optimizer.zero_units()["up.weight:0"].tolist()
        found[name] = {"kept": 0 not in units, "before": errors[0], "after": errors[-1]}
    return found
