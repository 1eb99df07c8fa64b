"""The test material itself: zoo models train, random models are sound, the oracles are right."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from reference import Settings
from torch import Tensor, nn

import strategies
import zoo

EVERY_MODEL = [*zoo.models(), *[pytest.param(hard, id=hard.name) for hard in zoo.HARD.values()]]


def trained(model: zoo.ZooModel, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model after one forward and backward pass, and its loss."""
    module = model.make(dtype)
    loss = model.loss(zoo.call(module, model.example(dtype)))
    loss.backward()
    return module, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_zoo_model_gives_a_finite_loss_and_finite_gradients(model, dtype):
    module, loss = trained(model, dtype)
    assert loss.dtype == dtype
    assert loss.isfinite()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("model", zoo.models(exclude=("unused", "zero-gradient")))
def test_every_trainable_parameter_of_a_zoo_model_has_a_gradient_that_is_not_zero(model):
    module, _ = trained(model, torch.float64)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("model", zoo.models(exclude=("large",)))
def test_zoo_model_is_deterministic_given_the_seed(model):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(trained(model, torch.float32))
    (one, first), (two, second) = runs
    assert torch.equal(first, second)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("model", zoo.models(include=("random",)))
def test_tag_random_marks_the_models_that_depend_on_the_random_state(model):
    torch.manual_seed(1)
    _, first = trained(model, torch.float32)
    _, second = trained(model, torch.float32)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("model", zoo.models())
def test_tag_buffer_marks_the_models_whose_forward_writes_buffers(model):
    module = model.make()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    zoo.call(module, model.example())
    changed = any(not torch.equal(before[name], b) for name, b in module.named_buffers())
    assert changed == ("buffer" in model.tags)


def test_models_selects_by_tag_and_by_name():
    names = {parameter.id for parameter in zoo.models(include=("mlp",), exclude=("sign_mlp", "random"))}
    assert {"mlp", "deep_mlp", "residual_mlp"} <= names
    assert not {"small_resnet", "sign_mlp", "dropout_mlp"} & names
    with pytest.raises(AssertionError, match="transfromer"):
        zoo.models(include=("transfromer",))


@pytest.mark.parametrize("model", zoo.BAD.values(), ids=zoo.BAD)
def test_bad_models_have_no_output_to_learn_from(model):
    output = zoo.call(model.make(), model.example())
    assert not any(leaf.is_floating_point() for leaf in zoo.leaves(output))


# Random models


@given(strategies.dag_models())
def test_random_models_train_and_use_every_parameter(model):
    module = model.build().double()
    strategies.loss(module(*model.example(dtype=torch.float64))).backward()
    assert 2 <= len(model.nodes) <= 12
    assert list(module.parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@given(strategies.dag_models())
def test_random_models_are_rebuilt_from_their_description(model):
    description = eval(repr(model), vars(strategies))
    assert description == model
    outputs = []
    for spec in (model, description):
        torch.manual_seed(2)
        outputs.append(spec.build()(*spec.example()))
    assert all(map(torch.equal, *(tuple(zoo.leaves(output)) for output in outputs)))


# The transcriptions of rec-LRA


def autograd_gradients(module: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    nn.functional.cross_entropy(module(x), labels).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def problem() -> tuple[Tensor, Tensor]:
    return zoo.vectors()[0].double(), torch.tensor([2, 0, 3])


def double_mlp(*sizes: int, activation: type[nn.Module]) -> tuple[nn.Module, list, list]:
    module = zoo.layers(*sizes, activation=activation).double()
    linears = [layer for layer in module if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach() for layer in linears]
    return module, weights, [layer.bias.detach() for layer in linears]


def assert_mlp_matches(gradients: dict, module: nn.Module, x: Tensor, labels: Tensor, **close) -> None:
    exact = list(autograd_gradients(module, x, labels).values())
    names = [f"{kind}{layer}" for layer in range(1, len(exact) // 2 + 1) for kind in "Wb"]
    assert sorted(gradients) == sorted(names)
    for name, expected in zip(names, exact, strict=True):
        torch.testing.assert_close(gradients[name], expected, **close)


def test_cross_entropy_error_is_autograd_s_per_sample():
    logits, labels = problem()[0].requires_grad_(), problem()[1]
    nn.functional.cross_entropy(logits, labels).backward()
    error = reference.cross_entropy_error(logits.detach(), labels)
    torch.testing.assert_close(error, len(labels) * logits.grad)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_linear_net_with_transposed_weight_products_follows_autograd(rescale):
    (x, labels), (module, weights, biases) = problem(), double_mlp(6, 5, 7, 4, activation=nn.Identity)
    error_weights = [(weights[2] @ weights[1]).T, weights[2].T]
    settings = Settings("linear", beta=1.0, rescale=rescale)
    gradients = reference.mlp_rec_lra(weights, biases, error_weights, x, labels, settings)
    assert_mlp_matches(gradients, module, x, labels)


@pytest.mark.parametrize(("name", "activation"), [("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid), ("relu", nn.ReLU)])
@pytest.mark.parametrize("rescale", [False, True])
def test_one_hidden_layer_follows_autograd_as_beta_vanishes(name, activation, rescale):
    """e / beta goes to phi'(h) d, which for E = W^T and one hidden layer is backprop's delta."""
    (x, labels), (module, weights, biases) = problem(), double_mlp(6, 8, 4, activation=activation)
    settings = Settings(name, beta=1e-6, rescale=rescale)
    gradients = reference.mlp_rec_lra(weights, biases, [weights[1].T], x, labels, settings)
    gradients |= {key: gradients[key] / settings.beta for key in ("W1", "b1")}
    assert_mlp_matches(gradients, module, x, labels, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", "linear"])
def test_slopes_are_autograd_s_and_multiply_the_error(name):
    h = torch.linspace(-2, 2, 10, dtype=torch.float64, requires_grad=True)
    settings = Settings(name, derivative=True)
    settings.phi(h).sum().backward()
    torch.testing.assert_close(settings.slope(h.detach()), h.grad)
    torch.testing.assert_close(reference.update_error(2 * h, h, settings), 2 * h * h.grad)


def test_algorithm_1_by_hand():
    """One sample, one unit a layer: h_1 = 2, output 0.5 and 0, e_L = (p, -p)."""
    column = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    weights = [torch.tensor([[2.0]], dtype=torch.float64), column / 4]
    biases = [torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    x, e = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    settings = Settings("relu", beta=0.5, error_update="literal", gamma=0.1)
    gradients = reference.mlp_rec_lra(weights, biases, [e], x, torch.tensor([1]), settings)
    p = 1 / (1 + torch.exp(torch.tensor(-0.5, dtype=torch.float64)))
    d = 3 * p - p  # positive, so d / s = 1 and e_1 = d (2 - 1.5)
    torch.testing.assert_close(gradients["W1"], (d / 2).view(1, 1))
    torch.testing.assert_close(gradients["b2"], torch.stack([p, -p]))
    torch.testing.assert_close(gradients["W2"], torch.stack([2 * p, -2 * p]).view(2, 1))
    torch.testing.assert_close(gradients["E1"], -0.1 * d * torch.stack([p, -p]).view(1, 2))


def test_kp_keeps_error_weights_moving_with_the_transposed_weights():
    (x, labels), (_, weights, biases) = problem(), double_mlp(6, 8, 4, activation=nn.Tanh)
    settings = Settings(error_update="kp")
    gradients = reference.mlp_rec_lra(weights, biases, [weights[1].T], x, labels, settings)
    torch.testing.assert_close(gradients["E1"], gradients["W2"].T)


def test_clip_shortens_only_longer_gradients():
    long, short = torch.full((2, 2), 2.0), torch.full((2, 2), 0.1)
    clipped = reference.normalized({"long": long, "short": short, "fixed": None}, clip=1.0)
    assert sorted(clipped) == ["long", "short"]
    torch.testing.assert_close(clipped["long"], long / 4)
    assert torch.equal(clipped["short"], short)


def residual_problem(blocks: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The zoo's residual MLP, its parameters, and random error weights."""
    module = zoo.ResidualMLP(blocks).double()
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    output = dict.fromkeys(("stem", *[f"blocks.{b}" for b in range(blocks)]), (7, 4))
    inner = {f"blocks.{b}.inner": (8, 7) for b in range(blocks)}
    shapes = (output | inner).items()
    error_weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes}
    return module, parameters, error_weights


def test_a_block_s_depth_1_update_is_autograd_s_through_the_block():
    x, labels = problem()
    module, parameters, error_weights = residual_problem(blocks=2)
    settings = Settings(derivative=True)
    local = reference.residual_rec_lra(parameters, error_weights, 2, x, labels, settings, depth=1)

    z = module.blocks[0](torch.tanh(module.stem(x))).detach().requires_grad_()
    block = module.blocks[1]
    pre_activation = block.outer(torch.tanh(block.inner(z))) + z
    error = reference.cross_entropy_error(module.head(torch.tanh(pre_activation)).detach(), labels)
    d = error @ error_weights["blocks.1"].T
    e = reference.local_error(pre_activation.detach(), d, settings)
    torch.tanh(pre_activation).backward(e / len(x))
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(local[f"blocks.1.{name}"], parameter.grad)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_follows_autograd_as_beta_vanishes(depth):
    """With transposed weights as E; at depth 2 the inner e is d phi', scaled by beta twice."""
    x, labels = problem()
    module, parameters, error_weights = residual_problem(blocks=1)
    error_weights["blocks.0"] = parameters["head.weight"].T
    error_weights["blocks.0.inner"] = parameters["blocks.0.outer.weight"].T
    settings = Settings(beta=1e-5)
    local = reference.residual_rec_lra(parameters, error_weights, 1, x, labels, settings, depth=depth)
    exact = autograd_gradients(module, x, labels)
    power = {"head": 0, "blocks.0.outer": 1, "blocks.0.inner": depth}
    for name in exact:
        layer = name.rpartition(".")[0]
        if layer != "stem":
            scaled = local[name] / settings.beta ** power[layer]
            torch.testing.assert_close(scaled, exact[name], rtol=1e-3, atol=1e-5)


def test_recursion_changes_only_what_lies_inside_the_blocks():
    x, labels = problem()
    _, parameters, error_weights = residual_problem(blocks=2)
    settings = Settings(error_update="kp")
    one, two = (
        reference.residual_rec_lra(parameters, error_weights, 2, x, labels, settings, depth=depth) for depth in (1, 2)
    )
    assert set(two) - set(one) == {"E.blocks.0.inner", "E.blocks.1.inner"}
    for name, gradient in one.items():
        assert torch.equal(gradient, two[name]) == (".inner." not in name), name
