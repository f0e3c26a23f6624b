"""torchlathe: turn a PyTorch model down to size, pass by pass.

Importing this package loads none of it: each public name is loaded when it is first used, so
that ``import torchlathe`` costs next to nothing, starts no device and needs no optional package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from torchlathe._version import __version__

if TYPE_CHECKING:
    from torchlathe import backends, ir, kernels, optim, passes, tools
    from torchlathe._compile import compile, load
    from torchlathe._plan import plan
    from torchlathe.backends import CompiledModel
    from torchlathe.ir import Error, Program, capture
    from torchlathe.passes import PassManager
    from torchlathe.passes.statistics import Calibration
    from torchlathe.tools.checkpoints import load_checkpoint
    from torchlathe.tools.diff import diff

__all__ = [
    "Calibration",
    "CompiledModel",
    "Error",
    "PassManager",
    "Program",
    "__version__",
    "backends",
    "capture",
    "compile",
    "diff",
    "ir",
    "kernels",
    "load",
    "load_checkpoint",
    "optim",
    "passes",
    "plan",
    "tools",
]

_PACKAGES = frozenset({"backends", "ir", "kernels", "optim", "passes", "tools"})
_HOME = {
    "Calibration": "torchlathe.passes.statistics",
    "CompiledModel": "torchlathe.backends",
    "Error": "torchlathe.ir",
    "PassManager": "torchlathe.passes",
    "Program": "torchlathe.ir",
    "capture": "torchlathe.ir",
    "compile": "torchlathe._compile",
    "diff": "torchlathe.tools.diff",
    "load": "torchlathe._compile",
    "load_checkpoint": "torchlathe.tools.checkpoints",
    "plan": "torchlathe._plan",
}


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"torchlathe.{name}")
    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'torchlathe' has no attribute {name!r}", name=name, obj=None)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
