"""Helpers of the tests of saved files: training steps to compare, and files that are damaged on purpose."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphlocal.artefact.container import MEMBERS, write_container
from graphlocal.runtime import LocalModule
from zoo import ZooModel, call

Members = dict[str, bytes]


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, linear: with state that changes, and random numbers."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, features, 3, padding=1)
        self.norm = nn.BatchNorm2d(features)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(x))


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def steps(local: nn.Module, inputs: Any, loss: Callable[[Any], Tensor], count: int = 2) -> list[Tensor]:
    """Losses of a few training steps with a fixed random state."""
    optimizer = torch.optim.SGD(local.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    losses = []
    torch.manual_seed(11)
    for _ in range(count):
        found = loss(call(local, inputs))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    return losses


def net_steps(local: nn.Module, count: int = 2) -> list[Tensor]:
    return steps(local, (pictures(),), lambda y: y.square().mean(), count)


def zoo_steps(local: nn.Module, model: ZooModel, count: int = 2) -> list[Tensor]:
    return steps(local, model.example(), model.loss, count)


def all_state(local: LocalModule) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not persistent included, and feedback maps."""
    return {name: t.detach().clone() for name, t in (*local.named_parameters(), *local.named_buffers())}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name]), name


# Files.


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in MEMBERS}


def rewritten(path: Path, change: Callable[[Members], None]) -> Path:
    """A copy of the file with changed members and checksums to match, as an attacker would make it."""
    members = members_of(path)
    change(members)
    copy = path.with_name("changed.local")
    write_container(copy, members)
    return copy


def edited(member: str, *keys: Any, to: Any) -> Callable[[Members], None]:
    """Set the value at a place of a JSON member."""

    def change(members: Members) -> None:
        document = json.loads(members[member])
        place = document
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
        members[member] = json.dumps(document).encode()

    return change


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the values of safetensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(found: dict[str, Any], values: bytes) -> bytes:
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + values
