"""The intermediate representation: capture, the Program, axis terms, cost, verifying, printing."""

if __name__ != "torchlathe.ir":
    raise ImportError("import torchlathe.ir, not ir")

from torchlathe.ir.analysis import Analysis
from torchlathe.ir.capturing import capture, from_exported
from torchlathe.ir.edit import Edit
from torchlathe.ir.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    Error,
    InputError,
    OptionError,
    PassError,
    PreconditionError,
    SpecError,
    UnsupportedError,
    VerifyError,
)
from torchlathe.ir.program import Program, TensorEntry, TensorKind
from torchlathe.ir.provenance import NodeInfo, describe, info, module_path, source_line

__all__ = [
    "Analysis",
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "Edit",
    "Error",
    "InputError",
    "NodeInfo",
    "OptionError",
    "PassError",
    "PreconditionError",
    "Program",
    "SpecError",
    "TensorEntry",
    "TensorKind",
    "UnsupportedError",
    "VerifyError",
    "capture",
    "describe",
    "from_exported",
    "info",
    "module_path",
    "source_line",
]
