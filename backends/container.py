"""The file around a saved model: a zip of uncompressed members, in which every byte is checked.

Any zip tool can open it. The archive's comment holds a hash of everything that is not the content
of a listed member, and the manifest holds a hash of each of those: a changed byte is found
wherever it is. This guards against damage and mistakes. It is no signature: whoever can write the
file can also write the hashes, so what reads the members still trusts none of them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torchlathe.ir import ArtifactError
from torchlathe.ir.files import atomic

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "Container",
    "Member",
    "read_container",
    "write_container",
]

FORMAT = "torchlathe"
VERSION = 1
MANIFEST = "manifest.json"

_COMMENT = b"torchlathe sha256:"
_TAIL = len(_COMMENT) + 64
_END = 22  # bytes of a zip's end record before its comment
_ALIGNMENT = 64  # content starts at a multiple of it, so that it could be mapped into memory
_CHUNK = 1 << 22
_REPEAT = "save the model again, or fetch the file again"

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Member:
    """A member to write: its name, and its content in pieces."""

    name: str
    size: int
    pieces: Iterable[Buffer]


# -- writing ---------------------------------------------------------------------------------


def write_container(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], members: Iterable[Member]
) -> None:
    """Write a file at once or not at all; the same content gives the same bytes.

    Args:
        path: Replaced if it exists.
        manifest: What to say about the content; format, version and members are added.
        members: In the order of the file.

    Raises:
        ArtifactError: The file system refuses.
    """
    path = Path(path)
    try:
        with atomic(path) as draft, open(draft, "x+b") as file:
            _write(file, dict(manifest), members)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error


def _write(file: BinaryIO, manifest: dict[str, Any], members: Iterable[Member]) -> None:
    listed: dict[str, dict[str, Any]] = {}
    contents: list[tuple[int, int]] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for member in members:
            digest, start = _write_member(archive, file, member)
            listed[member.name] = {"size": member.size, "sha256": digest}
            contents.append((start, member.size))
        manifest |= {"format": FORMAT, "format_version": VERSION, "members": listed}
        text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
        _write_member(archive, file, Member(MANIFEST, len(text), [text]))
        archive.comment = _COMMENT + b"0" * 64
    end = file.seek(0, os.SEEK_END)
    seal = _seal(file, contents, end)
    file.seek(end - 64)
    file.write(seal)


def _write_member(archive: zipfile.ZipFile, file: BinaryIO, member: Member) -> tuple[str, int]:
    entry = zipfile.ZipInfo(member.name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    large = member.size >= zipfile.ZIP64_LIMIT
    head = file.tell() + 30 + len(member.name) + (20 if large else 0)
    # An extra field is 4 bytes and its content; its tag is one that no tool interprets.
    padding = -(head + 4) % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4C54, padding) + b"\0" * padding
    digest = hashlib.sha256()
    with archive.open(entry, "w", force_zip64=large) as target:
        start = file.tell()
        for piece in member.pieces:
            target.write(piece)
            digest.update(piece)
    return digest.hexdigest(), start


def _seal(file: BinaryIO, contents: Iterable[tuple[int, int]], end: int) -> bytes:
    """Hash everything but the contents of members and the hash itself."""
    digest = hashlib.sha256()
    position = 0
    for start, size in [*sorted(contents), (end - 64, 64)]:
        file.seek(position)
        left = start - position
        while left > 0:
            piece = file.read(min(left, _CHUNK))
            if not piece:
                break
            digest.update(piece)
            left -= len(piece)
        position = start + size
    return digest.hexdigest().encode()


# -- reading ---------------------------------------------------------------------------------


@dataclass
class Container:
    """An open file whose structure and manifest are as they were written.

    Attributes:
        manifest: The parsed manifest.
        members: Per member its start and size in bytes, and the hash of its content.
    """

    manifest: dict[str, Any]
    members: dict[str, tuple[int, int, str]]
    file: BinaryIO

    def read(self, name: str) -> bytes:
        """The whole content of a member.

        Raises:
            ArtifactError: It is not as it was written.
        """
        data = bytearray(self.members[name][1])
        with self.stream(name) as read_into:
            read_into(memoryview(data))
        return bytes(data)

    @contextmanager
    def stream(self, name: str) -> Iterator[Any]:
        """Give a function that fills a buffer with the next bytes of a member.

        On leaving, the whole member must have been read, and is held against its hash.

        Raises:
            ArtifactError: More or less was read than is there, or it is not as it was written.
        """
        start, size, expected = self.members[name]
        self.file.seek(start)
        digest = hashlib.sha256()
        done = 0

        def read_into(buffer: memoryview) -> None:
            nonlocal done
            done += len(buffer)
            if done > size:
                raise ArtifactError(f"{name} ends too early", hint=_REPEAT)
            filled = 0
            while filled < len(buffer):
                count = self.file.readinto(buffer[filled : filled + _CHUNK])  # type: ignore[attr-defined]
                if not count:
                    raise ArtifactError("the file is truncated", where=name, hint=_REPEAT)
                digest.update(buffer[filled : filled + count])
                filled += count

        yield read_into
        if done != size:
            raise ArtifactError(f"{name} is larger than its content", hint=_REPEAT)
        if digest.hexdigest() != expected:
            raise _changed(name)

    def map(self, name: str, *, check: bool) -> tuple[Any, int, int]:
        """The file mapped into memory, and where a member lies in it.

        Args:
            name: Of the member.
            check: Hold it against its hash, which reads all of it once.

        Raises:
            ArtifactError: It is not as it was written.
        """
        start, size, expected = self.members[name]
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        if check:
            digest = hashlib.sha256()
            with memoryview(mapped) as view:
                for place in range(start, start + size, _CHUNK):
                    digest.update(view[place : min(place + _CHUNK, start + size)])
            if digest.hexdigest() != expected:
                raise _changed(name)
        return mapped, start, size


def _changed(name: str) -> ArtifactError:
    return ArtifactError(
        f"{name} was changed or damaged: its sha256 is not the one in {MANIFEST}", hint=_REPEAT
    )


@contextmanager
def read_container(path: str | os.PathLike[str], expected: frozenset[str]) -> Iterator[Container]:
    """Open a file and check all of it but the contents of the listed members.

    Args:
        path: What `write_container` wrote.
        expected: Names of the members that must be there, and nothing else.

    Raises:
        ArtifactError: It is not such a file, of another version, truncated or changed.
    """
    try:
        with open(path, "rb") as file:
            yield _opened(file, expected)
    except ArtifactError as error:
        error.where = f"{path}: {error.where}" if error.where else str(path)
        raise
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}",
            hint="give a file that compiled.save() wrote",
        ) from error


def _opened(file: BinaryIO, expected: frozenset[str]) -> Container:
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise ArtifactError(
            "this is not a saved torchlathe model" if end else "the file is empty",
            hint="give a file that compiled.save() wrote",
        )
    file.seek(max(end - _TAIL, 0))
    comment = file.read()
    if not comment.startswith(_COMMENT):
        raise ArtifactError(
            "the file is truncated, or is not a saved torchlathe model", hint=_REPEAT
        )
    spans = _spans(file, end)
    names = set(spans)
    if names != expected | {MANIFEST}:
        missing = sorted((expected | {MANIFEST}) - names)
        extra = sorted(names - expected - {MANIFEST})
        text = [f"{', '.join(missing)} is missing"] if missing else []
        text += [f"{', '.join(map(repr, extra))} does not belong there"] if extra else []
        raise ArtifactError(f"the members are not those of a saved model: {'; '.join(text)}")
    contents = [span for name, span in spans.items() if name != MANIFEST]
    if _seal(file, contents, end) != comment[len(_COMMENT) :]:
        raise ArtifactError("the file was changed or damaged", hint=_REPEAT)
    start, size = spans[MANIFEST]
    file.seek(start)
    manifest = _manifest(file.read(size))
    members = {}
    for name in expected:
        listed = manifest["members"].get(name)
        if not isinstance(listed, dict) or listed.get("size") != spans[name][1]:
            raise ArtifactError(f"{name} has another size than {MANIFEST} says", hint=_REPEAT)
        members[name] = (*spans[name], str(listed.get("sha256")))
    return Container(manifest, members, file)


def _spans(file: BinaryIO, end: int) -> dict[str, tuple[int, int]]:
    """Start and size of each member's content; names are only compared, never used as paths."""
    try:
        # zipfile reads the directory alone; whatever it chokes on is damage.
        entries = zipfile.ZipFile(file).infolist()
    except Exception as error:
        raise ArtifactError(f"the archive is damaged: {error}", hint=_REPEAT) from error
    spans: dict[str, tuple[int, int]] = {}
    last = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.filename in spans:
            raise ArtifactError(f"the member {entry.filename!r} is there twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ArtifactError(
                f"the member {entry.filename!r} is compressed, which saved models are not",
                hint=_REPEAT,
            )
        if not last <= entry.header_offset <= end - 30:
            raise ArtifactError("the archive is damaged: members overlap", hint=_REPEAT)
        file.seek(entry.header_offset)
        head = file.read(30)
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise ArtifactError("the archive is damaged: no header of a member", hint=_REPEAT)
        name_size, extra_size = struct.unpack("<HH", head[26:30])
        start = entry.header_offset + 30 + name_size + extra_size
        last = start + entry.file_size
        if last > end - _END:
            raise ArtifactError("the file is truncated", where=entry.filename, hint=_REPEAT)
        spans[entry.filename] = (start, entry.file_size)
    return spans


def _manifest(text: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST} is not JSON: {error}", hint=_REPEAT) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{MANIFEST} does not describe a saved torchlathe model")
    if manifest.get("format_version") != VERSION:
        raise ArtifactError(
            f"the file has format version {manifest.get('format_version')!r}, "
            f"this torchlathe reads {VERSION}",
            hint=f"it was written by torchlathe {manifest.get('torchlathe', '?')}: "
            "load it with that version, or save the model again with this one",
        )
    if not isinstance(manifest.get("members"), dict):
        raise ArtifactError(f"{MANIFEST} lists no members", hint=_REPEAT)
    return manifest
