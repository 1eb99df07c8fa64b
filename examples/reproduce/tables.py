"""What the scripts of this folder share: networks, mean and standard deviation, and the Markdown file."""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"
NOT_AT_HAND = "not at hand"
"""In the paper's column, where its number could not be looked up."""


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them; weights as Glorot and Bengio start them, so that deep nets learn."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(*layers[:-1])


def mean_std(values: Sequence[float]) -> str:
    """`80.1 ± 0.4`, with the sample's standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def write(name: str, title: str, command: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> str:
    """Write results/`name`.md, and return its text."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    machine = f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread"
    text = f"# {title}\n\n`{command}` ({machine})\n\n{table}\n\n{notes}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    return text


def command_line(description: str | None) -> argparse.Namespace:
    """What the command line says: data_dir, quick, seeds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data-dir", help="the folder that holds FashionMNIST/raw (and MNIST/raw)")
    parser.add_argument("--quick", action="store_true", help="the digits, and 5,000 pictures of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()
