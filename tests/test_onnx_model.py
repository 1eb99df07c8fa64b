"""The ONNX export: functions that are the subgraphs, values that are the evaluated model's, files that are whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphlocal
import zoo
from graphlocal.cli import app
from graphlocal.errors import InputError
from graphlocal.nn import Bernoulli
from graphlocal.targets.onnx import export, files
from graphlocal.targets.onnx.functions import DOMAIN
from graphlocal.targets.onnx.split import chain, read_manifest
from graphlocal.text import parse

QUICK = {"several_inputs_outputs", "message_passing"}


REFUSED = {
    "branch_in_block": "opaque leaf",
    "top_one_experts": "opaque leaf",
    "branch_at_root": "recorded path",
    "skip_torch": "recorded path",
}
"""Models whose control flow only Python can run, with the reason that the error gives."""

HARD_BUT_EXPORTED = ("item", "reassigned_buffer")


def compiled(model: nn.Module, inputs: object, **options: object) -> graphlocal.LocalModule:
    return graphlocal.compile(model, example_inputs=inputs, **options)


def settled(model: nn.Module) -> nn.Module:
    """The model with running statistics that are not the initial ones, so that evaluation differs from training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def evaluated(model: nn.Module, inputs: tuple | dict) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        result = [x.clone() for x in zoo.leaves(zoo.call(model, inputs))]
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    for module, mode in modes:
        module.training = mode
    return result


def tensors(inputs: tuple | dict) -> list[Tensor]:
    return [x for x in (inputs.values() if isinstance(inputs, dict) else inputs) if isinstance(x, Tensor)]


def run(path: Path, inputs: tuple | dict) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, tensors(inputs), strict=True)})


def assert_equal(found: list[np.ndarray], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for array, tensor in zip(found, expected, strict=True):
        assert array.shape == tensor.shape
        scale = tensor.double().abs().max().item() if tensor.numel() else 0.0
        assert np.abs(array.astype(np.float64) - tensor.double().numpy()).max(initial=0.0) <= 1e-5 * scale


def more_rows(inputs: tuple | dict) -> tuple | dict:
    def grown(x: Tensor) -> Tensor:
        return torch.cat([x, x[:2].flip(0)])

    if isinstance(inputs, dict):
        return {name: grown(x) for name, x in inputs.items()}
    return tuple(grown(x) for x in inputs)


def properties(holder: object) -> dict[str, str]:
    return {item.key.removeprefix("graphlocal."): item.value for item in holder.metadata_props}


def check_zoo_model(model: zoo.ZooModel, folder: Path) -> None:
    torch.manual_seed(0)
    module = settled(model.make())
    local = compiled(module, model.example())
    result = local.export(folder / "model.onnx")
    onnx.checker.check_model(str(result.path), full_check=True)
    assert_equal(run(result.path, model.example()), evaluated(module, model.example()))
    if not {"time-first", "graph"} & model.tags and model.name != "message_passing_batch":
        assert_equal(run(result.path, more_rows(model.example())), evaluated(module, more_rows(model.example())))
    proto = onnx.load(result.path)
    names = [function.name for function in proto.functions]
    assert names == [node.op_type for node in proto.graph.node if node.domain == DOMAIN]
    assert sorted([*names, *result.unused]) == sorted(subgraph.name for subgraph in local.graph.subgraphs)
    assert {tensor.name for tensor in proto.graph.initializer} <= set(local.graph.state)
    assert all(node.domain == DOMAIN or node.op_type in ("Shape", "Identity") for node in proto.graph.node)
    split = local.export(folder / "parts", kind="split")
    given = dict(zip(read_manifest(split.path)["inputs"], tensors(model.example()), strict=True))
    parts = chain(split.path)({name: x.numpy() for name, x in given.items()})
    assert_equal(list(parts.values()), evaluated(module, model.example()))


@pytest.mark.parametrize("model", [model for model in zoo.models() if model.id in QUICK])
def test_exported_model_and_its_parts_compute_what_the_evaluated_model_does(model, tmp_path):
    check_zoo_model(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [model for model in zoo.models() if model.id not in QUICK]
    + [pytest.param(zoo.HARD[name], id=name) for name in HARD_BUT_EXPORTED],
)
def test_every_other_zoo_model_exports(model, tmp_path):
    check_zoo_model(model, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_python_can_run_is_refused_with_the_reason(name, tmp_path):
    model = zoo.HARD[name]
    local = compiled(model.make(), model.example())
    with pytest.raises(InputError, match=REFUSED[name]):
        local.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model = zoo.MODELS["small_resnet"]
    local = compiled(settled(model.make()), model.example())
    path = tmp_path_factory.mktemp("resnet") / "model.onnx"
    local.export(path)
    return local, onnx.load(path), path


def test_functions_carry_module_role_and_parameters(resnet):
    local, proto, _ = resnet
    graph = local.graph
    for function, node in zip(proto.functions, (n for n in proto.graph.node if n.domain == DOMAIN), strict=True):
        subgraph, data = graph.subgraph[function.name], properties(function)
        assert data["number"] == str(graph.number[function.name])
        assert tuple(json.loads(data["operations"])) == subgraph.operations
        assert tuple(json.loads(data["representations"])) == tuple(o.value for o in subgraph.outputs)
        assert tuple(json.loads(data["preactivations"])) == tuple(o.preactivation for o in subgraph.outputs)
        assert set(json.loads(data["trainable"])) == set(graph.trainable(subgraph))
        assert json.loads(data["modules"])[0].startswith(data["module"])
        assert f"Subgraph {data['number']}" in function.doc_string
        assert list(node.output) == [o.value for o in subgraph.outputs]
        assert tuple(json.loads(properties(node)["error_neuron"])) == graph.neuron[subgraph.name].values
        assert json.loads(properties(node)["errors_from"]) == [c.name for c in graph.incoming(subgraph.name)]


def test_model_carries_the_error_graph_and_onnx_runtime_reads_it(resnet):
    local, _, path = resnet
    data = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    assert parse(data["graphlocal.graph"]) == local.graph
    assert len(json.loads(data["graphlocal.connections"])) == len(local.graph.connections)
    assert json.loads(data["graphlocal.error_neurons"]).keys() == local.graph.neuron.keys()
    assert "F1" in data["graphlocal.schedule"]
    assert data["graphlocal.rule"] == local.graph.rule


def test_weights_are_initializers_with_the_models_names_and_values(resnet):
    local, proto, _ = resnet
    state = local.original.state_dict()
    assert {name for name, _ in local.original.named_parameters()} <= {t.name for t in proto.graph.initializer}
    for tensor in proto.graph.initializer:
        assert np.array_equal(onnx.numpy_helper.to_array(tensor), state[tensor.name].numpy())


def test_open_batch_is_called_b_and_no_stack_trace_is_left(resnet):
    _, proto, _ = resnet
    assert [i.type.tensor_type.shape.dim[0].dim_param for i in (*proto.graph.input, *proto.graph.output)] == ["B", "B"]
    assert b"stack_trace" not in proto.SerializeToString()
    assert str(Path(__file__).parent).encode() not in proto.SerializeToString()


def test_netron_serves_the_file(resnet):
    netron = pytest.importorskip("netron")
    _, _, path = resnet
    host, port = netron.start(str(path), browse=False)
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/data/{path.name}") as response:
            assert response.read() == path.read_bytes()
    finally:
        netron.stop((host, port))


class Evaluates(nn.Module):
    """Two layers; subclasses do something else in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aux = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)


class Noisy(Evaluates):
    def __init__(self) -> None:
        super().__init__()
        self.units = Bernoulli()

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        if self.training:
            z = z + 0.3 * torch.randn_like(z)
            keep = z.new_empty(z.shape[0], 1).bernoulli_(0.8).div_(0.8)  # stochastic depth
            z = z * keep
        return self.second(self.units(nn.functional.dropout(z, 0.5, self.training)))


class Auxiliary(Evaluates):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = torch.tanh(self.first(x))
        return (self.aux(z), self.second(z)) if self.training else self.second(z)


class OtherPath(Evaluates):
    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.second(torch.tanh(z) if self.training else torch.relu(z))


class ForeignSizes(nn.Module):
    """The head needs the sizes of tensors that it doesn't read: of the input, and of one inside another block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.tanh(self.first(x[::2].reshape(-1, 6)))
        z = torch.tanh(self.second(rows)).mean(0, keepdim=True)
        shifted = z.expand(rows.shape[0], -1)
        return self.head(shifted) + 0 * torch.ones(x.shape[0], 1)[:1], self.head(z), x


@pytest.mark.parametrize("model", [Noisy, Auxiliary, ForeignSizes], ids=lambda model: model.__name__)
def test_what_training_adds_is_gone_in_the_file(model, tmp_path):
    module = model()
    inputs = (torch.randn(4, 5, 6) if model is ForeignSizes else torch.randn(4, 6),)
    local = compiled(module, inputs, partition="leaf")
    result = local.export(tmp_path / "model.onnx")
    for x in (inputs, more_rows(inputs)):
        assert_equal(run(result.path, x), evaluated(module, x))
    assert result.unused == (("aux",) if model is Auxiliary else ())
    split = local.export(tmp_path / "parts", kind="split")
    (name,) = read_manifest(split.path)["inputs"]
    assert_equal(list(chain(split.path)({name: inputs[0].numpy()}).values()), evaluated(module, inputs))
    assert module.training


def test_a_forward_that_evaluates_otherwise_is_refused(tmp_path):
    local = compiled(OtherPath(), (torch.randn(4, 6),))
    with pytest.raises(InputError, match="in another way than in training mode"):
        local.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Bessel(Evaluates):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.special.bessel_j0(x.mean(1, keepdim=True))
        return self.second(torch.tanh(self.first(x)) * scale)


def test_an_operation_without_an_onnx_form_is_named_with_its_subgraph(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_text("what was here")
    local = compiled(Bessel(), (torch.randn(4, 6),))
    with pytest.raises(InputError, match=r"subgraph '.+' can't be written as ONNX: .*bessel") as caught:
        local.export(target)
    assert "test_onnx_model.py" in (caught.value.where or "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert target.read_text() == "what was here"


def mlp() -> graphlocal.LocalModule:
    return compiled(zoo.MODELS["mlp"].make(), zoo.MODELS["mlp"].example())


def test_weights_in_a_file_of_their_own_stay_with_their_model_when_a_file_cannot_be_moved(tmp_path, monkeypatch):
    local = mlp()
    result = local.export(tmp_path / "model.onnx", external_data=True)
    assert result.files == ("model.onnx", "model.onnx.data")
    inputs = zoo.MODELS["mlp"].example()
    assert_equal(run(result.path, inputs), evaluated(local.original, inputs))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.normal_(local.original[0].weight)
    move = os.replace

    def refuse(source, target):
        if Path(target) == result.path and Path(source).suffix == ".onnx":
            raise OSError("the disk is full")
        move(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(InputError, match=r"can't be written[\s\S]*the disk is full"):
        local.export(result.path, external_data=True, check=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_split_folder_is_checked_and_only_an_exported_one_is_replaced(tmp_path):
    local = mlp()
    result = local.export(tmp_path / "parts", kind="split", devices=3)
    manifest = read_manifest(result.path)
    assert [part["subgraph"] for part in manifest["parts"]] == [s.name for s in local.graph.subgraphs]
    assert [part["device"] for part in manifest["parts"]] == sorted(part["device"] for part in manifest["parts"])
    assert manifest["parts"][-1]["device"] > 0
    assert manifest["parts"][1]["reads"] == manifest["parts"][0]["gives"]
    assert parse(manifest["graph"]) == local.graph
    part = result.path / manifest["parts"][0]["file"]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="is not the file that was exported"):
        chain(result.path)
    local.export(result.path, kind="split", check=False)
    chain(result.path)
    other = tmp_path / "own"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an exported folder"):
        local.export(other, kind="split")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "parts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kind": "modle"}, "did you mean 'model'"), ({"opsett": 20}, "did you mean 'opset'")],
)
def test_unknown_kinds_and_options_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        mlp().export(tmp_path / "model.onnx", **options)


def test_missing_onnx_is_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    local = mlp()
    with pytest.raises(InputError, match=r"pip install 'graphlocal\[onnx\]'"):
        export(local.graph, local.compiled.traced, local.original, tmp_path / "model.onnx")


def test_importing_graphlocal_does_not_import_onnx():
    code = "import sys, graphlocal, graphlocal.cli; print([n for n in sys.modules if n.startswith('onnx')])"
    root = Path(graphlocal.__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_command_line_exports_both_forms(tmp_path):
    command = ["export", "graphlocal.demo:digits_mlp", "--input", "8x64", "--onnx", str(tmp_path / "m.onnx"),
               "--split", str(tmp_path / "parts")]  # fmt: skip
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "differs from the model by at most" in result.stdout
    assert onnx.load(tmp_path / "m.onnx").functions
    assert read_manifest(tmp_path / "parts")["parts"]


def test_command_line_without_a_target_is_refused():
    with pytest.raises(InputError, match="nothing to export to"):
        CliRunner().invoke(app, ["export", "graphlocal.demo:digits_mlp", "--input", "8x64"], catch_exceptions=False)
