"""The command line: what it prints, writes and returns, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

import graphlocal
from graphlocal import cli, demo, training
from graphlocal.data import load
from graphlocal.errors import InputError
from graphlocal.model_spec import example_inputs, load_model, parse_partition
from graphlocal.text import parse, to_text

ROOT = Path(__file__).resolve().parent.parent
MLP, RESNET = "graphlocal.demo:digits_mlp", "graphlocal.demo:SmallResNet"
DIGITS = ("--input", "4x1x8x8")
COMMANDS = typer.main.get_command(cli.app).commands


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run the command line in this process; any exception but SystemExit, a traceback to the user, goes on."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command line adds the current folder

    def call(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["graphlocal", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ran(caught.value.code, *capsys.readouterr())

    return call


def words(text: str) -> str:
    return " ".join(text.split())


# Help


def test_the_package_runs_as_a_module():
    ran = subprocess.run(
        [sys.executable, "-m", "graphlocal", "--help"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(f"  {name} " in ran.stdout for name in ("check", "compile", "train", "demo"))


def test_the_help_lists_every_command_with_what_it_does(run):
    ran = run("--help")
    assert ran.code == 0
    for name, command in COMMANDS.items():
        assert f"{name} {command.get_short_help_str(30)[:20]}" in words(ran.out)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_names_its_options_and_gives_an_example(run, name):
    ran = run(name, "--help")
    assert ran.code == 0
    listed = re.findall(r"--[a-z-]+", ran.out)
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option" and not p.hidden]
    assert options
    for option in options:
        assert set(option.opts) & set(listed) or "--help" in option.opts, option.name
    assert f"Example: graphlocal {name} " in words(ran.out)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:the running statistics of the BatchNorm")  # true of a short training
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_example_in_the_help_runs(run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"Example: graphlocal (.*?)(?:\n\n|$)", COMMANDS[name].help, re.DOTALL)
    if name == "demo":  # has tests of its own
        monkeypatch.setattr(demo, "TRIALS", demo.TRIALS[:1])
    if name == "report":  # of a run
        run("train", "--epochs", "1", "--run", "run")
    ran = run(*example.split())
    assert (ran.code, ran.err) == (0, "")


def test_the_version_names_torch_too(run):
    ran = run("--version")
    assert (ran.code, ran.out) == (0, f"graphlocal {graphlocal.__version__} (torch {torch.__version__})\n")


# check


def test_check_prints_the_report_and_exits_with_0(run):
    ran = run("check", MLP, *DIGITS, "--rule", "backprop")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "Sequential can be compiled into 3 subgraphs\n"


def test_check_exits_with_1_if_the_model_cannot_be_compiled(run):
    ran = run("check", MLP, "--input", "4x5")
    assert (ran.code, ran.err) == (1, "")
    assert "error: Sequential does not run on the example inputs (input: float32[4, 5] on cpu)" in ran.out
    assert "  remedy: pass example_inputs of the shape" in ran.out


def test_check_of_a_torchvision_model_with_its_settings(run):
    arguments = ("torchvision.models:squeezenet1_1", "--input", "3x3x32x32", "--set", "num_classes=4")
    ran = run("check", *arguments, "--partition", "2")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("SqueezeNet can be compiled into 2 subgraphs\n")
    assert "warning: random skip-errors cost accuracy on convolutions" in ran.out


# compile


def test_compile_prints_the_graph_and_writes_one_that_reads_back_equal(run, tmp_path):
    path = tmp_path / "new" / "graph.txt"
    ran = run("compile", RESNET, *DIGITS, "--set", "width=4", "--depth", "2", "--output", path)
    assert (ran.code, ran.err) == (0, "")
    rule = graphlocal.rules.RecLRA(depth=2)
    graph = graphlocal.compile(demo.SmallResNet(4), example_inputs=torch.zeros(4, 1, 8, 8), rule=rule).graph
    assert parse(path.read_text()) == graph
    assert path.read_text() == to_text(graph)
    assert str(graph) in ran.out
    assert f"graph written to {path}" in ran.out
    assert re.search(r"^compiled in \d+\.\d s, traced by: export$", ran.out, re.M)
    assert [file.name for file in path.parent.iterdir()] == ["graph.txt"]


def test_compile_shows_what_each_pass_changed(run):
    plain, shown = run("compile", MLP, *DIGITS), run("compile", MLP, *DIGITS, "--passes")
    local = graphlocal.compile(demo.digits_mlp(), example_inputs=torch.zeros(4, 1, 8, 8))
    for record in local.compiled.records:
        assert record.name in shown.out
    added = [line for line in shown.out.splitlines() if line.startswith("+")]
    assert any("feedback" in line for line in added)
    assert not any(line.startswith("+") for line in plain.out.splitlines())


@pytest.mark.parametrize(
    ("partition", "subgraphs"),
    [("auto", "stem blocks.0 blocks.1 head"), ("2", "segment1 segment2"), ("blocks,head", "stem blocks head")],
)
def test_compile_cuts_as_told(run, partition, subgraphs, tmp_path):
    ran = run("compile", RESNET, *DIGITS, "--partition", partition, "-o", tmp_path / "graph")
    assert ran.code == 0
    assert " ".join(s.name for s in parse((tmp_path / "graph").read_text()).subgraphs) == subgraphs


# train


def test_train_prints_each_epoch_and_saves_weights_that_load(run, tmp_path):
    path = tmp_path / "weights.pt"
    ran = run("train", MLP, "--epochs", 2, "--backprop", "--seed", 3, "--save", path)
    assert (ran.code, ran.err) == (0, "")
    for name in ("rec-lra", "backprop"):
        assert len(re.findall(rf"^{name} epoch \d: test error \d+\.\d\d %$", ran.out, re.M)) == 2
    (error,) = re.findall(r"^rec-lra epoch 2: test error (\S+) %$", ran.out, re.M)
    assert words(ran.out).count(f"{error} %") >= 2  # the table has it too
    torch.manual_seed(3)
    model = demo.digits_mlp()
    start = model[1].weight.clone()
    model.load_state_dict(torch.load(path, weights_only=True))
    assert not torch.equal(model[1].weight, start)
    assert f"{training.error_rate(model, load('digits')):.2f}" == error
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]


def test_train_is_repeated_by_its_seed(run, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train", "--epochs", 1, "--batch-size", 200, "--seed", seed, "--save", tmp_path / name)
        weights.append(torch.load(tmp_path / name, weights_only=True)["1.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_train_takes_a_model_of_the_current_folder_that_wants_vectors(run, tmp_path, monkeypatch):
    source = (
        "from torch import nn\ndef net(width):\n    return nn.Sequential(nn.Linear(64, width), nn.Linear(width, 10))\n"
    )
    (tmp_path / "my_own_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    flags = ("--flatten", "--optimizer", "sgd", "--lr", "0.05", "--rule", "backprop", "--epochs", "1")
    ran = run("train", "my_own_net:net", "--set", "width=12", *flags)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"backprop epoch 1: test error [1-4]?\d\.\d\d %", ran.out)


# Failures


def test_no_command_shows_the_help_and_exits_with_2(run):
    ran = run()
    assert ran.code == 2
    assert "Commands:" in ran.out + ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", MLP, "--inptu", "4x1x8x8"], "No such option: --inptu"),
        (["check"], "Missing argument 'MODEL'"),
        (["chekc"], "No such command 'chekc'"),
        (["compile", MLP, *DIGITS, "--depth", "0"], "Invalid value for '--depth'"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["train", "--batch-size", "1"], "Invalid value for '--batch-size'"),
        (["check", MLP, "--input"], "Option '--input' requires an argument"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(run, arguments, said):
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in words(ran.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "no_such_module:net", *DIGITS], ("'no_such_module' can't be imported", "No module named")),
        (["check", ".relative:net", *DIGITS], ("'.relative' can't be imported",)),
        (["check", "graphlocal.demo", *DIGITS], ("MODEL is 'graphlocal.demo'", "write module:callable")),
        (["check", "graphlocal.demo:digit_mlp", *DIGITS], ("no 'digit_mlp': did you mean 'digits_mlp'?",)),
        (["check", "graphlocal.demo:Path", *DIGITS], ("gives a PosixPath", "a callable that returns a Module")),
        (["check", "graphlocal.demo:BATCH_SIZE", *DIGITS], ("makes no model", "not callable")),
        (["check", MLP], ("no --input is given", "such as --input 8x3x64x64")),
        (["check", MLP, "--input", "4by1"], ("--input '4by1'", "write SHAPE, dtype:SHAPE<HIGH")),
        (["check", MLP, "--input", "float33:4x1"], ("torch has no dtype 'float33'",)),
        (["check", MLP, "--input", "a=4x1", "--input", "4x1"], ("some inputs have a name", "name all of them")),
        (["check", RESNET, *DIGITS, "--set", "width"], ("--set 'width'", "write key=value")),
        (["check", RESNET, *DIGITS, "--set", "wdth=4"], ("makes no model from wdth=4", "argument 'wdth'", "--set")),
        (["check", RESNET, *DIGITS, "--set", "width=abc"], ("makes no model from width=abc", "TypeError")),
        (["check", "torch.nn:Linear", *DIGITS], ("makes no model from no settings", "in_features", "--set key=value")),
        (["compile", MLP, *DIGITS, "--rule", "rec-lar"], ("unknown rule 'rec-lar': did you mean 'rec-lra'?",)),
        (["compile", MLP, *DIGITS, "--partition", "laef"], ("did you mean 'leaf'?",)),
        (["compile", MLP, *DIGITS, "--partition", "9.*,8"], ("the glob '9.*' matches no module",)),
        (["compile", MLP, *DIGITS, "--rule", "backprop", "--depth", "2"], ("--depth 2 with rule 'backprop'",)),
        (["compile", MLP, "--input", "1x1x8x8"], ("a batch of 1", "pass a batch of 2 or more")),
        (["train", "--optimizer", "adamm"], ("unknown optimizer 'adamm'", "use one of adam, sgd")),
        (["train", "--data", "mnits"], ("there is no data set 'mnits'", "did you mean 'mnist'?")),
        (["train", "--data", "mnist", "--data-dir", "/nowhere"], ("no such file: /nowhere/MNIST", "GRAPHLOCAL_DATA")),
    ],
    ids=lambda value: " ".join(value)[:60].replace("/", "_") if isinstance(value, list) else "",
)
def test_an_error_exits_with_1_and_a_message_on_stderr(run, arguments, said):
    ran = run(*arguments)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: ")
    for text in said:
        assert text in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("target", [".", "file/graph.txt"], ids=["a folder", "below a file"])
def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(run, tmp_path, target):
    (tmp_path / "file").write_text("mine")
    ran = run("compile", MLP, *DIGITS, "--output", tmp_path / target)
    assert ran.code == 1
    assert f"error: {tmp_path / target} can't be written" in ran.err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# Ctrl-C


def test_ctrl_c_in_the_middle_of_training_exits_with_130_and_writes_nothing(run, tmp_path, monkeypatch):
    seen: list[int] = []

    def interrupted(*arguments: Any):
        for batch in training_batches(*arguments):
            seen.append(len(batch[0]))
            if len(seen) == 5:
                raise KeyboardInterrupt
            yield batch

    training_batches = training.batches
    monkeypatch.setattr(training, "batches", interrupted)
    ran = run("train", "--epochs", 2, "--save", tmp_path / "weights.pt")
    assert ran.code == 130
    assert ran.err.split() == ["stopped"]
    assert seen == [32] * 5
    assert list(tmp_path.iterdir()) == []


def half(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize("existed", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize("command", ["train", "compile"])
def test_ctrl_c_while_a_file_is_written_leaves_no_half_of_it(run, tmp_path, monkeypatch, command, existed):
    path = tmp_path / "result"
    if existed:
        path.write_text("the old one")
    if command == "train":
        monkeypatch.setattr(torch, "save", lambda state, file: half(file))
        ran = run("train", "--epochs", 1, "--batch-size", 500, "--save", path)
    else:
        monkeypatch.setattr(Path, "write_bytes", lambda file, content: half(file))
        ran = run("compile", MLP, *DIGITS, "--output", path)
    assert (ran.code, ran.err) == (130, "stopped\n")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == (
        {"result": "the old one"} if existed else {}
    )


# Models and inputs by name


def test_example_inputs_have_the_shape_the_type_and_the_range_that_were_asked_for():
    x, tokens, mask = example_inputs(["2x3", "int64:40x5<7", "bool:50"])
    assert (x.shape, x.dtype) == ((2, 3), torch.float32)
    assert (tokens.shape, tokens.dtype) == ((40, 5), torch.int64)
    assert set(tokens.unique().tolist()) == set(range(7))
    assert mask.dtype == torch.bool
    assert set(mask.tolist()) == {False, True}


def test_example_inputs_by_name_are_keywords():
    inputs = example_inputs(["ids=int32:4x5<3", "scale=float64:4"])
    assert {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()} == {
        "ids": ((4, 5), torch.int32),
        "scale": ((4,), torch.float64),
    }


def test_a_partition_is_a_word_a_number_or_globs():
    assert [parse_partition(text) for text in ("auto", "leaf", "12", "a,b.*", "layer*")] == [
        "auto", "leaf", 12, ["a", "b.*"], ["layer*"],
    ]  # fmt: skip


def test_settings_are_python_literals_or_else_strings():
    model = load_model("torch.nn:Linear", ["in_features=3", "out_features=2", "bias=False"])
    assert (model.in_features, model.bias) == (3, None)
    assert load_model("torch.nn:Upsample", ["mode=nearest"]).mode == "nearest"


def test_a_model_that_exists_already_is_taken_as_it_is(monkeypatch):
    model = nn.Linear(2, 2)
    monkeypatch.setattr(demo, "ready", model, raising=False)
    assert load_model("graphlocal.demo:ready", []) is model


@pytest.mark.parametrize("error", [RuntimeError("no such operator"), SyntaxError("bad")], ids=["runtime", "syntax"])
def test_a_module_that_fails_when_imported_is_an_error_of_the_input(monkeypatch, error):
    def fails(name: str) -> Any:
        raise error

    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(InputError, match=f"{type(error).__name__}: {error}"):
        load_model("anything:net", [])


# Saved models


def test_compile_and_train_write_whole_models_to_names_that_end_in_local(run, tmp_path):
    compiled, trained = tmp_path / "c.local", tmp_path / "t.local"
    ran = run("compile", MLP, *DIGITS, "-o", compiled)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, f"model written to {compiled}")
    assert run("train", "--epochs", "1", "--batch-size", "512", "--rule", "backprop", "--save", trained).code == 0
    for path, rule in ((compiled, "RecLRA()"), (trained, "Backprop()")):
        local = graphlocal.load(path)
        assert str(local.options.rule) == rule
        assert local(torch.randn(2, 1, 8, 8)).shape == (2, 10)
