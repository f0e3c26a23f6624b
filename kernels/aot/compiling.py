"""Compiles a Triton kernel for an architecture that need not be present.

Source: own, on `triton.compile` and the assemblers that its wheel carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURES", "Architecture", "Binary", "compile_kernel", "read_binary"]


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture that kernels are compiled for.

    Attributes:
        name: As users write it, ``sm_90`` or ``gfx942``.
        backend: Triton's name of the backend.
        arch: Triton's name of the architecture.
        lanes: Threads of a warp or wave.
        shared_bytes: Shared memory that one block may have.
    """

    name: str
    backend: str
    arch: int | str
    lanes: int
    shared_bytes: int

    @property
    def is_nvidia(self) -> bool:
        """Whether its assembly is SASS."""
        return self.backend == "cuda"


# Shared memory of one block: CUDA C programming guide, table of technical specifications
# (163 KB and 227 KB), and the LDS of CDNA 3.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sm_80": Architecture("sm_80", "cuda", 80, 32, 166_912),
    "sm_90": Architecture("sm_90", "cuda", 90, 32, 232_448),
    "gfx942": Architecture("gfx942", "hip", "gfx942", 64, 65_536),
}


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its assembly and the resources of one thread and one block.

    Attributes:
        architecture: What it was compiled for.
        assembly: SASS or GCN assembly.
        ptx: PTX, or nothing.
        registers: Vector registers of a thread.
        stack: Bytes of stack of a thread; more than 0 means spilled registers.
        shared: Bytes of shared memory of a block.
        threads: Threads of a block.
    """

    architecture: Architecture
    assembly: str
    ptx: str
    registers: int
    stack: int
    shared: int
    threads: int


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: Architecture,
    *,
    divisible: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Binary:
    """Compile one specialisation of a ``@triton.jit`` function.

    Args:
        kernel: The function.
        signature: Triton's type of each argument that is not a constant, as in ``*fp16``.
        constants: Value of each ``constexpr`` argument.
        architecture: What to compile for.
        divisible: Arguments that are multiples of 16 when the kernel is launched (pointers: in
            bytes). It must be what a launch would find, or the code is not the code that runs.
        num_warps: Warps of a block.
        num_stages: Stages of the software pipeline.

    Returns:
        The binary and its resources.

    Raises:
        triton.CompilationError: The kernel does not exist on this architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names
    }
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=hints)
    target = GPUTarget(architecture.backend, architecture.arch, architecture.lanes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return read_binary(triton.compile(source, target=target, options=options), architecture)


def read_binary(compiled: Any, architecture: Architecture) -> Binary:
    """The assembly and the resources of a kernel that Triton compiled."""
    threads = compiled.metadata.num_warps * architecture.lanes
    if architecture.is_nvidia:
        registers, stack = _cubin_resources(compiled.asm["cubin"])
        return Binary(
            architecture,
            _disassembled(compiled.asm["cubin"]),
            compiled.asm["ptx"],
            registers,
            stack,
            compiled.metadata.shared,
            threads,
        )
    text = compiled.asm["amdgcn"]
    registers = _gcn(text, "vgpr_count") + _gcn(text, "agpr_count")
    stack = _gcn(text, "private_segment_fixed_size")
    return Binary(architecture, text, "", registers, stack, compiled.metadata.shared, threads)


def _gcn(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def _tool(name: str) -> str:
    from triton import knobs

    path: str = getattr(knobs.nvidia, name).path
    return path


def _run_on(cubin: bytes, *command: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [*command, str(path)], capture_output=True, text=True, check=True
        ).stdout


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    text = _run_on(cubin, _tool("cuobjdump"), "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources:\n{text}")
    return int(found.group(1)), int(found.group(2))


def _disassembled(cubin: bytes) -> str:
    # A spill is counted in STACK, never in LOCAL, whatever the names suggest.
    return _run_on(cubin, _tool("nvdisasm"), "-c")
