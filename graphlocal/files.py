"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from graphlocal.errors import InputError


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError where it can't be written."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_with(path: Path, fill: Callable[[Path], object]) -> None:
    """`write`, with the content that `fill(path)` writes."""
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} can't be written", why=str(error)) from error
    finally:
        with contextlib.suppress(OSError):  # gone, if all went well
            temporary.unlink()
