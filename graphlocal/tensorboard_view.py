"""A monitor's records for TensorBoard, through torch's own writer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphlocal.errors import InputError
from graphlocal.runtime import LocalModule
from graphlocal.training_records import EpochRecord, StepRecord


class TensorBoardView:
    """Writes scalars at every observation, and histograms where angles are measured too.

    Scalars: loss/training, and by subgraph local loss, update norm, step ratio (what the optimizer changed over the
    weights), angle; credit depth; by epoch and model: loss and test error. Histograms: of every trainable parameter
    (weights/), its local update (updates/), every feedback map (E/). Text: the partition.

    Raises InputError where tensorboard is not installed or the folder can't be written.
    """

    def __init__(self, folder: Path, local: LocalModule) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard's writer is missing", why=str(error), remedy="pip install tensorboard"
            ) from None
        try:
            self.writer: Any = SummaryWriter(str(folder))
        except OSError as error:
            raise InputError(f"{folder} can't be written", why=str(error)) from error
        self.local = local
        self.writer.add_text("partition", _markdown(str(local.graph)), 0)
        self.writer.flush()

    def on_step(self, record: StepRecord) -> None:
        groups = {
            "local loss": record.local_loss, "update norm": record.update_norm, "step ratio": record.step_ratio,
            "angle": record.angle or {},
        }  # fmt: skip
        self._scalar("loss/training", record.loss, record.step)
        self._scalar("angle of all", record.overall_angle, record.step)
        self._scalar("credit depth", record.credit_depth, record.step)
        for group, values in groups.items():
            for subgraph, value in values.items():
                self._scalar(f"{group}/{subgraph}", value, record.step)
        if record.seldom:
            self._histograms(record)
        self.writer.flush()

    def _histograms(self, record: StepRecord) -> None:
        for name, parameter in self.local.original.named_parameters():
            if parameter.requires_grad:
                self._histogram(f"weights/{name}", parameter, record.step)
        for name, update in record.updates.items():
            self._histogram(f"updates/{name}", update, record.step)
        for name, value in self.local.error_weights.state_dict().items():
            self._histogram(f"E/{name}", value, record.step)

    def on_epoch(self, record: EpochRecord) -> None:
        self._scalar(f"epoch loss/{record.of}", record.loss, record.epoch)
        self._scalar(f"test error/{record.of}", record.test_error, record.epoch)
        self.writer.flush()

    def close(self, status: str) -> None:
        self.writer.close()

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self.writer.add_scalar(tag, value, step)

    def _histogram(self, tag: str, tensor: Tensor, step: int) -> None:
        dense = (tensor.to_dense() if tensor.is_sparse else tensor).detach()
        if dense.is_floating_point() and dense.numel() and bool(torch.isfinite(dense).all()):
            self.writer.add_histogram(tag, dense.float(), step)


def _markdown(text: str) -> str:
    """The text as TensorBoard's Markdown keeps it: as code."""
    return "\n".join(f"    {line}" for line in text.splitlines())
