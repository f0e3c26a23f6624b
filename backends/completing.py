"""Metadata of a loaded program, worked out when something first asks for it.

Running a saved model needs no shapes, and finding them takes longer than reading its weights.
"""

from __future__ import annotations

import torch

from torchlathe.ir import ArtifactError, Error, Program
from torchlathe.ir.edit import fake_run

__all__ = ["complete"]


def complete(program: Program) -> None:
    """Give each node its ``meta["val"]`` by running the graph on fake tensors, once.

    Raises:
        ArtifactError: The graph does not fit its tensors, or not this version of torch.
    """
    last = next((n for n in reversed(program.graph.nodes) if n.op == "call_function"), None)
    if last is None or "val" in last.meta:
        return
    mode = program.fake_mode
    try:
        for node in program.nodes:
            if node.op == "call_function":
                node.meta["val"] = fake_run(node, mode)
    except Error as error:
        raise ArtifactError(
            f"the loaded graph does not work here: {error.message}",
            where=error.where,
            hint=f"this is torch {torch.__version__}; the file's manifest names the one that "
            "wrote it",
        ) from error
