"""What passes can rely on about quantised programs."""

from __future__ import annotations

from typing import ClassVar

from torchlathe.ir import Program
from torchlathe.passes.base import Fact

__all__ = ["Unpacked", "packed_ops"]

# Ops whose weights lie in a kernel's own order.
_PACKED = (
    "torchlathe::w4a16_linear",
    "torchlathe::w4a16_low_rank_linear",
    "torchlathe::w4a16_experts_linear",
    "torchlathe::w8a16_linear",
    "torchlathe::w8a8_linear",
    "torchlathe::w4a8_linear",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_weight_int8pack_mm",
)


def packed_ops(program: Program) -> list[str]:
    """Names of the nodes that read weights in a kernel's own order."""
    return [
        node.name
        for node in program.nodes
        if node.op == "call_function"
        and getattr(getattr(node.target, "_schema", None), "name", "") in _PACKED
    ]


class Unpacked(Fact):
    """No weight is packed for a kernel: what reads it is still an ordinary layer."""

    name: ClassVar[str] = "no weight is packed for a kernel"

    @classmethod
    def holds(cls, program: Program) -> bool:
        """Whether no fused op is there yet."""
        return not packed_ops(program)
