"""Recurrent nets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.registry import BATCH, CLASSES, model, normal, sequences


class Recurrent(nn.Module):
    """Classifies by the mean of all hidden states."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cells = kind(8, 6, **options)
        self.head = nn.Linear(12 if self.cells.bidirectional else 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cells(x)
        return self.head(states.mean(1 if self.cells.batch_first else 0))


def time_first() -> tuple[Tensor]:
    return (normal(5, BATCH, 8),)


@model("lstm", sequences, tags="recurrent lstm")
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True)


@model("lstm_time_first", time_first, tags="recurrent lstm time-first")
def lstm_time_first() -> nn.Module:
    return Recurrent(nn.LSTM)


@model("lstm_bidirectional", sequences, tags="recurrent lstm")
def lstm_bidirectional() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2)


@model("gru", sequences, tags="recurrent gru")
def gru() -> nn.Module:
    return Recurrent(nn.GRU, batch_first=True)


@model("gru_time_first", time_first, tags="recurrent gru time-first")
def gru_time_first() -> nn.Module:
    return Recurrent(nn.GRU, bidirectional=True, num_layers=2)


@model("gru_unrolled", sequences, tags="recurrent gru shared")
class UnrolledGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)
