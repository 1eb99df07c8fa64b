"""`captured_step` on a CPU, with a fake CUDA graph: warm-up, capture, replay, and what it refuses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from test_streams import assert_equal, compiled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import graphlocal
import zoo
from graphlocal.captured_step import WARM_UP, CapturedStep, captured_step
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import RecLRA

SHAPE = (8, 6)


class Recorder(TorchDispatchMode):
    """Records every operator, with the tensors and the Python numbers that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # each memory, and what was in it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                memory = leaf.untyped_storage()
                self.before.setdefault(memory._cdata, (memory, memory.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result


class FakeGraph:
    """A CUDA graph as far as its numbers go: memory is where it was at the capture, and so are Python's numbers."""

    capturing = False
    made: list[FakeGraph]

    def __init__(self) -> None:
        FakeGraph.made.append(self)
        self.recorder = Recorder()
        self.replays = 0

    @contextmanager
    def capture(self) -> Iterator[None]:
        FakeGraph.capturing, random = True, torch.get_rng_state()
        try:
            with self.recorder:
                yield
        finally:
            FakeGraph.capturing = False
            torch.set_rng_state(random)
            for memory, value in self.recorder.before.values():  # nothing has run
                memory.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, result in self.recorder.calls:
                again = function(*args, **kwargs)
                inside = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if is_tensor(x)}
                for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                    if is_tensor(old) and old.untyped_storage()._cdata not in inside:
                        old.detach().copy_(new)


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


class FakeStream:
    def __init__(self, device: Any = None) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch) -> None:
    def random_state() -> list[Tensor]:
        assert not FakeGraph.capturing, "the random state of a GPU is read during a capture"
        return []

    FakeGraph.made, FakeGraph.capturing = [], False
    caller = FakeStream()
    monkeypatch.setattr(sys.modules[CapturedStep.__module__], "_require_cuda", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.capture())
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: FakeGraph.capturing)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", random_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: None)


def mlp(**options: Any) -> graphlocal.LocalModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"rule": RecLRA(), "partition": "leaf", "target": "lowered"} | options
    local = graphlocal.compile(model, example_inputs=torch.randn(SHAPE), **options)
    local.check_finite = False
    return local


def stepper(local: graphlocal.LocalModule | None = None, optimizer: Any = None, **options: Any) -> graphlocal.TrainStep:
    local = local or mlp()
    options = options or {"lr": 0.1, "momentum": 0.9}
    return graphlocal.train_step(local, cross_entropy, (optimizer or torch.optim.SGD)(local.parameters(), **options))


def batches(count: int, samples: int = SHAPE[0]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (samples, SHAPE[1])
    return [
        (torch.randn(shape, generator=generator), torch.randint(3, (samples,), generator=generator))
        for _ in range(count)
    ]


def trained(run: Any, batches: list) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(2)
    return [run(x, y) for x, y in batches], torch.get_rng_state()


# What it gives


@pytest.mark.parametrize("target", ["lowered", "streams", "auto", "eager"])
def test_steps_that_are_replayed_give_what_the_steps_give(target):
    steps = [stepper(mlp(target=target)) for _ in range(2)]
    expected, random = trained(steps[0], batches(12))
    found, random_then = trained(captured_step(steps[1]), batches(12))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert torch.equal(random, random_then)
    assert_equal(steps[1].local.state_dict(), steps[0].local.state_dict())
    (graph,) = FakeGraph.made
    assert graph.replays == 12 - WARM_UP


def test_the_capture_itself_trains_nothing_and_warm_ups_are_ordered_with_the_caller():
    step = stepper()
    run = captured_step(step)
    first, *_, last = batches(WARM_UP + 1)
    for _ in range(WARM_UP):
        run(*first)
    assert FakeGraph.made == []
    assert run.side.waited == [torch.cuda.current_stream(None)] * WARM_UP
    assert torch.cuda.current_stream(None).waited == [run.side] * WARM_UP
    before = {key: value.clone() for key, value in step.local.state_dict().items()}
    run.inputs.take(*last)
    run._capture(*run.inputs.static)
    assert_equal(step.local.state_dict(), before)


class Pair(nn.Module):
    """Takes inputs by keyword or as a tuple, and returns two outputs of which the loss takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.first(x * scale))
        return self.head(z), self.other(z)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_inputs_may_be_tuples_and_dicts_and_outputs_several(kind):
    states = []
    for captured in (False, True):
        torch.manual_seed(0)
        local = graphlocal.compile(Pair(), example_inputs=(torch.randn(SHAPE), torch.ones(8, 1)), target="lowered")
        local.check_finite = False
        optimizer = torch.optim.SGD(local.parameters(), 0.1)
        step = graphlocal.train_step(local, lambda out, y: cross_entropy(out[0], y["labels"]), optimizer)
        run = captured_step(step) if captured else step
        for i, (x, y) in enumerate(batches(8)):
            scale = torch.full((8, 1), 1.0 + i)
            run((x, scale) if kind == "tuple" else {"x": x, "scale": scale}, {"labels": y})
        states.append(local.state_dict())
    assert_equal(states[1], states[0])


def test_a_loss_on_other_outputs_than_before_can_not_be_captured():
    local = graphlocal.compile(Pair(), example_inputs=(torch.randn(SHAPE), torch.ones(8, 1)), target="lowered")
    local.check_finite = False
    place = 0
    loss = lambda out, y: out[place].square().mean()  # noqa: E731
    run = captured_step(graphlocal.train_step(local, loss, torch.optim.SGD(local.parameters(), 0.1)))
    for _ in range(WARM_UP):
        run((torch.randn(SHAPE), torch.ones(8, 1)), None)
    place = 1
    with pytest.raises(LocalTrainingError, match="why: the loss takes other outputs of the model") as caught:
        run((torch.randn(SHAPE), torch.ones(8, 1)), None)
    assert "can't be captured" in str(caught.value)


def test_a_loss_that_waits_for_the_device_can_not_be_captured():
    local = mlp()
    loss = lambda out, y: cross_entropy(out, y) * (1 + 0 * out.detach().sum().item())  # noqa: E731
    run = captured_step(graphlocal.train_step(local, loss, torch.optim.SGD(local.parameters(), 0.1)))
    with pytest.raises(LocalTrainingError, match="why: operation not permitted when stream is capturing"):
        trained(run, batches(WARM_UP + 1))


def test_running_statistics_are_not_watched_during_a_capture():
    example = zoo.MODELS["small_resnet"].example()
    local = compiled("small_resnet", target="lowered")
    local.check_finite = False
    optimizer = torch.optim.SGD(local.parameters(), 0.01)
    step = graphlocal.train_step(local, lambda out, _: zoo.MODELS["small_resnet"].loss(out), optimizer)
    run = captured_step(step)
    for _ in range(WARM_UP):
        run(example, None)
    local._lag.steps = 9
    run(example, None)
    assert local._lag.steps == 10
    assert local._lag.seen == {}


# Batches


def test_a_batch_that_is_not_like_the_first_is_refused_and_the_next_one_trains():
    run = captured_step(stepper())
    ((x, y),) = batches(1)
    for count in range(WARM_UP + 3):
        for bad, said in (
            ((x[:5], y[:5]), r"captured for torch.float32 of shape \[8, 6\] on cpu"),
            ((x.double(), y), "this call has torch.float64"),
            ((x, y[:5]), r"this call has torch.int64 of shape \[5\] on cpu"),
            (((x,), y), "not built like the first one"),
            ((x.to("meta"), y), "on meta"),
        ):
            if count:
                before = {key: value.clone() for key, value in run.step.local.state_dict().items()}
                with pytest.raises(InputError, match=said):
                    run(*bad)
                assert_equal(run.step.local.state_dict(), before)
        run(x, y)
    assert FakeGraph.made[0].replays == 3


def test_a_constant_of_the_batch_stays_the_same():
    local = mlp()
    loss = lambda out, y: cross_entropy(out, y[0]) * y[1]  # noqa: E731
    run = captured_step(graphlocal.train_step(local, loss, torch.optim.SGD(local.parameters(), 0.1)))
    ((x, y),) = batches(1)
    run(x, (y, 2.0))
    with pytest.raises(InputError, match=r"(?s)captured for the constant 2.0.*the constant 3.0"):
        run(x, (y, 3.0))


@pytest.mark.parametrize(
    ("x", "said"),
    [(torch.zeros(SHAPE, device="meta"), "on meta, and the model on cpu"), (object(), "the batch holds a object")],
    ids=["device", "object"],
)
def test_a_first_batch_that_can_not_be_captured(x, said):
    with pytest.raises(InputError, match=said):
        captured_step(stepper())(x, None)


def test_evaluation_mode_is_refused_in_replays_too():
    run = captured_step(stepper())
    trained(run, batches(WARM_UP + 1))
    run.step.local.eval()
    with pytest.raises(InputError, match="evaluation mode"):
        run(*batches(1)[0])


# Optimizers


@pytest.mark.parametrize("given", [None, "step", nn.Linear(2, 2)], ids=["none", "text", "module"])
def test_what_is_no_training_step(given):
    with pytest.raises(InputError, match="captured_step needs a training step, and got a") as caught:
        captured_step(given)
    assert "graphlocal.train_step(local, loss_fn, optimizer)" in str(caught.value)
    with pytest.raises(InputError, match="got a LocalModule"):
        captured_step(mlp())


ADAPTIVE = [
    getattr(torch.optim, name) for name in dir(torch.optim) if name not in ("Optimizer", "LBFGS", "SGD", "Muon")
]
ADAPTIVE = [kind for kind in ADAPTIVE if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]


@pytest.mark.parametrize("kind", ADAPTIVE, ids=lambda kind: kind.__name__)
def test_optimizers_are_refused_unless_they_are_known_to_be_capturable(kind):
    has_option = "capturable" in kind([nn.Parameter(torch.zeros(2))]).defaults
    said = "make it with capturable=True" if has_option else f"{kind.__name__} is not known to be capturable"
    with pytest.raises(InputError, match=said):
        captured_step(stepper(optimizer=kind, lr=0.1))
    if has_option:
        assert isinstance(captured_step(stepper(optimizer=kind, lr=0.1, capturable=True)), CapturedStep)


CAPTURABLE = [kind for kind in ADAPTIVE if "capturable" in kind([nn.Parameter(torch.zeros(2))]).defaults]


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("kind", CAPTURABLE, ids=lambda kind: kind.__name__)
def test_optimizers_that_say_they_are_capturable_count_on_in_replays(kind, lr, monkeypatch):
    for module in (kind.__module__, "torch.optim.adam"):
        name = "_get_capturable_supported_devices"
        monkeypatch.setattr(sys.modules[module], name, lambda **_: ["cpu"], raising=False)
    states = []
    for captured in (False, True):
        options = {"lr": torch.tensor(0.01) if lr == "tensor" else 0.01, "capturable": True, "foreach": True}
        step = stepper(optimizer=kind, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 4, 0.5) if lr == "tensor" else None
        run = captured_step(step) if captured else step
        torch.manual_seed(2)
        for x, y in batches(WARM_UP + 4):
            run(x, y)
            if scheduler is not None:
                scheduler.step()
        states.append(step.local.state_dict())
    assert_equal(states[1], states[0])


def test_an_optimizer_of_the_users_own_is_not_taken_for_capturable():
    class Own(torch.optim.SGD):
        pass

    with pytest.raises(InputError, match="Own is not known to be capturable"):
        captured_step(stepper(optimizer=Own, lr=0.1))


def test_optimizer_hooks_would_not_run_in_a_replay():
    step = stepper()
    run = captured_step(step)
    trained(run, batches(WARM_UP + 1))
    step.optimizer.register_step_post_hook(lambda *call: None)
    with pytest.raises(InputError, match="the optimizer has step hooks"):
        run(*batches(1)[0])
    with pytest.raises(InputError, match="the optimizer has step hooks"):
        captured_step(step)


def test_a_learning_rate_that_changes_after_the_capture_is_refused():
    step = stepper()
    run = captured_step(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, 0.5)
    trained(run, batches(WARM_UP))
    scheduler.step()  # before the capture, it counts
    trained(run, batches(2))
    scheduler.step()
    before = {key: value.clone() for key, value in step.local.state_dict().items()}
    with pytest.raises(InputError, match="'lr' of the optimizer's parameter group 0 has changed") as caught:
        run(*batches(1)[0])
    assert "0.05 to 0.025" in str(caught.value)
    assert "lr=torch.tensor(1e-3, device='cuda')" in str(caught.value)
    assert_equal(step.local.state_dict(), before)
    captured_step(step)(*batches(1)[0])  # a new one goes on


def test_a_learning_rate_in_a_tensor_counts_in_replays():
    states = []
    for captured in (False, True):
        step = stepper(lr=torch.tensor(0.1), fused=True)
        run = captured_step(step) if captured else step
        scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, 0.5)
        torch.manual_seed(2)
        for x, y in batches(WARM_UP + 4):
            run(x, y)
            scheduler.step()
        states.append(step.local.state_dict())
    assert_equal(states[1], states[0])
    with pytest.raises(InputError, match="make it with fused=True"):
        captured_step(stepper(lr=torch.tensor(0.1)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda step: step.optimizer.load_state_dict(step.optimizer.state_dict()), "has changed since the step was"),
        (lambda step: step.local.original[0].requires_grad_(False), "which of the model's layers"),
        (lambda step: step.local.original[2].eval(), "which of the model's layers"),
        (lambda step: step.optimizer.param_groups[0].update(momentum=0.5), "'momentum' of .*: 0.9 to 0.5"),
    ],
    ids=["loaded state", "frozen", "mode", "momentum"],
)
def test_what_a_replay_would_not_notice_is_refused(change, said):
    step = stepper()
    run = captured_step(step)
    trained(run, batches(WARM_UP + 1))
    change(step)
    with pytest.raises(InputError, match=said):
        run(*batches(1)[0])


def test_autocast_that_begins_after_the_capture_is_refused():
    run = captured_step(stepper(mlp(target="eager")))
    trained(run, batches(WARM_UP + 1))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match="the state of autocast"):
        run(*batches(1)[0])


# Models and rules


@pytest.mark.parametrize("rule", ["auto", "equilibrium", "nlp", "lp"])
def test_rules_whose_steps_differ_are_refused(rule):
    local = compiled("mlp", rule)
    local.check_finite = False
    with pytest.raises(InputError, match=f"steps of the rule '{rule}' can't be captured"):
        captured_step(stepper(local, lr=0.1))


def test_a_model_that_checks_its_updates_is_refused_also_from_later_on():
    step = stepper()
    run = captured_step(step)
    step.local.check_finite = True
    for call in (lambda: captured_step(step), lambda: trained(run, batches(WARM_UP + 1))):
        with pytest.raises(InputError, match=r"set local\.check_finite = False"):
            call()
