"""Steps that overlap: `step.run(batches)` gives bit for bit what a loop over `step(x, y)` gives."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal import overlap
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.passes.overlap import seconds_a_step
from graphlocal.rules import Backprop, RecLRA
from graphlocal.targets.lanes import Lanes

DOZEN = [
    "mlp", "deep_mlp", "dropout_mlp", "tied_weight", "called_twice", "several_inputs_outputs", "nested_output",
    "small_resnet", "inception", "unet", "transformer_dropout", "language_model", "gru_unrolled", "moving_average",
]  # fmt: skip
QUICK = {"deep_mlp", "tied_weight", "several_inputs_outputs"}
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.exhaustive) for name in DOZEN]


def compiled(name: str, rule=None, **options) -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    torch.manual_seed(0)
    return graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule or RecLRA(), **options)


def stepper(name: str, local: graphlocal.LocalModule) -> graphlocal.step.TrainStep:
    model = zoo.MODELS[name]
    return graphlocal.train_step(local, lambda out, _: model.loss(out), torch.optim.Adam(local.parameters(), 1e-2))


def state(local: graphlocal.LocalModule) -> dict:
    return {key: value.clone() for key, value in local.state_dict().items()} | {"random": torch.get_rng_state()}


def batches(name: str, count: int):
    """Batches whose making draws random numbers."""
    for _ in range(count):
        example = zoo.MODELS[name].example()
        yield tuple(x + 0.01 * torch.randn_like(x) if x.is_floating_point() else x for x in example), None


def loop(name: str, local: graphlocal.LocalModule, count: int = 20) -> tuple[list, dict]:
    step = stepper(name, local)
    torch.manual_seed(3)
    return [step(x, y) for x, y in batches(name, count)], state(local)


def overlapped(name: str, local: graphlocal.LocalModule, count: int = 20, **options) -> tuple[list, dict]:
    step = stepper(name, local)
    torch.manual_seed(3)
    return list(step.run(batches(name, count), **options)), state(local)


def assert_same(found: tuple[list, dict], expected: tuple[list, dict]) -> None:
    assert torch.equal(torch.stack(found[0]), torch.stack(expected[0]))
    assert [key for key, value in expected[1].items() if not torch.equal(found[1][key], value)] == []


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """One piece for each action, however small."""
    monkeypatch.setattr("graphlocal.targets.overlap.LEAST", 0.0)


@pytest.fixture
def traced(monkeypatch) -> list:
    """What ran on the lanes made from now on."""
    trace: list = []
    make = Lanes.__init__
    monkeypatch.setattr(Lanes, "__init__", lambda self, streams, _=None: make(self, streams, trace))
    return trace


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_equal_the_loop_bit_for_bit(name, traced):
    rule = RecLRA(error_weights="kp")
    expected = loop(name, compiled(name, rule, target="lowered"))
    assert_same(overlapped(name, compiled(name, rule, target="streams", streams=2 + DOZEN.index(name) % 3)), expected)
    assert {ran.step for ran in traced if ran.step is not None and ran.name[0] == "F"} == set(range(1, 20))


@pytest.mark.parametrize("name", ["tied_weight"])
def test_backprop_overlaps_nothing_and_stays_the_same(name):
    expected = loop(name, compiled(name, Backprop(), target="lowered"), 8)
    assert_same(overlapped(name, compiled(name, Backprop(), target="streams"), 8), expected)


def test_the_next_batch_enters_before_the_last_update(traced):
    overlapped("deep_mlp", compiled("deep_mlp", target="streams", streams=1), 6)  # one lane: an order without chance
    last_update = max(ran.start for ran in traced if ran.step == 3 and "optimizer" in ran.name)
    entered = min(ran.end for ran in traced if ran.step == 4 and ran.name == "F1")
    assert entered < last_update
    first = min(ran.end for ran in traced if ran.step == 3 and "U1 optimizer" in ran.name)
    assert first <= min(ran.start for ran in traced if ran.step == 4 and ran.name == "F1")


def test_two_lanes_work_on_two_batches_at_one_time(traced, monkeypatch):
    slowed(monkeypatch, 0.003)
    overlapped("deep_mlp", compiled("deep_mlp", target="streams", streams=2), 6)
    forward = [ran for ran in traced if ran.step == 4 and ran.name.startswith("F")]
    learning = [ran for ran in traced if ran.step == 3 and ran.name.startswith("D")]
    assert any(f.lane != d.lane and f.start < d.end and d.start < f.end for f in forward for d in learning)


def test_small_neighbours_are_one_piece(traced, monkeypatch):
    monkeypatch.setattr("graphlocal.targets.overlap.LEAST", 1.5e-4)
    expected = loop("deep_mlp", compiled("deep_mlp", target="lowered"), 6)
    assert_same(overlapped("deep_mlp", compiled("deep_mlp", target="streams"), 6), expected)
    names = {ran.name for ran in traced if ran.step == 3 and ran.name.startswith(("F", "D"))}
    assert 2 <= len([name for name in names if name.startswith("F")]) < 8
    assert any("-" in name for name in names)


def slowed(monkeypatch, seconds: float) -> None:
    """Let every piece sleep at random before and after it runs."""
    generator = random.Random(0)
    run = Lanes._run

    def slow(self, flight, i, lane):
        function = flight.cut.functions[i]
        pause = generator.random() * seconds

        def paused(*values):
            time.sleep(pause)
            results = function(*values)
            time.sleep(seconds - pause)
            return results

        functions = (*flight.cut.functions[:i], paused, *flight.cut.functions[i + 1 :])
        flight.cut = replace(flight.cut, functions=functions)
        run(self, flight, i, lane)

    monkeypatch.setattr(Lanes, "_run", slow)


@pytest.mark.parametrize("name", ["small_resnet", "dropout_mlp"])
def test_random_delays_change_nothing(name, monkeypatch):
    expected = loop(name, compiled(name, target="lowered"), 8)
    slowed(monkeypatch, 0.001)
    assert_same(overlapped(name, compiled(name, target="streams", streams=4), 8), expected)


@pytest.mark.parametrize(
    ("name", "count"),
    [("dropout_mlp", 60), *(pytest.param(n, 2000, marks=pytest.mark.exhaustive) for n in ("residual_mlp", "unet"))],
)
def test_runs_with_random_numbers_of_lanes_that_are_broken_off_at_random(name, count, monkeypatch):
    expected = loop(name, compiled(name, target="lowered"), count)
    generator, make = random.Random(1), Lanes.__init__
    monkeypatch.setattr(Lanes, "__init__", lambda self, *_: make(self, generator.randint(1, 5)))
    local = compiled(name, target="streams")
    step, losses = stepper(name, local), []
    torch.manual_seed(3)
    while len(losses) < count:
        for loss in step.run(batches(name, count - len(losses))):
            losses.append(loss)
            if generator.random() < 0.1:
                break  # the batch that is ahead has drawn nothing, as far as one can tell
    assert_same((losses, state(local)), expected)


# The user's turn


def test_at_every_loss_the_model_is_as_in_the_loop():
    seen: list[list] = [[], []]
    for states, options in zip(seen, ({"target": "lowered"}, {"target": "streams", "streams": 3}), strict=True):
        local = compiled("moving_average", **options)
        step = stepper("moving_average", local)
        torch.manual_seed(3)
        for _ in step.run(batches("moving_average", 6)):
            states.append(state(local))
    for mine, true in zip(*seen, strict=True):
        assert [key for key in true if not torch.equal(mine[key], true[key])] == []


def test_a_run_that_ends_early_leaves_the_model_after_the_last_loss():
    states = []
    for options in ({"target": "lowered"}, {"target": "streams"}):
        local = compiled("small_resnet", **options)
        torch.manual_seed(3)
        for i, _ in enumerate(stepper("small_resnet", local).run(batches("small_resnet", 9))):
            if i == 4:
                break
        states.append(state(local))
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


def test_changes_between_two_losses_count():
    found = []
    for options in ({"target": "lowered"}, {"target": "streams"}):
        local = compiled("small_resnet", **options)
        step, losses = stepper("small_resnet", local), []
        torch.manual_seed(3)
        data = [(zoo.MODELS["small_resnet"].example(), None) for _ in range(12)]
        for i, loss in enumerate(step.run(data)):
            losses.append(loss)
            with torch.no_grad():
                if i == 3:
                    next(local.original.parameters()).mul_(0.5)
                if i == 5:
                    next(local.original.buffers()).add_(1)
                if i == 7:
                    step.optimizer.param_groups[0]["lr"] = 1e-3
        found.append((losses, state(local)))
    assert_same(found[1], found[0])


def test_numbers_drawn_between_two_losses_go_to_the_next_dropout():
    found = []
    data = [(zoo.MODELS["dropout_mlp"].example(), None) for _ in range(8)]
    for options in ({"target": "lowered"}, {"target": "streams"}):
        local, losses = compiled("dropout_mlp", **options), []
        torch.manual_seed(3)
        for loss in stepper("dropout_mlp", local).run(data):
            losses.append(loss)
            torch.rand(3)
        found.append((losses, state(local)))
    assert_same(found[1], found[0])


def test_numbers_drawn_between_two_losses_and_by_the_batches_are_refused():
    run = stepper("mlp", compiled("mlp", target="streams")).run(batches("mlp", 9))
    with pytest.raises(LocalTrainingError, match=r"torch\.Generator"):
        [torch.rand(3) for _ in run]


def test_evaluation_between_two_losses():
    local = compiled("small_resnet", target="streams")
    run = stepper("small_resnet", local).run(batches("small_resnet", 9))
    for i, _ in zip(range(4), run, strict=False):
        local.eval()
        with torch.no_grad():
            local(*zoo.MODELS["small_resnet"].example())
        if i < 3:
            local.train()
    with pytest.raises(InputError, match="evaluation mode"):
        next(run)


def test_other_shapes_and_batches_in_one_memory():
    """A loader that fills the same tensor again, and whose last batch is smaller."""
    found = []
    for options in ({"target": "lowered"}, {"target": "streams", "streams": 3}):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 3))
        local = graphlocal.compile(model, example_inputs=torch.randn(8, 16), **options)
        step = graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.1))

        def loader():
            memory, labels = torch.empty(8, 16), torch.arange(8) % 3
            for i in range(20):
                yield memory.normal_()[: 5 if i % 7 == 6 else 8], labels[: 5 if i % 7 == 6 else 8]

        found.append((list(step.run(loader())), state(local)))
    assert_same(found[1], found[0])


# Failure


def test_an_error_of_the_batches_comes_after_the_last_loss():
    def failing():
        yield from batches("deep_mlp", 4)
        raise OSError("no such file")

    expected = loop("deep_mlp", compiled("deep_mlp", target="lowered"), 4)
    local, losses = compiled("deep_mlp", target="streams"), []
    run = stepper("deep_mlp", local).run(failing())
    torch.manual_seed(3)
    with pytest.raises(OSError, match="no such file"):
        losses.extend(run)
    assert_same((losses, state(local)), expected)


def test_a_batch_that_is_no_pair_is_refused_in_its_turn():
    data = [(zoo.MODELS["mlp"].example(), None)] * 4
    run = stepper("mlp", compiled("mlp", target="streams")).run([*data, (1, 2, 3)])
    assert len([next(run) for _ in range(4)]) == 4
    with pytest.raises(InputError, match="pairs"):
        next(run)


@pytest.mark.parametrize("piece", ["F3", "D4 U4", "U2 optimizer"])
def test_an_error_in_a_piece_takes_back_what_is_ahead(piece, monkeypatch):
    local = compiled("deep_mlp", target="streams", streams=3)
    step = stepper("deep_mlp", local)
    run, original = step.run(batches("deep_mlp", 30)), Lanes._run
    for _ in range(4):
        next(run)

    def fails(self, flight, i, lane):
        if flight.cut.pieces[i].name == piece and flight.step >= 6:
            raise ZeroDivisionError("in a piece")
        original(self, flight, i, lane)

    monkeypatch.setattr(Lanes, "_run", fails)
    with pytest.raises(ZeroDivisionError, match="in a piece"):
        list(run)
    assert list(run) == []
    monkeypatch.undo()
    assert len(list(step.run(batches("deep_mlp", 3)))) == 3


def test_a_loss_that_is_not_a_number_stops_before_any_update():
    model = zoo.MODELS["small_resnet"]
    states = []
    for options in ({"target": "lowered"}, {"target": "streams"}):
        local = compiled("small_resnet", **options)
        calls: list[int] = []

        def loss(output, _, calls=calls):
            calls.append(1)
            return model.loss(output) * (float("nan") if len(calls) == 5 else 1)

        step = graphlocal.train_step(local, loss, torch.optim.SGD(local.parameters(), 0.1))
        torch.manual_seed(3)
        with pytest.raises(LocalTrainingError, match="not a number"):
            list(step.run(batches("small_resnet", 9)))
        states.append(state(local))
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []


def test_ctrl_c_stops_every_lane_and_takes_back_what_is_ahead(ctrl_c, monkeypatch):
    local = compiled("moving_average", target="streams", streams=3)
    step = stepper("moving_average", local)
    list(step.run(batches("moving_average", 2)))
    slowed(monkeypatch, 0.01)
    timer = ctrl_c(0.1)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(step.run(batches("moving_average", 500)))
    timer.join()
    before = state(local)
    time.sleep(0.05)
    assert [key for key, value in state(local).items() if not torch.equal(before[key], value)] == []
    monkeypatch.undo()
    assert len(list(step.run(batches("moving_average", 3)))) == 3


# Targets


def test_every_target_and_rule_runs_batches():
    for options in ({"rule": "auto"}, {"target": "eager"}):
        found = []
        for run in (False, True):
            local = compiled("mlp", **options)
            found.append((overlapped if run else loop)("mlp", local, 4))
        assert_same(found[1], found[0])
    assert overlap.MOST_STALENESS == 64
    with pytest.raises(InputError, match="pairs"):
        stepper("mlp", compiled("mlp")).run(3)


# The plan


def test_the_simulator_overlaps_steps_as_the_lanes_do():
    graph = compiled("deep_mlp").graph
    costs = {(kind, n): 1.0 for n in graph.number.values() for kind in "FU"}
    count = len(graph.subgraphs)
    assert seconds_a_step(graph, costs, 1, None) == seconds_a_step(graph, costs, 1, 0) == 2 * count
    assert seconds_a_step(graph, costs, 2, None) == count + count / 2  # a chain, then two updates at a time
    assert seconds_a_step(graph, costs, 2, 0) == pytest.approx(count + 1, abs=0.5)  # F1 waits for U1, then a lane each
    assert seconds_a_step(graph, costs, 2, 1) == pytest.approx(count, abs=0.5)
    chain = compiled("deep_mlp", Backprop()).graph
    assert seconds_a_step(chain, costs, 4, 0) >= 2 * count - 1  # every update waits for the one above
    assert "overlapping (step.run)" in str(graphlocal.plan(compiled("mlp"), devices=2))
