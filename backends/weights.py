"""Tensors as one safetensors member, written and read piece by piece.

The format is the public one (8 bytes of header size, a JSON header, raw little-endian data), so
that any safetensors reader can open the member. The package's own functions want a file or the
whole content in memory; here one tensor at a time goes through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from torchlathe.ir import ArtifactError

__all__ = ["DTYPES", "map_tensors", "read_tensors", "tensor_member"]

_CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _CODES.items() if hasattr(torch, name)
}
_NAMES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 1 << 28


def tensor_member(tensors: Mapping[str, torch.Tensor]) -> tuple[int, Iterator[bytes | memoryview]]:
    """Size in bytes of the member, and its content in pieces.

    Raises:
        ArtifactError: A tensor of a kind that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide elements first keeps every tensor aligned to its own element.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    offset = 0
    for name in names:
        tensor = tensors[name]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized:
            raise ArtifactError(f"{name} is a {type(tensor).__name__}, which cannot be saved")
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
            raise ArtifactError(
                f"{name} cannot be saved: {tensor.layout}, {tensor.dtype}, {tensor.device}",
                hint="what is saved are dense tensors with values, of a dtype of safetensors",
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name in names:
            if tensors[name].numel():
                yield _bytes_of(tensors[name])

    return 8 + len(text) + offset, pieces()


def read_tensors(size: int, read_into: Callable[[memoryview], None]) -> dict[str, torch.Tensor]:
    """Read all tensors of a member, each into memory of its own.

    Args:
        size: Size of the member in bytes.
        read_into: Fills a buffer with the next bytes.

    Raises:
        ArtifactError: The content is not what the format asks for.
    """
    head = bytearray(8)
    read_into(memoryview(head))
    length = int.from_bytes(head, "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise _broken("the header is larger than the member")
    text = bytearray(length)
    read_into(memoryview(text))
    layout = _layout(text, size - 8 - length)
    tensors = {}
    for name, dtype, shape, count in layout:
        data = torch.empty(count, dtype=torch.uint8)
        if count:
            read_into(data.numpy().data)
        tensors[name] = _over(data.untyped_storage(), 0, shape, dtype)
    return tensors


def map_tensors(mapped: Any, start: int, size: int) -> dict[str, torch.Tensor]:
    """All tensors of a member where they lie in a mapped file; pages are read as they are used.

    Args:
        mapped: The file, mapped so that writing to it changes this process' copy alone.
        start: Where the member begins.
        size: Its size in bytes.

    Raises:
        ArtifactError: The content is not what the format asks for.
    """
    length = int.from_bytes(mapped[start : start + 8], "little")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise _broken("the header is larger than the member")
    first = start + 8 + length
    layout = _layout(bytearray(mapped[start + 8 : first]), size - 8 - length)
    tensors = {}
    offset = first
    for name, dtype, shape, count in layout:
        if count and offset % dtype.itemsize == 0:
            flat = torch.frombuffer(
                mapped, dtype=dtype, count=count // dtype.itemsize, offset=offset
            )
            # Not a view: nothing else is to be found over the same memory.
            tensors[name] = _over(flat.untyped_storage(), 0, shape, dtype)
        else:  # empty, or of a writer that does not align
            data = torch.empty(count, dtype=torch.uint8)
            if count:
                data.numpy().data[:] = mapped[offset : offset + count]
            tensors[name] = _over(data.untyped_storage(), 0, shape, dtype)
        offset += count
    return tensors


def _layout(text: bytearray, size: int) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of each tensor in the order of the data, which it must fill."""
    try:
        header = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise _broken(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken("the header is not a table")
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise _broken(f"{name} has no description")
        dtype, shape, offsets = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and dtype in DTYPES and _sizes(shape) and _sizes(offsets)):
            raise _broken(f"{name} has an impossible dtype, shape or place")
        assert isinstance(shape, list)
        assert isinstance(offsets, list)
        count = math.prod(shape) * DTYPES[dtype].itemsize
        if len(offsets) != 2 or offsets[1] - offsets[0] != count:
            raise _broken(f"{name} does not have the size of its shape")
        found.append((offsets[0], count, name, DTYPES[dtype], tuple(shape)))
    found.sort(key=lambda row: row[:2])
    end = 0
    for start, count, name, _, _ in found:
        if start != end:
            raise _broken(f"{name} does not start where the tensor before it ends")
        end += count
    if end != size:
        raise _broken("the tensors do not fill the member")
    return [(name, dtype, shape, count) for _, count, name, dtype, shape in found]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous()
    size = flat.numel() * flat.element_size()
    start = int(flat.storage_offset()) * flat.element_size()
    return _over(flat.untyped_storage(), start, (size,), torch.uint8).numpy().data


def _over(
    storage: torch.UntypedStorage, start: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A row-major tensor over a storage; unlike the result of a view, it has no base."""
    stride = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, start, shape, stride)


def _broken(text: str) -> ArtifactError:
    return ArtifactError(f"the weights cannot be read: {text}", where="weights.safetensors")
