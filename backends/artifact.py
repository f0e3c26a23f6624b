"""Saving a compiled model to one file, and loading it without running anything from the file.

The file is a zip of uncompressed members:

- ``manifest.json``: for people; format and versions, the model's name, the text pipeline, and
  size and hash of each member;
- ``graph.json``: the program, see `torchlathe.backends.graph_json`;
- ``weights.safetensors``: parameters, buffers and constants under their names, each tied one
  once, and small example inputs;
- ``report.json``: what the compilation did.

Saving puts no time, path or device into the file: the same model gives the same bytes. It is
loaded onto the CPU; ``.to(device)`` moves it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from torchlathe._version import __version__
from torchlathe.backends.base import Backend, get_backend
from torchlathe.backends.compiled import CompiledModel
from torchlathe.backends.container import Member, read_container, write_container
from torchlathe.backends.graph_json import SavedReport, plain, program_json, record_specs
from torchlathe.backends.graph_reading import read_program
from torchlathe.backends.weights import map_tensors, read_tensors, tensor_member
from torchlathe.ir import ArtifactError, BackendError

__all__ = ["check", "load", "manifest", "save", "saved_report"]

_GRAPH = "graph.json"
_WEIGHTS = "weights.safetensors"
_REPORT = "report.json"
_MEMBERS = frozenset({_GRAPH, _WEIGHTS, _REPORT})


def save(compiled: CompiledModel, path: str | os.PathLike[str]) -> None:
    """Write a compiled model to one file, at once or not at all.

    Args:
        compiled: The model, with the tensors as they are now.
        path: By custom ``name.tl``; replaced if it exists.

    Raises:
        ArtifactError: The file cannot be written, or something in the program has no place in a
            file.
    """
    program = compiled.program
    graph, tensors = program_json(program)
    size, pieces = tensor_member(tensors)
    report = json.dumps(_report(compiled), indent=2, sort_keys=True).encode() + b"\n"
    about = {
        "torchlathe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": program.model_name,
        "pipeline": record_specs(program.history),
        "parameters": sum(tensor.numel() for tensor in program.parameters.values()),
    }
    members = [
        Member(_WEIGHTS, size, pieces),
        Member(_GRAPH, len(graph), [graph]),
        Member(_REPORT, len(report), [report]),
    ]
    write_container(path, about, members)


def _report(compiled: CompiledModel) -> Any:
    report = compiled.report
    if report is None:
        return None
    data = report if isinstance(report, Mapping) else report.to_dict()
    return plain(data)


def load(
    path: str | os.PathLike[str],
    backend: str | Backend = "eager",
    *,
    mmap: bool = False,
    check: bool = True,
) -> CompiledModel:
    """Load a compiled model.

    It gives the outputs that the saved one gave (bit by bit on the same machine, with as many
    threads), and its
    ``program`` can go through more passes. The file is checked as a whole, and nothing in it is
    run or unpickled; ops that are not torch's own must be registered before, by importing their
    package.

    Args:
        path: What ``compiled.save`` wrote.
        backend: A name, or an instance.
        mmap: Map the weights into memory instead of reading them: pages that are not used are not
            read, and processes that load the same file share them. The file must stay as it is;
            what is written to the tensors goes to a copy of this process.
        check: Hold the weights against their hash, which reads all of them once.

    Returns:
        The model on the CPU. Its ``report`` is a `SavedReport`, or None.

    Raises:
        ArtifactError: The file is missing, truncated, changed, of another version, or needs an
            op that is not there.
        BackendError: An unknown backend, or one that cannot lower the program.
    """
    found = get_backend(backend)
    with read_container(path, _MEMBERS) as container:
        report = _read_report(container.read(_REPORT))
        graph = container.read(_GRAPH)
        if mmap:
            tensors = map_tensors(*container.map(_WEIGHTS, check=check))
        else:
            with container.stream(_WEIGHTS) as read_into:
                tensors = read_tensors(container.members[_WEIGHTS][1], read_into)
        try:
            program = read_program(graph, tensors)
            # Nothing else holds these tensors: an empty source shares nothing.
            return CompiledModel(program, found, source=torch.nn.Module(), report=report)
        except ArtifactError:
            raise
        except BackendError as error:
            if found.name == "eager":
                raise ArtifactError(error.message, hint=error.hint) from error
            raise


def manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a saved file says about itself; reads no weights.

    Raises:
        ArtifactError: As `load`, as far as the file is read.
    """
    with read_container(path, _MEMBERS) as container:
        return container.manifest


def saved_report(path: str | os.PathLike[str]) -> SavedReport | None:
    """The report of a saved file; reads no weights.

    Raises:
        ArtifactError: As `load`, as far as the file is read.
    """
    with read_container(path, _MEMBERS) as container:
        return _read_report(container.read(_REPORT))


def check(path: str | os.PathLike[str]) -> None:
    """Read every member of a saved file, and hold it against its hash.

    Raises:
        ArtifactError: A file that is truncated, was changed, or is of another version.
    """
    with read_container(path, _MEMBERS) as container:
        container.read(_REPORT)
        container.read(_GRAPH)
        with container.stream(_WEIGHTS) as read_into:
            read_tensors(container.members[_WEIGHTS][1], read_into)


def _read_report(text: bytes) -> SavedReport | None:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{_REPORT} is not JSON: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ArtifactError(f"{_REPORT} is not a report")
    return None if data is None else SavedReport(data)
