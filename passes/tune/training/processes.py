"""Training by one process, or by several with FSDP2; the same calls for both."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from torchlathe.passes.tune.training.checkpoints import Checkpoint, flatten, unflatten
from torchlathe.passes.tune.training.module import like

__all__ = ["Processes"]


class Processes:
    """What differs between one process and several.

    Args:
        device: Where each computes.

    Attributes:
        rank: Of this process.
        world: How many there are; 1 unless ``torch.distributed`` is initialised.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.world = dist.get_world_size() if several else 1

    def shard(self, module: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
        """Shard the parameters of each block, and what is left, over the processes.

        Each block is put together right before it runs and taken apart after. Scalars cannot be
        sharded, and stay as they are.
        """
        if self.world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for each in (*blocks, module):
            scalars = {p for p in each.parameters() if not p.dim()}
            if any(p.dim() for p in each.parameters()):
                fully_shard(each, mesh=mesh, ignored_params=scalars)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without FSDP's warnings of in-place ops on views, which graphs here do not have."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield

    def groups(self, parameters: Mapping[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
        """Parameters for an optimizer: what is sharded cannot be stepped with what is not.

        The groups are the same for any number of processes, so that a checkpoint fits all.
        """
        found: dict[bool, list[torch.nn.Parameter]] = {}
        for parameter in parameters.values():
            found.setdefault(not parameter.dim(), []).append(parameter)
        return [{"params": each} for each in found.values()]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def average_unsharded(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients that FSDP has not: those of scalars."""
        if self.world == 1:
            return
        for parameter in parameters:
            if not _is_sharded(parameter) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.world)

    @torch.no_grad()
    def clip(self, parameters: Iterable[torch.nn.Parameter], most: float) -> None:
        """Scale all gradients together, so that their norm is at most this."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world == 1:
            torch.nn.utils.clip_grads_with_norm_(
                [p for p in parameters if p.grad is not None],
                most,
                torch.nn.utils.get_total_norm(gradients),
            )
            return
        squares = torch.zeros(2, device=self.device)
        for gradient in gradients:
            sharded = _is_sharded(gradient)
            squares[int(sharded)] += _local(gradient).float().square().sum()
        own, across = squares[0], self.sum(squares[1].clone())
        scale = (most / ((own + across).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            _local(gradient).mul_(scale.to(gradient.dtype))

    def save(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Put the state together, and have the first process write it."""
        if self.world == 1:
            checkpoint.save(state)
            return
        tensors: dict[str, torch.Tensor] = {}
        together = unflatten(flatten(state, tensors), tensors)
        if self.rank == 0:
            checkpoint.save(together)
        dist.barrier()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Give an optimizer its state, sharded as its parameters are."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = dict(state["state"])
        for index, own in found.items():
            parameter = parameters[index]
            found[index] = {
                name: like(value, parameter)
                if isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and _is_sharded(parameter)
                else value
                for name, value in own.items()
            }
        optimizer.load_state_dict({**state, "state": found})


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process has; shares its memory."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found
