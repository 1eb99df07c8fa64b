"""Programs of torch.export: no pickle in the file, the model's outputs, and a step that trains itself."""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typer.testing import CliRunner

import graphlocal
import zoo
from graphlocal.cli import app
from graphlocal.errors import InputError
from graphlocal.targets.torch_export import DOCUMENT, pickled_members
from graphlocal.text import from_document

ROOT = Path(__file__).resolve().parent.parent
FAST = ("nested_output", "small_resnet", "keyword_none")


def is_pickle(data: bytes) -> bool:
    """Whether bytes are one whole pickle, or a zip file, as torch.save writes it."""
    try:
        *_, (_, _, last) = pickletools.genops(data)
    except Exception:
        return data.startswith(b"PK")
    return last == len(data) - 1


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def loaded(path: Path) -> nn.Module:
    return torch.export.load(path).module()


def same(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def grown(inputs: Any) -> Any:
    """One more row in each tensor."""
    return pytree.tree_map(lambda x: torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x, inputs)


SKIPPED = ("message_passing",)
"""Its rows are counted by other rows, so that one more makes no graph."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST else pytest.mark.exhaustive) for n in zoo.MODELS if n not in SKIPPED],
)
def test_model_comes_back_without_graphlocal_and_without_pickle(name: str, tmp_path: Path) -> None:
    model, example = zoo.MODELS[name].make(), zoo.MODELS[name].example()
    local = graphlocal.compile(model, example_inputs=example)
    written = local.export(tmp_path / "m.pt2")
    assert written.difference < 1e-5
    assert not [member for member, data in members(written.path).items() if is_pickle(data)]
    local.eval()
    arguments = local.compiled.traced.arguments
    program = loaded(written.path)
    args, kwargs = arguments.args, arguments.kwargs
    if all(isinstance(size, str) for item in local.graph.inputs if item.type for size in item.type.shape[:1]):
        args, kwargs = grown(args), grown(kwargs)  # not where time comes first, whose length a recurrent graph holds
    with torch.no_grad():
        same(program(*args, **kwargs), local(*args, **kwargs))
    assert set(program.state_dict()) <= set(model.state_dict())


def test_every_operator_names_its_subgraph_and_the_graph_rides_along(tmp_path: Path) -> None:
    model = zoo.MODELS["small_resnet"]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    local.export(tmp_path / "m.pt2")
    extra = {DOCUMENT: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    marks = [
        node.meta["custom"]
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), Tensor) and node.op == "call_function"
    ]
    assert {mark["subgraph"] for mark in marks} - {""} == set(local.graph.subgraph)
    assert {mark["operation"] for mark in marks} <= set(local.graph.operation)
    assert from_document(json.loads(extra[DOCUMENT])["graph"]) == local.graph
    assert str(ROOT).encode() not in b"".join(members(tmp_path / "m.pt2").values())


def small(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8, bias=not norm), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.ReLU(), nn.Linear(8, 3)
    )


def export_step(path: Path, model: nn.Module, make: Callable[..., Any]) -> Any:
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 5))
    y = torch.zeros(4, dtype=torch.long)
    return local, local.export(
        path, kind="training-step", loss_fn=F.cross_entropy, optimizer=make(local.parameters(), 0.01), y=y
    )


@pytest.mark.parametrize("make", [torch.optim.Adam, pytest.param(torch.optim.SGD, marks=pytest.mark.exhaustive)])
def test_training_step_trains_its_own_buffers_as_train_step_does(make: Any, tmp_path: Path) -> None:
    local, written = export_step(tmp_path / "step.pt2", small(), make)
    assert not [member for member, data in members(written.path).items() if is_pickle(data)]
    step = graphlocal.train_step(local, F.cross_entropy, make(local.parameters(), 0.01))
    program = loaded(written.path)
    generator = torch.Generator().manual_seed(1)
    for size in (4, 7, 2, 4):
        x = torch.randn(size, 5, generator=generator)
        y = torch.randint(0, 3, (size,), generator=generator)
        torch.testing.assert_close(program(x, y, torch.tensor(0.01)), step(x, y))
    states = program.state_dict()
    for name, value in local.state_dict().items():
        torch.testing.assert_close(states[name], value)


def test_learning_rate_is_an_input(tmp_path: Path) -> None:
    export_step(tmp_path / "step.pt2", small(norm=False), torch.optim.SGD)
    program = loaded(tmp_path / "step.pt2")
    before = {name: value.clone() for name, value in program.state_dict().items()}
    program(torch.randn(3, 5), torch.zeros(3, dtype=torch.long), torch.tensor(0.0))
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())


# Refusals, before anything is written.


class Weight(Tensor):
    """A subclass, which torch pickles."""


def test_what_torch_would_pickle_is_refused(tmp_path: Path) -> None:
    local = graphlocal.compile(small(), example_inputs=torch.randn(4, 5))

    def loss(output: Tensor, _: Any) -> Tensor:
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
        return (output - drawn).square().mean()

    options = {"loss_fn": loss, "optimizer": torch.optim.SGD(local.parameters(), 0.1), "y": torch.zeros(4)}
    with pytest.raises(InputError, match=r"torch would pickle .*\n.*no pickle"):
        local.export(tmp_path / "a.pt2", kind="training-step", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_archive_of_torch_export_save_is_told_apart(tmp_path: Path) -> None:
    program = torch.export.export(small(), (torch.randn(4, 5),))
    torch.export.save(program, tmp_path / "theirs.pt2")
    assert pickled_members((tmp_path / "theirs.pt2").read_bytes()) == ["the example inputs"]
    assert any(map(is_pickle, members(tmp_path / "theirs.pt2").values()))


def test_bad_options_and_models_are_refused(tmp_path: Path) -> None:
    local = graphlocal.compile(small(), example_inputs=torch.randn(4, 5))
    with pytest.raises(InputError, match=r"can't hold the kind 'split'"):
        local.export(tmp_path / "a.pt2", kind="split")
    with pytest.raises(InputError, match="unknown option 'opset'"):
        local.export(tmp_path / "a.pt2", opset=20)
    with pytest.raises(InputError, match="needs loss_fn="):
        local.export(tmp_path / "a.pt2", kind="training-step")
    with pytest.raises(InputError, match=r"local\.save\(path\)"):
        local.export(tmp_path / "a.local")
    with pytest.raises(InputError, match=r"suffix \.pt2"):
        local.export(tmp_path / "a.pt", kind="training-step")
    with pytest.raises(InputError, match="can't be written"):
        local.export(Path("/dev/null/a.pt2"))
    hard = zoo.HARD["branch_in_block"]
    with pytest.raises(InputError, match="opaque leaf"):
        graphlocal.compile(hard.make(), example_inputs=hard.example()).export(tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_command_line_writes_a_program(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    command = ["export", "graphlocal.demo:digits_mlp", "--input", "4x1x8x8", "--torch-export"]
    done = CliRunner().invoke(app, [*command, str(path)])
    assert done.exit_code == 0, done.output
    assert loaded(path)(zoo.normal(9, 1, 8, 8)).shape == (9, 10)
    done = CliRunner().invoke(app, [*command, str(tmp_path / "m.onnx")])
    assert isinstance(done.exception, InputError)
