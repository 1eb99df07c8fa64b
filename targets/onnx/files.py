"""Files and folders written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir

from graphlocal.errors import InputError

LARGE = 1_500_000_000
"""Bytes of weights from which on they go into a file of their own; protobuf ends at 2 GiB."""


def save(model: Any, folder: Path, name: str, external: bool | None = None) -> list[str]:
    """Write `name` into a folder, and `name.data` for the weights of a large model; return the names of the files.

    external: whether weights go into a file of their own; None, if they are large.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external is None:
        external = size > LARGE
    data = f"{name}.data" if external and size else None
    onnx_ir.save(model, folder / name, external_data=data, size_threshold_bytes=0 if data else 256)
    return [name, *([data] if data else [])]


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """A folder beside `target` in which it is made; gone afterwards. Raises InputError where there can't be one."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        outer = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        place = outer / "made"
        place.mkdir()  # unlike the outer one with the usual permissions
    except OSError as error:
        raise InputError(f"{target} can't be written", why=str(error)) from error
    try:
        yield place
    except OSError as error:
        raise InputError(f"{target} can't be written", why=str(error)) from error
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def put_files(place: Path, names: list[str], folder: Path) -> None:
    """Move files to where they belong, the last one first; what they replace comes back if one can't be moved."""
    kept: list[tuple[Path, Path]] = []
    moved: list[Path] = []
    try:
        for name in reversed(names):
            target = folder / name
            if target.exists() and len(names) > 1:
                old = place / f"{name}.old"
                os.replace(target, old)
                kept.append((old, target))
            os.replace(place / name, target)
            moved.append(target)
    except OSError:
        for target in moved:
            target.unlink()
        for old, target in kept:
            os.replace(old, target)
        raise


def put_folder(place: Path, target: Path) -> None:
    """Move a folder of `workplace` to where it belongs; the one that it replaces comes back if that fails."""
    old = place.with_name(place.name + ".old")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(place, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
