"""Settings that every test shares: torchvision's missing operators, one thread, fixed seeds."""

from __future__ import annotations

import _thread
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare the operators that `import torchvision` needs where its C++ library cannot load.

    torchvision 0.28.0 registers shape functions for these two when imported. Its wheel from PyPI
    is linked against a CUDA build of torch, so beside a CPU build they don't exist.
    The result must be kept: the declarations live as long as it does.
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
    for schema in SCHEMAS:
        library.define(schema)
    return library


TORCHVISION = declare_torchvision_operators()

torch.set_num_threads(1)  # pytest-xdist already runs one worker for each core

hypothesis.settings.register_profile(
    "graphlocal",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("graphlocal")


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[float], threading.Timer]]:
    """A timer that presses Ctrl-C after so many seconds, also where the shell has the tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda seconds: threading.Timer(seconds, _thread.interrupt_main)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
