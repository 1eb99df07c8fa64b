"""Message-passing nets on graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.registry import BATCH, CLASSES, model, normal, tokens


def edges() -> Tensor:
    return tokens(2, 9, seed=2, high=5)


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(12, 5), nn.Linear(11, 6)
        self.head = nn.Linear(6, CLASSES)


@model("message_passing", lambda: (normal(7, 6), edges()), tags="graph gather shared several-inputs")
class MessagePassing(Messages):
    """Two rounds; nodes are rows, edges the columns of `edge_index`."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, sink = edge_index[0], edge_index[1]
        for _ in range(2):
            messages = self.message(torch.cat([x[source], x[sink]], 1)).relu()
            received = x.new_zeros(x.shape[0], 5).index_add(0, sink, messages)
            x = torch.tanh(self.update(torch.cat([x, received], 1)))
        return self.head(x)


@model("message_passing_batch", lambda: (normal(BATCH, 5, 6), edges()), tags="gather several-inputs")
class BatchedMessagePassing(Messages):
    """The same edges for every sample; one label a sample."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, sink = edge_index[0], edge_index[1]
        ends = [x.index_select(1, source), x.index_select(1, sink)]
        messages = self.message(torch.cat(ends, 2)).relu()
        index = sink[None, :, None].expand_as(messages)
        received = torch.zeros_like(x[..., :5]).scatter_add(1, index, messages)
        return self.head(torch.tanh(self.update(torch.cat([x, received], 2))).mean(1))
