"""Plans of models with several outputs, and what a plan says of links, streams and microbatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import graphlocal
from graphlocal.errors import InputError
from graphlocal.ir import Input, LocalGraph, TensorType
from graphlocal.passes import pipelines
from graphlocal.passes.cost import Device, Sizes, roofline
from graphlocal.passes.pipelines import Link, busiest_link, device_name
from graphlocal.passes.simulate import Task, Timeline, simulate

BATCH = 8


class TwoHeads(nn.Module):
    """A trunk of 8 features, a head of 2 outputs and one of 3, in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.trunk(x))
        return self.small(z), self.large(z)


def two_heads(rule: str = "backprop") -> graphlocal.LocalModule:
    return graphlocal.compile(TwoHeads(), example_inputs=torch.randn(BATCH, 8), rule=rule, partition="leaf")


@pytest.fixture(scope="module")
def heads() -> LocalGraph:
    return two_heads().graph


def costs_of(graph: LocalGraph) -> dict:
    return {(kind, n): float(kind != "D") for n in graph.number.values() for kind in "FDU"}


def ran(timeline: Timeline) -> dict:
    return {slot.task.name: slot for slot in timeline.slots}


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_backward_pass_starts_before_all_outputs_of_its_microbatch_are_at_the_loss(heads, schedule, microbatches):
    costs = costs_of(heads) | {("F", 2): 9.0}  # the first head is slow
    link, sizes = Link(1e3, 0.5), Sizes(heads, {"B": BATCH})
    tasks = pipelines.backprop(heads, [0, 1, 2], costs, microbatches, link, sizes, schedule)
    slots = ran(simulate(tasks))
    for k in range(1, microbatches + 1):
        (arrives,) = (s for s in slots.values() if s.task.label == "z" and s.task.name.endswith(f"1>2.{k}"))
        assert arrives.start >= slots[f"F2.{k}"].end
        assert slots[f"B3.{k}"].start >= arrives.end + 0.5
        (error,) = (s for s in slots.values() if s.task.label == "e" and s.task.name.endswith(f"2>1.{k}"))
        assert slots[f"B2.{k}"].start >= error.end + 0.5 >= arrives.end + 1.0
        assert slots[f"B1.{k}"].start >= max(slots[f"B2.{k}"].end, slots[f"B3.{k}"].end)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_outputs_and_errors_are_sent_to_and_from_the_loss_as_in_local_learning(heads, schedule):
    link, sizes = Link(), Sizes(heads, {"B": BATCH})
    exact = simulate(pipelines.backprop(heads, [0, 1, 2], costs_of(heads), 2, link, sizes, schedule))
    local = simulate(pipelines.local(heads, [0, 1, 2], costs_of(heads), 2, link, sizes))
    small, trunk = 4 * BATCH * 2, 4 * BATCH * 8
    assert exact.bytes == 2 * small + 4 * trunk  # an output and its error; z to two devices, and a gradient from each

    def at_the_loss(timeline: Timeline) -> list[tuple[str, int]]:
        moved = (s.task for s in timeline.slots if s.task.label in ("z", "e") and "0>" not in s.task.name)
        return sorted((task.label, task.bytes) for task in moved if task.bytes == small // 2)

    assert at_the_loss(exact) == at_the_loss(local) == [("e", small // 2)] * 2 + [("z", small // 2)] * 2


def test_no_gradient_is_sent_of_what_is_no_float():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.below(x)
            mask = h > 0
            return self.above(h.masked_fill(mask, 1.0))

    def half(op: graphlocal.ir.Operation) -> str:
        return "above" if op.module == "above" or "masked_fill" in op.target else "below"

    local = graphlocal.compile(Masked(), example_inputs=torch.randn(BATCH, 8), rule="backprop", partition=half)
    graph = local.graph
    tasks = pipelines.backprop(graph, [0, 1], costs_of(graph), 1, Link(), Sizes(graph, {"B": BATCH}))
    sent = {label: {t.name.split()[1] for t in tasks if t.label == label} for label in "zg"}
    assert len(sent["z"]) == 2  # h and the mask
    assert sent["g"] == {value for value in sent["z"] if graph.is_float(value)}
    assert len(sent["g"]) == 1


# Links


def test_the_busiest_link_is_the_device_that_sends_longest():
    tasks = [
        Task("a", "port 0", 1.0, to="device 1"), Task("b", "port 0", 1.0, to="device 2"),
        Task("c", "port 1", 1.5, to="device 0"), Task("d", "device 0", 9.0),
    ]  # fmt: skip
    assert busiest_link(simulate(tasks)) == ("device 0 -> device 1 and device 2", 2.0)
    assert busiest_link(simulate(tasks[3:])) is None


def test_a_plan_says_how_busy_its_busiest_link_is_where_anything_is_sent():
    local = two_heads("rec-lra")
    slow = graphlocal.plan(local, devices=3, microbatches=1, bandwidth="1Mb", latency="0s")
    found = busiest_link(slow.timelines["gpipe"])
    assert found is not None
    assert found[0].startswith("device 0 -> ")
    assert found[1] == pytest.approx(slow.timelines["gpipe"].busy("port 0"))
    assert found[1] == pytest.approx(2 * 4 * BATCH * 8 / 1.25e5)
    assert str(slow).count("busiest link: device ") == 3
    assert f"  busiest link: {found[0]}, 4.1 ms of " in str(slow)
    assert "busiest link" not in str(graphlocal.plan(local, devices=1))


# Streams, microbatches and the time to start an operator


def test_what_is_predicted_for_several_streams_is_printed_with_its_condition():
    local = two_heads("rec-lra")
    condition = "if each stream had cores of its own"
    one, two = (str(graphlocal.plan(local, streams=n)) for n in (1, 2))
    assert f"with 2 streams, {condition}: " in one
    assert one.count(condition) == 1
    assert f"runs 2 actions of a device at one time, {condition}." in two
    assert two.count(condition) == 2


def test_more_microbatches_than_samples_are_refused_and_the_default_fits():
    local = graphlocal.compile(nn.Linear(4, 2), example_inputs=torch.randn(3, 4))
    with pytest.raises(InputError, match="microbatches is 4, and the batch of the example inputs 3") as caught:
        graphlocal.plan(local, microbatches=4)
    assert "at most 3" in caught.value.remedy
    assert graphlocal.plan(local, microbatches=3).microbatches == graphlocal.plan(local).microbatches == 3
    assert graphlocal.plan(two_heads()).microbatches == 8


class Returns(nn.Module):
    """Two classes, and what is made of them."""

    def __init__(self, of_classes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.of_classes = nn.Linear(4, 2), of_classes

    def forward(self, x: Tensor) -> Tensor:
        return self.of_classes(self.layer(x))


@pytest.mark.parametrize(
    "of_classes", [lambda z: z, lambda z: z.transpose(0, 1), lambda z: z.mean(0), lambda z: z.mean()],
    ids=["classes", "transposed", "mean of samples", "mean"],
)  # fmt: skip
def test_the_batch_of_a_plan_is_the_inputs_first_axis_whatever_the_model_returns(of_classes):
    local = graphlocal.compile(Returns(of_classes), example_inputs=torch.randn(16, 4), rule="backprop")
    assert Sizes(local.graph, {"B": 16}).batch == 16
    assert graphlocal.plan(local, microbatches=16).microbatches == 16
    with pytest.raises(InputError, match="microbatches is 17, and the batch of the example inputs 16"):
        graphlocal.plan(local, microbatches=17)


def test_inputs_that_leave_no_axis_open_do_not_tell_the_batch_beside_those_that_do():
    given = (Input("x", TensorType("float32", ("B", 4))), Input("table", TensorType("float32", (3, 4))))
    graph = replace(two_heads().graph, inputs=given)
    assert Sizes(graph, {"B": 16}).batch == 16
    assert Sizes(replace(graph, inputs=given[1:]), {}).batch == 3
    assert Sizes(replace(graph, inputs=(Input("scale", TensorType("float32", ())),)), {}).batch == 1


def test_inputs_whose_first_axes_differ_set_no_limit_to_microbatches():
    class Matched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.queries(x) @ self.keys(memory).T

    local = graphlocal.compile(Matched(), example_inputs=(torch.randn(3, 4), torch.randn(5, 4)))
    assert graphlocal.plan(local).microbatches == 8
    assert graphlocal.plan(local, microbatches=9).microbatches == 9


@pytest.mark.parametrize("rates", [{"launch": "5us"}, {"flops": "2T"}, {"launch": 1e-6, "memory": "1TB"}])
def test_rates_that_a_measured_plan_would_not_use_are_refused(rates):
    with pytest.raises(InputError) as caught:
        graphlocal.plan(two_heads("rec-lra"), measured=True, **rates)
    assert caught.value.message.endswith("measured are given together")
    assert all(name in caught.value.message and name in caught.value.remedy for name in rates)


@pytest.mark.parametrize("rule", ["rec-lra", "lra-fdbk"])
def test_starting_an_operator_takes_the_time_that_is_given_and_by_default_none(rule):
    local = two_heads(rule)
    none, zero, some, more = (graphlocal.plan(local, **o).one_device["local"]
                              for o in ({}, {"launch": 0}, {"launch": "1ms"}, {"launch": "2ms"}))  # fmt: skip
    assert none == zero
    assert more - some == pytest.approx(some - none, rel=1e-6)
    assert (some - none) / 1e-3 >= 12  # operators: forward and update of three subgraphs, and their errors
    assert (some - none) / 1e-3 == pytest.approx(round((some - none) / 1e-3))
    with pytest.raises(InputError, match="launch is 'soon'"):
        graphlocal.plan(local, launch="soon")


@pytest.mark.parametrize("rule", ["rec-lra", "lra-fdbk"])
def test_every_microbatch_starts_all_operators(rule):
    local = two_heads(rule)
    found = graphlocal.plan(local, devices=1, microbatches=4, flops="1e9T", memory="1e9GB", launch="1ms")
    for name, alone in (("local", "local"), ("gpipe", "backprop")):
        assert found.timelines[name].makespan == pytest.approx(4 * found.one_device[alone], rel=1e-6)


def test_the_graphs_roofline_starts_every_operator_of_an_error():
    local = two_heads("rec-lra")
    costs = roofline(local.graph, Sizes(local.graph, {"B": BATCH}), Device(1e30, 1e30, 1.0))
    assert costs["D", 1] == 5 + 2  # target, error and their parts; a product with E for each of two sources
    assert costs["F", 2] == costs["U", 2] == 1


def test_the_command_line_takes_the_time_to_start_an_operator(monkeypatch, capsys):
    from graphlocal import cli

    def run(*arguments: str) -> str:
        base = ["graphlocal", "plan", "graphlocal.demo:digits_mlp", "--input", "4x1x8x8", "--devices", "1"]
        monkeypatch.setattr("sys.argv", [*base, *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        assert caught.value.code == int("refused" in arguments or "5" in arguments)
        return shown.out + shown.err

    assert "on 1 devices, 4 microbatches" in run()
    assert "ms" in run("--launch", "1ms")
    assert "--launch" in run("--help")
    assert "microbatches is 5" in run("--microbatches", "5")
    assert "launch is 'refused'" in run("--launch", "refused")


def test_devices_are_named_as_the_simulator_names_them(heads):
    timeline = simulate(pipelines.backprop(heads, [0, 0, 1], costs_of(heads)))
    assert {slot.task.to for slot in timeline.slots if slot.task.to} == {device_name(0), device_name(1)}
