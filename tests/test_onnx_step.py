"""The training step in ONNX Runtime: it follows torch's loss curve, with the same weights, for any batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx_steps import (
    adam,
    distance,
    next_token,
    of_pictures,
    of_tokens,
    of_two_sentences,
    of_vectors,
    pair,
    sgd,
    slow_sgd,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import graphlocal
import zoo
from graphlocal.cli import app
from graphlocal.errors import GraphLocalError, InputError
from graphlocal.rules import FeedbackAlignment, RecLRA
from graphlocal.targets.lowered import NotLowered
from graphlocal.targets.onnx.trainer import OnnxTrainer

# One small model, exported once.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    rule = RecLRA(error_weights="kp")
    return path, *pair(zoo.MODELS["mlp"].make, rule, adam, of_vectors(6), path)


def test_loss_curve_and_states_equal_torch_for_other_batch_sizes(files: Any) -> None:
    _, step, trainer, local = files
    for size in (3, 17, 2):
        assert distance(step, trainer, of_vectors(6), 10, size)[0] < 1e-5
    states = trainer.state_dict()
    for name, value in local.state_dict().items():
        torch.testing.assert_close(states[name], value, atol=1e-4, rtol=0)
    assert float(states["optimizer.step.0.weight"]) == 30
    model = zoo.MODELS["mlp"].make()
    model.load_state_dict(trainer.model_state())


def test_a_step_reads_one_set_of_buffers_and_writes_the_other(files: Any) -> None:
    trainer = OnnxTrainer(files[0], threads=1)
    places = [{name: value.data_ptr() for name, value in states.items()} for states in trainer._sets]
    assert all(places[0][name] != places[1][name] for name, output in trainer._outputs.items() if output)
    x, y = of_vectors(6)(0, 4)
    before = trainer.state_dict()["original.0.weight"]
    trainer.step(x, y)
    trainer.step(x, y)
    assert places == [{name: value.data_ptr() for name, value in states.items()} for states in trainer._sets]
    assert not torch.equal(before, trainer.state_dict()["original.0.weight"])


def test_learning_rate_is_an_input(files: Any) -> None:
    trainer = OnnxTrainer(files[0], threads=1)
    before = trainer.state_dict()
    trainer.step(*of_vectors(6)(0, 4), lr=0.0)
    after = trainer.state_dict()
    assert torch.equal(before["original.0.weight"], after["original.0.weight"])
    assert not torch.equal(before["optimizer.exp_avg.0.weight"], after["optimizer.exp_avg.0.weight"])


def test_training_goes_on_from_given_states(files: Any) -> None:
    first, second = OnnxTrainer(files[0], threads=1), OnnxTrainer(files[0], threads=1)
    batches = of_vectors(6)
    for i in range(3):
        first.step(*batches(i, 4))
    second.load_state_dict(first.state_dict())
    assert [first.step(*batches(i, 4)) for i in (3, 4)] == [second.step(*batches(i, 4)) for i in (3, 4)]
    third = OnnxTrainer(files[0].read_bytes(), first.state_dict(), threads=1)
    assert third.step(*batches(5, 4)) == first.step(*batches(5, 4))


def test_weights_without_a_gradient_stay(files: Any) -> None:
    """Adam divides 0 by its `eps` of 1e-8, which a simplification must not take for 0."""
    trainer = OnnxTrainer(files[0], threads=1)
    before = trainer.state_dict()["original.0.weight"]
    x, y = of_vectors(6)(0, 4)
    x[:, 2] = 0
    trainer.step(x, y)
    after = trainer.state_dict()["original.0.weight"]
    assert torch.equal(before[:, 2], after[:, 2])
    assert not torch.equal(before, after)


def test_file_is_plain_onnx_with_named_states_and_metadata(files: Any) -> None:
    path = files[0]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert (metadata["kind"], metadata["optimizer"], metadata["batch_axis"]) == ("training-step", "Adam", "0")
    assert metadata["rule"] == "RecLRA(error_weights='kp')"
    states = json.loads(metadata["states"])
    assert [item.name for item in model.graph.input] == [*states, "x", "y", "lr"]
    assert model.graph.output[0].name == "loss"
    assert {item.name for item in model.graph.output} == {"loss", *filter(None, states.values())}
    assert set(load_file(path.with_suffix(".safetensors"))) == set(states)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert any(name.startswith("error_weights.") for name, output in states.items() if output)  # kp learns them
    sizes = {
        item.name: [d.dim_param or d.dim_value for d in item.type.tensor_type.shape.dim] for item in model.graph.input
    }
    assert (sizes["x"], sizes["y"], sizes["lr"]) == (["B", 6], ["B"], [])
    assert str(Path(__file__).parent.parent) not in str(model)


def test_bad_input_to_the_trainer_is_refused(files: Any, tmp_path: Path) -> None:
    trainer = OnnxTrainer(files[0], threads=1)
    x, y = of_vectors(6)(0, 4)
    with pytest.raises(InputError, match="takes 1 inputs and 1 labels"):
        trainer.step((x, x), y)
    with pytest.raises(InputError, match=r"shape \[4, 5\]"):
        trainer.step(x[:, :5], y)
    with pytest.raises(InputError, match="no state of this step"):
        trainer.load_state_dict({"original.0.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"step\.onnx lack error_weights"):
        OnnxTrainer(files[0], {})
    with pytest.raises(InputError, match="does not load"):
        OnnxTrainer(b"no model", {})
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match=r"alone\.safetensors does not hold the states"):
        OnnxTrainer(alone)


def test_provider_is_cuda_where_there_is_one(files: Any) -> None:
    providers = OnnxTrainer(files[0]).session.get_providers()
    assert ("CUDAExecutionProvider" in providers) == ("CUDAExecutionProvider" in onnxruntime.get_available_providers())


# Refusals, before anything is written.


def test_bad_options_of_the_export_are_refused(tmp_path: Path) -> None:
    model = zoo.MODELS["mlp"].make()
    local = graphlocal.compile(model, example_inputs=zoo.vectors())
    options = {"loss_fn": F.cross_entropy, "optimizer": sgd(local), "y": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(InputError, match="did you mean 'training-step'"):
        local.export(tmp_path / "a.onnx", kind="training_step", **options)
    with pytest.raises(InputError, match="unknown option 'los_fn'"):
        local.export(tmp_path / "a.onnx", kind="training-step", los_fn=None)
    with pytest.raises(InputError, match="needs loss_fn="):
        local.export(tmp_path / "a.onnx", kind="training-step")
    other = {**options, "optimizer": torch.optim.Adagrad(model.parameters())}
    with pytest.raises(InputError, match="Adagrad"):
        local.export(tmp_path / "a.onnx", kind="training-step", **other)
    with pytest.raises(InputError, match="no place for a model"):
        local.export(tmp_path, kind="training-step", **options)
    assert not list(tmp_path.iterdir())


class Unknown(nn.Module):
    """Samples an image at learned places; the backward of that has no ONNX form."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Linear(16, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.place(x.flatten(1)).view(-1, 2, 2, 2).tanh()
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


def test_operators_without_an_onnx_form_are_named_with_their_subgraph(tmp_path: Path) -> None:
    local = graphlocal.compile(Unknown(), example_inputs=(zoo.normal(3, 1, 4, 4),), partition=1, rule="backprop")
    with pytest.raises(NotLowered, match=r"aten\.grid_sampler_2d_backward\.default \(in \w+\)"):
        local.export(
            tmp_path / "a.onnx", kind="training-step", loss_fn=F.cross_entropy, optimizer=sgd(local),
            y=torch.zeros(3, dtype=torch.long),
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


# Loss curves over 200 steps.


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4)
    )


@pytest.mark.parametrize("rule", ["rec-lra", "lra-fdbk"])
def test_convnet_with_batchnorm_equals_torch(rule: str, tmp_path: Path) -> None:
    batches = of_vectors(1, 8, 8)
    step, trainer, local = pair(convnet, rule, sgd, batches, tmp_path / "a.onnx")
    assert distance(step, trainer, batches, 10, 5)[0] < 1e-5
    states = trainer.model_state()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        torch.testing.assert_close(states[name], local.original.state_dict()[name])


CURVES = [
    ("mlp", "rec-lra", adam, of_vectors(6)),
    ("mlp", RecLRA(error_weights="kp"), sgd, of_vectors(6)),
    ("mlp", FeedbackAlignment(), sgd, of_vectors(6)),
    ("mlp", "backprop", adam, of_vectors(6)),
    ("small_resnet", "rec-lra", slow_sgd, of_vectors(2, 8, 8)),
    ("small_resnet", "backprop", slow_sgd, of_vectors(2, 8, 8)),
    ("unet", "rec-lra", slow_sgd, of_vectors(2, 8, 8)),
    ("vit", "rec-lra", adam, of_vectors(2, 8, 8)),
    ("vit", "backprop", sgd, of_vectors(2, 8, 8)),
    ("gru", "rec-lra", adam, of_vectors(5, 8)),
    ("lstm", "backprop", adam, of_vectors(5, 8)),
    ("language_model", "rec-lra", adam, of_tokens),
    ("embeddings", "rec-lra", adam, of_two_sentences),
]


def label(case: Any) -> str:
    return f"{case[0]}-{getattr(case[1], 'name', case[1])}-{case[2].__name__}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CURVES, ids=label)
def test_loss_of_200_steps_equals_torch(case: Any, tmp_path: Path) -> None:
    name, rule, optimizer, batches = case
    loss = next_token if name == "language_model" else F.cross_entropy
    if name == "unet":
        loss, batches = F.mse_loss, of_pictures
    step, trainer, _ = pair(zoo.MODELS[name].make, rule, optimizer, batches, tmp_path / "a.onnx", loss)
    before = trainer.model_state()
    largest, fall = distance(step, trainer, batches, 200, 8)
    print(f"{label(case)}: largest difference {largest:.1e}, sum of ten losses fell by {fall:.2f}")
    assert largest < 1e-4
    assert any(not torch.equal(value, before[key]) for key, value in trainer.model_state().items())


@pytest.mark.exhaustive
def test_dropout_draws_anew_at_every_step(tmp_path: Path) -> None:
    _, trainer, _ = pair(zoo.MODELS["dropout_mlp"].make, "rec-lra", sgd, of_vectors(6), tmp_path / "a.onnx")
    x, y = of_vectors(6)(0, 16)
    losses = {trainer.step(x, y, lr=0.0) for _ in range(5)}
    assert len(losses) > 1
    first = [trainer.step(*of_vectors(6)(i, 64)) for i in range(150)]
    assert sum(first[-20:]) < sum(first[:20])


# The command line.


@pytest.mark.exhaustive
def test_command_line_exports_a_step_and_trains_with_it(tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    model = ["graphlocal.demo:digits_mlp"]
    done = CliRunner().invoke(
        app,
        ["export", *model, "--input", "4x1x8x8", "--training-step", str(path), "--optimizer", "sgd", "--lr", "0.05"],
    )
    assert done.exit_code == 0, done.output
    trainer = OnnxTrainer(path, threads=1)
    assert trainer.lr == 0.05
    x, y = zoo.normal(9, 1, 8, 8), zoo.tokens(9, high=10)
    assert trainer.step(x, y) > trainer.step(x, y)

    train = ["train", *model, "--epochs", "1", "--seed", "3"]
    tables = [CliRunner().invoke(app, [*train, "--backend", backend]) for backend in ("torch", "onnxruntime")]
    assert [table.exit_code for table in tables] == [0, 0], tables[1].output
    numbers = [next(line for line in table.output.splitlines() if "epoch 1" in line) for table in tables]
    assert numbers[0] == numbers[1]


def test_unknown_backend_is_refused() -> None:
    done = CliRunner().invoke(app, ["train", "--backend", "tensorflow"])
    assert isinstance(done.exception, GraphLocalError)
    assert "use one of torch, onnxruntime" in str(done.exception)
