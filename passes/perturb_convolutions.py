"""PerturbConvolutions: a model of which every convolution that allows it is a perturbative layer.

Unlike the other passes it comes before tracing and rewrites modules, not a graph:

    rewritten = PerturbConvolutions(noise=0.1).rewrite(model, example_inputs)
    print(rewritten.report)
    local = graphlocal.compile(rewritten.model, example_inputs=example_inputs)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from graphlocal.arguments import Arguments, Binder, ExampleInputs
from graphlocal.errors import InputError
from graphlocal.nn import PerturbativeConv2d
from graphlocal.passes.rewriting import (
    LeftAlone,
    Rewritten,
    aligned,
    copy_sharing_tensors,
    has_hooks,
    left_alone_table,
    listed_reasons,
    shown_path,
)
from graphlocal.preserve import preserved, preserved_random_state

Size = tuple[int, int]
Calls = dict[nn.Module, list[tuple[Size, Size]]]
"""The sizes (H, W) of input and output at which each convolution is called, every pair once."""


@dataclass(frozen=True)
class Replaced:
    """A convolution that became a perturbative layer: its parameters before and after, its fixed noise values."""

    path: str
    before: int
    after: int
    noise: int


@dataclass(frozen=True)
class PerturbReport:
    """What PerturbConvolutions did; `print` shows it. before, after: parameters of the whole model, shared ones once.

    A convolution that stands at several paths is listed once, at the first.
    """

    model: str
    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]
    before: int
    after: int

    @property
    def noise(self) -> int:
        """How many numbers the noise maps hold; they are buffers, not parameters."""
        return sum(row.noise for row in self.replaced)

    def __str__(self) -> str:
        count = len(self.replaced)
        change = f"({self.after / self.before - 1:+.1%})"
        lines = [
            f"{self.model}: {count} of {count + len(self.left_alone)} convolutions became perturbative layers",
            f"{self.before:,} -> {self.after:,} parameters {change}, {self.noise:,} fixed noise values",
        ]
        rows = [(shown_path(r.path), f"{r.before:,}", f"{r.after:,}", f"{r.noise:,}") for r in self.replaced]
        lines += ["", *aligned([("replaced", "before", "after", "noise"), *rows])]
        return "\n".join([*lines, *left_alone_table(self.left_alone)])


@dataclass(frozen=True)
class PerturbConvolutions:
    """Replace every `nn.Conv2d` by a `PerturbativeConv2d` of the same output size. Left alone are

    1. convolutions of other kinds, and those with hooks, whose computation is not known,
    2. grouped and 1x1 convolutions,
    3. those with frozen or shared parameters, which new weights would undo,
    4. those that are not called with the example inputs in evaluation mode, or are called at several sizes,
    5. those whose output is not ceil(H / stride) by ceil(W / stride).

    noise: standard deviation of the noise maps. maps: noise maps for each input channel. seed: of the new weights
    and noise maps, which are drawn on the default device, in the order of `model.modules()`.
    """

    noise: float = 0.1
    maps: int = 1
    seed: int = 0
    name: str = "perturb-convolutions"

    def rewrite(self, model: nn.Module, example_inputs: ExampleInputs) -> Rewritten[PerturbReport]:
        """A new model with its report; `model` itself is left as it was.

        All parameters and buffers of what is not replaced are shared by the two models, so that training one
        trains them in the other.

        Raises InputError for what is no model, or can't be copied, for example inputs that don't fit, and if no
        convolution can be replaced.
        """
        arguments = _arguments(model, example_inputs)
        new = copy_sharing_tensors(model)
        calls = _calls(new, arguments)
        reasons = {conv: _why_left_alone(new, conv, sizes) for conv, sizes in calls.items()}
        chosen = {conv: sizes[0][0] for conv, sizes in calls.items() if reasons[conv] is None}
        paths = {module: path for path, module in new.named_modules()}
        left = tuple(LeftAlone(paths[conv], why) for conv, why in reasons.items() if why)
        if not chosen:
            raise InputError(
                f"no convolution of {type(model).__name__} can be replaced by a perturbative layer",
                why=listed_reasons(left) or "it has no convolution",
                remedy="use 'same' padding in the convolutions that are to be replaced",
            )
        layers = self._layers(chosen)
        replaced = tuple(_replaced(paths[conv], conv, layer) for conv, layer in layers.items())
        before = _count(new)
        new = _with_layers(new, layers)
        return Rewritten(new, PerturbReport(type(model).__name__, replaced, left, before, _count(new)))

    def _layers(self, chosen: dict[nn.Module, Size]) -> dict[nn.Module, PerturbativeConv2d]:
        with preserved_random_state():
            torch.manual_seed(self.seed)
            return {conv: self._layer(conv, size) for conv, size in chosen.items()}

    def _layer(self, conv: nn.Module, size: Size) -> PerturbativeConv2d:
        assert isinstance(conv, nn.Conv2d)
        high, wide = conv.stride
        layer = PerturbativeConv2d(
            conv.in_channels, conv.out_channels, size,
            maps=self.maps, noise=self.noise, stride=(high, wide), bias=conv.bias is not None,
        )  # fmt: skip
        return layer.to(conv.weight).train(conv.training)


def _arguments(model: nn.Module, example_inputs: ExampleInputs) -> Arguments:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}", remedy="pass a torch.nn.Module")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            f"{type(model).__name__} has lazy layers without parameters yet",
            remedy="run the model once on a batch",
        )
    return Binder(model).example(example_inputs)


def _calls(model: nn.Module, arguments: Arguments) -> Calls:
    """Run the model once in evaluation mode, without a trace on it, and watch its convolutions."""
    calls: Calls = {module: [] for module in model.modules() if isinstance(module, _ConvNd)}

    def note(conv: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        sizes = _last_two(x), _last_two(output)
        if sizes not in calls[conv]:
            calls[conv].append(sizes)

    with preserved(model), torch.no_grad():
        handles = [conv.register_forward_hook(note, with_kwargs=True) for conv in calls]
        try:
            model.eval()
            model(*arguments.args, **arguments.kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _last_two(tensor: Tensor) -> Size:
    high, wide = tensor.shape[-2:]
    return high, wide


def _why_left_alone(model: nn.Module, conv: nn.Module, sizes: list[tuple[Size, Size]]) -> str | None:
    """Why a convolution can't be replaced, by the numbers in PerturbConvolutions; None if it can."""
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain Conv2d"
    if has_hooks(conv):
        return "it has hooks, such as those of weight_norm"
    if conv.groups != 1:
        return f"grouped (groups={conv.groups})"
    if conv.kernel_size == (1, 1):
        return "1x1: it only mixes channels, so there is nothing to perturb"
    if not all(parameter.requires_grad for parameter in conv.parameters()):
        return "its parameters are frozen"
    if _shares_parameters(model, conv):
        return "it shares parameters with another module"
    return _why_sizes_do_not_fit(conv, sizes)


def _shares_parameters(model: nn.Module, conv: nn.Conv2d) -> bool:
    holders = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return any(holders[parameter] > 1 for parameter in conv.parameters())


def _why_sizes_do_not_fit(conv: nn.Conv2d, sizes: list[tuple[Size, Size]]) -> str | None:
    if not sizes:
        return "not called with these inputs in evaluation mode"
    seen = list(dict.fromkeys(before for before, _ in sizes))
    if len(seen) > 1:
        return f"called at several sizes: {', '.join(map(_by, seen))}"
    ((before, after),) = sizes
    high, wide = (-(-size // stride) for size, stride in zip(before, conv.stride, strict=True))
    if after != (high, wide):
        wanted = f"{_by((high, wide))}, which is {_by(before)} at stride {_by(conv.stride)}"
        return f"its output is {_by(after)}, not {wanted}"
    return None


def _replaced(path: str, conv: nn.Module, layer: PerturbativeConv2d) -> Replaced:
    return Replaced(path, _count(conv), _count(layer), layer.noise_maps.numel())


def _with_layers(model: nn.Module, layers: dict[nn.Module, PerturbativeConv2d]) -> nn.Module:
    """Put the layers in place of the convolutions, at every path where one stands."""
    if model in layers:
        return layers[model]
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child in layers:
                parent.add_module(name, layers[child])
    return model


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
