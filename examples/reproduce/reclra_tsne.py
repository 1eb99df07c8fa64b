"""rec-LRA (2023), t-SNE: what the last hidden layer makes of the test images, in the plane."""

from __future__ import annotations

import torch
from experiment import Experiment, Run, Size, Table, figure, main
from matplotlib.figure import Figure
from nets import WIDE_HIDDEN, Setting, fit, network, plain
from tables import NOT_AT_HAND, mean_std
from torch import Tensor, nn

import graphlocal
from graphlocal.data import Dataset
from graphlocal.rules import RecLRA

RULE = RecLRA(error_weights="kp", derivative=True)
SETTING = Setting(5e-4, torch.optim.Adam, 32)
SHOWN = 1000


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """The last hidden layer."""
    net = plain(model).eval()
    assert isinstance(net, nn.Sequential)
    with torch.no_grad():
        return net.to(x.device)[:-1](x)


def plane(codes: Tensor) -> Tensor:
    """t-SNE in two dimensions, from the two principal components on."""
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30, len(codes) // 4), init="pca", random_state=0)
    return torch.from_numpy(tsne.fit_transform(codes.cpu().numpy()))


def drawn(codes: dict[str, Tensor], data: Dataset) -> Figure:
    """One panel for each of the codes, coloured by class."""
    picture = figure(4 * len(codes) + 1.4, 4)
    labels = data.test_y[:SHOWN].cpu()
    for axes, (name, values) in zip(picture.subplots(1, len(codes)), codes.items(), strict=True):
        points = plane(values)
        for number, label in enumerate(data.classes):
            mine = points[labels == number].numpy()
            axes.scatter(mine[:, 0], mine[:, 1], s=5, color=f"C{number}", label=label)
        axes.set(title=name, xticks=[], yticks=[])
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside right center", markerscale=3)
    return picture


def measure(run: Run) -> Table:
    data = run.data("fashion-mnist")
    table = Table(
        ("quantity",),
        f"784-3×256-10 tanh, {RULE}, Adam 5e-4, batches of 32; {run.described(data)}. 5-NN: the test samples whose "
        "five nearest training samples (cosine of the last hidden layer) vote for another class. The picture: t-SNE "
        f"of the first {min(SHOWN, len(data.test_x)):,} test images, coloured by class.",
    )
    error: dict[str, list[float]] = {"rec-LRA": [], "backprop": []}
    nearest: dict[str, list[float]] = {"raw pixels": [], "untrained": [], "rec-LRA": [], "backprop": []}
    shown = {"raw pixels": data.test_x[:SHOWN].flatten(1)}
    for seed in run.seeds:
        torch.manual_seed(seed)
        start = network(data, WIDE_HIDDEN, nn.Tanh)
        trained: dict[str, nn.Module] = {"untrained": start}
        for name, rule in (("rec-LRA", RULE), ("backprop", None)):
            fitted = fit(start, rule, SETTING, data, run.size.epochs, seed)
            error[name].append(fitted.error)
            trained[name] = fitted.model
        for name, model in trained.items():
            codes = hidden(model, data.train_x), hidden(model, data.test_x)
            nearest[name].append(graphlocal.knn_error(codes[0], data.train_y, codes[1], data.test_y))
            shown.setdefault(name, codes[1][:SHOWN])
            run.say(f"  seed {seed} {name}: 5-NN {nearest[name][-1]:.2f} %")
    nearest["raw pixels"].append(
        graphlocal.knn_error(data.train_x.flatten(1), data.train_y, data.test_x.flatten(1), data.test_y)
    )
    table.rows = [
        ("test error %", NOT_AT_HAND, mean_std(error["rec-LRA"]), mean_std(error["backprop"])),
        ("5-NN error % on the last hidden layer", NOT_AT_HAND, *map(mean_std, list(nearest.values())[2:])),
        ("the same of the untrained net", NOT_AT_HAND, *2 * [mean_std(nearest["untrained"])]),
        ("the same of the raw pixels", NOT_AT_HAND, *2 * [mean_std(nearest["raw pixels"])]),
    ]
    table.caption = "t-SNE of the test images and of the last hidden layer (first seed)"
    table.picture = drawn(shown, data)
    return table


EXPERIMENT = Experiment(
    "reclra_tsne",
    "rec-LRA: representations in the plane",
    quick=Size(epochs=3, train=10_000, test=5_000),
    full=Size(epochs=30),
    measure=measure,
)

if __name__ == "__main__":
    main(EXPERIMENT)
