"""What the benchmarks share: the machine's description and the result file."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """One line that says what a figure was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {device}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads, Python {sys.version.split()[0]}"
    )


def write(name: str, title: str, command: str, tables: list[str], notes: str = "") -> None:
    """Print the report and keep it as benchmarks/results/`name`.md."""
    parts = [f"# {title}", f"`{command}` on {machine()}.", *tables, notes]
    text = "\n\n".join(part for part in parts if part) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
