"""Two programs side by side: where their values part, and where the difference grows."""

from torchlathe.tools.diff.comparing import diff
from torchlathe.tools.diff.rows import NodeDifference, ProgramDiff

__all__ = ["NodeDifference", "ProgramDiff", "diff"]
