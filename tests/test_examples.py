"""The examples run as they stand, and show what they say they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@cache
def output(name: str) -> str:
    """What an example prints, run by itself on one thread, from a folder that is not the project's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], cwd=ROOT / "examples", env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def accuracies(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"test accuracy (\d+\.\d) %", text)]


def test_01_trains_an_mlp_with_the_loop_that_you_have():
    text = output("01_mlp.py")
    assert "output => 5 : linear_2  (loss, exact)" in text
    assert "5 ~> 1 : tanh" in text
    assert re.findall(r"^epoch (\d+): loss", text, re.M) == [str(i + 1) for i in range(10)]
    assert accuracies(text)[-1] > 88
    assert re.search(r"^alignment with the true gradient: \d+\.\d° overall$", text, re.M)
    assert re.search(r"^  5 +0\.0°$", text, re.M)  # the head's gradient is exact


@pytest.mark.slow
def test_02_wires_blocks_to_the_output_and_layers_to_their_block():
    text = output("02_resnet.py")
    wires = dict(re.findall(r"^  (\S+ ~> \S+) : \S+ +\(feedback .*, depth (\d)\)$", text, re.M))
    assert wires["head ~> blocks.0.conv2"] == wires["head ~> blocks.1.conv2"] == "1"
    assert wires["blocks.0.conv2 ~> blocks.0.conv1"] == wires["blocks.1.conv2 ~> blocks.1.conv1"] == "2"
    assert len(accuracies(text)) == 5
    assert accuracies(text)[-1] > 90


def test_03_wires_the_output_error_to_every_subgraph():
    text = output("03_own_rule.py")
    assert "rule: DirectFeedback()" in text
    assert re.findall(r"^  5 ~> (\d) .*depth 1\)$", text, re.M) == ["1", "3"]
    assert accuracies(text)[-1] > 85


def test_04_shows_the_updates_move_to_parallel_streams():
    text = output("04_own_pass.py")
    before = [line for line in text.splitlines() if line.startswith("-step")]
    after = [line for line in text.splitlines() if line.startswith("+step")]
    assert 0 < len(after) < len(before)
    assert not any("|" in line for line in before)
    assert all(line.count("|") == 3 for line in after)
    assert "schedule: 7 steps on 4 streams" in text
    assert re.search(r"^ +5  U4 +D3 +D2 +D1$", text, re.M)


def test_05_reconstructs_images():
    text = output("05_autoencoder.py")
    errors = {name: float(e) for name, e in re.findall(r"^test error of (.+) (\d\.\d+)$", text, re.M)}
    assert errors.keys() == {"the mean image", "backprop", "rec-lra"}
    assert errors["rec-lra"] < 0.6 * errors["the mean image"]


def test_a_rule_of_your_own_fits_below_40_lines():
    assert len((ROOT / "examples" / "03_own_rule.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_test_here_and_says_what_it_shows(path):
    assert f'"{path.name}"' in Path(__file__).read_text()
    assert re.match(r'"""[A-Z].+\."""\n', path.read_text())
