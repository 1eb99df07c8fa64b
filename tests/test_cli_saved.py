"""A file that `local.save` wrote, as the MODEL of a command."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from typer.testing import CliRunner, Result

import graphlocal
import zoo
from graphlocal.cli import app
from graphlocal.errors import GraphLocalError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "m.local"
    local = graphlocal.compile(zoo.MODELS["mlp"].make(), example_inputs=zoo.vectors())
    local.save(path)
    return path


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return done


def test_show_and_plan_take_a_saved_model(saved: Path, tmp_path: Path) -> None:
    run("show", str(saved), "--dot", str(tmp_path / "m.dot"), "--text")
    assert (tmp_path / "m.dot").read_text().startswith("digraph")
    assert "backprop" in run("plan", str(saved), "--devices", "2").output


def test_export_takes_a_saved_model(saved: Path, tmp_path: Path) -> None:
    onnx, program = tmp_path / "m.onnx", tmp_path / "m.pt2"
    run("export", str(saved), "--onnx", str(onnx), "--torch-export", str(program))
    x = zoo.normal(5, 6)
    local = graphlocal.load(saved).eval()
    with torch.no_grad():
        expected = local(x)
    torch.testing.assert_close(torch.export.load(program).module()(x), expected)
    session = onnxruntime.InferenceSession(onnx)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--rule", "fa"), ("--partition", "leaf"), ("--input", "2x2"), ("--set", "a=1"), ("--depth", "2")],
)
def test_options_that_the_file_holds_are_refused(option: str, value: str, saved: Path) -> None:
    done = CliRunner().invoke(app, ["show", str(saved), option, value])
    assert isinstance(done.exception, GraphLocalError)
    assert f"{option} beside" in str(done.exception)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 nothing"])
def test_missing_and_damaged_files_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.local"
    if content is not None:
        path.write_bytes(content)
    done = CliRunner().invoke(app, ["show", str(path)])
    assert isinstance(done.exception, GraphLocalError)
    assert str(path) in str(done.exception)
