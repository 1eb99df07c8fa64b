"""graphlocal: compile an existing PyTorch model into one that learns by local rules."""

import pathlib as _pathlib

# In a bare checkout and in an editable install passes/ and targets/ lie beside this folder, not in it.
if not (_pathlib.Path(__file__).resolve().parent / "passes").is_dir():
    __path__.append(str(_pathlib.Path(__file__).resolve().parent.parent))

from graphlocal import partition, rules
from graphlocal.alignment import Alignment, alignment
from graphlocal.captured_step import CapturedStep, captured_step
from graphlocal.check import Finding, Report, check
from graphlocal.compile import compile
from graphlocal.errors import GraphLocalError
from graphlocal.goals import ClassCodes
from graphlocal.load import load
from graphlocal.monitor import Monitor
from graphlocal.plan import Plan, plan
from graphlocal.recalibrate import recalibrate
from graphlocal.representations import knn_error, representations
from graphlocal.runtime import LocalModule
from graphlocal.step import TrainStep, train_step
from graphlocal.version import __version__ as __version__

__all__ = [
    "Alignment",
    "CapturedStep",
    "ClassCodes",
    "Finding",
    "GraphLocalError",
    "LocalModule",
    "Monitor",
    "Plan",
    "Report",
    "TrainStep",
    "alignment",
    "captured_step",
    "check",
    "compile",
    "knn_error",
    "load",
    "partition",
    "plan",
    "recalibrate",
    "representations",
    "rules",
    "train_step",
]
