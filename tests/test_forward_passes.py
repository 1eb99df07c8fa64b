"""Several forward passes before a backward pass, and steps inside of what torch.compile has compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from test_runtime import RULES
from test_training_loops import assert_same, collected
from torch import Tensor, nn

import graphlocal


def normalized() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("target", ["eager", "auto", "lowered", "streams"])
def test_batch_norm_takes_several_forward_passes_before_the_backward_pass(target):
    """As in Siamese nets; here some of them run eagerly and others are lowered, whose batch sizes were seen before."""
    eager, batches = normalized(), [torch.randn(n, 6, dtype=torch.float64) for n in (8, 8, 5, 8, 5)]
    local = graphlocal.compile(normalized(), example_inputs=batches[0], rule="backprop", target=target)
    for _ in range(3):
        for module in (local, eager):
            module.zero_grad()
            sum(module(x).square().mean() for x in batches).backward()
        for p, q in zip(local.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for p, q in zip(local.original.buffers(), eager.buffers(), strict=True):
            assert torch.equal(p, q)


class TwoHeads(nn.Module):
    """Two outputs, of which a loss may read one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = normalized(), nn.Linear(3, 2).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.first(h), self.second(h)


@pytest.mark.parametrize("target", ["auto", "lowered"])
def test_losses_on_other_outputs_than_before_take_several_forward_passes(target):
    torch.manual_seed(1)
    eager, x = TwoHeads(), torch.randn(8, 6, dtype=torch.float64)
    local = graphlocal.compile(copy.deepcopy(eager), example_inputs=x, rule="backprop", target=target)
    for read in ((0,), (0, 1), (1,), (0,), (0, 1)):
        for module in (local, eager):
            module.zero_grad()
            outputs = module(x), module(x + 1)
            sum(heads[i].square().sum() for heads in outputs for i in read).backward()
        assert_same(collected(local.original), collected(eager))
        for p, q in zip(local.original.buffers(), eager.buffers(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("rule", RULES)
def test_torch_compile_leaves_a_training_step_as_it_is(rule):
    torch.manual_seed(0)
    inner, plain = normalized(), normalized()
    x = torch.randn(8, 6, dtype=torch.float64)
    locals_ = [graphlocal.compile(model, example_inputs=x, rule=rule) for model in (inner, plain)]
    locals_[0].load_state_dict(locals_[1].state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(module: nn.Module) -> Tensor:
        loss = (module(x) * 2).square().mean()
        loss.backward()
        return loss

    compiled = torch.compile(step, backend="eager")
    for _ in range(3):  # run eagerly, then lowered
        for module in locals_:
            module.zero_grad()
        assert torch.equal(compiled(locals_[0]), step(locals_[1]))
        assert_same(collected(locals_[0].original), collected(plain), rtol=0, atol=0)
    assert torch._dynamo.utils.counters["frames"]["total"] < 20  # it was hundreds, of this library's own code
    locals_[0].eval()
    assert torch.equal(torch.compile(locals_[0], backend="eager")(x), inner(x))
