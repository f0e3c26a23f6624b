"""Writes the table of ``docs/kernels.md`` from ``tools/bench/results/kernels_aot.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchlathe.ir.files import write_text

__all__ = ["main", "page_with_table", "table"]

_ROOT = Path(__file__).resolve().parents[2]
RESULTS = _ROOT / "tools" / "bench" / "results" / "kernels_aot.json"
PAGE = _ROOT / "docs" / "kernels.md"

_START = (
    "<!-- Written by `python -m torchlathe.tools.kernels.page` from tools/bench/results; do not "
    "edit from here to the end. -->\n"
)
_ARCHITECTURES = ("sm_80", "sm_90", "gfx942")

_TEXT = """
`torchlathe kernels check -o tools/bench/results/kernels_aot.json`, Triton {triton}: {rows}
binaries, of which {kept} keep their limits. No GPU was involved: these are instructions counted,
not time. *Slots* are the instructions of the main loop for each weight (of the whole kernel for
each element, where there is no loop), on sm_80, sm_90 and gfx942; registers, shared memory in KB
and the kind of matrix instruction are those of sm_90. No binary uses stack, and all load 16 bytes
at a time.

"""


def table(results: Path = RESULTS) -> str:
    """The section as text.

    Raises:
        FileNotFoundError: The result file is missing.
    """
    data = json.loads(results.read_text(encoding="utf-8"))
    rows = data["rows"]
    kept = sum(not row["problems"] for row in rows)
    text = _TEXT.format(triton=data["triton"], rows=len(rows), kept=kept)
    text = text.lstrip("\n") + "\n".join(_lines(rows + data["control"])) + "\n"
    candidates = data.get("candidates", [])
    return text + "".join(f"{line}\n" for line in _candidate_lines(candidates))


def _candidate_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What is known of the tiles that the tuner times."""
    if not rows:
        return
    kept = sum(not row["problems"] for row in rows)
    yield (
        f"\nThe tuner's candidates (`--candidates`), {len(rows)} binaries more, of which {kept} "
        "keep their\nlimits; slots are the most of any.\n"
    )
    yield "| op | architecture | binaries | slots to 16 tokens | beyond | registers | stack |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = row["config"].split()[1]
        groups.setdefault((row["op"], kind, row["arch"]), []).append(row)
    for (op, kind, arch), found in groups.items():
        few = [row for row in found if int(row["config"].split("BM")[1].split()[0]) <= 16]
        many = [row for row in found if row not in few]
        slots = [f"{max(row['slots_per_weight'] for row in part):.2f}" for part in (few, many)]
        most = [str(max(row[name] for row in found)) for name in ("registers", "stack")]
        yield f"| {' | '.join([f'{op} {kind}', arch, str(len(found)), *slots, *most])} |"


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    heads = ("op", "specialisation", *(f"slots {name}" for name in _ARCHITECTURES))
    heads += ("registers", "shared", "products")
    yield f"| {' | '.join(heads)} |"
    yield f"| --- | --- |{' ---: |' * 5} --- |"
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["config"]), {})[row["arch"]] = row
    for (op, config), found in cases.items():
        slots = [_slots(found.get(name)) for name in _ARCHITECTURES]
        main = found["sm_90"]
        facts = (str(main["registers"]), f"{main['shared'] / 1024:.0f}", main["mma"])
        name = op + ", which must fail" if main["problems"] else op
        yield f"| {' | '.join([name, config, *slots, *facts])} |"


def _slots(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['slots_per_weight']:.2f}"


def page_with_table(page: str, results: Path = RESULTS) -> str:
    """The page with the section put in place of what follows its mark.

    Raises:
        ValueError: The page has no mark.
    """
    head, mark, _ = page.partition(_START)
    if not mark:
        raise ValueError("the page has no mark that the table follows")
    return f"{head}{mark}\n{table(results)}"


def main() -> int:
    """Write the page; returns the exit status."""
    write_text(PAGE, page_with_table(PAGE.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
