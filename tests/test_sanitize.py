"""`make sanitize` says what is missing, and otherwise runs the GPU tests that there are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitize
import torch


def test_it_says_all_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert sanitize.main() == 2
    said = capsys.readouterr().err
    assert "is a build without CUDA: install" in said
    assert "compute-sanitizer is not on the PATH" in said
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main() == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_it_runs_every_check_and_fails_if_one_finds_something(monkeypatch, capsys):
    ran = []

    def run(command, env, check):
        ran.append((command, env))
        return SimpleNamespace(returncode=99 if "racecheck" in command else 0)

    monkeypatch.setattr(sanitize, "missing", list)
    monkeypatch.setattr(subprocess, "run", run)
    assert sanitize.main() == 1
    assert [command[2] for command, _ in ran if command[0] == "compute-sanitizer"].count("memcheck") == 2
    assert all(env["GRAPHLOCAL_STRESS_STEPS"] == "20" for _, env in ran)
    assert "found something: streams, racecheck, captured steps, racecheck" in capsys.readouterr().out


@pytest.mark.parametrize(("wanted", "least"), [(sanitize.STREAMS, 2), (sanitize.CAPTURED, 3)])
def test_the_tests_that_it_names_exist_and_need_a_gpu(wanted, least):
    command = sanitize.command(sanitize.Check("", wanted, None, {}))
    done = subprocess.run(
        [*command, "--collect-only"], capture_output=True, text=True, check=True, cwd=Path(sanitize.__file__).parents[1]
    )
    found = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(found) >= least
    source = sanitize.TESTS.read_text()
    for name in {name.partition("[")[0] for name in found}:
        before = source.partition(f"def {name}(")[0]
        assert "@no_gpu" in before[before.rindex("\n\n\n") :]
