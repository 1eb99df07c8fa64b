"""Makes the pictures of the docs anew: `python docs/pictures.py [NAME ...]` writes docs/pictures/page-NAME.png.

Needs torchvision, transformers, playwright and a Chromium on the machine; `make test` brings the first and third.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torch import nn

import graphlocal
from graphlocal import LocalModule
from graphlocal.rules import RecLRA
from graphlocal.targets.page import page
from graphlocal.torchvision_operators import declare_operators

HERE = Path(__file__).resolve().parent / "pictures"


def mlp() -> LocalModule:
    """784-256-256-256-10 with tanh."""
    widths = (784, 256, 256, 256)
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))
    return graphlocal.compile(model, example_inputs=torch.randn(8, 1, 28, 28), partition="leaf")


def resnet50() -> LocalModule:
    """torchvision's, cut into its blocks and their parts."""
    from torchvision.models import resnet50

    return graphlocal.compile(resnet50(), example_inputs=torch.randn(2, 3, 64, 64), rule=RecLRA(depth=2))


def vit() -> LocalModule:
    """Torchvision's ViT-B/16."""
    from torchvision.models import vit_b_16

    return graphlocal.compile(vit_b_16(), example_inputs=torch.randn(2, 3, 224, 224), rule=RecLRA(depth=2))


def gpt2() -> LocalModule:
    """GPT-2 of 12 blocks in a small size, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=12, n_head=4, n_embd=64, vocab_size=512, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(512, (2, 32))
    return graphlocal.compile(GPT2LMHeadModel(config), example_inputs={"input_ids": ids}, rule=RecLRA(depth=2))


def click(shown: Page, subgraph: str) -> None:
    """Open a subgraph as a reader would."""
    shown.locator("#search").fill(subgraph)
    shown.keyboard.press("Enter")
    shown.keyboard.press("Enter")


def nothing(shown: Page) -> None:
    """The page as it opens."""


def all_errors(shown: Page) -> None:
    """All skip-errors."""
    shown.locator("input[value=all]").check(force=True)


def block_open(shown: Page) -> None:
    """One attention block open, with its errors and its place in the schedule."""
    shown.keyboard.press("s")
    click(shown, "transformer.h.1.attn")


def by_depth(shown: Page) -> None:
    """Coloured by recursion depth."""
    all_errors(shown)
    shown.select_option("#colour", "depth")


@dataclass(frozen=True)
class Picture:
    """name: of the file. show: what is done to the page first."""

    name: str
    make: Callable[[], LocalModule]
    show: Callable[[Page], None] = nothing


PICTURES = (
    Picture("mlp", mlp, all_errors),
    Picture("resnet50", resnet50, all_errors),
    Picture("vit", vit, by_depth),
    Picture("gpt2", gpt2, nothing),
    Picture("gpt2-open", gpt2, block_open),
)


def main(names: list[str]) -> None:
    """Make the pictures of these names, or all."""
    HERE.mkdir(exist_ok=True)
    declare_operators()
    torch.manual_seed(0)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for picture in PICTURES:
            if not names or picture.name in names:
                take(browser, picture, Path(folder))
        browser.close()


def take(browser: Any, picture: Picture, folder: Path) -> None:
    """Write one picture."""
    file = folder / f"{picture.name}.html"
    file.write_text(page(picture.make().graph), encoding="utf-8")
    shown = browser.new_page(viewport={"width": 1340, "height": 840}, color_scheme="light", reduced_motion="reduce")
    shown.goto(file.as_uri())
    shown.wait_for_selector("html[data-ready]")
    picture.show(shown)
    shown.evaluate("document.activeElement.blur()")
    shown.wait_for_timeout(500)
    path = HERE / f"page-{picture.name}.png"
    shown.screenshot(path=path)
    Image.open(path).save(path, optimize=True)
    shown.close()
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
