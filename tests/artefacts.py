"""Helpers of the tests of saved files: training steps to compare, and files that are damaged on purpose."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphlocal
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


class Odd(nn.Module):
    """Tensors of many kinds, tied weights, a module held twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("nothing", torch.empty(0, 7))
        self.register_buffer("halved", torch.tensor([1.5, -0.0], dtype=torch.bfloat16))
        self.register_buffer("phase", torch.tensor([1 + 2j, -1j]))
        self.register_buffer("double_phase", torch.tensor([1 + 2j], dtype=torch.complex128))
        self.register_buffer("wide", torch.arange(6.0).view(2, 3).t())
        self.register_buffer("spread", torch.tensor([2.0]).expand(4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.tensor([4.0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        x = torch.tanh(self.first(x)) * self.wide[0, 0] + self.halved[0].float() * self.spread[0]
        return self.again(torch.tanh(self.second(x))) * self.phase.abs()[0] + self.hidden


def pictures(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def compiled_net(rule: Any = "rec-lra", **options: Any) -> LocalModule:
    torch.manual_seed(0)
    return graphlocal.compile(Net(), example_inputs=pictures(), rule=rule, **options)


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


def forbid_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pickling and unpickling fail the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was pickled or unpickled")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)


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
