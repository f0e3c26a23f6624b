"""What all sparse optimizers share: a base optimizer, the groups, and which of them are gone."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from torchlathe.ir import InputError, OptionError
from torchlathe.passes.analysis.families import Families
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.rewrite.allocation.ladders import Floors
from torchlathe.passes.rewrite.erasing.choosing import Choice
from torchlathe.passes.tune.optim.groups import GroupTable, Sums, named_tensors
from torchlathe.passes.tune.optim.saliency import Saliency, saliency_of
from torchlathe.passes.tune.optim.shards import is_sharded, local

__all__ = [
    "GONE",
    "KEPT",
    "LEAVING",
    "Memory",
    "SparseOptimizer",
    "WrappedOptimizer",
    "check_schedule",
    "rates_of",
    "trainable",
]

# Weights before a step, to see what the step did.
Memory: TypeAlias = dict[str, torch.Tensor]

# What a group is.
KEPT, LEAVING, GONE = 0, 1, 2


class WrappedOptimizer(torch.optim.Optimizer):
    """An optimizer that does what another one does, and something with the parameters after it.

    Parameter groups, state and hooks are those of the base, so schedulers, gradient scalers and
    whatever else holds an optimizer take it for one.

    Args:
        parameters: As the base takes them.
        base: Class of the base optimizer.
        options: For the base.
    """

    def __init__(
        self, parameters: Any, base: type[torch.optim.Optimizer], options: Mapping[str, Any]
    ) -> None:
        try:
            self.base = base(parameters, **options)
        except TypeError as error:
            known = inspect.signature(base).parameters
            unknown = [name for name in options if name not in known]
            if not unknown:
                raise
            own = inspect.signature(type(self)).parameters
            raise OptionError(
                f"neither {type(self).__name__} nor {base.__name__} has an option {unknown[0]}",
                hint=did_you_mean(unknown[0], [*own, *known]),
            ) from error
        super().__init__(self.base.param_groups, self.base.defaults)
        self._given_state: Mapping[str, Any] | None = None
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base does."""
        self.base.zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies: the groups are of this model's tensors.

        Raises:
            TypeError: Always.
        """
        name = type(self).__name__
        raise TypeError(f"{name} cannot be copied; load its state_dict() into another {name}")

    def _base_step(self, closure: Callable[[], Any] | None) -> Any:
        return self.base.step() if closure is None else self.base.step(closure)

    def _only_makes_state(self) -> bool:
        """Whether a step is the one by which torch.distributed.checkpoint makes the base's state.

        It has no rate and no gradients, and is no step of the training.
        """
        if self.base.state or any(float(group.get("lr", 1.0)) for group in self.param_groups):
            return False
        grads = (p.grad for group in self.param_groups for p in group["params"])
        return not any(bool(local(grad).any()) for grad in grads if grad is not None)

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and under "sparse" what `sparse_state` says."""
        return {**self.base.state_dict(), "sparse": self.sparse_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; the model has its own.

        Where another has left the part "sparse" out, as torch.distributed.checkpoint does, it is
        that which `load_sparse_state` was given before.

        Raises:
            InputError: The state is not of an optimizer like this one.
        """
        sparse = state_dict.get("sparse", self._given_state)
        if sparse is None:
            raise InputError(
                f"the state has no part for {type(self).__name__}",
                hint=f"load it into {type(self.base).__name__}, or give the state_dict() of a "
                f"{type(self).__name__}; of torch.distributed.checkpoint, which leaves that part "
                "out, keep sparse_state() too, and give it to load_sparse_state() first",
            )
        self.load_sparse_state(sparse)
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "sparse"})
        self._share()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what another optimizer saved, or this one in an earlier version.

        Raises:
            InputError: Something is missing.
        """
        if missing := [name for name in self.sparse_state() if name not in state]:
            name = type(self).__name__
            raise InputError(
                f"the state is not of a {name} like this one: {missing[0]} is not in it",
                hint=f"give the state_dict() of a {name}; one that an earlier version saved cannot "
                "be gone on from",
            )

    @abstractmethod
    def sparse_state(self) -> dict[str, Any]:
        """Numbers and tensors by name, besides the base's state."""

    def load_sparse_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `sparse_state` gave.

        Raises:
            InputError: It is of another model, or was saved with other options.
        """
        self._check_state(state)
        self._take(state)
        self._given_state = state

    @abstractmethod
    def _take(self, state: Mapping[str, Any]) -> None:
        """Take over a state that has all its parts."""


class SparseOptimizer(WrappedOptimizer):
    """Trains with a base optimizer, and makes a set share of the groups zero on the way.

    Args:
        groups: ``tl.capture(model, inputs).analysis(ZeroInvariantGroups)``.
        model: The module that was captured, or tensors by name; perhaps wrapped (DDP, FSDP2).
        base: Class of the optimizer that trains.
        params: What the base optimizes, as parameters or parameter groups; all parameters of the
            model that require gradients, unless given.
        target_sparsity: Share of all groups that become zero, in (0, 1): exactly
            ``int(groups * target_sparsity)`` of them with ``divisible=1``.
        start_step: Steps of the base alone before anything else.
        pruning_steps: Steps over which groups become zero.
        total_steps: Steps of the whole training, if known, to refuse pruning past its end.
        saliency: `Saliency`, weights by name of the criterion, or the name of one.
        include: Patterns of families (or tensors that they write) whose units are groups.
        exclude: Patterns of families, or of tensors that stay whole.
        keep_at_least: Units that each family keeps: a count, or a share if below 1. Two thirds of
            what all families keep on average, unless given: narrow layers do not recover.
        divisible: Kept units of each family are a multiple of it; rounding keeps more.
        options: For the base: ``lr`` and so on.

    Attributes:
        base: The base optimizer.
        table: The groups.
        target: Number of groups that will be zero, before ``divisible`` rounds.
        steps: Steps done.
        given_loss: Of this step's batch, for loops that call ``step()`` with nothing.

    Raises:
        OptionError: An option is out of its range, a pattern matches nothing, the families cannot
            spare so many units, or pruning ends after the training.
        InputError: The groups are of another model.
    """

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        params: Any = None,
        target_sparsity: float = 0.5,
        start_step: int = 0,
        pruning_steps: int = 1,
        total_steps: int | None = None,
        saliency: Saliency | Mapping[str, float] | str = "default",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        keep_at_least: float | None = None,
        divisible: int = 1,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        check_schedule(name, target_sparsity, start_step, pruning_steps, total_steps)
        if (keep_at_least or 0) < 0 or divisible < 1:
            raise OptionError(
                f"keep_at_least is {keep_at_least} and divisible {divisible}, but they must be at "
                "least 0 and 1",
                where=name,
            )
        self.saliency = saliency_of(saliency)
        choice = Choice(tuple(include), tuple(exclude))
        choice.check(groups, name)
        chosen, self.diagnostics = choice.of(groups)
        tensors = named_tensors(model)
        self.table = GroupTable(groups, chosen, tensors)
        self.floors = _floors(self.table, target_sparsity, keep_at_least, divisible)
        self.target = _target(self.table, target_sparsity, self.floors, name)
        self.start_step, self.pruning_steps = start_step, pruning_steps
        self.steps = 0
        self.given_loss: float | None = None
        self.phase = torch.zeros(self.table.count, dtype=torch.int8)
        if params is None:
            params = trainable(model, tensors)
        super().__init__(params, base, options)

    # -- what users ask ----------------------------------------------------------------------

    @property
    def zero_groups(self) -> int:
        """Groups that are zero now, and stay so."""
        return int((self.phase == GONE).sum())

    @property
    def group_sparsity(self) -> float:
        """Share of all groups that are zero now."""
        return self.zero_groups / self.table.count

    @property
    def finished(self) -> bool:
        """Whether no more groups become zero."""
        return self.steps >= self.start_step + self.pruning_steps

    def zero_units(self) -> dict[str, torch.Tensor]:
        """Units that are zero, by the name of their family."""
        return self.table.units(self.phase == GONE)

    # -- stepping ----------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: torch.Tensor | float | None = None,
    ) -> Any:
        """One step of the base, and then what this optimizer does with the groups.

        Args:
            closure: For the base.
            loss: Of this step's batch, for optimizers that look at it (`HESSOCRIC`); what the
                closure returns, if there is one.
        """
        if self._only_makes_state():
            return super()._base_step(closure)
        before = self._before()
        result = self._base_step(closure)
        if loss is None:
            loss = self.given_loss if result is None else result
        self._after(before, loss)
        self.steps += 1
        if self.finished:
            self.table.forget()
        return result

    @abstractmethod
    def _before(self) -> Memory | None:
        """What has to be known of the weights before a step."""

    @abstractmethod
    def _after(self, before: Memory | None, loss: Any) -> None:
        """What is done after a step of the base."""

    def _remember(self) -> Memory:
        return self.table.remember()

    def _sums(self, before: Memory) -> Sums:
        """Statistics of the weights before a step, and of what it did to them."""
        return self.table.sums(before, rates_of(self.param_groups))

    # -- choosing ----------------------------------------------------------------------------

    def _lowest(self, scores: torch.Tensor, count: int, taken: torch.Tensor) -> torch.Tensor:
        """The ``count`` groups of the lowest scores, besides those that are taken.

        Args:
            scores: Shape (groups,).
            count: How many; fewer where ``divisible`` keeps more.
            taken: Shape (groups,) bool; they count for what their family has to spare.

        Returns:
            Shape (groups,) bool.
        """
        table = self.table
        spare = torch.tensor([f.extent - self.floors.of(f) for f in table.chosen])
        gone = torch.bincount(table.family[taken], minlength=len(spare))
        order = torch.argsort(scores, stable=True)
        order = order[~taken[order]]
        rank = _rank_within(table.family[order], len(spare))
        order = order[rank < (spare - gone)[table.family[order]]]
        chosen = torch.zeros_like(taken)
        chosen[order[:count]] = True
        if self.floors.round_to > 1:
            self._round(scores, chosen, taken)
        return chosen

    def _round(self, scores: torch.Tensor, chosen: torch.Tensor, taken: torch.Tensor) -> None:
        """Give back the best of the chosen until each family keeps a round number."""
        for i, family in enumerate(self.table.chosen):
            mine = self.table.family == i
            kept = family.extent - int((mine & (chosen | taken)).sum())
            back = self.floors.rounded(kept, family) - kept
            members = (mine & chosen).nonzero().flatten()
            order = torch.argsort(scores[members], stable=True)
            chosen[members[order[max(0, len(members) - back) :]]] = False

    def _set_phase(self, groups: torch.Tensor, phase: int) -> None:
        self.phase[groups] = phase
        self.table.watch(self.phase != KEPT)

    def _multiply(self, factor: float = 1.0) -> None:
        """Zero what is gone, and multiply what is leaving."""
        of_phase = torch.tensor([1.0, factor, 0.0], dtype=torch.float64)
        self.table.multiply(of_phase[self.phase.long()])

    # -- state -------------------------------------------------------------------------------

    def sparse_state(self) -> dict[str, Any]:
        """Where the pruning is: steps done, and the phase of each group."""
        schedule = self.schedule()
        phase = self.phase.clone()
        return {"steps": self.steps, "phase": phase, "target": self.target, "schedule": schedule}

    def schedule(self) -> dict[str, int]:
        """When groups go."""
        return {"start_step": self.start_step, "pruning_steps": self.pruning_steps}

    def _take(self, state: Mapping[str, Any]) -> None:
        if state["phase"].shape != self.phase.shape or state["target"] != self.target:
            raise InputError(
                f"the state is of {len(state['phase'])} groups of which {state['target']} become "
                f"zero, but here are {len(self.phase)} and {self.target}",
                hint="make the optimizer with the options that the state was saved with",
            )
        if state["schedule"] != self.schedule():
            raise InputError(
                f"the state was saved with {state['schedule']}, but here is {self.schedule()}",
                hint="make the optimizer with the options that the state was saved with",
            )
        self.steps = int(state["steps"])
        self.phase = state["phase"].clone().to("cpu", torch.int8)
        self.table.watch(self.phase != KEPT)


def _rank_within(members: torch.Tensor, kinds: int) -> torch.Tensor:
    """Of each entry, how many before it are of its kind."""
    order = torch.argsort(members, stable=True)
    starts = torch.cumsum(torch.bincount(members, minlength=kinds), 0)
    starts = torch.cat([starts.new_zeros(1), starts[:-1]])
    rank = torch.empty_like(members)
    rank[order] = torch.arange(len(members)) - starts[members[order]]
    return rank


def _spare(table: GroupTable, floors: Floors) -> int:
    """Groups that may go at most."""
    return sum(f.extent - floors.of(f) for f in table.chosen)


def _floors(table: GroupTable, sparsity: float, least: float | None, divisible: int) -> Floors:
    """What each family keeps; one unit at least where the default asks for more than can stay."""
    if least is not None:
        return Floors(least, divisible)
    found = Floors((1 - sparsity) * 2 / 3, divisible)
    enough = _spare(table, found) >= int(table.count * sparsity)
    return found if enough else Floors(1, divisible)


def _target(table: GroupTable, sparsity: float, floors: Floors, where: str) -> int:
    if not table.count:
        raise OptionError(
            "no family is left whose units could become zero",
            where=where,
            hint="torchlathe inspect MODEL --families tells why each is pinned",
        )
    # As the official code counts: 2,880 groups at 0.7 are 2,015 zeros, since 0.7 is a little less.
    target = int(table.count * sparsity)
    spare = _spare(table, floors)
    if target > spare:
        raise OptionError(
            f"target_sparsity={sparsity} asks for {target} of {table.count} groups, but the "
            f"families can spare {spare}",
            where=where,
            hint=f"at most {spare / table.count:.4f}, or a lower keep_at_least",
        )
    return target


def rates_of(groups: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The learning rate of each parameter, by its id."""
    return {id(p): float(group.get("lr", 1.0)) for group in groups for p in group["params"]}


def check_schedule(
    where: str, sparsity: float, start: int, pruning: int, total: int | None
) -> None:
    """Refuse a sparsity outside (0, 1), and pruning that does not fit into the training.

    Raises:
        OptionError: It does not.
    """
    if not 0 < sparsity < 1:
        raise OptionError(
            f"target_sparsity is {sparsity}, but must be between 0 and 1",
            where=where,
            hint="it is the share of the groups that become zero: 0.7 leaves 30 % of them",
        )
    if start < 0 or pruning < 1:
        raise OptionError(
            f"start_step is {start} and pruning_steps {pruning}, but they must be at least 0 and 1",
            where=where,
        )
    if total is not None and start + pruning > total:
        raise OptionError(
            f"pruning ends after step {start + pruning}, but the training has {total} steps",
            where=where,
            hint="start earlier or prune in fewer steps, and leave some to recover",
        )


def trainable(
    model: nn.Module | Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Parameter groups of the parameters that ask for gradients."""
    found = model.parameters() if isinstance(model, nn.Module) else tensors.values()
    # Tied ones have several names.
    wanted = list({id(p): p for p in found if p.requires_grad}.values())
    # Many kernels take either whole or sharded tensors, but not both at once.
    sharded = [p for p in wanted if is_sharded(p)]
    whole = [p for p in wanted if not is_sharded(p)]
    return [{"params": part} for part in (sharded, whole) if part]
