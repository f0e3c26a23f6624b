"""The inductor backend: ``torch.compile`` of the whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from torchlathe.backends.base import FlatCallable, Lowerable
from torchlathe.ir import BackendError, OptionError

__all__ = ["Inductor"]

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Inductor:
    """Compiles by ``torch.compile`` at the first call; training works.

    Args:
        mode: As ``torch.compile`` takes it; exclusive with ``options``.
        dynamic: Whether one compilation serves every size. None: yes if the program has symbolic
            dimensions, no if all are static.
        options: Options of the inductor, as ``torch.compile`` takes them.
    """

    name: ClassVar[str] = "inductor"

    mode: Mode = "default"
    dynamic: bool | None = None
    options: Mapping[str, str | int | bool] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise OptionError(
                f"mode={self.mode!r} is not known", hint=f"one of {', '.join(get_args(Mode))}"
            )
        if self.options and self.mode != "default":
            raise OptionError(
                "mode and options exclude each other",
                hint="torch._inductor.list_mode_options() gives the options of a mode",
            )

    def lower(self, source: Lowerable) -> FlatCallable:
        """Return the compiled function; compiling itself happens at its first call.

        Raises:
            BackendError: ``torch.compile`` does not take the options.
        """
        dynamic = source.dynamic if self.dynamic is None else self.dynamic
        how: dict[str, Any] = {"options": dict(self.options)} if self.options else {}
        if self.mode != "default":
            how["mode"] = self.mode
        module = source.graph_module()
        try:
            compiled = torch.compile(
                module, backend="inductor", fullgraph=True, dynamic=dynamic, **how
            )
        except Exception as error:
            raise BackendError(f"torch.compile refuses {self}: {error}") from error

        def call(*inputs: Any) -> Any:
            try:
                return compiled(*inputs)
            except Exception as error:
                if not _from_compiler(error):
                    raise
                raise BackendError(
                    f"the inductor could not compile {source.name}: "
                    f"{type(error).__name__}: {_first_lines(error)}",
                    hint="a C++ compiler (g++) must be on the path, on a GPU also Triton; "
                    'backend="eager" needs neither',
                ) from error

        return call


def _from_compiler(error: Exception) -> bool:
    """Whether an error comes from compiling rather than from running."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:600]
