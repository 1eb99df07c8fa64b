"""Plain transcriptions of rec-LRA, the oracles of the rule's tests.

Written from the equations alone: tensors in, tensors out, float64, no graphlocal and no autograd.

Terms, for an MLP with z_0 = x, h_l = W_l z_{l-1} + b_l, z_l = phi(h_l) and output h_L, B samples:
    e_L = dloss/dh_L in per-sample units (B times the gradient of a mean-reduced loss)
    d_l = E_l e_L                      displacement, E_l: (width of l, width of the output)
    s   = sqrt(mean(d_l^2))            over batch and features; 1 without `rescale`
    y_l = phi(h_l - beta d_l / s)      local target
    e_l = s (z_l - y_l)                error neuron
    dW_l = mean(u_l z_{l-1}^T), db_l = mean(u_l), u_l = e_l, or e_l phi'(h_l) with `derivative`
    dE_l = mean(z_l e_L^T) with error_update "kp", -gamma mean(d_l e_L^T) with "literal"
Means are over the batch; the caller's optimizer subtracts. With `clip`, each gradient (those of E
too) becomes clip * g / |g| where its Frobenius norm |g| is clip or more. Tensors are rows of a
batch throughout, so that E e is `e @ E.T`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Activation:
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]  # of the pre-activation


def sigmoid_slope(h: Tensor) -> Tensor:
    return torch.sigmoid(h) * (1 - torch.sigmoid(h))


ACTIVATIONS = {
    "linear": Activation(lambda h: h, torch.ones_like),
    "tanh": Activation(torch.tanh, lambda h: 1 - torch.tanh(h) ** 2),
    "sigmoid": Activation(torch.sigmoid, sigmoid_slope),
    "relu": Activation(lambda h: h.clamp(min=0), lambda h: (h > 0).to(h.dtype)),
}


@dataclass(frozen=True)
class Settings:
    activation: str = "tanh"
    beta: float = 0.1
    rescale: bool = True
    derivative: bool = False
    clip: float | None = None
    error_update: str | None = None  # None, "kp", "literal"
    gamma: float = 1.0

    def phi(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation].value(h)

    def slope(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation].derivative(h)


def cross_entropy_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax minus the one-hot label: the gradient of each sample's cross-entropy."""
    error = torch.exp(logits - logits.logsumexp(1, keepdim=True))
    error[torch.arange(len(labels)), labels] -= 1
    return error


# The equations above, one function each


def displacement(error: Tensor, weight: Tensor) -> Tensor:
    return error @ weight.T


def local_error(h: Tensor, d: Tensor, settings: Settings) -> Tensor:
    """e = s (phi(h) - phi(h - beta d / s))."""
    scale = (d**2).mean().sqrt() if settings.rescale else torch.ones((), dtype=d.dtype)
    target = settings.phi(h - settings.beta * d / scale)
    return scale * (settings.phi(h) - target)


def update_error(error: Tensor, h: Tensor, settings: Settings) -> Tensor:
    """What multiplies the layer's input in the update: e, or e phi'(h)."""
    return error * settings.slope(h) if settings.derivative else error


def mean_outer(left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right / len(left)


def error_weight_gradient(z: Tensor, d: Tensor, error: Tensor, settings: Settings) -> Tensor | None:
    """dE for the connection whose source has `error`; None where E is fixed."""
    if settings.error_update == "kp":
        return mean_outer(z, error)
    if settings.error_update == "literal":
        return -settings.gamma * mean_outer(d, error)
    return None


def normalized(gradients: dict[str, Tensor | None], clip: float | None) -> Gradients:
    """Those that exist, each re-projected onto the ball of radius `clip`."""
    result = {}
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        norm = gradient.square().sum().sqrt()
        result[name] = clip * gradient / norm if clip is not None and norm >= clip else gradient
    return result


# Algorithm 1: a multilayer perceptron, every layer a block


def mlp_forward(
    weights: list[Tensor], biases: list[Tensor], x: Tensor, settings: Settings
) -> tuple[list[Tensor], list[Tensor]]:
    """Pre-activations h_1..h_L and representations z_0..z_{L-1}."""
    h, z = [], [x]
    for weight, bias in zip(weights, biases, strict=True):
        h.append(z[-1] @ weight.T + bias)
        z.append(settings.phi(h[-1]))
    return h, z[:-1]


def mlp_rec_lra(
    weights: list[Tensor],
    biases: list[Tensor],
    error_weights: list[Tensor],
    x: Tensor,
    labels: Tensor,
    settings: Settings,
) -> Gradients:
    """One step of Algorithm 1 under cross-entropy.

    `weights` and `biases` are those of layers 1 to L, `error_weights` E_1 to E_{L-1}. Gives
    "W1", "b1", ..., "WL", "bL" and, where E learns, "E1", ...
    """
    h, z = mlp_forward(weights, biases, x, settings)
    output_error = cross_entropy_error(h[-1], labels)
    gradients: dict[str, Tensor | None] = {}
    for layer in range(1, len(weights) + 1):
        update = output_error
        if layer < len(weights):
            d = displacement(output_error, error_weights[layer - 1])
            error = local_error(h[layer - 1], d, settings)
            update = update_error(error, h[layer - 1], settings)
            gradients[f"E{layer}"] = error_weight_gradient(z[layer], d, output_error, settings)
        gradients[f"W{layer}"] = mean_outer(update, z[layer - 1])
        gradients[f"b{layer}"] = update.mean(0)
    return normalized(gradients, settings.clip)


# Algorithm 2: a residual MLP, with the names of zoo.ResidualMLP
#
#   h_stem = W x + b                           z_0 = phi(h_stem)
#   h_inner = W1 z_{b-1} + b1                  a_b = phi(h_inner)             for every block b
#   h_outer = W2 a_b + b2 + z_{b-1}            z_b = phi(h_outer)
#   output = W z_N + b


@dataclass(frozen=True)
class Block:
    name: str  # "blocks.0", ...
    z_in: Tensor
    h_inner: Tensor
    a: Tensor
    h_outer: Tensor
    z: Tensor


def linear(parameters: Gradients, name: str, z: Tensor) -> Tensor:
    return z @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]


def linear_update(name: str, update: Tensor, z_in: Tensor) -> dict[str, Tensor | None]:
    return {f"{name}.weight": mean_outer(update, z_in), f"{name}.bias": update.mean(0)}


def residual_forward(
    parameters: Gradients, blocks: int, x: Tensor, settings: Settings
) -> tuple[Tensor, list[Block], Tensor]:
    """The stem's pre-activation, every block's tensors and the logits."""
    h_stem = linear(parameters, "stem", x)
    z = settings.phi(h_stem)
    done = []
    for name in [f"blocks.{index}" for index in range(blocks)]:
        h_inner = linear(parameters, f"{name}.inner", z)
        a = settings.phi(h_inner)
        h_outer = linear(parameters, f"{name}.outer", a) + z
        done.append(Block(name, z, h_inner, a, h_outer, settings.phi(h_outer)))
        z = done[-1].z
    return h_stem, done, linear(parameters, "head", z)


def residual_rec_lra(
    parameters: Gradients,
    error_weights: Gradients,
    blocks: int,
    x: Tensor,
    labels: Tensor,
    settings: Settings,
    depth: int = 1,
) -> Gradients:
    """One step of Algorithm 2 under cross-entropy, with recursion depth 1 or 2 (which is full).

    `error_weights` has E from the output to "stem" and to "blocks.0", ... and, at depth 2, E from
    each block's error to its inner layer, "blocks.0.inner", ... Gives the gradients under the
    parameters' names and, where E learns, as "E.stem", "E.blocks.0", "E.blocks.0.inner", ...
    """
    h_stem, done, logits = residual_forward(parameters, blocks, x, settings)
    output_error = cross_entropy_error(logits, labels)
    gradients = linear_update("head", output_error, done[-1].z if done else settings.phi(h_stem))

    d = displacement(output_error, error_weights["stem"])
    error = local_error(h_stem, d, settings)
    gradients |= linear_update("stem", update_error(error, h_stem, settings), x)
    z_stem = settings.phi(h_stem)
    gradients["E.stem"] = error_weight_gradient(z_stem, d, output_error, settings)

    for block in done:
        d = displacement(output_error, error_weights[block.name])
        error = local_error(block.h_outer, d, settings)
        gradients[f"E.{block.name}"] = error_weight_gradient(block.z, d, output_error, settings)
        if depth == 1:
            gradients |= block_by_derivative(block, error, parameters, settings)
        else:
            gradients |= block_by_recursion(block, error, error_weights, settings)
    return normalized(gradients, settings.clip)


def block_by_derivative(
    block: Block, error: Tensor, parameters: Gradients, settings: Settings
) -> dict[str, Tensor | None]:
    """The block as one subgraph: the chain rule from its pre-activation down to its input."""
    outer = update_error(error, block.h_outer, settings)
    inner = (outer @ parameters[f"{block.name}.outer.weight"]) * settings.slope(block.h_inner)
    return {
        **linear_update(f"{block.name}.outer", outer, block.a),
        **linear_update(f"{block.name}.inner", inner, block.z_in),
    }


def block_by_recursion(
    block: Block, error: Tensor, error_weights: Gradients, settings: Settings
) -> dict[str, Tensor | None]:
    """The block entered: its error goes to its inner layer through a skip-error of its own."""
    name = f"{block.name}.inner"
    d = displacement(error, error_weights[name])
    inner_error = local_error(block.h_inner, d, settings)
    outer = update_error(error, block.h_outer, settings)
    inner = update_error(inner_error, block.h_inner, settings)
    return {
        **linear_update(f"{block.name}.outer", outer, block.a),
        **linear_update(name, inner, block.z_in),
        f"E.{name}": error_weight_gradient(block.a, d, error, settings),
    }
