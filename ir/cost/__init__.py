"""What a program costs: parameters, bytes and FLOPs, also in symbolic extents."""

from torchlathe.ir.cost.analysis import Cost, NodeCost, ProgramCost

__all__ = ["Cost", "NodeCost", "ProgramCost"]
