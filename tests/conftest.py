"""Settings that every test shares: torchvision's missing operators, one thread, fixed seeds."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from graphlocal.torchvision_operators import declare_operators

declare_operators()  # before any test file imports torchvision

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
