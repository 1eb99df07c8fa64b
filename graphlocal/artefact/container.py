"""The zip file around the members: written whole, read with suspicion."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from graphlocal.artefact.document import Doc, parse, to_bytes
from graphlocal.errors import FileFormatError, InputError
from graphlocal.files import write_with
from graphlocal.version import __version__

FORMAT = "graphlocal-model"
VERSION = 1
MANIFEST = "manifest.json"
JSON_MEMBERS = ("module.json", "graph.json", "trace.json", "evaluation.json")
TENSOR_MEMBERS = (
    "weights.safetensors", "error_weights.safetensors", "constants.safetensors", "inputs.safetensors",
)  # fmt: skip
MEMBERS = (*JSON_MEMBERS, *TENSOR_MEMBERS)
LARGEST_JSON = 256 * 2**20
"""Bytes of one JSON member; a model of 10,000 operations takes about 10 MB."""
LARGEST_RATIO = 200
"""How many times smaller than its content a compressed JSON member may be; ours are about 20 times smaller."""
_SMALL = 4096
_DATE = (1980, 1, 1, 0, 0, 0)
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError,
    OverflowError, KeyError, IndexError,
)  # fmt: skip
"""What zipfile raises for a damaged file."""


def write_container(path: Path, members: dict[str, bytes]) -> None:
    """Write the members and their manifest; equal members make equal files."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "graphlocal": __version__,
        "torch": torch.__version__,
        "members": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in members.items()
        },
    }

    def fill(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in {MANIFEST: to_bytes(manifest), **members}.items():
                info = zipfile.ZipInfo(name, _DATE)
                info.compress_type = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, data)

    write_with(path, fill)


def read_container(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """The members of a file with verified checksums, and the versions of what wrote it.

    Raises InputError if there is no such file, and FileFormatError for anything that `write_container` can't have
    written: the manifest is checked before another member is unpacked, and sizes before anything is.
    """
    try:
        size = os.stat(path).st_size
        with zipfile.ZipFile(path) as archive:
            infos = _checked(archive, size)
            manifest = parse(_content(archive, infos.pop(MANIFEST)), MANIFEST)
            declared, writers = _manifest(manifest)
            if set(declared) != set(infos):
                raise manifest.error(f"it lists {sorted(declared)}, but the file holds {sorted(infos)}")
            members = {name: _verified(archive, infos[name], *declared[name]) for name in declared}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} can't be read", why=str(error), remedy="give a file that local.save wrote") from error
    except _DAMAGE as error:
        raise FileFormatError(
            f"{path} is not a file that local.save wrote, or it is damaged or cut short",
            why=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="copy or download it again, or save the model anew",
        ) from error
    return members, writers


def _manifest(manifest: Doc) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    if not isinstance(manifest.value, dict) or manifest.value.get("format") != FORMAT:
        raise manifest.error(f"its 'format' is not {FORMAT!r}")
    version = manifest.value.get("version")
    if type(version) is not int or version != VERSION:
        raise FileFormatError(
            f"the file has version {str(version)[:20]} of the format; this graphlocal reads version {VERSION}",
            where=MANIFEST,
            remedy="load it with the graphlocal that wrote it "
            f"({str(manifest.value.get('graphlocal'))[:20]}), or save the model anew",
        )
    _, _, graphlocal, torch_version, members = manifest.fields("format", "version", "graphlocal", "torch", "members")
    declared = {}
    for name, member in members.items():
        size, digest = member.fields("size", "sha256")
        declared[Doc(name, members.place).one_of(MEMBERS)] = size.number(), digest.text()
    missing = [name for name in MEMBERS if name not in declared]
    if missing:
        raise members.error(f"{missing[0]} is missing")
    return declared, {"graphlocal": graphlocal.text()[:40], "torch": torch_version.text()[:40]}


def _checked(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name, if nothing about them is out of the ordinary; nothing is unpacked yet."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        why = _objection(info)
        if name in found:
            why = "it is there twice"
        if why:
            raise FileFormatError(f"the file holds a member {name!r:.80} that does not belong there", why=why)
        found[name] = info
    if MANIFEST not in found:
        raise FileFormatError(
            "the file has no manifest.json", why="it is some other zip file", remedy="give a file that local.save wrote"
        )
    if sum(info.compress_size for info in found.values()) > size:
        raise FileFormatError("the file's members claim more bytes than the file has", why="they overlap")
    return found


def _objection(info: zipfile.ZipInfo) -> str:
    """What is wrong with a member's entry, or nothing."""
    name, mode = info.filename, info.external_attr >> 16
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name or "\0" in name:
        return "its path leads out of the file"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "it is a link or a folder, not a plain file"
    if name not in (MANIFEST, *MEMBERS):
        return f"the members are {', '.join((MANIFEST, *MEMBERS))}"
    if info.flag_bits & 0x1:
        return "it is encrypted"
    if name in TENSOR_MEMBERS:
        return "" if _is_plain(info) else "tensors are stored without compression, in their own size"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "it is compressed in an unknown way"
    if info.file_size > LARGEST_JSON:
        return f"it would unpack to {info.file_size} bytes, of which {LARGEST_JSON} are allowed"
    if info.file_size > _SMALL and info.file_size > LARGEST_RATIO * max(info.compress_size, 1):
        return f"it would unpack to {info.file_size // max(info.compress_size, 1)} times its size (a zip bomb)"
    return ""


def _is_plain(info: zipfile.ZipInfo) -> bool:
    return info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a member; zipfile reads no more than the declared size, and checks the CRC."""
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)
        if len(data) != info.file_size or member.read(1):
            raise FileFormatError(f"{info.filename} has another size than the file says")
    return data


def _verified(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int, digest: str) -> bytes:
    if info.file_size != size:
        raise FileFormatError(f"{info.filename} has {info.file_size} bytes, not the {size} of the manifest")
    data = _content(archive, info)
    if hashlib.sha256(data).hexdigest() != digest:
        raise FileFormatError(
            f"the checksum of {info.filename} is wrong",
            why="the file was changed or damaged after it was saved",
            remedy="copy or download it again, or save the model anew",
        )
    return data


def summary(writers: dict[str, Any]) -> str:
    """`graphlocal 0.1.0 and torch 2.13.0`."""
    return f"graphlocal {writers['graphlocal']} and torch {writers['torch']}"
