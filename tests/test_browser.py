"""The browser example: made, served on the loopback, and used in a real Chromium."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_page import CHROMIUM, FLAGS

from graphlocal.data import load

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "browser"
SECONDS = 60  # within which the loss must halve and the accuracy pass 90 %
STROKES = {  # of digits, as points on the pad
    "0": [[(0.5, 0.1), (0.25, 0.3), (0.25, 0.7), (0.5, 0.9), (0.7, 0.8), (0.78, 0.5), (0.65, 0.15), (0.5, 0.1)]],
    "1": [[(0.38, 0.25), (0.5, 0.1), (0.5, 0.9)]],
    "2": [[(0.3, 0.25), (0.5, 0.1), (0.7, 0.25), (0.6, 0.5), (0.3, 0.9), (0.75, 0.9)]],
    "3": [[(0.3, 0.15), (0.6, 0.1), (0.7, 0.3), (0.5, 0.48), (0.7, 0.65), (0.6, 0.88), (0.3, 0.85)]],
    "4": [[(0.5, 0.1), (0.25, 0.55), (0.75, 0.55)], [(0.62, 0.35), (0.55, 0.9)]],
    "6": [[(0.6, 0.1), (0.4, 0.3), (0.3, 0.65), (0.4, 0.88), (0.62, 0.85), (0.68, 0.65), (0.5, 0.55), (0.33, 0.7)]],
    "7": [[(0.3, 0.1), (0.7, 0.1), (0.45, 0.9)], [(0.35, 0.5), (0.65, 0.5)]],
}  # fmt: skip
needs_vendor = pytest.mark.skipif(
    not (EXAMPLE / "vendor").is_dir(), reason="ONNX Runtime for the browser is not bundled (npm was missing)"
)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(EXAMPLE / "make.py"), *arguments], env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxscript")
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("browser") / "site"
    made = make("--out", str(out))
    assert made.returncode == 0, made.stderr
    return out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, loaded; at the end it may have logged no error and asked nobody but the server."""
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#run:enabled")
    wait(opened, lambda: "%" in opened.locator("#accuracy").inner_text())
    yield opened
    context.close()
    assert said == []
    assert any(url.endswith(".wasm") for url in asked)
    assert [url for url in asked if not url.startswith((address, "data:"))] == []


def shown(page: Any, name: str) -> float:
    return float(page.locator(f"#{name}").inner_text().replace(",", "").split()[0])


def wait(page: Any, reached: Callable[[], bool], seconds: float = 20) -> None:
    """The page's policy forbids what Playwright's wait_for_function would evaluate."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, page.locator("main").inner_text()
        page.wait_for_timeout(50)


def draw(page: Any, digit: str) -> None:
    page.locator("#clear").click()
    box = page.locator("#pad").bounding_box()
    for stroke in STROKES[digit]:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=4)
        page.mouse.up()


def answer(page: Any, after: str = "") -> str:
    """The answer, once the probabilities are others than before."""
    wait(page, lambda: "like" in page.locator("#answer").inner_text() and page.locator("#bars").inner_text() != after)
    return str(page.locator("#answer").inner_text()).removeprefix("It looks like: ")


@pytest.mark.slow
@needs_vendor
def test_the_site_holds_the_data_and_weights_that_are_inputs(site: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    about = json.loads((site / "site.json").read_text())
    images, expected = load_file(site / "data.safetensors"), load("digits")
    assert torch.equal(images["test_x"] / about["shades"], expected.test_x.flatten(1))
    assert torch.equal(images["train_y"].long(), expected.train_y)
    session = onnxruntime.InferenceSession(site / "model.onnx", providers=["CPUExecutionProvider"])
    states = load_file(site / "step.safetensors")
    x, *names = (value.name for value in session.get_inputs())
    given = {name: states[f"original.{name}"].numpy() for name in names}
    batch = expected.test_x[:5].flatten(1)
    (logits,) = session.run(None, {x: batch.numpy(), **given})
    hidden = batch
    for layer in (0, 2, 4):
        hidden = hidden.tanh() if layer else hidden
        hidden = hidden @ states[f"original.{layer}.weight"].T + states[f"original.{layer}.bias"]
    np.testing.assert_allclose(logits, hidden.numpy(), atol=1e-5)


@pytest.mark.slow
@needs_vendor
def test_loss_halves_and_accuracy_passes_90_percent_in_a_browser_tab(page: Any) -> None:
    assert shown(page, "accuracy") < 30
    page.locator("#run").click()
    started = time.monotonic()
    wait(page, lambda: page.locator("#loss-first").inner_text() != "")
    first = shown(page, "loss-first")
    assert 1.5 < first < 4  # log 10 = 2.3
    wait(page, lambda: shown(page, "loss") < first / 2 and shown(page, "accuracy") > 90, SECONDS)
    assert time.monotonic() - started < SECONDS


@pytest.mark.slow
@needs_vendor
def test_draws_answers_pauses_and_starts_anew(page: Any) -> None:
    page.locator("#run").click()
    wait(page, lambda: shown(page, "accuracy") > 95, SECONDS)
    page.locator("#run").click()
    wait(page, lambda: page.locator("#run").inner_text() == "Start")
    steps = shown(page, "steps")
    page.wait_for_timeout(500)
    assert shown(page, "steps") == steps  # paused
    answers, before = {}, ""
    for digit in STROKES:
        draw(page, digit)
        answers[digit] = answer(page, before)
        before = page.locator("#bars").inner_text()
    assert sum(given == digit for digit, given in answers.items()) >= 5, answers
    page.locator("#sample").click()
    assert answer(page, before) in "0123456789"
    assert "labelled" in page.locator("#truth").inner_text()
    page.locator("#reset").click()
    wait(page, lambda: page.locator("#steps").inner_text() == "0")
    assert shown(page, "accuracy") < 30
    assert page.locator("#loss").inner_text() == "–"


@pytest.mark.slow
@needs_vendor
def test_the_keyboard_trains_and_draws(page: Any) -> None:
    page.locator("#run").focus()
    page.keyboard.press("Space")
    wait(page, lambda: shown(page, "steps") > 1)
    page.locator("#pad").focus()
    page.keyboard.press("Space")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    assert answer(page) in "0123456789"
    page.keyboard.press("Delete")
    assert page.locator("#answer").inner_text() == "Nothing is drawn yet."


@pytest.mark.slow
@needs_vendor
def test_a_rate_that_is_too_high_is_explained_or_survived_and_can_be_reset(page: Any) -> None:
    page.locator("#rate").fill("-1.5")
    page.locator("#rate").dispatch_event("change")
    page.locator("#run").click()
    wait(page, lambda: shown(page, "steps") > 20 or "lower learning rate" in page.locator("#message").inner_text())
    page.locator("#reset").click()
    wait(page, lambda: page.locator("#steps").inner_text() == "0" and shown(page, "accuracy") < 30)


@needs_vendor
def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    made = make("--out", str(tmp_path))
    assert made.returncode == 1
    assert "is no earlier site" in made.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"
