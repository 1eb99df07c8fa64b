"""`graphlocal sweep`: what a step costs after the loss, and the table and plot of accuracy against parallelism."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_cli import run  # noqa: F401  (a fixture)
from torch import nn

import graphlocal
from graphlocal.cost import action_flops, critical_path
from graphlocal.rules import Calibrated, DirectFeedbackAlignment, RecLRA
from graphlocal.sweep import Point, draw, relative_costs

BATCH = 8
SIZES = (6, 20, 30, 40, 5)
TANH = [BATCH * n for n in SIZES[1:-1]]
PRODUCTS = [2 * BATCH * a * b for a, b in itertools.pairwise(SIZES)]


def mlp() -> nn.Sequential:
    layers = [(nn.Linear(a, b, bias=False), nn.Tanh()) for a, b in itertools.pairwise(SIZES)]
    return nn.Sequential(*[m for pair in layers for m in pair][:-1])


def compiled(rule, **options) -> graphlocal.LocalModule:
    return graphlocal.compile(mlp(), example_inputs=(torch.randn(BATCH, 6),), rule=rule, **options)


@pytest.mark.parametrize("partition", ["leaf", 2, 1])
def test_backpropagation_is_one_chain_whatever_the_partition(partition):
    """Two products a layer, but none for the gradient of the input."""
    graph = compiled("backprop", partition=partition).graph
    total = 2 * sum(PRODUCTS) - PRODUCTS[0] + sum(TANH)
    assert critical_path(graph, BATCH) == total
    assert critical_path(graph, BATCH, unlimited=False) == total


def test_under_skip_errors_the_path_is_the_longest_message_and_its_update():
    whole = {"feedback_share": 1e6, "feedback_total": 1e6}
    graph = compiled(RecLRA(**whole), partition="leaf").graph
    messages = [2 * BATCH * n * SIZES[-1] for n in SIZES[1:-1]]
    chains = [d + t + u for d, t, u in zip([*messages, 0], [*TANH, 0], PRODUCTS, strict=True)]
    assert critical_path(graph, BATCH) == max(chains)
    assert critical_path(graph, BATCH, unlimited=False) == sum(chains)


def test_a_chain_of_fitted_maps_adds_up_before_the_last_update():
    graph = compiled("auto", partition="leaf").graph
    costs = action_flops(graph, BATCH)
    assert costs["U", 4] == 2 * PRODUCTS[3]  # with the message to what it reads
    assert costs["D", 2] == 2 * BATCH * 30 * 40
    assert costs["D", 1] == 2 * BATCH * 20 * 30
    paths = (
        costs["U", 4] + TANH[2] + PRODUCTS[2],
        costs["U", 4] + costs["D", 2] + TANH[1] + PRODUCTS[1],
        costs["U", 4] + costs["D", 2] + costs["D", 1] + TANH[0] + PRODUCTS[0],
    )
    assert critical_path(graph, BATCH) == max(paths)


def test_a_convolution_s_map_costs_its_window():
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(),
                          nn.Flatten(), nn.Linear(4 * 25, 5))  # fmt: skip
    x = torch.randn(BATCH, 2, 5, 5)
    for most, taps in ((1280, 9), (4 * 9 - 1, 2)):
        rule = Calibrated(max_inputs=most)
        graph = graphlocal.compile(model, example_inputs=(x,), rule=rule, partition="leaf").graph
        assert action_flops(graph, BATCH)["D", 1] == 2 * BATCH * 25 * 3 * (4 * taps)


def test_relative_costs_count_calibrations():
    every = {n: relative_costs(compiled(Calibrated(every=n), partition="leaf"), BATCH) for n in (1, 10)}
    assert every[1] == pytest.approx((1.0, 1.0))
    plain = compiled(DirectFeedbackAlignment(), partition="leaf")
    assert relative_costs(plain, BATCH)[0] < every[10][0]


def test_the_command_writes_a_table_and_a_plot(run, tmp_path):  # noqa: F811
    out = tmp_path / "front.png"
    ran = run("sweep", "graphlocal.demo:digits_mlp", "--samples", "64", "--epochs", "1", "--partitions", "2,leaf",
              "--rules", "backprop,rec-lra", "-o", out)  # fmt: skip
    assert ran.code == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = [line.split(" | ") for line in out.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == ["backprop", "rec-lra", "rec-lra"]
    assert [row[1] for row in rows[3:]] == ["2", "leaf"]
    assert rows[2][4] == "1.00"


def test_nothing_to_sweep_is_refused(run):  # noqa: F811
    ran = run("sweep", "--rules", "")
    assert ran.code == 1
    assert "nothing to sweep" in ran.err


def test_the_plot_shows_any_number_of_rules(tmp_path):
    points = [Point(f"rule {i}", "auto", 3, 10.0 + i, 0.5, 1.0) for i in range(12)]
    draw(points, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 1000
