"""torchvision beside a CPU build of torch.

torchvision 0.28.0 registers shape functions for two operators of its C++ library when it is imported. Its wheel from
PyPI is linked against a CUDA build of torch; beside a CPU build the library can't be loaded, the operators don't exist,
and not even a model that never calls them can be imported. Declared here, they can be imported, but not run.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def declare_operators() -> torch.library.Library | None:
    """Declare what `import torchvision` needs, unless torchvision is missing or its own library works.

    The declarations live as long as the result, which this function keeps.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
    except OSError:
        pass
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
