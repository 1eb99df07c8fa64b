"""PerturbConvolutions: which convolutions it rewrites, what it keeps, shares and reports."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_forward, assert_same_gradients, step

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.nn import PerturbativeConv2d
from graphlocal.passes.perturb_convolutions import PerturbConvolutions, Replaced, Rewritten

DOUBLE = torch.float64


RESNET = zoo.MODELS["small_resnet"]


def rewritten(model: nn.Module | None = None, **options) -> Rewritten:
    model = RESNET.make(DOUBLE) if model is None else model
    dtype = next(model.parameters()).dtype
    return PerturbConvolutions(**options).rewrite(model, RESNET.example(dtype))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def reasons(result: Rewritten) -> dict[str, str]:
    return {row.path: row.why for row in result.report.left_alone}


def replaced(result: Rewritten) -> list[str]:
    return [row.path for row in result.report.replaced]


@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_rewriting_keeps_the_shapes_of_every_module(maps, training):
    model = RESNET.make().train(training)
    new = rewritten(model, maps=maps).model
    shapes: dict[nn.Module, dict[str, torch.Size]] = {model: {}, new: {}}
    for root in shapes:
        for path, module in root.named_modules():

            def note(_: nn.Module, args: tuple, output: Tensor, path: str = path, root: nn.Module = root) -> None:
                shapes[root][path] = output.shape

            module.register_forward_hook(note)
        zoo.call(root, RESNET.example())
    assert shapes[new] == shapes[model]
    assert [(path, m.training) for path, m in new.named_modules()] == [
        (path, m.training) for path, m in model.named_modules()
    ]


def test_rewriting_leaves_the_model_as_it_was():
    model, untouched = RESNET.make(), RESNET.make()
    for module in (model, untouched):
        module[1].eval()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    modules = list(model.modules())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rewritten(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in untouched.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert tensor is tensors[name]
        assert torch.equal(tensor, untouched.state_dict()[name]), name
    assert_same_forward(*(step(m, RESNET.example(), zoo.classify) for m in (model, untouched)))


def test_untouched_parameters_and_buffers_are_shared():
    model = RESNET.make()
    result = rewritten(model)
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    new = dict(result.model.named_parameters()) | dict(result.model.named_buffers())
    apart = {name for name in new if new[name] is not old.get(name)}
    assert apart == {f"{path}.{name}" for path in replaced(result) for name in ("weight", "noise_maps")} | {"0.bias"}
    assert not {id(t) for name in apart for t in [new[name]]} & {id(t) for t in old.values()}
    assert not {id(m) for m in model.modules()} & {id(m) for m in result.model.modules()}


@pytest.mark.parametrize("maps", [1, 2])
def test_counts_add_up_to_the_true_sums(maps):
    model = RESNET.make()
    result = rewritten(model, maps=maps)
    report = result.report
    assert (report.before, report.after) == (count(model), count(result.model))
    for row in report.replaced:
        old, new = model.get_submodule(row.path), result.model.get_submodule(row.path)
        assert (row.before, row.after, row.noise) == (count(old), count(new), new.noise_maps.numel())
    assert report.after - report.before == sum(row.after - row.before for row in report.replaced)
    assert report.noise == maps * (2 * 64 + 3 * 4 * 64 + 8 * 16)
    convolutions = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {*replaced(result), *reasons(result)} == convolutions


def test_the_report_prints_what_it_did_to_the_parameter_count():
    assert str(rewritten().report).splitlines() == [
        "Sequential: 5 of 6 convolutions became perturbative layers",
        "1,360 -> 272 parameters (-80.0%), 1,024 fixed noise values",
        "",
        "replaced  before  after  noise",
        "0             76     12    128",
        "3.conv1      144     16    256",
        "3.conv2      144     16    256",
        "4.conv1      288     32    256",
        "4.conv2      576     64    128",
        "",
        "left alone",
        "4.shortcut  1x1: it only mixes channels, so there is nothing to perturb",
    ]


def test_a_seed_gives_the_same_layers_and_another_one_others():
    one, same, other = (rewritten(seed=seed).model.state_dict() for seed in (7, 7, 8))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one["3.conv1.weight"], other["3.conv1.weight"])
    assert not torch.equal(one["3.conv1.noise_maps"], other["3.conv1.noise_maps"])


def test_new_layers_have_the_convolution_s_dtype_noise_and_mode():
    model = RESNET.make(DOUBLE)
    model[3].eval()
    new = rewritten(model, noise=0.01, maps=2).model
    layer = new[3].conv1
    assert (layer.noise, layer.maps, layer.training, new[0].training) == (0.01, 2, False, True)
    assert all(tensor.dtype == DOUBLE for tensor in layer.state_dict().values())


def test_keyword_inputs_and_a_single_tensor_are_taken():
    (x,) = RESNET.example()
    forms = [PerturbConvolutions().rewrite(RESNET.make(), form).report for form in ((x,), {"input": x}, x)]
    assert forms[0] == forms[1] == forms[2]


@pytest.mark.parametrize("maps", [1, 2])
def test_a_rewritten_resnet_s_local_backprop_equals_autograd(maps):
    model = rewritten(maps=maps).model
    inputs = RESNET.example(DOUBLE)
    twin = copy.deepcopy(model)
    eager = step(twin, inputs, RESNET.loss)
    local = step(graphlocal.compile(model, example_inputs=inputs, rule="backprop"), inputs, RESNET.loss)
    assert_same_forward(local, eager)
    assert_same_gradients(local.gradients, eager.gradients)


def test_a_rewritten_resnet_gets_rec_lra_updates_everywhere():
    inputs = RESNET.example(DOUBLE)
    local = graphlocal.compile(rewritten().model, example_inputs=inputs, rule="rec-lra")
    gradients = step(local, inputs, RESNET.loss).gradients
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_a_rewritten_resnet_18_has_a_fraction_of_the_parameters():
    model = zoo.MODELS["resnet18"]
    result = PerturbConvolutions().rewrite(model.make(), model.example())
    assert len(replaced(result)) == 17
    assert len(reasons(result)) == 3  # the 1x1 convolutions of the shortcuts
    assert result.report.after == count(result.model) < result.report.before / 7
    assert zoo.call(result.model, model.example()).shape == (zoo.IMAGES, 10)


# What is left alone


class Convolutions(nn.Module):
    """One convolution for each reason to leave one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3, padding=1)
        self.dilated = nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(2, 0), dilation=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.shrinking = nn.Conv2d(4, 4, 3)
        self.several = nn.Conv2d(4, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Conv2d(4, 4, 3, padding=1)
        self.frozen = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.tied, self.knot = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.knot.weight = self.tied.weight
        self.hooked = nn.Conv2d(4, 4, 3, padding=1)
        self.hooked.register_forward_hook(lambda *_: None)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.head = nn.Linear(4, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.plain(x)
        z = z + self.grouped(z) + self.pointwise(z) + self.frozen(z) + self.knot(self.tied(z))
        z = self.twice(input=self.twice(z)) + self.hooked(z) + self.normed(z)
        z = self.several(self.shrinking(self.several(z)))
        return self.head(self.up(self.dilated(z)).mean((2, 3)))


def test_each_convolution_that_stays_has_its_reason():
    result = rewritten(Convolutions())
    assert replaced(result) == ["plain", "dilated", "twice"]
    assert reasons(result) == {
        "grouped": "grouped (groups=2)",
        "pointwise": "1x1: it only mixes channels, so there is nothing to perturb",
        "shrinking": "its output is 6x6, not 8x8, which is 8x8 at stride 1x1",
        "several": "called at several sizes: 8x8, 6x6",
        "unused": "not called with these inputs in evaluation mode",
        "frozen": "its parameters are frozen",
        "tied": "it shares parameters with another module",
        "knot": "it shares parameters with another module",
        "hooked": "it has hooks, such as those of weight_norm",
        "normed": "a ParametrizedConv2d, not a plain Conv2d",
        "up": "a ConvTranspose2d, not a plain Conv2d",
    }
    assert str(result.report).startswith("Convolutions: 3 of 14 convolutions became perturbative layers\n")
    assert zoo.call(result.model, RESNET.example()).shape == (zoo.BATCH, zoo.CLASSES)


def test_a_convolution_at_two_paths_becomes_one_layer_at_both():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), nn.Sequential(conv), nn.Flatten(), nn.Linear(128, zoo.CLASSES))
    result = rewritten(model)
    assert isinstance(result.model[0], PerturbativeConv2d)
    assert result.model[0] is result.model[2][0]
    assert result.report.replaced == (Replaced("0", 38, 6, 128),)
    assert result.report.after == count(result.model)


def test_a_model_that_is_a_convolution_becomes_a_layer():
    result = rewritten(nn.Conv2d(2, 4, 3, 2, padding=1))
    assert isinstance(result.model, PerturbativeConv2d)
    assert zoo.call(result.model, RESNET.example()).shape == (zoo.BATCH, 4, 4, 4)
    assert "(the model)" in str(result.report)


class Counting(nn.Module):
    """Writes a buffer and an attribute in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.conv(x)


def test_the_measuring_run_leaves_no_trace():
    model = Counting()
    result = rewritten(model)
    assert not model.calls
    assert result.model.calls is model.calls
    assert model.last is None
    assert result.model.last is None


# Errors


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (lambda: zoo.MODELS["mlp"].make(), zoo.vectors, "no convolution of Sequential.*\n.*it has no convolution"),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3)), zoo.pictures, "convolution of Sequential(.|\n)*0: its output is"),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1)), lambda: (zoo.normal(3, 2, 9),), "0: a Conv1d, not a"),
        (lambda: 3, zoo.pictures, "model is a int"),
        (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: 3, "example_inputs is a int"),
        (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: {"y": zoo.normal(3, 2, 8, 8)}, "do not fit Conv2d.forward"),
        (lambda: nn.LazyConv2d(4, 3, padding=1), zoo.pictures, "lazy layers without parameters"),
    ],
    ids=["no convolution", "none fits", "one dimension", "no model", "no inputs", "wrong keyword", "lazy"],
)  # fmt: skip
def test_what_can_not_be_rewritten_is_refused(model, inputs, said):
    with pytest.raises(InputError, match=said):
        PerturbConvolutions().rewrite(model(), inputs())


def test_a_model_that_can_not_be_copied_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    model.rows = (row for row in ())
    with pytest.raises(InputError, match="Sequential can't be copied") as caught:
        rewritten(model)
    assert "generator" in str(caught.value)


@pytest.mark.parametrize(("option", "said"), [({"maps": 0}, "maps is 0"), ({"noise": -1}, "noise is -1")], ids=str)
def test_options_of_the_pass_are_those_of_the_layer(option, said):
    with pytest.raises(InputError, match=said):
        rewritten(**option)
