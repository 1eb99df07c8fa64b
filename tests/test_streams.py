"""The streams target: the sequential target's numbers on any number of lanes, and nothing left behind."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import Backprop, KolenPollack, RecLRA
from graphlocal.targets.accesses import annotate
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.lanes import Lanes, Part
from graphlocal.targets.lowered import NotLowered, lower
from graphlocal.targets.pieces import Cut, OrderError, check_order, cut
from graphlocal.targets.streams import StreamedPass
from graphlocal.targets.training_graph import split

DOZEN = [
    "mlp", "deep_mlp", "dropout_mlp", "tied_weight", "called_twice", "several_inputs_outputs", "nested_output",
    "small_resnet", "inception", "unet", "transformer_dropout", "language_model", "gru_unrolled", "moving_average",
]  # fmt: skip
RULES = [Backprop(), RecLRA(error_weights="kp"), KolenPollack()]


def compiled(name: str, rule=None, **options) -> graphlocal.LocalModule:
    model = zoo.MODELS[name]
    torch.manual_seed(0)
    return graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule or RecLRA(), **options)


def trained(name: str, local: graphlocal.LocalModule, steps: int = 20, fused: bool = True, seed: int = 3) -> dict:
    model = zoo.MODELS[name]
    optimizer = torch.optim.Adam(local.parameters(), 1e-2)
    run = graphlocal.train_step(local, lambda output, _: model.loss(output), optimizer)
    torch.manual_seed(seed)
    for _ in range(steps):
        if fused:
            run(model.example(), None)
        else:
            optimizer.zero_grad()
            model.loss(zoo.call(local, model.example())).backward()
            optimizer.step()
    return {key: value.clone() for key, value in local.state_dict().items()} | {"random": torch.get_rng_state()}


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


def warmed(name: str, **options) -> graphlocal.LocalModule:
    """A model that is lowered already, in the state that it starts from."""
    local, model = compiled(name, **options), zoo.MODELS[name]
    start = {key: value.clone() for key, value in local.state_dict().items()}
    optimizer = torch.optim.SGD(local.parameters(), 0.0)
    graphlocal.train_step(local, lambda y, _: model.loss(y), optimizer)(model.example(), None)
    local.load_state_dict(start)
    return local


def passes(local: graphlocal.LocalModule) -> list[StreamedPass]:
    found = [p for passes in local.compiled.execution._passes.values() for p in (passes.forward, passes.error)]
    return [p for p in found if isinstance(p, StreamedPass)]


def error_cut(name: str, rule=None) -> Cut:
    local = compiled(name, rule, target="lowered")
    leaves, _ = local._binder.flatten(zoo.MODELS[name].example(), {})
    low = with_updates(lower(local.compiled.training, leaves, local.compiled.differentiable))
    annotate(low)
    return cut(split(low)[1])


CASES = [(name, RULES[1]) for name in DOZEN]
CASES += [(name, rule) for name in ("mlp", "small_resnet", "tied_weight", "unet") for rule in (RULES[0], RULES[2])]


@pytest.mark.parametrize(("name", "rule"), CASES, ids=str)
def test_twenty_steps_equal_the_sequential_target_bit_for_bit(name, rule):
    expected = trained(name, compiled(name, rule, target="lowered"))
    streams = 2 + CASES.index((name, rule)) % 3
    local = compiled(name, rule, target="streams", streams=streams)
    assert_equal(trained(name, local), expected)
    assert all(p.streams == streams for p in passes(local))
    assert passes(local)


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["tied_weight", "several_inputs_outputs"])
def test_the_drop_in_path_equals_the_sequential_target_on_any_number_of_streams(name, streams):
    expected = trained(name, compiled(name, target="lowered"), 5, fused=False)
    local = compiled(name, target="streams", streams=streams)
    assert_equal(trained(name, local, 5, fused=False), expected)


@pytest.mark.parametrize("name", ["tied_weight", "called_twice", "gru_unrolled"])
def test_subgraphs_that_share_a_parameter_update_in_one_order_on_any_number_of_streams(name):
    orders = set()
    for streams in (1, 2, 3, 4):
        graph = compiled(name, target="streams", streams=streams).graph
        shared = [s for s in graph.states if sum(s.name in g.states for g in graph.subgraphs) > 1 and s.trainable]
        updates = [graph.subgraphs[a.subgraph - 1] for a in graph.schedule if a.kind == "U"]
        orders.add(str([[g.name for g in updates if s.name in g.states] for s in shared]))
    assert len(orders) == 1


def test_updates_under_skip_errors_wait_for_the_output_error_alone():
    pieces = error_cut("deep_mlp")
    updates = [i for i, piece in enumerate(pieces.pieces) if piece.name.startswith("D")]
    assert len(updates) == 7
    assert all(pieces.needs[i] == {0} for i in updates)
    assert [i for i, piece in enumerate(pieces.pieces) if piece.updates] == sorted(
        i for i, piece in enumerate(pieces.pieces) if "optimizer" in piece.name
    )


def test_backprop_waits_for_the_update_above():
    pieces = error_cut("deep_mlp", Backprop())
    chain = [i for i, piece in enumerate(pieces.pieces) if not piece.updates]
    assert all(above in pieces.needs[below] for above, below in pairwise(chain))


# Order


@pytest.mark.parametrize("name", ["small_resnet", "tied_weight", "transformer_dropout", "moving_average"])
def test_the_checker_finds_every_dependency_that_is_taken_out(name):
    pieces = error_cut(name, RecLRA(error_weights="kp"))
    check_order(pieces)
    found = 0
    for i, needs in enumerate(pieces.needs):
        for j in needs:
            others = (*pieces.needs[:i], needs - {j}, *pieces.needs[i + 1 :])
            corrupted = replace(pieces, needs=others)
            if not reachable(others, j, i):
                with pytest.raises(OrderError, match="not kept in order"):
                    check_order(corrupted)
                found += 1
    assert found >= len(pieces.pieces) - 1


def reachable(needs: tuple[frozenset[int], ...], earlier: int, later: int) -> bool:
    return any(j == earlier or reachable(needs, earlier, j) for j in needs[later])


def test_the_checker_finds_a_dependency_on_a_later_piece():
    pieces = error_cut("mlp")
    with pytest.raises(OrderError, match="needs a later piece"):
        check_order(replace(pieces, needs=(frozenset({3}), *pieces.needs[1:])))


class RandomBranches(nn.Module):
    """Two branches that both draw random numbers and write one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        a = self.drop(self.left(x))
        self.seen.mul_(0.5).add_(a.detach().mean(0))
        b = self.drop(self.right(x))
        self.seen.mul_(0.5).add_(b.detach().mean(0))
        return self.head(a + b)


def test_random_numbers_and_buffers_keep_their_order_across_branches():
    states = []
    for options in ({"target": "lowered"}, {"target": "streams", "streams": 3}):
        torch.manual_seed(0)
        x, model = torch.randn(5, 6), RandomBranches()
        local = graphlocal.compile(model, example_inputs=x, partition="leaf", **options)
        for _ in range(10):
            local.zero_grad()
            cross_entropy(local(x), torch.arange(5) % 3).backward()
        states.append({**{n: p.grad for n, p in model.named_parameters()}, "seen": model.seen})
    assert_equal(states[1], states[0])


def call_instead(p: StreamedPass, functions: tuple, monkeypatch) -> None:
    """Let other functions stand for the pieces of a pass."""
    monkeypatch.setattr(p, "part", Part(replace(p.cut, functions=functions)))


def delay(local: graphlocal.LocalModule, seconds: float, monkeypatch) -> None:
    """Let every piece of a model sleep at random before and after it runs."""
    generator = random.Random(0)
    for p in passes(local):

        def slow(function):
            def run(*values):
                time.sleep(generator.random() * seconds)
                results = function(*values)
                time.sleep(generator.random() * seconds)
                return results

            return run

        call_instead(p, tuple(map(slow, p.cut.functions)), monkeypatch)


@pytest.mark.parametrize("name", ["tied_weight", "several_inputs_outputs", "deep_mlp"])
def test_random_delays_change_nothing_and_every_piece_waits_for_what_it_needs(name, monkeypatch):
    expected = trained(name, compiled(name, target="lowered"), 12)
    local = warmed(name, target="streams", streams=4)
    delay(local, 0.002, monkeypatch)
    traces = [(p, p.trace) for p in passes(local) if setattr(p, "trace", []) is None]
    assert_equal(trained(name, local, 12), expected)
    for p, trace in traces:
        count = len(p.cut.pieces)
        for step in (trace[i : i + count] for i in range(0, len(trace), count)):
            over = {ran.piece: ran.end for ran in step}
            assert len(over) == count
            assert all(over[j] <= ran.start for ran in step for j in p.cut.needs[ran.piece])
            assert {ran.lane for ran in step if p.cut.pieces[ran.piece].updates} <= {0}
    assert any(ran.lane for _, trace in traces for ran in trace)


@pytest.mark.slow
def test_two_thousand_steps_under_random_stream_counts():
    model = zoo.MODELS["residual_mlp"]
    generator = random.Random(1)
    locals_ = [compiled("residual_mlp", target="streams", streams=4), compiled("residual_mlp", target="lowered")]
    runs = []
    for local in locals_:
        optimizer = torch.optim.SGD(local.parameters(), 1e-3, momentum=0.9)
        runs.append(graphlocal.train_step(local, lambda y, _: model.loss(y), optimizer))
    for i in range(2000):
        for p in passes(locals_[0]):
            p.streams = generator.randint(1, 4)
        for run in runs:
            run(model.example(), None)
        if i % 100 == 99:
            assert_equal(locals_[0].state_dict(), locals_[1].state_dict())


# Failure


def fails_in(local: graphlocal.LocalModule, wanted: str, error: BaseException, monkeypatch) -> None:
    def fail(*values):
        raise error

    for p in passes(local):
        functions = [
            fail if piece.name == wanted else function
            for piece, function in zip(p.cut.pieces, p.cut.functions, strict=True)
        ]
        call_instead(p, tuple(functions), monkeypatch)


@pytest.mark.parametrize("streams", [1, 3])
def test_an_error_in_a_piece_reaches_the_caller_and_the_next_step_works(streams, monkeypatch):
    local = compiled("deep_mlp", target="streams", streams=streams)
    trained("deep_mlp", local, 1)
    with monkeypatch.context() as patch:
        fails_in(local, "D4 U4", ZeroDivisionError("in a piece"), patch)
        with pytest.raises(ZeroDivisionError, match="in a piece"):
            trained("deep_mlp", local, 1)
    trained("deep_mlp", local, 1)


def test_an_update_that_is_not_a_number_is_reported_as_ever():
    local = compiled("mlp", target="streams")
    model = zoo.MODELS["mlp"]
    with pytest.raises(LocalTrainingError):
        (model.loss(local(*model.example())) * float("nan")).backward()


def lanes() -> int:
    """How many threads there are that run pieces."""
    return sum(t.name.startswith("graphlocal-lane") for t in threading.enumerate())


def test_ctrl_c_stops_every_lane_before_it_reaches_the_caller(ctrl_c, monkeypatch):
    local = compiled("deep_mlp", target="streams", streams=2)
    trained("deep_mlp", local, 1)
    delay(local, 0.01, monkeypatch)
    before = lanes()
    timer = ctrl_c(0.03)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        trained("deep_mlp", local, 200)
    timer.join()
    traces = [p for p in passes(local) if setattr(p, "trace", []) is None]
    time.sleep(0.05)
    assert all(not p.trace for p in traces)  # no piece runs on by itself
    assert lanes() <= max(before, 1)
    trained("deep_mlp", local, 1)


def test_many_models_share_the_threads():
    before = lanes()
    for _ in range(3):
        for streams in (2, 4, 3):
            trained("mlp", compiled("mlp", target="streams", streams=streams), 2)
    assert 3 <= lanes() <= max(before, 3)


def test_models_that_train_in_several_threads_at_a_time_do_not_block_each_other():
    expected = trained("deep_mlp", compiled("deep_mlp", target="lowered"), 10)
    models = [warmed("deep_mlp", target="streams", streams=3) for _ in range(3)]
    found: list[dict] = []
    threads = [threading.Thread(target=lambda m=m: found.append(trained("deep_mlp", m, 10))) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 3
    for state in found:
        assert_equal(
            {k: v for k, v in state.items() if k != "random"}, {k: expected[k] for k in state if k != "random"}
        )


def test_values_are_freed_after_their_last_reader(monkeypatch):
    local = compiled("deep_mlp", target="streams", streams=2)
    trained("deep_mlp", local, 1)
    (p,) = (p for p in passes(local) if p.cut.saved)
    tables: list[dict] = []
    run = Lanes.run
    monkeypatch.setattr(
        Lanes, "run", lambda self, f: (tables.append(f.table) if f.part is p.part else None, run(self, f))
    )
    trained("deep_mlp", local, 1)
    left = set(tables[0]) - set(p.cut.arguments)
    assert left == set(p.cut.returned)
    assert set(tables[0]["saved"]) == {None}


def test_threads_inside_a_kernel_are_divided_among_the_lanes_and_given_back(monkeypatch):
    local = compiled("deep_mlp", target="streams", streams=2)
    trained("deep_mlp", local, 1)
    seen: set[int] = set()
    for p in passes(local):
        watch = [lambda *v, f=f: (seen.add(torch.get_num_threads()), f(*v))[1] for f in p.cut.functions]
        call_instead(p, tuple(watch), monkeypatch)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        trained("deep_mlp", local, 1)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == {2}


# The API


def test_the_number_of_streams_is_checked_and_goes_with_the_target():
    make = lambda **options: compiled("mlp", **options).options.streams  # noqa: E731
    assert make(target="streams") == 2
    assert make(target="streams", streams=3) == 3
    assert make(target="lowered") == 1
    for bad in (0, -1, 1.5, True, 5000):
        with pytest.raises(InputError, match="streams"):
            make(target="streams", streams=bad)
    with pytest.raises(InputError, match='target="streams"'):
        make(streams=2)


def test_auto_does_not_choose_streams():
    local = compiled("deep_mlp")
    trained("deep_mlp", local, 3)
    assert local.compiled.execution._passes
    assert not passes(local)


def test_a_graph_without_a_lowered_form_is_refused():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), Chooses(), nn.Linear(4, 2))
    local = graphlocal.compile(model, example_inputs=torch.randn(6, 4), target="streams")
    with pytest.raises(NotLowered):
        local(torch.randn(6, 4))
