"""What a training step keeps: only what updates need, less on demand, and as much as was predicted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from training import Step, step

import graphlocal
import zoo
from graphlocal.demo import SmallResNet
from graphlocal.errors import InputError
from graphlocal.execution import Execution
from graphlocal.live_memory import LiveMemory, allocated_bytes, peak_bytes, stored_bytes, tensor_bytes
from graphlocal.memory import memory
from graphlocal.partial_optimizer import Gathering
from graphlocal.rules import Backprop, EquilibriumPropagation, LRADiff, RecLRA
from graphlocal.targets.fused_updates import with_updates
from graphlocal.targets.liveness import liveness
from graphlocal.targets.lowered import lower
from graphlocal.targets.recompute import recompute
from graphlocal.targets.training_graph import split, take

RULES = [Backprop(), RecLRA(error_weights="kp")]


@pytest.fixture
def drop_all(monkeypatch):
    """Elementwise results are worked out again however small they are."""
    monkeypatch.setattr(recompute, "__defaults__", ((), 0, False))


# The tracker


def test_live_memory_counts_storages_once_and_forgets_freed_ones():
    before = torch.ones(100)
    with LiveMemory() as live:
        a = torch.zeros(250)
        view = a.view(50, 5).t()
        assert live.now == 1000
        del a
        assert live.now == 1000
        before.add_(1)
        b = view + 1
        assert live.now == 2000
        del view
        assert live.now == 1000
        del before, b
    assert (live.now, live.peak) == (0, 2000)


def test_live_memory_sees_what_autograd_keeps_and_the_parts_of_sparse_tensors():
    x = torch.ones(100, requires_grad=True)
    with LiveMemory() as live:
        y = x.exp().sum()
        assert live.now == 404
        del y
        assert live.now == 0
        table = torch.ones(5, 3, requires_grad=True)
        F.embedding(torch.tensor([1, 4]), table, sparse=True).sum().backward()
        assert live.now >= 5 * 3 * 4 + 2 * 3 * 4  # the table, and the rows of its gradient
        del table
    assert live.now == 0
    assert peak_bytes(lambda: torch.ones(10), torch.device("cpu")) == 40


def test_tensors_take_what_they_show_and_lie_in_memory_that_counts_once():
    whole = torch.zeros(4, 6)
    wide = torch.zeros(1, 6).expand(4, 6)
    assert tensor_bytes([whole, (wide, None)]) == 2 * 4 * 24
    assert stored_bytes([whole, whole[1:], whole.T, wide]) == 4 * (24 + 6)
    assert stored_bytes([torch.eye(3).to_sparse()]) == 3 * (2 * 8 + 4)


def test_the_allocator_forgets_what_is_freed_and_does_not_count_what_was_there():
    kept = [torch.ones(1000)]

    def make_and_free() -> None:
        kept.append(torch.ones(250))
        kept[0] = torch.ones(500)
        del kept[1]
        torch.ones(100)

    cpu = torch.device("cpu")
    assert allocated_bytes(make_and_free, cpu) == 3000
    assert allocated_bytes(make_and_free, cpu) == 3000  # frees what the first run made
    assert allocated_bytes(lambda: None, cpu) == 0


def steps_of(way: str, trained: nn.Module, x: Tensor, loss: Callable[[Any], Tensor]) -> Callable[[], object]:
    """A training step, after the ones that make what lives between steps."""
    local = trained if way == "backprop" else graphlocal.compile(trained, example_inputs=(x,))
    optimizer = torch.optim.Adam(local.parameters(), 1e-3, fused=True)
    fused = graphlocal.train_step(local, lambda z, _: loss(z), optimizer) if way == "fused" else None

    def run() -> None:
        if fused is not None:
            fused(x, None)
            return
        loss(local(x)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        run()
    return run


@pytest.mark.parametrize("way", ["backprop", "drop-in", "fused"])
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_the_allocator_counts_what_live_memory_counts(name, way):
    model = zoo.MODELS[name]
    run = steps_of(way, model.make(), *model.example(), model.loss)
    counts = [count(run, torch.device("cpu")) for count in (peak_bytes, allocated_bytes)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("way", ["backprop", "fused"])
def test_the_allocator_counts_the_workspaces_of_convolutions_too(way):
    run = steps_of(way, SmallResNet(), torch.randn(256, 1, 8, 8), lambda z: z.square().mean())
    counts = [count(run, torch.device("cpu")) for count in (peak_bytes, allocated_bytes)]
    assert counts[0] <= counts[1] <= 1.15 * counts[0]


# What a step keeps


def lowered(name: str, rule: Any = "rec-lra", **options: Any) -> tuple[Execution, list[Any]]:
    model = zoo.MODELS[name]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule, **options)
    compiled = local.compiled
    return Execution(compiled, "lowered"), list(compiled.traced.arguments.leaves)


FEW = ["small_resnet", "several_inputs_outputs"]
MORE = ["vit", "language_model", "transformer_dropout", "unet", "convnext", "mixture_of_experts", "moving_average"]
KEEPS = [*FEW, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", KEEPS)
def test_nothing_that_an_update_reads_survives_it(name, again):
    """After the last update that reads it, a kept value is gone, unless it is the caller's or the model's own."""
    execution, leaves = lowered(name, recompute=again)
    graph = with_updates(execution.lowered(leaves))
    error = split(graph)[1].graph
    readers = {
        int(node.args[1]): {user.meta["action"] for user in node.users if user.meta.get("action")}
        for node in error.find_nodes(op="call_function", target=take)
    }
    updates = [node for node in error.nodes if "apply_updates" in node.name]
    order = {str(a): i for i, a in enumerate(execution.compiled.graph.schedule)}
    order[""] = len(order)  # of shared parameters
    with torch.enable_grad():
        run = execution.run(leaves, fused=True)
    owned = (*leaves, *execution.compiled.model.parameters(), *execution.compiled.model.buffers(), *run.outputs)
    known = {x.untyped_storage()._cdata for x in owned if isinstance(x, Tensor)}
    storages: dict[int, set[str]] = {}
    weak: dict[int, StorageWeakRef] = {}
    for i, x in enumerate(run.saved):
        if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in known:
            storages[key] = storages.get(key, set()) | readers.get(i, set())
            weak[key] = StorageWeakRef(x.untyped_storage())
    del x

    def expired(key: int) -> bool:
        return weak[key].expired()

    errors = [torch.ones_like(z) if taken else None for z, taken in zip(run.outputs, execution.taken, strict=True)]
    checked: set[int] = set()

    def look(names: tuple[str, ...], _: Any) -> None:
        action = next(node.meta["action"] for node in updates if set(names) <= set(node.args[1]))
        for storage, read_by in storages.items():
            if all(order[other] < order[action] for other in read_by):
                assert expired(storage), (action, read_by)
                checked.add(storage)

    with torch.no_grad():
        run.error_pass(errors, look)
    last = max((node.meta["action"] for node in updates), key=order.__getitem__)
    assert checked == {key for key, read_by in storages.items() if all(order[o] < order[last] for o in read_by)}
    assert checked
    assert all(map(expired, storages))


@pytest.mark.parametrize("name", KEEPS)
def test_the_forward_pass_keeps_what_the_error_pass_reads_and_no_more(name):
    execution, leaves = lowered(name)
    found = liveness(execution.lowered(leaves))
    execution.run(leaves, fused=True)
    with torch.no_grad(), LiveMemory() as live:
        run = execution.run(leaves, fused=True)
        run.outputs = []
        assert live.now == found.kept


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", KEEPS)
def test_the_predicted_peak_is_the_measured_one(name, again):
    found = memory(lowered(name, recompute=again)[0].compiled, torch.optim.SGD).steps["local"]
    assert found.predicted is not None
    assert found.measured == pytest.approx(found.predicted.peak.total, rel=0.03)


def test_fused_updates_need_less_than_backpropagation_on_a_deep_model():
    hidden = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(512, 10))
    local = graphlocal.compile(model, example_inputs=torch.randn(8, 512))
    found = memory(local.compiled, torch.optim.Adam)
    gradients = 8 * 4 * (512 * 512 + 512) + 4 * (512 * 10 + 10)
    assert (found.parameters, found.buffers, found.optimizer) == (gradients, 0, 2 * gradients)
    assert found.feedback == sum(4 * t.numel() for t in local.error_weights.buffers())
    assert found.steps["backprop"].measured > gradients
    assert found.steps["local"].measured < gradients / 2
    assert found.total("local") < found.total("backprop")


def test_gradients_that_wait_for_each_other_are_at_most_half_of_the_models_and_a_layers():
    hidden = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.Tanh())]
    local = graphlocal.compile(nn.Sequential(*hidden, nn.Linear(256, 10)), example_inputs=torch.randn(8, 256))
    layer, activations = 4 * (256 * 256 + 256), 16 * 4 * 8 * 256
    gradients = 6 * layer + 4 * (256 * 10 + 10)
    step = memory(local.compiled, torch.optim.Adam).steps["local"]
    assert step.measured <= gradients / 2 + layer + activations


def deep() -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(16) for layer in (nn.Linear(32, 32), nn.Tanh())], nn.Linear(32, 3))


def test_what_stacked_updates_take_counts_and_recomputing_subgraphs_are_not_stacked():
    found = {}
    for again in (False, True):
        local = graphlocal.compile(deep(), example_inputs=torch.randn(8, 32), recompute=again)
        found[again] = memory(local.compiled, torch.optim.SGD)
        step = found[again].steps["local"]
        assert step.measured == pytest.approx(step.predicted.peak.total, rel=0.05)
    one_stack = 4 * 16 * (32 * 32 + 32)
    assert (found[False].lent, found[True].lent) == (one_stack, 0)
    between = found[False].parameters + found[False].feedback + one_stack
    assert found[False].total("local") == between + found[False].steps["local"].peak
    assert f"lent stacks {one_stack / 1000:.1f} kB" in str(found[False])
    assert "lent" not in str(found[True])


def test_steps_on_batches_of_several_sizes_stack_their_gradients_in_one_place():
    local = graphlocal.compile(deep(), example_inputs=torch.randn(8, 32))
    run = graphlocal.train_step(local, F.cross_entropy, torch.optim.SGD(local.parameters(), 0.1))
    kept = []
    for size in (8, 8, 8, 6, 6, 6):
        run(torch.randn(size, 32), torch.randint(3, (size,)))
        kept.append(local.compiled.execution.scratch.bytes)
    assert local.compiled.execution.batches
    assert kept == [0, *[4 * 16 * (32 * 32 + 32)] * 5]


def test_gradients_wait_for_each_other_until_there_are_enough():
    handed: list[tuple[str, ...]] = []
    gathering = Gathering(lambda names, _: handed.append(names), 10)
    gathering(("a",), (torch.ones(4),))
    gathering(("b", "c"), (None, torch.ones(7)))
    gathering(("d",), (torch.ones(1),))
    assert handed == [("a", "b", "c")]
    gathering.flush()
    gathering.flush()
    assert handed == [("a", "b", "c"), ("d",)]


# Recomputation


def assert_same_steps(make: Callable[..., graphlocal.LocalModule], model: zoo.ZooModel, steps: int = 3) -> None:
    """A model that recomputes does bit for bit what it does otherwise: outputs, gradients, buffers, random state."""
    plain, *others = make(target="eager"), make(target="eager", recompute=True), make(recompute=True)
    for seed in range(steps):
        true = step(plain, model.example(), model.loss, seed)
        for other in others:
            assert_same(step(other, model.example(), model.loss, seed), true)


def assert_same(found: Step, true: Step) -> None:
    assert all(map(torch.equal, found.outputs, true.outputs))
    assert torch.equal(found.random_state, true.random_state)
    assert all(torch.equal(found.buffers[name], value) for name, value in true.buffers.items())
    for name, gradient in true.gradients.items():
        assert (found.gradients[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(found.gradients[name], gradient), name


CHOSEN = {"small_resnet", "dropout_mlp", "tied_weight", "moving_average", "partly_detached"}


@pytest.mark.usefixtures("drop_all")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "name", [n if n in CHOSEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in zoo.MODELS]
)
def test_recomputed_steps_are_equal_bit_for_bit(name, rule):
    model = zoo.MODELS[name]
    assert_same_steps(
        lambda **options: graphlocal.compile(
            model.make(), example_inputs=model.example(), rule=rule, **options
        ), model,
    )  # fmt: skip


@pytest.mark.usefixtures("drop_all")
def test_training_with_recomputation_ends_at_the_same_parameters():
    """Dropout draws the same numbers, and BatchNorm counts each batch once."""
    ends = []
    for options in itertools.product(("lowered", "eager"), (False, True)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
            nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3),
        )  # fmt: skip
        target, recompute = options
        local = graphlocal.compile(
            model, example_inputs=torch.randn(5, 2, 8, 8), partition=3, target=target, recompute=recompute
        )
        run = graphlocal.train_step(local, F.cross_entropy, torch.optim.Adam(local.parameters(), 0.01))
        torch.manual_seed(1)
        for _ in range(8):
            run(torch.randn(5, 2, 8, 8), torch.randint(3, (5,)))
        ends.append({**local.state_dict(), "random": torch.get_rng_state()})
        assert model[1].num_batches_tracked == 8
    for kept, recomputed in (ends[:2], ends[2:]):
        assert all(torch.equal(recomputed[name], value) for name, value in kept.items())
    assert all(torch.allclose(ends[0][name].float(), value.float(), rtol=1e-5) for name, value in ends[2].items())


@pytest.mark.parametrize("name", ["vit", "small_resnet"])
def test_a_recomputed_subgraph_keeps_nothing_of_its_interior(name):
    """Attention, and BatchNorm in training mode, whose running statistics are not renewed again."""
    execution, leaves = lowered(name, rule="backprop", recompute=True)
    graph = execution.compiled.graph
    inside = {f"F{graph.number[name]}" for name in execution.compiled.recomputed}
    assert len(inside) == len(graph.subgraphs)
    training = execution.lowered(leaves)
    nodes = list(training.module.graph.nodes)
    before = nodes[: next(i for i, node in enumerate(nodes) if node.name == training.loss)]
    after = set(nodes[len(before) + 1 : -1])
    for node in before:
        if node.meta.get("action") in inside and not after.isdisjoint(node.users):
            others = {user.meta.get("action") for user in node.users if user in set(before)} - {node.meta["action"]}
            assert others, f"{node} is kept, and no other subgraph reads it"


def test_globs_choose_the_subgraphs_that_recompute():
    execution, leaves = lowered("small_resnet", rule="backprop")
    names = [s.name for s in execution.compiled.graph.subgraphs]
    model = zoo.MODELS["small_resnet"]
    kept = [liveness(execution.lowered(leaves)).kept]
    for globs in ([names[1]], [names[1], names[2]], True):
        local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="backprop", recompute=globs)
        assert len(local.compiled.recomputed) == (len(names) if globs is True else len(globs))
        kept.append(liveness(Execution(local.compiled, "lowered").lowered(leaves)).kept)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_autocast_holds_for_the_second_run_too():
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        local = graphlocal.compile(model, example_inputs=torch.randn(5, 6), partition=2, recompute=again)
        x = torch.randn(5, 6)
        with torch.autocast("cpu", torch.bfloat16):
            out = local(x)
        out.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_updates_on_several_streams_share_nothing_that_is_recomputed():
    """Else one update would wait for another for the sake of an elementwise function."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(5, 6), target="streams")
    compiled = local.compiled
    low = lower(compiled.training, [torch.randn(5, 6)], compiled.differentiable)
    tanh = torch.ops.aten.tanh.default
    counts = {}
    for apart in (False, True):
        module = recompute(low, (), 0, apart).module
        counts[apart] = [
            n.meta["action"] for n in module.graph.nodes if n.target is tanh and n.meta["action"][0] != "F"
        ]
    assert len(counts[True]) > len(counts[False])


def test_opaque_subgraphs_are_kept():
    model = zoo.HARD["branch_in_block"]
    torch.manual_seed(0)
    local = graphlocal.compile(model.make(), example_inputs=model.example(), recompute=True)
    opaque = {s.name for s in local.graph.subgraphs if any("opaque" in o for o in _targets(local, s))}
    assert opaque
    assert not opaque & local.compiled.recomputed
    assert local.compiled.recomputed
    step(local, model.example(), model.loss)


def _targets(local: graphlocal.LocalModule, subgraph: Any) -> list[str]:
    return [local.graph.operation[name].target for name in subgraph.operations]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [(["block9"], "matches no subgraph"), ("1", "recompute is '1'"), ([], "recompute is"), ([3], "recompute is"),
     (7, "recompute is 7")],
)  # fmt: skip
def test_what_names_no_subgraph_is_refused(wanted, said):
    with pytest.raises(InputError, match=said):
        graphlocal.compile(zoo.MODELS["mlp"].make(), example_inputs=zoo.MODELS["mlp"].example(), recompute=wanted)


@pytest.mark.parametrize("rule", [LRADiff(steps=2), EquilibriumPropagation()], ids=str)
def test_rules_that_evaluate_subgraphs_by_themselves_refuse(rule):
    with pytest.raises(InputError, match="more than once"):
        graphlocal.compile(
            zoo.MODELS["mlp"].make(), example_inputs=zoo.MODELS["mlp"].example(), rule=rule, recompute=True
        )


def test_a_saved_model_recomputes_as_before(tmp_path):
    model = zoo.MODELS["mlp"]
    for wanted in (True, ["0"]):
        local = graphlocal.compile(model.make(), example_inputs=model.example(), recompute=wanted, partition="leaf")
        local.save(tmp_path / "m.local")
        loaded = graphlocal.load(tmp_path / "m.local")
        assert loaded.options.recompute == local.options.recompute
        assert loaded.compiled.recomputed == local.compiled.recomputed


# The plan


def test_the_plan_shows_both_peaks():
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    local = graphlocal.compile(model, example_inputs=torch.randn(32, 16))
    text = str(graphlocal.plan(local, devices=2, peak=True))
    assert "memory: parameters 5.39 kB, buffers 0 B, E" in text
    assert "optimizer 10.8 kB" in text
    assert graphlocal.plan(local, devices=2).memory is None
    for name in ("local", "backprop"):
        assert any(line.startswith(name) and "kB" in line for line in text.splitlines())


def test_a_plan_says_when_it_measures_another_target():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for target, said in (("auto", False), ("batched", False), ("streams", True)):
        local = graphlocal.compile(model, example_inputs=torch.randn(6, 4), target=target)
        assert ("As target='auto' runs it, not 'streams'." in str(memory(local.compiled, torch.optim.SGD))) == said


def test_a_model_without_a_lowered_form_is_measured_only():
    model = zoo.MODELS["gru"]
    found = memory(graphlocal.compile(model.make(), example_inputs=model.example()).compiled, torch.optim.SGD)
    assert all(way.predicted is None and way.measured > 0 for way in found.steps.values())
    assert "No prediction: a whole recurrent layer" in str(found)


def test_the_model_is_left_as_it_was():
    model = zoo.MODELS["small_resnet"]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    local.eval()
    before = {name: value.clone() for name, value in local.state_dict().items()}
    random = torch.get_rng_state()
    memory(local.compiled, torch.optim.Adam)
    assert all(torch.equal(value, before[name]) for name, value in local.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in local.parameters())
    assert not local.original.training
