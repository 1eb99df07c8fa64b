"""What a fused step saves: stacks handed over whole, lent memory, counts of steps in one tensor, a cheaper tanh."""

from __future__ import annotations

import copy
import timeit
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn, optim
from torch.nn.functional import cross_entropy

import graphlocal
import zoo
from graphlocal.errors import LocalTrainingError
from graphlocal.norms import SO_FEW, UpdateNorms, are_numbers
from graphlocal.partial_optimizer import Gathering, PartialOptimizer
from graphlocal.targets import fast_tanh
from graphlocal.targets.fast_tanh import minus_tanh, minus_tanh_over, replace_tanh
from graphlocal.targets.reuse import reuse
from graphlocal.targets.scratch import Lent, Scratch, lend
from graphlocal.targets.stacked_updates import apply_stacks

aten = torch.ops.aten


def deep(target: str, layers: int = 6, width: int = 16) -> graphlocal.LocalModule:
    torch.manual_seed(0)
    hidden = [layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(width, 3))
    return graphlocal.compile(model, example_inputs=torch.randn(8, width), target=target)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 16), torch.randint(3, (8,))) for _ in range(count)]


def trained(local: graphlocal.LocalModule, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    step = graphlocal.train_step(local, cross_entropy, optimizer)
    for x, y in batches():
        step(x, y)
    return local.state_dict()


def traced(values: dict[str, Any], *nodes: tuple[str, Any, tuple[Any, ...]]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A graph of calls by name, with `val` for each; arguments are names, or constants."""
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for name, target, arguments in nodes:
        given = tuple(made.get(a, a) if isinstance(a, str) else a for a in arguments)
        made[name] = graph.placeholder(name) if target is None else graph.call_function(target, given)
        made[name].meta["val"] = values[name]
    return graph, made


# Stacks


class Keeps(optim.SGD):
    """An optimizer that looks at a gradient again in the next step; torch knows no fused kernel for it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                before = self.state[p].get("before")
                self.state[p]["before"] = p.grad
                if before is not None:
                    p.grad = p.grad + before
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [partial(optim.Adam, lr=0.01, amsgrad=True), partial(optim.SGD, lr=0.1, momentum=0.9), partial(Keeps, lr=0.1)],
    ids=["adam", "sgd", "keeps"],
)
def test_lent_stacks_give_the_parameters_of_the_eager_target(make):
    found = [trained(local, make(local.parameters())) for local in (deep("eager"), deep("batched"))]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_fused_step_hands_over_the_stacks_of_its_batch(monkeypatch):
    seen: list[Any] = []
    hand_on = Gathering.lent
    monkeypatch.setattr(Gathering, "lent", lambda self, lent: (seen.append(lent), hand_on(self, lent))[1])
    local = deep("batched")
    trained(local, optim.SGD(local.parameters(), 0.1))
    assert len(seen) == 5
    lent = seen[0]
    assert all(other is lent for other in seen)
    assert lent.groups == (tuple(f"{i}.weight" for i in range(0, 12, 2)), tuple(f"{i}.bias" for i in range(0, 12, 2)))
    assert [tuple(stack.shape) for stack in lent.stacks] == [(6, 16, 16), (6, 16)]


def test_stacks_of_one_kind_share_memory_once_the_optimizer_is_done_with_the_first():
    x, y = torch.empty(2, 3, 4), torch.empty(2, 4, 3)
    out = torch.empty(2, 3, 3)
    values = dict.fromkeys(("apply", "b1", "u1", "b2", "b3", "u2"), out) | {"x": x, "y": y}
    names = ((("a", "b"),), (("c", "d"), ("e", "f")))
    graph, made = traced(
        values, ("apply", None, ()), ("x", None, ()), ("y", None, ()), ("b1", aten.bmm.default, ("x", "y")),
        ("u1", apply_stacks, ("apply", names[0], "b1")), ("b2", aten.bmm.default, ("x", "y")),
        ("b3", aten.bmm.default, ("x", "y")), ("u2", apply_stacks, ("apply", names[1], "b2", "b3")),
    )  # fmt: skip
    bound = SimpleNamespace()
    scratch = Scratch()
    lend(graph, bound, scratch)
    first, second = (value for value in vars(bound).values() if isinstance(value, Lent))
    assert second.stacks[0].data_ptr() == first.stacks[0].data_ptr()
    assert second.stacks[1].data_ptr() != first.stacks[0].data_ptr()
    assert scratch.bytes == 2 * out.nbytes
    assert second.names == ("c", "d", "e", "f")
    assert made["b3"].target is torch.bmm


def test_stacks_of_other_shapes_lie_in_memory_that_is_large_enough():
    large, small, other = torch.empty(4, 3, 3), torch.empty(2, 5), torch.empty(2, 5, dtype=torch.float64)
    scratch = Scratch()
    for _ in range(2):  # two graphs, of which one runs at a time
        scratch.begin()
        slots = [scratch.borrow(x, start, end) for x, start, end in ((small, 0, 3), (large, 4, 6), (small, 5, 7))]
        assert slots[0] in slots[1:]
        assert slots[2] is not slots[1]  # which is still lent
        assert [slot[x].shape for slot, x in zip(slots, (small, large, small), strict=True)] == [
            (2, 5),
            (4, 3, 3),
            (2, 5),
        ]
        assert scratch.bytes == large.nbytes + small.nbytes
    assert scratch.borrow(other, 9, 10)[other].dtype == torch.float64


def test_an_update_of_a_stack_that_is_not_a_number_is_named():
    local = deep("batched")
    x, y = batches()[0]
    step = graphlocal.train_step(local, cross_entropy, optim.SGD(local.parameters(), 0.1))
    for _ in range(2):
        step(x, y)
    name, feedback = list(local.error_weights.named_buffers())[3]
    feedback[0, 0] = float("nan")
    with pytest.raises(LocalTrainingError, match="the local error of subgraph") as caught:
        step(x, y)
    target = next(
        c.target for c in local.graph.connections if c.kind == "feedback" and name.startswith(f"{c.value}_from")
    )
    assert f"'{target}'" in str(caught.value)


def test_norms_of_stacks_and_of_single_updates_add_up():
    norms = UpdateNorms(apart=["E"])
    norms.add(("a", "E", "none"), (torch.tensor([3.0, 4.0]), torch.tensor([float("nan")]), None))
    norms.add_stack(("b", "c"), torch.tensor([[1.0], [2.0]]))
    assert norms.total() == 8
    norms.add_stack(("d", "e"), torch.tensor([[1.0], [float("nan")]]))
    assert norms.bad() == {"e"}


# The optimizer's counts


def test_counts_of_steps_lie_side_by_side_and_may_be_replaced():
    ours, theirs = ([nn.Parameter(torch.ones(3) * k) for k in (1.0, 2.0)] for _ in range(2))
    mine, plain = optim.Adam(ours, 0.1), optim.Adam(theirs, 0.1)
    part = PartialOptimizer(mine, ours)
    for i in range(6):
        for p in theirs:
            p.grad = torch.full((3,), float(i - 2))
        part.step([p.grad for p in theirs])
        plain.step()
        if i == 2:
            mine.state[ours[1]]["step"] = torch.tensor(40.0)
            plain.state[theirs[1]]["step"] = torch.tensor(40.0)
        if i == 4:
            saved = copy.deepcopy(mine.state_dict())
            mine.load_state_dict(saved)
    assert [float(mine.state[p]["step"]) for p in ours] == [6, 43]
    assert mine.state[ours[0]]["step"]._base is mine.state[ours[1]]["step"]._base is not None
    torch.testing.assert_close(ours, theirs)


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_difference_to_a_tanh_is_as_good_as_rounding_allows(dtype):
    u = torch.cat(
        [torch.linspace(-12, 12, 20001, dtype=dtype), torch.tensor([-1e4, 0.0, 1e4, float("inf")], dtype=dtype)]
    )
    z = torch.tanh(u.roll(1))
    exact = z.double() - torch.tanh(u.double())
    limit = 4 * torch.finfo(dtype).eps
    assert float((minus_tanh(z, u).double() - exact).abs().max()) < limit
    assert float((minus_tanh_over(z, u.clone()).double() - exact).abs().max()) < limit
    assert bool(minus_tanh(z[:1], torch.tensor([float("nan")], dtype=dtype)).isnan())


@pytest.mark.parametrize(("numbers", "dtype", "read_twice"), [(4096, torch.float32, False), (8, torch.float32, False),
                         (4096, torch.bfloat16, False), (4096, torch.float32, True)])  # fmt: skip
def test_only_a_large_tanh_that_nothing_else_reads_is_replaced(numbers, dtype, read_twice, monkeypatch):
    monkeypatch.setattr(fast_tanh, "tanh_is_slow", lambda dtype: True)
    values = dict.fromkeys(("z", "h", "u", "t", "e", "f"), torch.empty(numbers, dtype=dtype))
    more = [("f", aten.neg.default, ("t",))] if read_twice else []
    graph, made = traced(
        values, ("z", None, ()), ("h", None, ()), ("u", aten.neg.default, ("h",)), ("t", aten.tanh.default, ("u",)),
        ("e", aten.sub.Tensor, ("z", "t")), *more,
    )  # fmt: skip
    replace_tanh(graph)
    replaced = numbers > 8 and dtype is torch.float32 and not read_twice
    assert (made["e"].target is minus_tanh_over) == replaced


@pytest.mark.parametrize("slowness", [1.5, 10])
def test_a_tanh_is_replaced_where_it_is_slow(slowness, monkeypatch):
    now = 0.0

    def clock() -> float:
        return now

    def taking(seconds: float) -> Any:
        def run(x: Tensor) -> Tensor:
            nonlocal now
            now += seconds
            return x

        return run

    measured = partial(timeit.repeat, timer=clock)
    monkeypatch.setattr(fast_tanh, "repeat", measured)
    monkeypatch.setattr(torch, "tanh", taking(slowness))
    monkeypatch.setattr(torch, "sigmoid", taking(1))
    assert fast_tanh.tanh_is_slow.__wrapped__(torch.float32) == (slowness == 10)


def test_operators_work_in_place_on_what_nothing_else_reads_and_the_pass_made():
    values = dict.fromkeys(("x", "a", "b", "c", "view", "d"), torch.empty(2, 2)) | {"wide": torch.empty(3, 2, 2)}
    graph, made = traced(
        values, ("x", None, ()), ("a", aten.mul.Tensor, ("x", "x")), ("b", aten.tanh.default, ("a",)),
        ("c", aten.add.Tensor, ("b", "x")), ("view", aten.t.default, ("x",)), ("d", aten.tanh.default, ("view",)),
        ("wide", aten.add.Tensor, ("c", "d")),
    )  # fmt: skip
    reuse(graph)
    in_place = {name for name, node in made.items() if node.target in (Tensor.tanh_, Tensor.add_, Tensor.mul_)}
    assert in_place == {"b", "c"}  # not x, which is the caller's, nor a view of it, nor what is of another shape


# The drop-in path


def test_the_compilation_used_last_is_left_when_anything_it_was_chosen_by_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    local = graphlocal.compile(model, example_inputs=torch.randn(4, 4))

    def used(x: Tensor) -> Any:
        local.zero_grad()
        local(x).sum().backward()
        return local.compiled

    x = torch.randn(4, 4)
    first = used(x)
    assert used(x) is first
    assert used(torch.randn(7, 4)) is first  # the batch size is open
    model[1].eval()
    second = used(x)
    assert second is not first
    model[0].weight.requires_grad_(False)
    third = used(x)
    assert third is not second
    assert model[0].weight.grad is None
    model[0].weight.requires_grad_(True)
    assert used(x) is second
    model[1] = nn.BatchNorm1d(6)
    assert used(x) not in (first, second, third)
    assert local._lag.present
    assert model[1].running_mean.abs().sum() > 0


def test_a_cleared_state_of_the_optimizer_starts_anew():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(4, 6), torch.randint(3, (4,))
    local = graphlocal.compile(model, example_inputs=x)
    optimizer = torch.optim.Adam(local.parameters(), 1e-3)
    step = graphlocal.train_step(local, nn.functional.cross_entropy, optimizer)
    for _ in range(3):
        step(x, y)
    optimizer.state.clear()
    for count in (1.0, 2.0):
        step(x, y)
        assert [float(state["step"]) for state in optimizer.state.values()] == [count, count]


# Looking for NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("few", [True, False])
def test_nan_is_found_and_infinity_let_pass_whatever_the_update_is_like(dtype, strided, few):
    """An infinite update is a gradient scaler's to find."""

    def updates(number: float) -> list[Tensor | None]:
        torch.manual_seed(0)
        found = [torch.randn(3, 4, dtype=dtype), torch.randn(5, 2, dtype=dtype)]
        found[1][4, 1] = number
        more = [torch.randn(2, dtype=dtype) for _ in range(0 if few else SO_FEW)]
        return [None, *(x.T if strided else x for x in found), torch.eye(2).to_sparse(), *more]

    for number, expected in ((1.0, True), (torch.inf, True), (-torch.inf, True), (torch.nan, False)):
        given = updates(number)
        assert are_numbers(given) is expected
        for looked_at, untouched in zip(given[1:3], updates(number)[1:3], strict=True):
            assert torch.equal(looked_at.nan_to_num(7.0), untouched.nan_to_num(7.0))
    assert are_numbers([])
    assert are_numbers([None])


def test_the_look_for_nan_is_in_single_precision_on_the_cpu_whatever_the_defaults_are():
    updates = [*(torch.randn(3, 4) for _ in range(SO_FEW + 1)), torch.full((2,), torch.nan)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert are_numbers(updates[:-1])
            assert not are_numbers(updates)
    finally:
        torch.set_default_dtype(before)


def test_the_look_for_nan_is_no_change_to_autograd():
    weight, update = torch.randn(3, requires_grad=True), torch.randn(3)
    product = weight * update  # keeps the update for its derivative
    assert are_numbers([update])
    assert are_numbers([update, *(torch.randn(3) for _ in range(SO_FEW))])
    product.sum().backward()
    assert torch.equal(weight.grad, update)
    with torch.inference_mode():
        made = [torch.randn(3) for _ in range(SO_FEW + 1)]
    assert are_numbers(made[:1])
    assert are_numbers(made)


@pytest.mark.parametrize("rule", ["backprop", "rec-lra", "fa"])
@pytest.mark.parametrize("name", ["mlp", "vit", "small_resnet", "tied_weight"])
def test_nan_in_any_update_shows_in_those_that_are_looked_at(name, rule):
    model = zoo.MODELS[name]
    local = graphlocal.compile(
        model.make(), example_inputs=model.example(), rule=rule, partition="leaf", target="lowered"
    )
    leaves = list(model.example()) if isinstance(model.example(), tuple) else list(model.example().values())
    outputs, saved = local.compiled.execution.run(leaves, False).passes.forward(*leaves)
    (passes,) = local.compiled.execution._passes.values()
    count = len(local.compiled.training.weights)
    assert len(passes.telling) <= count
    fewest = count / 2 - 1 if rule == "rec-lra" else 1  # no bias, and not the output layer; or the first layer alone
    assert len(passes.telling) == fewest or name != "mlp"

    def nan_somewhere(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach().clone()
        value[tuple(int(torch.randint(size, ())) for size in value.shape)] = torch.nan
        return value

    for place in range(len(saved) + 1):  # the error of the output, too
        spoilt = [nan_somewhere(x) if i == place else x for i, x in enumerate(saved)]
        errors = [torch.randn_like(z) for z in outputs]
        updates, _, _ = passes.error(spoilt, [nan_somewhere(e) if place == len(saved) else e for e in errors], False)
        hold = [bool(update.isnan().any()) for update in updates]
        assert any(hold) == any(hold[i] for i in passes.telling)
        assert passes.are_numbers(updates) != any(hold)
