"""`make sanitize`: the GPU tests of streams and captured steps under tools that look for races and bad accesses.

Not yet run on a GPU. What each run looks for:

- torch's own stream sanitizer: kernels on two streams that touch one tensor without an event between them. This is what
  the streams target has to keep; compute-sanitizer's racecheck does not look across streams.
- memcheck: accesses out of bounds and of freed memory. Without torch's cache of memory, since inside of a cached block
  nothing is out of bounds; captures need that cache.
- racecheck, synccheck: races and barriers inside of one kernel, such as those that inductor or an extension brings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

TESTS = Path(__file__).parent / "test_cuda_streams.py"
STREAMS = "equal_the_sequential_target"
CAPTURED = "a_captured_step_equals and streams and (SGD or Adam)"
STEPS = 20
"""Of the test of many steps; under these tools each takes up to a hundred times as long."""


class Check(NamedTuple):
    """A run of some of the tests. tool: of compute-sanitizer; None for none. environment: what is set for it."""

    name: str
    tests: str
    tool: str | None
    environment: dict[str, str]


CHECKS = (
    Check("streams, torch's stream sanitizer", STREAMS, None, {"TORCH_CUDA_SANITIZER": "1"}),
    Check("streams, memcheck", STREAMS, "memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    Check("captured steps, memcheck", CAPTURED, "memcheck", {}),
    Check("streams, racecheck", STREAMS, "racecheck", {}),
    Check("streams, synccheck", STREAMS, "synccheck", {}),
    Check("captured steps, racecheck", CAPTURED, "racecheck", {}),
    Check("captured steps, synccheck", CAPTURED, "synccheck", {}),
)


def missing() -> list[str]:
    """What the checks need and is not there, each with what to do."""
    found = []
    if torch.version.cuda is None:
        found.append(f"torch {torch.__version__} is a build without CUDA: install a CUDA build of it into .venv")
    elif not torch.cuda.is_available():
        found.append("torch finds no GPU: run this on a machine with an NVIDIA GPU and its driver (see nvidia-smi)")
    if shutil.which("compute-sanitizer") is None:
        found.append("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit, in its folder bin")
    return found


def command(check: Check) -> list[str]:
    """The tests by themselves, in one process, which fails if the tool or a test finds something."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", "-k", check.tests, str(TESTS)]
    if check.tool is None:
        return pytest
    return ["compute-sanitizer", "--tool", check.tool, "--target-processes", "all", "--error-exitcode", "99", *pytest]


def main() -> int:
    if lacking := missing():
        print("make sanitize can't run:", *lacking, sep="\n  ", file=sys.stderr)
        return 2
    failed = []
    for check in CHECKS:
        print(f"== {check.name}", flush=True)
        environment = os.environ | {"GRAPHLOCAL_STRESS_STEPS": str(STEPS)} | check.environment
        if subprocess.run(command(check), env=environment, check=False).returncode:
            failed.append(check.name)
    print(f"found something: {', '.join(failed)}" if failed else "found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
