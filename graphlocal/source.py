"""Where in the user's code an operation stands."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import torch
from torch import fx, nn

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OURS = {str(Path(__file__).with_name(f"{name}.py")) for name in ("runtime", "trace", "record", "opaque")}


def source_line(node: fx.Node) -> str:
    """`package/file.py:12`: the innermost line of the user's code, or of torch's if there is none.

    Where the model is traced from within a training loop, the frames up to our own are that loop's.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    ours = [i for i, frame in enumerate(frames) if frame[0] in _OURS]
    frames = frames[ours[-1] + 1 :] if ours else frames
    own = [frame for frame in frames if not frame[0].startswith(_TORCH_FOLDER)]
    if not (own or frames):
        return ""
    file, line = (own or frames)[-1]
    return f"{_short(file)}:{line}"


def _short(file: str) -> str:
    """The path below the folder from which Python imports it."""
    roots = [entry.rstrip("/") + "/" for entry in sys.path if entry and file.startswith(entry.rstrip("/") + "/")]
    return file[len(max(roots, key=len)) :] if roots else Path(file).name


def forward_line(module: nn.Module) -> str:
    """`package/file.py:12`, where a module's forward is defined; empty if its source is not at hand."""
    try:
        file = inspect.getsourcefile(type(module).forward)
        _, line = inspect.getsourcelines(type(module).forward)
    except (OSError, TypeError):
        return ""
    return f"{_short(file)}:{line}" if file else ""
