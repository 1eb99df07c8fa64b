"""Makes a folder that trains a model by local updates in a browser tab; any static server serves it.

    python examples/browser/make.py --out site
    python -m http.server --bind 127.0.0.1 --directory site

In it: the page, ONNX Runtime for WebAssembly, the training step (`step.onnx`, its first states in `step.safetensors`),
the model as it evaluates (`model.onnx`, the weights are inputs), the images (`data.safetensors`, one byte a pixel) and
`site.json`, which tells the page what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import onnx_ir
import torch
from safetensors.torch import save_file
from torch import nn

import graphlocal
from graphlocal.data import Dataset, load
from graphlocal.errors import GraphLocalError, InputError

HERE = Path(__file__).resolve().parent
PAGE = ("index.html", "style.css", "train.js", "worker.js", "curve.js", "pad.js", "safetensors.js")
VENDOR = HERE / "vendor"
RATE, BATCH = 1e-3, 32
# Of the images: shades, and how a drawing becomes such an image (in pixels: the empty border, the width of a stroke).
DRAWN = {"digits": (16, 0.0, 1.5), "mnist": (255, 4.0, 2.5), "fashion-mnist": (255, 1.0, 2.5)}


def make(out: Path, name: str, data_dir: str | None, train: int | None, test: int | None) -> None:
    """Raises InputError where something is missing, or `out` holds something else than an earlier site."""
    if not VENDOR.is_dir():
        raise InputError(
            "ONNX Runtime for the browser is missing",
            where=str(VENDOR),
            remedy="`make browser`, or in targets/page: npm ci --ignore-scripts && npm run bundle-browser",
        )
    if out.exists() and not (out / "site.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and is no earlier site", remedy="name a new or an empty folder")
    data = load(name, data_dir, train=train, test=test)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        site = Path(folder) / "site"
        shutil.copytree(VENDOR, site / "vendor")
        for file in PAGE:
            shutil.copyfile(HERE / file, site / file)
        fill(site, data)
        for path in site.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # a server may run as somebody else
        shutil.rmtree(out, ignore_errors=True)
        os.replace(site, out)


def fill(site: Path, data: Dataset) -> None:
    """Write the model, its training step, the images and what the page says of them."""
    side = data.train_x.shape[-1]
    hidden = (128, 64) if side <= 8 else (256, 128)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(side * side, hidden[0]), nn.Tanh(), nn.Linear(hidden[0], hidden[1]), nn.Tanh(),
        nn.Linear(hidden[1], len(data.classes)),
    )  # fmt: skip
    x, y = data.train_x[:BATCH].flatten(1), data.train_y[:BATCH]
    local = graphlocal.compile(model, example_inputs=(x,), rule="rec-lra")
    optimizer = torch.optim.Adam(local.parameters(), RATE)
    step = local.export(
        site / "step.onnx", kind="training-step", loss_fn=nn.functional.cross_entropy, optimizer=optimizer, y=y
    )
    local.export(site / "model.onnx")
    open_weights(site / "model.onnx")
    shades, margin, stroke = DRAWN[data.name]
    tensors = {
        name: (tensor.flatten(1) * shades).round().to(torch.uint8) if name.endswith("x") else tensor.to(torch.uint8)
        for name in ("train_x", "train_y", "test_x", "test_y")
        for tensor in [getattr(data, name)]
    }
    save_file(tensors, site / "data.safetensors")
    about = {
        "data": data.name, "classes": data.classes, "side": side, "shades": shades, "margin": margin, "stroke": stroke,
        "layers": [side * side, *hidden, len(data.classes)], "rule": "rec-LRA", "optimizer": "Adam", "rate": RATE,
        "batch": BATCH, "operators": step.nodes, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    (site / "site.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def open_weights(path: Path) -> None:
    """Make inputs of a model's weights, so that the page can evaluate it with those that it trains."""
    model = onnx_ir.load(path)
    for weight in list(model.graph.initializers.values()):
        del model.graph.initializers[weight.name]
        model.graph.inputs.append(onnx_ir.Value(name=weight.name, shape=weight.shape, type=weight.type))
        weight.replace_all_uses_with(model.graph.inputs[-1])
    onnx_ir.save(model, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("site"), help="the folder to make (site)")
    parser.add_argument("--data", choices=sorted(DRAWN), default="digits", help="the images (digits)")
    parser.add_argument("--data-dir", help="the folder with the IDX files of MNIST or Fashion-MNIST")
    parser.add_argument("--train", type=int, default=10_000, help="images to train on, at most (10000)")
    parser.add_argument("--test", type=int, default=1_000, help="images to measure the accuracy on, at most (1000)")
    chosen = parser.parse_args()
    try:
        make(chosen.out, chosen.data, chosen.data_dir, chosen.train, chosen.test)
    except GraphLocalError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{chosen.out} is made; to open it:\n  python -m http.server --bind 127.0.0.1 --directory {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
