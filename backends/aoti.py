"""The aoti backend: AOTInductor, one ``.pt2`` that runs without torchlathe and without Python."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchlathe.backends.attention import SHORT, write_out_attention
from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.exporting import Boundary, exported_program
from torchlathe.backends.inductor import stored_values
from torchlathe.ir import BackendError
from torchlathe.ir.files import copy_file
from torchlathe.ir.quiet import quiet_torch

__all__ = ["AOTInductor", "PackageRun"]


@dataclass(frozen=True)
class AOTInductor(Configured):
    """Compiles ahead of time by ``torch._inductor.aoti_compile_and_package``.

    ``compiled.export("model.pt2")`` writes the package. ``torch._inductor.aoti_load_package`` runs
    it in a process that has torch and no torchlathe, with the tensor inputs in their order; it
    gives a list of tensors. Its metadata has the names of both.

    Args:
        autotune: Measure several kernels for each matrix product, and take the fastest.
        freezing: Fold and pack the weights for the device.
        options: Options of the inductor.
        short_attention: As the inductor backend's.
    """

    name: ClassVar[str] = "aoti"

    autotune: bool = False
    freezing: bool = True
    options: Mapping[str, str | int | bool] | None = None
    short_attention: int = SHORT

    @property
    def capabilities(self) -> Capabilities:
        """All dtypes and devices of the inductor; no gradients, and copies of the weights."""
        return Capabilities()

    def lower(self, source: Lowerable) -> PackageRun:
        """Compile the program, and load the package.

        Raises:
            BackendError: Torch cannot export or compile it.
        """
        exported, boundary = exported_program(
            source, rewrite=lambda module: write_out_attention(module, self.short_attention)
        )
        folder = tempfile.mkdtemp(prefix="torchlathe-aoti-")
        path = str(Path(folder) / "model.pt2")
        configs: dict[str, Any] = {
            "aot_inductor.metadata": {
                "torchlathe.inputs": ",".join(boundary.inputs),
                "torchlathe.outputs": ",".join(boundary.outputs),
            },
            **({"freezing": True} if self.freezing else {}),
            **({"max_autotune": True} if self.autotune else {}),
            **stored_values(source),
            **dict(self.options or {}),
        }
        try:
            with quiet_torch(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=path, inductor_configs=configs
                )
                package = torch._inductor.aoti_load_package(path)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            text = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise BackendError(
                f"AOTInductor could not compile {source.name}: {type(error).__name__}: "
                f"{text[:600]}",
                hint="a C++ compiler (g++) must be on the path, on a GPU also Triton; "
                'backend="eager" needs neither',
            ) from error
        return PackageRun(package, boundary, folder)


class PackageRun:
    """A loaded package as a function of flat inputs.

    Args:
        package: What ``aoti_load_package`` gave.
        boundary: Between the program's inputs and outputs and the package's.
        folder: Temporary folder with the package, which goes with this object.
    """

    def __init__(self, package: Any, boundary: Boundary, folder: str) -> None:
        self._package = package
        self._boundary = boundary
        self._path = Path(folder) / "model.pt2"
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the package."""
        with torch.no_grad():
            outputs = self._package(*self._boundary.tensors(inputs))
        if isinstance(outputs, torch.Tensor):
            outputs = [outputs]
        return self._boundary.flat(outputs)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the package, at once or not at all."""
        copy_file(self._path, path)
