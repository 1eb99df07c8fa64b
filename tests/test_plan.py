"""The simulator, the pipelines that are made of it, and `graphlocal.plan`."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphlocal
import zoo
from graphlocal import units
from graphlocal.errors import InputError
from graphlocal.ir import TensorType
from graphlocal.measured import measure
from graphlocal.passes import pipelines
from graphlocal.passes.cost import Device, Sizes, roofline
from graphlocal.passes.pipelines import Link, balanced, device_name
from graphlocal.passes.simulate import Task, critical_path, grid, simulate

# The simulator


@st.composite
def task_graphs(draw) -> tuple[list[Task], dict[str, int]]:
    resources = ["a", "b", "c", ""]
    tasks: list[Task] = []
    for i in range(draw(st.integers(0, 14))):
        after = draw(st.lists(st.sampled_from(tasks), max_size=3, unique=True)) if tasks else []
        seconds = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25]))
        delay = draw(st.sampled_from([0.0, 0.0, 0.75]))
        tasks.append(Task(f"t{i}", draw(st.sampled_from(resources)), seconds, tuple(t.name for t in after), delay))
    return draw(st.permutations(tasks)), {"a": 1, "b": 2, "c": 3}


@settings(max_examples=150, deadline=None)
@given(task_graphs())
def test_a_timeline_keeps_dependencies_and_capacities_and_is_as_long_as_it_must_be(drawn):
    tasks, capacity = drawn
    timeline = simulate(tasks, capacity)
    slots = {slot.task.name: slot for slot in timeline.slots}
    assert sorted(slots) == sorted(task.name for task in tasks)
    for task in tasks:
        slot = slots[task.name]
        assert slot.end - slot.start == pytest.approx(task.seconds)
        assert all(slots[name].end + slots[name].task.delay <= slot.start + 1e-9 for name in task.after)
    for resource, room in capacity.items():
        mine = [slot for slot in timeline.slots if slot.task.resource == resource and slot.task.seconds]
        for slot in mine:
            assert sum(other.start <= slot.start < other.end for other in mine) <= room
        assert timeline.makespan >= timeline.busy(resource) / room - 1e-9
    assert timeline.makespan >= critical_path(tasks) - 1e-9
    assert timeline.makespan <= sum(task.seconds + task.delay for task in tasks) + 1e-9
    assert 0 <= timeline.bubble(list(capacity)) <= 1


@settings(max_examples=60, deadline=None)
@given(task_graphs())
def test_no_resource_stands_idle_while_a_task_of_its_own_is_ready(drawn):
    tasks, capacity = drawn
    timeline = simulate(tasks, capacity)
    slots = {slot.task.name: slot for slot in timeline.slots}
    for slot in timeline.slots:
        ready = max((slots[n].end + slots[n].task.delay for n in slot.task.after), default=0.0)
        if slot.start > ready:
            mine = [s for s in timeline.slots if s.task.resource == slot.task.resource and s is not slot]
            busy = [s for s in mine if s.start <= ready < s.end or (s.start == ready == s.end)]
            assert len(busy) >= capacity.get(slot.task.resource, 1)


def test_tasks_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="cycle: a, b"):
        simulate([Task("a", "x", 1, ("b",)), Task("b", "x", 1, ("a",)), Task("c", "x", 1)])
    with pytest.raises(InputError, match="isn't there"):
        simulate([Task("a", "x", 1, ("b",))])
    with pytest.raises(InputError, match="one name"):
        simulate([Task("a", "x", 1), Task("a", "x", 1)])
    with pytest.raises(InputError, match="-1"):
        simulate([Task("a", "x", -1)])


# Pipelines


def chain(blocks: int, rule: str = "rec-lra") -> graphlocal.LocalModule:
    """A perceptron of `blocks` subgraphs."""
    layers = [layer for _ in range(blocks - 1) for layer in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(8, 4))
    return graphlocal.compile(model, example_inputs=torch.randn(8, 8), rule=rule, partition="leaf")


@pytest.fixture(scope="module")
def chains() -> dict[int, graphlocal.ir.LocalGraph]:
    return {p: chain(p).graph for p in (2, 4, 6)}


def costs_of(graph, forward: float = 1.0, update: float = 1.0, displacement: float = 0.0) -> dict:
    kinds = {"F": forward, "D": displacement, "U": update}
    return {(kind, n): cost for n in graph.number.values() for kind, cost in kinds.items()}


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
@pytest.mark.parametrize("stages", [2, 4, 6])
@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_of_backprops_pipelines_is_the_closed_form(chains, stages, microbatches, backward, schedule):
    graph, place = chains[stages], range(stages)
    costs = costs_of(graph, update=backward)
    timeline = simulate(pipelines.backprop(graph, place, costs, microbatches, schedule=schedule))
    rounds = microbatches + stages - 1
    assert timeline.makespan == pytest.approx(rounds * (1 + backward) / microbatches)
    bubble = timeline.bubble([device_name(d) for d in place])
    assert bubble == pytest.approx((stages - 1) / rounds)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
@pytest.mark.parametrize("stages", [2, 4, 6])
@pytest.mark.parametrize("update", [0.5, 1.0, 2.0])
def test_local_learning_on_a_chain_pays_for_the_forward_pipeline_alone(chains, stages, microbatches, update):
    graph, place = chains[stages], range(stages)
    timeline = simulate(pipelines.local(graph, place, costs_of(graph, update=update), microbatches))
    expected = (stages - 1 + microbatches) / microbatches + update
    assert timeline.makespan == pytest.approx(expected)


def test_1f1b_keeps_as_many_microbatches_alive_as_there_are_stages_below(chains):
    tasks = pipelines.backprop(chains[4], range(4), costs_of(chains[4]), 8, schedule="1f1b")
    timeline = simulate(tasks)
    for stage in range(4):
        alive = most = 0
        for slot in timeline.slots:
            if slot.task.resource == device_name(stage):
                alive += 1 if slot.task.name.startswith("F") else -1
                most = max(most, alive)
        assert most == 4 - stage


GOLDEN = """\
         1    2    3    4    5    6    7
device 0 F1.1 F1.2 .    .    U1.1 U1.2 .
device 1 .    F2.1 F2.2 .    U2.1 U2.2 .
device 2 .    .    F3.1 F3.2 U3.1 U3.2 .
device 3 .    .    .    F4.1 F4.2 U4.1 U4.2"""

GPIPE = """\
         1    2    3    4    5    6    7    8    9    10
device 0 F1.1 F1.2 .    .    .    .    .    .    B1.1 B1.2
device 1 .    F2.1 F2.2 .    .    .    .    B2.1 B2.2 .
device 2 .    .    F3.1 F3.2 .    .    B3.1 B3.2 .    .
device 3 .    .    .    F4.1 F4.2 B4.1 B4.2 .    .    ."""

ONE_F_ONE_B = """\
         1    2    3    4    5    6    7    8    9    10
device 0 F1.1 F1.2 .    .    .    .    .    B1.1 .    B1.2
device 1 .    F2.1 F2.2 .    .    .    B2.1 .    B2.2 .
device 2 .    .    F3.1 F3.2 .    B3.1 .    B3.2 .    .
device 3 .    .    .    F4.1 B4.1 F4.2 B4.2 .    .    ."""


def test_the_grids_of_four_blocks_and_two_microbatches(chains):
    graph, costs, devices = chains[4], costs_of(chains[4], 2, 2), [device_name(d) for d in range(4)]
    shown = [
        simulate(pipelines.local(graph, range(4), costs, 2)),
        simulate(pipelines.backprop(graph, range(4), costs, 2)),
        simulate(pipelines.backprop(graph, range(4), costs, 2, schedule="1f1b")),
    ]
    assert ["\n".join(grid(timeline, devices, slot=1.0)) for timeline in shown] == [GOLDEN, GPIPE, ONE_F_ONE_B]


def test_what_crosses_devices_is_counted_once_for_each_device(chains):
    graph = chains[4]
    sizes = Sizes(graph, {"B": 8})
    link = Link(1e6, 0.5)
    timeline = simulate(pipelines.local(graph, [0, 0, 1, 1], costs_of(graph), 1, link, sizes))
    moved = {slot.task.name: slot.task.bytes for slot in timeline.slots if slot.task.resource.startswith("port")}
    assert sorted(moved.values()) == [8 * 4 * 4, 8 * 8 * 4]  # the output's error to device 0, z of subgraph 2 to 1
    assert timeline.bytes == sum(moved.values())
    ends = {slot.task.name: slot for slot in timeline.slots}
    (sent,) = (slot for slot in timeline.slots if slot.task.label == "z")
    assert ends["F3.1"].start == pytest.approx(sent.end + 0.5)
    assert sent.end - sent.start == pytest.approx(256 / 1e6)
    exact = simulate(pipelines.backprop(graph, [0, 0, 1, 1], costs_of(graph), 1, link, sizes))
    assert exact.bytes == 2 * 8 * 8 * 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=9), st.integers(1, 5))
def test_a_balanced_assignment_is_contiguous_and_no_other_has_a_smaller_maximum(costs, parts):
    place = balanced(costs, parts)
    used = min(parts, len(costs))
    assert sorted(set(place)) == list(range(used))
    assert all(b - a in (0, 1) for a, b in pairwise(place))

    def largest(limits: list[int]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise([0, *limits, len(costs)]))

    def all_limits(start: int, left: int):
        if not left:
            yield []
            return
        for at in range(start, len(costs) - left + 1):
            yield from ([at, *rest] for rest in all_limits(at + 1, left - 1))

    best = min(largest(limits) for limits in all_limits(1, used - 1))
    assert max(sum(c for c, d in zip(costs, place, strict=True) if d == k) for k in range(used)) == pytest.approx(best)


@pytest.mark.parametrize("name", ["mlp", "small_resnet", "unet", "several_inputs_outputs", "tied_weight",
                                  "transformer_dropout", "language_model", "gru_unrolled"])  # fmt: skip
@pytest.mark.parametrize("rule", ["rec-lra", "backprop"])
def test_the_plan_of_any_model_keeps_every_dependency_of_its_actions(name, rule):
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule)
    found = graphlocal.plan(local, devices=3, microbatches=2)
    slots = {slot.task.name: slot for slot in found.timelines["local"].slots}
    for (kind, n), needs in graphlocal.verify.action_dependencies(local.graph).items():
        for k in (1, 2):
            mine = slots[f"{kind}{n}.{k}"]
            assert mine.task.resource == device_name(found.place[n - 1])
            assert all(slots[f"{a}{b}.{k}"].end <= mine.start + 1e-12 for a, b in needs if a != "F" or kind == "F")
    for timeline in found.timelines.values():
        tasks = [slot.task for slot in timeline.slots]
        assert timeline.makespan >= critical_path(tasks) - 1e-12
        assert timeline.makespan >= max(map(timeline.busy, found.devices))
    assert "speed-up" in str(found)


# Costs and units


def test_the_roofline_of_a_linear_layer():
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 64), rule="rec-lra", partition="leaf")
    sizes = Sizes(local.graph, {"B": 8})
    compute = roofline(local.graph, sizes, Device(flops=1.0, bytes=1e30))
    tanh = 8 * 32
    assert compute["F", 1] == 2 * 8 * 64 * 32 + tanh
    assert compute["U", 1] == 2 * 8 * 64 * 32 + tanh  # the weight's gradient alone
    exact = roofline(local.graph, sizes, Device(flops=1.0, bytes=1e30), exact=True)
    assert exact["U", 2] == 2 * 2 * 8 * 32 * 16
    assert exact["U", 1] == 2 * 8 * 64 * 32 + tanh  # nothing is sent to the model's input
    assert compute["D", 1] == 2 * 8 * 16 * 32
    memory = roofline(local.graph, sizes, Device(flops=1e30, bytes=1.0))
    assert memory["F", 2] == 4 * (8 * 32 + 32 * 16 + 16 + 8 * 16)


@pytest.mark.parametrize(("dim", "size"), [(3, 3), ("B", 8), ("2*B", 16), ("(B-1)//2+1", 4), ("S1*B", 40), ("-1+B", 7)])
def test_sizes_that_the_graph_leaves_open(chains, dim, size):
    assert Sizes(chains[2], {"B": 8, "S1": 5}).of_type(TensorType("float16", (dim, 2))) == 4 * size


@pytest.mark.parametrize("dim", ["S9", "B/2", "__import__('os')", "B.real", "B//0", "("])
def test_sizes_that_are_no_arithmetic_are_refused(chains, dim):
    with pytest.raises(InputError, match="is not known"):
        Sizes(chains[2], {"B": 8}).of_type(TensorType("float32", (dim,)))


@pytest.mark.parametrize(
    ("text", "value"),
    [("10Gb", 1.25e9), ("10 Gb/s", 1.25e9), ("100Gbps", 1.25e10), ("1.6TB/s", 1.6e12), ("8b", 1.0), (5, 5.0)],
)
def test_bandwidths(text, value):
    assert units.bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("5us", 5e-6), ("0.1 ms", 1e-4), ("0s", 0), (1e-3, 1e-3), ("2ns", 2e-9)])
def test_times(text, value):
    assert units.seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["10", "Gb", "10 apples", "-1Gb", "0Gb", 0, float("nan"), None, "1e400Gb", True])
def test_bandwidths_that_are_none(text):
    with pytest.raises(InputError, match="bandwidth is"):
        units.bandwidth(text)


@pytest.mark.parametrize("text", ["5", "5 Gb", -1, "fast", float("inf"), None])
def test_times_that_are_none(text):
    with pytest.raises(InputError, match="latency is"):
        units.seconds(text)


def test_rates_and_labels():
    assert units.rate("19.5T") == units.rate("19.5 TFLOPS") == 19.5e12
    with pytest.raises(InputError, match="flops is 'quick'"):
        units.rate("quick")
    assert [units.time_label(x) for x in (2.0, 1.5e-3, 5e-6, 3e-9)] == ["2 s", "1.5 ms", "5 us", "3 ns"]
    assert [units.bytes_label(x) for x in (12, 1500, 2e6, 3e9)] == ["12 B", "1.5 kB", "2 MB", "3 GB"]


@pytest.mark.parametrize("options", [{"devices": 0}, {"streams": 1.5}, {"microbatches": True}, {"bandwidth": "x"}])
def test_a_plan_of_nonsense_is_refused(options):
    local = chain(2)
    with pytest.raises(InputError, match=next(iter(options))):
        graphlocal.plan(local, **options)
    with pytest.raises(InputError, match="compiled model"):
        graphlocal.plan(local.original)


def test_more_devices_do_not_make_more_parts_than_there_are_subgraphs_and_streams_do_not_slow_a_plan():
    local = chain(4)
    assert len(graphlocal.plan(local, devices=9).devices) == 4
    one, two = (graphlocal.plan(local, devices=2, streams=s).timelines["local"].makespan for s in (1, 2))
    assert two <= one


def test_a_measured_plan_has_a_time_for_every_action_and_leaves_the_model_alone():
    model = zoo.MODELS["small_resnet"]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    before = {key: value.clone() for key, value in local.state_dict().items()}
    found = measure(local.compiled, repeats=3)
    keys = {(a.kind, a.subgraph) for a in local.graph.schedule}
    assert {key for key in keys if key[0] in "FU"} <= set(found.actions) <= keys
    assert all(seconds > 0 for seconds in found.actions.values())
    shown = str(graphlocal.plan(local, devices=2, measured=True))
    alone = graphlocal.plan(local, devices=1, microbatches=1, measured=True)
    assert alone.timelines["local"].makespan == pytest.approx(alone.one_device["local"])
    assert alone.timelines["gpipe"].makespan == pytest.approx(alone.one_device["backprop"])
    assert "of the measured step" in shown
    assert all(torch.equal(before[key], value) for key, value in local.state_dict().items())


def test_the_command_line_prints_the_plan_and_refuses_bad_units(monkeypatch, capsys):
    from graphlocal import cli

    arguments = ["graphlocal", "plan", "graphlocal.demo:digits_mlp", "--input", "16x1x8x8", "--devices", "2"]
    arguments += ["--latency", "0s", "--flops", "1G"]
    monkeypatch.setattr("sys.argv", [*arguments, "--microbatches", "2"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "device 1 " in shown
    assert all(name in shown for name in ("local:", "gpipe:", "1f1b:", "F1.2", "B1.1"))
    monkeypatch.setattr("sys.argv", [*arguments, "--bandwidth", "10 apples"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "bandwidth is '10 apples'" in capsys.readouterr().err
