"""The inductor backend: ``torch.compile`` of the whole graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from torchlathe.backends.attention import SHORT, write_out_attention
from torchlathe.backends.base import Capabilities, Configured, FlatCallable, Lowerable
from torchlathe.backends.rounding import gives_integers
from torchlathe.ir import BackendError, OptionError

__all__ = ["Inductor", "stored_values"]

# Found on the feed-forward block of MiniLM in w8a8, where 6 took 11 % less time than 12 or 30.
_STORED_FROM = 6

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Inductor(Configured):
    """Compiles by ``torch.compile``; without freezing, training works.

    Args:
        freezing: Make constants of the weights: they are folded and packed for the device. A call
            gives no gradients then, and changed weights are compiled again.
        autotune: Measure several kernels for each matrix product, and take the fastest. On a CPU
            the ones that torch generates need ``freezing``.
        cuda_graphs: Record the calls on a CUDA device as graphs.
        mode: As ``torch.compile`` takes it; exclusive with all of these and ``options``.
        dynamic: Whether one compilation serves every size. None: yes if the program has symbolic
            dimensions, no if all are static.
        options: Options of the inductor, as ``torch.compile`` takes them.
        short_attention: On a CPU, attention of at most so many queries and keys becomes batched
            products with the softmax between them, where it is in float32, of static shape, not
            causal and without grouped heads; 0 leaves all of it to torch's fused kernel.
    """

    name: ClassVar[str] = "inductor"

    freezing: bool = False
    autotune: bool = False
    cuda_graphs: bool = False
    mode: Mode = "default"
    dynamic: bool | None = None
    options: Mapping[str, str | int | bool] | None = None
    short_attention: int = SHORT

    def __post_init__(self) -> None:
        """Hold the options to their types, and to each other.

        Raises:
            OptionError: A value is not of its option's type, or two exclude each other.
        """
        super().__post_init__()
        if self.mode != "default" and self.torch_options():
            raise OptionError(
                "mode and other options exclude each other",
                hint="torch._inductor.list_mode_options() gives the options of a mode",
            )

    @property
    def capabilities(self) -> Capabilities:
        """With freezing it keeps copies of the weights."""
        return Capabilities(training=not self.freezing, live=not self.freezing)

    def torch_options(self) -> dict[str, Any]:
        """The options of the inductor that these stand for."""
        found: dict[str, Any] = {}
        if self.freezing:
            found["freezing"] = True
        if self.autotune:
            found["max_autotune"] = True
            found["max_autotune_gemm_backends"] = "ATEN,TRITON,CPP"
        if self.cuda_graphs:
            found["triton.cudagraphs"] = True
        return found | dict(self.options or {})

    def lower(self, source: Lowerable) -> FlatCallable:
        """Return the compiled function; compiling itself happens at its first call.

        Raises:
            BackendError: ``torch.compile`` does not take the options.
        """
        dynamic = source.dynamic if self.dynamic is None else self.dynamic
        found = self.torch_options()
        how: dict[str, Any] = {}
        if self.mode != "default":
            how["mode"] = self.mode
        elif found := stored_values(source) | found:
            how["options"] = found
        module = source.graph_module()
        write_out_attention(module, self.short_attention)
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

        def frozen(*inputs: Any) -> Any:
            # Torch makes constants of the weights only where no gradient can be asked for.
            with torch.no_grad():
                return call(*inputs)

        return frozen if self.freezing else call


def stored_values(source: Lowerable) -> dict[str, Any]:
    """Options of the inductor for programs that round activations on a CPU.

    A row is read twice there: for its largest value, and to round it. What was computed for it, an
    error function for instance, would be computed twice as well; this has it stored from fewer ops
    on (torch's own limit is 30).
    """
    program = source.program
    on_cpu = all(entry.tensor.device.type == "cpu" for entry in program.entries.values())
    if on_cpu and any(gives_integers(node) for node in program.nodes):
        return {"realize_opcount_threshold": _STORED_FROM}
    return {}


def _from_compiler(error: Exception) -> bool:
    """Whether an error comes from compiling rather than from running."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:600]
