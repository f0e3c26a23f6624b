"""Finds a Triton for checks that need no GPU.

Triton's wheel needs nothing else, so that a folder that `pip install --target` filled will do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["PINNED", "use_triton"]

# The version whose facts are kept, which torch 2.11 comes with.
PINNED = "3.6.0"

_ROOT = Path(__file__).resolve().parents[2]


def use_triton(directory: str | os.PathLike[str] | None = None) -> str:
    """Make Triton importable.

    Args:
        directory: A folder that holds it; None for the variable TORCHLATHE_TRITON, else what is
            installed, else what ``tools/test`` put next to the repository's files.

    Returns:
        Its version.

    Raises:
        UnsupportedError: There is none.
    """
    from torchlathe.ir.errors import UnsupportedError

    wanted = directory or os.environ.get("TORCHLATHE_TRITON")
    kept = _ROOT / f".triton-{PINNED}"
    if wanted:
        sys.path.insert(0, str(wanted))
    elif importlib.util.find_spec("triton") is None and kept.is_dir():
        sys.path.append(str(kept))
    try:
        import triton
    except ImportError as error:
        raise UnsupportedError(
            "there is no Triton to compile the kernels with",
            where=str(wanted) if wanted else None,
            hint=f"pip install triton=={PINNED}, or name a folder that holds it with --triton",
        ) from error
    # Set here, because Triton 3.9 warns where it is not; fusing is what launches do today.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    version: str = triton.__version__
    return version
