"""rule="auto": maps fitted to true gradients on every N-th step, against a transcription, and on many models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.fitting import STEPS, WindowLayout, refit, thinned
from graphlocal.rules import Calibrated
from graphlocal.text import parse, to_text

DOUBLE = torch.float64


def made(name: str, rule: Calibrated | str = "auto", **options) -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    return graphlocal.compile(model.make(DOUBLE), example_inputs=model.example(DOUBLE), rule=rule, **options)


def ridge(x: list[Tensor], g: list[Tensor], forgetting: float, damping: float) -> Tensor:
    """E of the newest of several calibrations, written out sample by sample."""
    n, m = x[0].shape[1], g[0].shape[1]
    second, cross = torch.zeros(n, n, dtype=DOUBLE), torch.zeros(n, m, dtype=DOUBLE)
    for rows, wanted in zip(x, g, strict=True):
        square = float((rows**2).mean())
        second, cross = forgetting * second, forgetting * cross
        for a, b in zip(rows, wanted, strict=True):
            second = second + torch.outer(a, a) / square / len(rows)
            cross = cross + torch.outer(a, b) / square / len(rows)
    damped = second + damping * second.diagonal().mean() * torch.eye(n, dtype=DOUBLE)
    return torch.linalg.solve(damped, cross).T


# Against a transcription


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(),
                         nn.Linear(5, 4)).double()  # fmt: skip


def true_errors(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """z_1..z_3, and the gradients of the loss with respect to them."""
    z, values = x, []
    for layer in model:
        z = layer(z)
        if isinstance(layer, nn.Tanh):
            z.retain_grad()
            values.append(z)
    F.cross_entropy(z, y).backward()
    model.zero_grad()
    return [v.detach() for v in values], [v.grad for v in values]


@pytest.mark.parametrize("wiring", ["chain", "skip"])
@pytest.mark.parametrize("fused", [False, True], ids=["drop-in", "train_step"])
def test_two_calibrations_and_a_step_equal_the_transcription(wiring, fused):
    rule = Calibrated(every=2, wiring=wiring, forgetting=0.7, ridge=0.01)
    model = perceptron()
    data = [(torch.randn(9, 6, dtype=DOUBLE), torch.randint(4, (9,))) for _ in range(4)]
    local = graphlocal.compile(model, example_inputs=(data[0][0],), rule=rule, partition="blocks")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fused_step = graphlocal.train_step(local, F.cross_entropy, optimizer)
    x: dict[int, list[Tensor]] = {0: [], 1: []}
    g: dict[int, list[Tensor]] = {0: [], 1: []}
    for i, (inputs, labels) in enumerate(data):
        before = copy.deepcopy(model)
        z, e = true_errors(before, inputs, labels)
        if i % 2 == 0:
            for layer in (0, 1):
                source = 2 if wiring == "skip" else layer + 1
                x[layer].append(e[source] * (1 - z[source] ** 2))
                g[layer].append(e[layer])
        maps = {layer: ridge(x[layer], g[layer], 0.7, 0.01) for layer in (0, 1)}
        if i % 2:
            e[1] = (e[2] * (1 - z[2] ** 2)) @ maps[1].T
            source = 2 if wiring == "skip" else 1
            e[0] = (e[source] * (1 - z[source] ** 2)) @ maps[0].T
        below = [inputs, *z]
        updates = {2 * k: ((e[k] * (1 - z[k] ** 2)).T @ below[k]) for k in range(3)}
        if fused:
            fused_step(inputs, labels)
            for k, update in updates.items():
                moved = (before[k].weight - model[k].weight) / 0.1
                torch.testing.assert_close(moved.detach(), update, rtol=1e-6, atol=1e-9)
        else:
            optimizer.zero_grad()
            F.cross_entropy(local(inputs), labels).backward()
            for k, update in updates.items():
                torch.testing.assert_close(model[k].weight.grad, update, rtol=1e-6, atol=1e-9)
            optimizer.step()


MANY = (
    "mlp",
    "small_resnet",
    "unet",
    "vit",
    "language_model",
    "tied_weight",
    "gru_unrolled",
    "siamese",
    "sign_mlp",
    "several_inputs_outputs",
    "audio",
    "partly_detached",
    "transformer_dropout",
)


def check_both_kinds_of_steps(model: zoo.ZooModel) -> None:
    """A calibration is a step of backpropagation; the next step keeps the forward and moves every parameter."""
    module = model.make(DOUBLE)
    other = copy.deepcopy(module)
    local = graphlocal.compile(module, example_inputs=model.example(DOUBLE), rule="auto")
    found = step(local, model.example(DOUBLE), model.loss)
    true = step(other, model.example(DOUBLE), model.loss)
    assert_same_forward(found, true)
    if not any(op.discrete_of for op in local.graph.operations):  # which errors pass by, unlike autograd's
        compared = [name for name, gradient in found.gradients.items() if gradient is not None]
        assert_same_gradients(*({name: s.gradients[name] for name in compared} for s in (found, true)))
    for name, value in local.error_weights.state_dict().items():
        assert value.isfinite().all(), name
        assert value.any(), name
    found = step(local, model.example(DOUBLE), model.loss, seed=1)
    assert_same_forward(found, step(other, model.example(DOUBLE), model.loss, seed=1))
    for name, gradient in true.gradients.items():
        if gradient is not None and gradient.any():
            update = found.gradients[name]
            assert update is not None, name
            assert update.isfinite().all(), name


@pytest.mark.parametrize("model", zoo.models(include=MANY))
def test_calibrations_are_backpropagation_and_the_steps_between_move_every_parameter(model):
    check_both_kinds_of_steps(model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", zoo.models(exclude=MANY))
def test_the_same_on_the_rest_of_the_zoo(model):
    check_both_kinds_of_steps(model)


@pytest.mark.parametrize("partition", ["auto", "blocks", "3+head"])
def test_no_derivative_crosses_a_boundary_but_the_output_s(partition):
    graph = made("small_resnet", partition=partition).graph
    vjp = [c for c in graph.connections if c.kind == "vjp"]
    head = graph.owner[graph.outputs[0]]
    assert vjp
    assert {c.source for c in vjp} == {head}
    fitted = [c for c in graph.connections if c.kind == "feedback"]
    assert fitted
    assert all(c.fitted and c.pooled for c in fitted)
    assert {c.window for c in fitted} == {(3, 3)}
    assert parse(to_text(graph)) == graph


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 9)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return torch.softmax(self.head(z), -1).transpose(1, 2)


def test_the_error_of_the_last_representation_is_exact_also_below_a_head_that_ends_in_other_operations():
    x = torch.randn(3, 4, 6)
    graph = graphlocal.compile(Transposed(), example_inputs=(x,), rule="auto", partition="blocks").graph
    kinds = [(c.source.split(".")[0], c.target, c.kind) for c in graph.connections if c.kind != "loss"]
    assert ("head", "second", "vjp") in kinds
    assert {(source, target) for source, target, kind in kinds if kind == "feedback"} == {("second", "first")}


# Where linear maps are exact


def test_a_linear_net_s_maps_become_its_gradients():
    """The gradient at z_1 is W_2^T e_2, which one batch determines where it has as many samples as features."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).double()
    x, y = torch.randn(40, 4, dtype=DOUBLE), torch.randn(40, 4, dtype=DOUBLE)
    local = graphlocal.compile(model, example_inputs=(x,), rule=Calibrated(ridge=1e-12), partition="leaf")
    F.mse_loss(local(x), y).backward()
    assert graphlocal.alignment(local, x, lambda out: F.mse_loss(out, y)).overall < 1e-4


class Strided(nn.Module):
    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second, self.head = layer, nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.second(torch.tanh(self.first(x))).flatten(1))
        return z


@pytest.mark.parametrize(("layer", "window"), [
    (nn.Conv2d(3, 4, 3, padding=1, bias=False), 3), (nn.Conv2d(3, 4, 1), 1),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), 3), (nn.Conv2d(3, 4, 3, stride=(1, 2), padding=1), 3),
    (nn.Conv2d(3, 4, 1, stride=2), 1),
], ids=str)  # fmt: skip
def test_a_convolution_s_gradient_is_recovered(layer, window):
    """Its gradient is a convolution of its error (transposed where it strides), so nothing is lost in the fit."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 2, 8, 8, dtype=DOUBLE), torch.randint(5, (64,))
    model = Strided(layer, 8).double()
    model(x)
    rule = Calibrated(ridge=1e-12)
    local = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf")
    assert [(c.window, c.local) for c in local.graph.connections if c.fitted] == [((window, window), True)]
    F.cross_entropy(local(x), y).backward()
    assert graphlocal.alignment(local, x, lambda out: F.cross_entropy(out, y)).overall < 0.01


@pytest.mark.parametrize(
    ("source", "target"), [((5, 7), (5, 7)), ((3, 4), (5, 7)), ((2, 2), (8, 9)), ((6, 6), (3, 2)), ((7,), (13,))]
)
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("window", "pooled"), [(1, False), (3, False), (3, True)])
def test_what_a_window_map_sends_is_its_rows_times_e(source, target, window, pooled, local):
    error, z = torch.randn(2, 3, *source, dtype=DOUBLE), torch.randn(2, 4, *target, dtype=DOUBLE)
    layout = WindowLayout((window,) * len(source), pooled, local)
    rows = layout.rows(error, z)
    assert torch.equal(layout.rows(error, z, stride=3), rows[::3])
    matrix = torch.randn(4, rows.shape[1], dtype=DOUBLE)
    expected = (rows @ matrix.T).view(2, -1, 4).transpose(1, 2).reshape(z.shape)
    torch.testing.assert_close(layout.apply([matrix], error, z), expected)


def test_a_pooled_map_reads_positions_and_the_means_around_them():
    """Written out position by position."""
    torch.manual_seed(0)
    error, z = torch.randn(2, 3, 4, 5, dtype=DOUBLE), torch.zeros(2, 6, 4, 5, dtype=DOUBLE)
    here, around, everywhere = (torch.randn(6, 3, dtype=DOUBLE) for _ in range(3))
    expected = torch.zeros_like(z)
    for n, i, j in itertools.product(range(2), range(4), range(5)):
        window = error[n, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        expected[n, :, i, j] = (
            here @ error[n, :, i, j] + around @ window.sum((1, 2)) / 9 + everywhere @ error[n].mean((1, 2))
        )
    matrix = torch.cat([here, around, everywhere], 1)
    torch.testing.assert_close(WindowLayout((3, 3), pooled=True).apply([matrix], error, z), expected)


@pytest.mark.parametrize(("segments", "upper"), [((3, 1), ["4.bn2"]), ((1, 1), ["4.bn1", "4.bn2"])])
def test_by_default_segments_of_given_proportions_lie_below_the_last_layer(segments, upper):
    graph = made("small_resnet", Calibrated(segments=segments)).graph
    assert [s.name for s in graph.subgraphs] == ["segment1", "segment2", "7"]
    assert {c.source for c in graph.connections if c.fitted} == {"segment2"}
    norms = {state.rpartition(".")[0] for state in graph.trainable(graph.subgraph["segment2"]) if "bn" in state}
    assert norms == set(upper)


def test_without_segments_it_is_the_blocks():
    for rule in (Calibrated(segments=()), Calibrated(wiring="skip")):
        names = [s.name for s in made("small_resnet", rule).graph.subgraphs]
        assert names == [s.name for s in made("small_resnet", rule, partition="blocks").graph.subgraphs]


# State


def trained(local: graphlocal.LocalModule, steps: range) -> None:
    optimizer = torch.optim.SGD(local.parameters(), 0.05)
    for i in steps:
        torch.manual_seed(100 + i)
        optimizer.zero_grad()
        F.cross_entropy(local(torch.randn(6, 6).double()), torch.randint(4, (6,))).backward()
        optimizer.step()


def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_had_not_stopped():
    rule = Calibrated(every=3)
    torch.manual_seed(0)
    model = perceptron()
    x = torch.randn(6, 6).double()
    whole = graphlocal.compile(copy.deepcopy(model), example_inputs=(x,), rule=rule)
    trained(whole, range(9))
    half = graphlocal.compile(copy.deepcopy(model), example_inputs=(x,), rule=rule)
    trained(half, range(4))
    other = graphlocal.compile(perceptron(), example_inputs=(x,), rule=rule)
    other.load_state_dict(half.state_dict())
    trained(other, range(4, 9))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert int(whole.error_weights.calibration_steps) == 9


def test_maps_of_windows_go_into_a_file_and_come_back(tmp_path):
    model = zoo.MODELS["small_resnet"]
    local = made("small_resnet", Calibrated(every=3, segments=(2, 1)))
    model.loss(zoo.call(local, model.example(DOUBLE))).backward()
    local.save(tmp_path / "m.local")
    loaded = graphlocal.load(tmp_path / "m.local")
    assert (loaded.graph, loaded.options.rule) == (local.graph, local.options.rule)
    for each in (local, loaded):
        each.original.zero_grad()
        model.loss(zoo.call(each, model.example(DOUBLE))).backward()
    found = dict(loaded.original.named_parameters())
    assert all(torch.equal(p.grad, found[name].grad) for name, p in local.original.named_parameters())


def test_calibrations_come_every_n_steps_and_can_be_forced():
    local = made("mlp", Calibrated(every=3))
    model, seen = zoo.MODELS["mlp"], []
    moments = [b for name, b in local.error_weights.named_buffers() if name.startswith("moments")]

    def once() -> bool:
        before = [b.clone() for b in moments]
        model.loss(zoo.call(local, model.example(DOUBLE))).backward()
        return not all(map(torch.equal, before, moments))

    seen = [once() for _ in range(5)]
    local.calibrating = True
    seen += [once(), once()]
    local.calibrating = False
    seen += [once()]
    assert seen == [True, False, False, True, False, True, True, False]


def test_alignment_measures_the_maps_and_changes_nothing():
    local = made("mlp")
    model = zoo.MODELS["mlp"]
    before = copy.deepcopy(local.state_dict())
    report = graphlocal.alignment(local, model.example(DOUBLE), model.loss)
    assert report.overall > 1
    for name, value in before.items():
        assert torch.equal(local.state_dict()[name], value), name


def test_the_scale_of_the_loss_does_not_change_the_maps():
    found = []
    for scale in (1.0, 65536.0):
        torch.manual_seed(0)
        local = made("small_resnet")
        model = zoo.MODELS["small_resnet"]
        (scale * model.loss(zoo.call(local, model.example(DOUBLE)))).backward()
        found.append({k: v for k, v in local.error_weights.state_dict().items() if k != STEPS})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-12)


def test_a_calibration_that_is_no_number_is_left_out():
    second, cross, weight = torch.eye(3), torch.ones(3, 2), torch.ones(2, 3)
    rows = torch.randn(5, 3)
    rows[2, 1] = torch.inf
    refit([weight], second, cross, rows, torch.randn(5, 2), 0.9, 1e-3)
    assert torch.equal(second, torch.eye(3))
    assert torch.equal(weight, torch.ones(2, 3))
    refit([weight], second, cross, torch.zeros(5, 3), torch.zeros(5, 2), 0.9, 1e-3)
    assert weight.isfinite().all()


def test_rows_are_thinned_evenly_over_positions():
    assert thinned(100, 10, 200) == 1
    stride = thinned(6400, 64, 800)
    assert stride >= 8
    assert {i % 64 for i in range(0, 6400, stride)} == set(range(64))


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"wiring": "ring"}, {"window": 2}, {"forgetting": 1.0}, {"ridge": 0}, {"rows": 0.5},
                {"segments": 2}, {"segments": (1, 0)}],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        Calibrated(**options)


def test_leaves_that_normalize_hand_errors_down_by_their_own_derivative():
    """Fitted through a BatchNorm, errors are far from the gradient, however well they are fitted."""
    torch.manual_seed(0)
    conv = lambda: (nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())  # noqa: E731
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), *conv(), *conv(), nn.Flatten(), nn.Linear(384, 3)).double()
    x, y = torch.rand(64, 1, 8, 8, dtype=torch.float64), torch.randint(3, (64,))
    local = graphlocal.compile(model, example_inputs=(x,), rule=Calibrated(every=1), partition="leaf")
    kinds = {c.target: c.kind for c in local.graph.connections}
    assert kinds == {"0": "feedback", "1": "vjp", "2": "feedback", "4": "vjp", "5": "vjp", "8": "loss"}
    local.calibrating = True
    F.cross_entropy(local(x), y).backward()
    aligned = graphlocal.alignment(local, (x,), lambda output: F.cross_entropy(output, y))
    assert max(aligned.by_subgraph.values()) < 45
