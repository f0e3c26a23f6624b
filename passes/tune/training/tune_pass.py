"""The options that passes with a `Trainer` share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from torchlathe.ir import Program
from torchlathe.passes.base import TunePass
from torchlathe.passes.tune.training.hooks import Hook, KeepMasks
from torchlathe.passes.tune.training.module import choose_trainable, masks_of_zeros
from torchlathe.passes.tune.training.options import Schedule, TrainingOptions

__all__ = ["OptionValue", "TrainerPass"]

OptionValue = bool | int | float | str | None


@dataclass(frozen=True)
class TrainerPass(TunePass):
    """A pass that trains by a `Trainer`, with the options of `TrainingOptions`.

    A subclass may give other defaults by declaring a field again.
    """

    steps: int = field(default=200, metadata={"help": "steps of the optimizer"})
    lr: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    optimizer: str = field(default="AdamW", metadata={"help": "a class of torch.optim"})
    optimizer_options: dict[str, OptionValue] = field(
        default_factory=lambda: {"weight_decay": 0.0},
        metadata={"help": "further arguments of the optimizer"},
    )
    schedule: Schedule = field(default="cosine", metadata={"help": "how the rate falls"})
    warmup: int = field(default=10, metadata={"help": "steps over which the rate rises"})
    accumulate: int = field(default=1, metadata={"help": "batches to one step"})
    clip: float | None = field(default=1.0, metadata={"help": "largest norm of the gradients"})
    amp: bool = field(default=False, metadata={"help": "compute in bfloat16 where that is safe"})
    batch_norm: bool = field(
        default=True, metadata={"help": "batch norm follows the data while training"}
    )
    dropout: bool = field(default=False, metadata={"help": "draw dropout while training"})
    trainable: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns of parameters to train; all by default"}
    )
    frozen: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns of parameters to leave alone"}
    )
    keep_zeros: bool = field(
        default=True, metadata={"help": "zeros of weights that are partly zero stay"}
    )
    held_out: float = field(
        default=0.1, metadata={"help": "share of the batches that the result is judged by"}
    )
    evaluate_every: int = field(
        default=0, metadata={"help": "steps between evaluations; 0 for ten in all"}
    )
    patience: int = field(
        default=0, metadata={"help": "stop after so many evaluations without gain; 0 for never"}
    )
    checkpoint: str | None = field(
        default=None, metadata={"help": "folder to save states in, and to go on from"}
    )
    save_every: int = field(default=50, metadata={"help": "steps between two saved states"})
    recompute: bool = field(
        default=False, metadata={"help": "save memory by computing activations twice"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of range.
        """
        super().__post_init__()
        self.training_options()

    def training_options(self, **others: Any) -> TrainingOptions:
        """The options of the trainer.

        Args:
            **others: Those that are to be others than the pass says.
        """
        names = [each.name for each in fields(TrainingOptions)]
        shared = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return TrainingOptions(**{**shared, **others})

    def key(self, **others: Any) -> str:
        """The pass as text, without what makes no difference to the result: for checkpoints.

        Args:
            **others: Options that are to be others than the pass says.
        """
        return replace(self, checkpoint=None, save_every=1, **others).spec()

    def hooks_for(self, program: Program) -> list[Hook]:
        """What keeps the zeros of a program where they are to stay."""
        if not self.keep_zeros:
            return []
        names = choose_trainable(program, self.trainable, self.frozen)
        return [KeepMasks(masks_of_zeros(program, names))]
