"""`captured_step` on a CPU, with a fake CUDA graph: warm-up, capture, replay, and what it refuses."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import pytest
import torch
from fake_cuda_graph import FakeGraph, fake_cuda  # noqa: F401 (a fixture)
from test_streams import assert_equal, compiled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal.captured_step import WARM_UP, CapturedStep, captured_step
from graphlocal.errors import InputError, LocalTrainingError
from graphlocal.rules import RecLRA

SHAPE = (8, 6)


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


def moved(step: graphlocal.TrainStep) -> None:
    weight = step.local.original[0].weight
    weight.data = weight.data.clone()


def from_a_vector(step: graphlocal.TrainStep) -> None:
    parameters = list(step.local.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).clone(), parameters)


def there_and_back(step: graphlocal.TrainStep) -> None:
    kept = [p.data for p in step.local.parameters()]  # lest the allocator gives out the same memory again
    step.local.double().float()
    del kept


def another_error_weight(step: graphlocal.TrainStep) -> None:
    name, E = next(step.local.error_weights.named_buffers())
    setattr(step.local.error_weights, name, E.clone())


def transposed(step: graphlocal.TrainStep) -> None:
    weight = step.local.original[3].weight
    weight.data = weight.data.t()


def changed_rate(step: graphlocal.TrainStep) -> None:
    step.optimizer.param_groups[0]["momentum"] = 0.5


CHANGES = {
    "loaded state": (lambda step: step.optimizer.load_state_dict(step.optimizer.state_dict()), "table of states has"),
    "frozen": (lambda step: step.local.original[0].requires_grad_(False), "which of the model's layers"),
    "mode": (lambda step: step.local.original[2].eval(), "which of the model's layers"),
    "momentum": (changed_rate, "'momentum' of .*: 0.9 to 0.5"),
    "data": (moved, "the memory of 0.weight has changed since the step was"),
    "vector": (from_a_vector, "the memory of 0.weight has"),
    "dtype": (there_and_back, "the memory of 0.weight has"),
    "transposed": (transposed, "the memory of 3.weight has"),
    "error weight": (another_error_weight, r"the memory of error_weights\.tanh_from_\w+ has"),
    "cleared state": (lambda step: step.optimizer.state.clear(), "the memory of a tensor of the optimizer has"),
    "checks": (lambda step: setattr(step.local, "check_finite", True), "set local.check_finite = False"),
    "loss": (lambda step: setattr(step, "loss_fn", lambda *a: cross_entropy(*a)), "the step's loss function has"),
    "optimizer": (
        lambda step: setattr(step, "optimizer", torch.optim.SGD(step.local.parameters(), 0.5)), "step's optimizer has",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_what_a_replay_would_not_notice_is_refused(change, said):
    step = stepper()
    run = captured_step(step)
    trained(run, batches(WARM_UP + 1))
    change(step)
    before = {key: value.clone() for key, value in step.local.state_dict().items()}
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            run(*batches(1)[0])
    assert_equal(step.local.state_dict(), before)
    assert FakeGraph.made[0].replays == 1


def test_a_running_statistic_that_was_replaced_is_refused():
    local = compiled("small_resnet", target="lowered")
    local.check_finite = False
    loss = lambda out, _: zoo.MODELS["small_resnet"].loss(out)  # noqa: E731
    run = captured_step(graphlocal.train_step(local, loss, torch.optim.SGD(local.parameters(), 0.01)))
    trained(run, [(zoo.MODELS["small_resnet"].example(), None)] * (WARM_UP + 1))
    name, module = next((n, m) for n, m in local.original.named_modules() if isinstance(m, nn.BatchNorm2d))
    module.running_mean = module.running_mean.clone()
    with pytest.raises(InputError, match=f"the memory of {name}.running_mean has changed"):
        run(zoo.MODELS["small_resnet"].example(), None)


@pytest.mark.parametrize("change", ["loss", "optimizer", "data", "dtype", "error weight", "cleared state"])
def test_after_a_change_a_step_that_is_captured_anew_trains_as_the_step_does(change):
    states = []
    for captured in (False, True):
        step = stepper()
        trained(captured_step(step) if captured else step, batches(WARM_UP + 1))
        CHANGES[change][0](step)
        trained(captured_step(step) if captured else step, batches(WARM_UP + 3))
        states.append(step.local.state_dict())
    assert_equal(states[1], states[0])


def test_an_optimizer_that_is_replaced_between_steps_is_the_one_that_counts():
    step = stepper()
    trained(step, batches(2))
    step.optimizer = torch.optim.SGD(step.local.parameters(), 0.0)
    before = {key: value.clone() for key, value in step.local.state_dict().items()}
    for run in (step, captured_step(step)):
        trained(run, batches(WARM_UP + 2))
        assert_equal(step.local.state_dict(), before)


def test_what_changes_in_place_counts_in_replays():
    states = []
    for captured in (False, True):
        step = stepper()
        run = captured_step(step) if captured else step
        trained(run, batches(WARM_UP + 2))
        step.local.load_state_dict({key: 0.5 * value for key, value in step.local.state_dict().items()})
        with torch.no_grad():
            for state in step.optimizer.state.values():
                state["momentum_buffer"].zero_()
        trained(run, batches(3))
        states.append(step.local.state_dict())
    assert_equal(states[1], states[0])


@pytest.mark.parametrize("target", ["lowered", "batched", "streams"])
def test_the_memory_of_the_captured_passes_lives_as_long_as_the_captured_step(target):
    states = []
    for captured in (False, True):
        step = stepper(mlp(target=target))
        run = captured_step(step) if captured else step
        trained(run, batches(WARM_UP + 1))
        if captured:
            step.local.float()  # moves nothing, and forgets what was compiled
            step._parts.clear()
            gc.collect()
            assert not step.local._cache
        trained(run, batches(3))
        states.append(step.local.state_dict())
    assert_equal(states[1], states[0])


def test_a_step_that_replaces_a_tensor_of_its_model_can_not_be_captured():
    step = stepper()
    loss = step.loss_fn

    def replacing(out: Tensor, y: Tensor) -> Tensor:
        if FakeGraph.capturing:
            moved(step)
        return loss(out, y)

    step.loss_fn = replacing
    run = captured_step(step)
    with pytest.raises(LocalTrainingError, match=r"why: it puts 0\.weight into other memory"):
        trained(run, batches(WARM_UP + 1))


def test_the_fake_graph_writes_where_memory_was_at_the_capture():
    x = torch.zeros(2)
    kept = x.data
    with FakeGraph().capture():
        x.add_(1)
    (graph,) = FakeGraph.made
    x.data = torch.zeros(2)
    graph.replay()
    assert kept.tolist() == [1, 1]
    assert x.tolist() == [0, 0]
    del kept
    with pytest.raises(AssertionError, match="memory that was freed"):
        graph.replay()


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
