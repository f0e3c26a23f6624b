"""What the main loop of a compiled kernel does, read from its assembly.

Source: own. Instructions are counted, not timed: the count is a ceiling on what issue slots
allow, and says nothing of latency.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torchlathe.kernels.aot.compiling import Binary

__all__ = ["Instruction", "Loop", "main_loop", "whole"]


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name with modifiers, and its operands as they are printed."""

    name: str
    operands: str

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel.

    Attributes:
        instructions: One iteration, the branch back included.
        threads: Threads of the block.
        nvidia: Whether this is SASS.
    """

    instructions: tuple[Instruction, ...]
    threads: int
    nvidia: bool

    @property
    def mma(self) -> str:
        """Kind of matrix instruction.

        Returns:
            ``wgmma-registers`` or ``wgmma-shared`` (where the left operand lies), ``mma``,
            ``mfma`` or ``none``.
        """
        found = [i for i in self.instructions if _is_product(i)]
        if not found:
            return "none"
        if not self.nvidia:
            return "mfma"
        if all(i.base.endswith("GMMA") for i in found):
            in_registers = all(re.match(r"R\d+, R\d+, gdesc", i.operands) for i in found)
            return "wgmma-registers" if in_registers else "wgmma-shared"
        return "mma"

    @property
    def products(self) -> int:
        """How many matrix instructions there are."""
        return sum(map(_is_product, self.instructions))

    @property
    def loaded(self) -> Counter[int]:
        """Bytes that one thread loads from global memory in an iteration, by width in bytes."""
        widths: Counter[int] = Counter()
        for instruction in self.instructions:
            width = _sass_load(instruction) if self.nvidia else _gcn_load(instruction)
            widths[width] += width
        del widths[0]
        return widths

    @property
    def load_bytes(self) -> int:
        """Width of the loads that carry most of the bytes."""
        return max(self.loaded.items(), key=lambda item: (item[1], item[0]), default=(0, 0))[0]

    @property
    def asynchronous_bytes(self) -> int:
        """Bytes that one thread copies to shared memory without waiting, in an iteration."""
        return sum(_sass_load(i) for i in self.instructions if i.base == "LDGSTS")

    @property
    def conversions(self) -> int:
        """Conversions of integers to floats, which run at a quarter of the rate or less."""
        return sum(i.base in {"I2F", "I2FP"} for i in self.instructions)

    def counts(self) -> Counter[str]:
        """How often each instruction occurs, without modifiers."""
        return Counter(i.base for i in self.instructions)

    def slots_per(self, things: int, bytes_loaded: int) -> float:
        """Instructions of a thread for each of its share of ``things``.

        Args:
            things: Weights (or elements) of the block in one step of the source's loop.
            bytes_loaded: Bytes that the block copies asynchronously in one such step; the
                compiler may have unrolled the loop, and this tells how often.
        """
        copied = self.asynchronous_bytes * self.threads
        unrolled = max(1, round(copied / bytes_loaded)) if bytes_loaded else 1
        return len(self.instructions) * self.threads / (things * unrolled)


_SASS = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"\s*(\.L_\w+):")
_GCN = re.compile(r"\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|flat_\w+)\s*(.*)")
_GCN_LABEL = re.compile(r"(\.LBB\w+):")


def _is_product(instruction: Instruction) -> bool:
    return "MMA" in instruction.base or instruction.base.startswith("v_mfma")


def _sass_load(instruction: Instruction) -> int:
    if instruction.base not in {"LDG", "LDGSTS"}:
        return 0
    if ".128" in instruction.name:
        return 16
    if ".64" in instruction.name:
        return 8
    return 1 if "8" in instruction.name else 2 if "16" in instruction.name else 4


def _gcn_load(instruction: Instruction) -> int:
    found = re.match(
        r"(?:global|buffer)_load_(?:lds_)?(dword|ushort|ubyte|sbyte|short)(x\d)?",
        (instruction.name),
    )
    if not found:
        return 0
    size = {"dword": 4, "ushort": 2, "short": 2}.get(found[1], 1)
    return size * int((found[2] or "x1")[1:])


def main_loop(binary: Binary) -> Loop | None:
    """The innermost loop with the most matrix instructions, or with the most loads if none has any.

    Returns:
        The loop, or None where the kernel has none.
    """
    nvidia = binary.architecture.is_nvidia
    if nvidia:
        instructions, labels = _parse(binary.assembly, _SASS, _SASS_LABEL)
        bodies = list(_bodies(instructions, labels, lambda i: i.base == "BRA", r"\.L_\w+"))
    else:
        instructions, labels = _parse(binary.assembly, _GCN, _GCN_LABEL)
        bodies = list(_bodies(instructions, labels, _gcn_branches, r"\.LBB\w+"))
    loops = [Loop(body, binary.threads, nvidia) for body in bodies]
    working = [loop for loop in loops if loop.mma != "none"]
    if working:
        return max(working, key=lambda loop: (loop.products, -len(loop.instructions)))
    return max(loops, key=lambda loop: sum(loop.loaded.values()), default=None)


def whole(binary: Binary) -> Loop:
    """All instructions, for a kernel that is executed once from top to bottom."""
    nvidia = binary.architecture.is_nvidia
    pattern, label = (_SASS, _SASS_LABEL) if nvidia else (_GCN, _GCN_LABEL)
    instructions, _ = _parse(binary.assembly, pattern, label)
    return Loop(tuple(instructions), binary.threads, nvidia)


def _gcn_branches(instruction: Instruction) -> bool:
    return instruction.name.startswith(("s_cbranch", "s_branch"))


def _parse(
    text: str, pattern: re.Pattern[str], label: re.Pattern[str]
) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif found := pattern.match(line):
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def _bodies(
    instructions: Sequence[Instruction],
    labels: dict[str, int],
    branches: Callable[[Instruction], bool],
    target: str,
) -> Iterator[tuple[Instruction, ...]]:
    for end, instruction in enumerate(instructions):
        if branches(instruction) and (found := re.search(target, instruction.operands)):
            start = labels.get(found[0], end + 1)
            if start < end:
                yield tuple(instructions[start : end + 1])
