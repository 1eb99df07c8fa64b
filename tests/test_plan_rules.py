"""What `graphlocal.plan` makes of each rule: whose plan there is, and what its actions cost."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.memory import memory
from graphlocal.passes.cost import Device, Sizes, open_sizes, roofline
from graphlocal.rules import Calibrated, DifferenceTargetPropagation, LocalLoss, LRADiff, LRAFeedback, RecLRA, Rule
from graphlocal.step_costs import roofline_costs, told_by_graph

BATCH, WIDTH, CLASSES = 16, 32, 4
PRODUCT = 2 * BATCH * WIDTH * WIDTH
"""FLOPs of one hidden layer's matrix product."""

SLACK = 40 * (BATCH * WIDTH + WIDTH * WIDTH)
"""More FLOPs than the elementwise operators of one action have; less than the products that the tests tell apart."""


def perceptron(rule: str | Rule, hidden: int = 3, **options: object) -> graphlocal.LocalModule:
    layers = [layer for _ in range(hidden) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    return graphlocal.compile(model, example_inputs=torch.randn(BATCH, WIDTH), rule=rule, partition="leaf", **options)


def flops(local: graphlocal.LocalModule):
    """The costs in FLOPs."""
    sizes = Sizes(local.graph, open_sizes(local.graph, local.compiled.traced.arguments.leaves))
    return roofline_costs(local.compiled, sizes, Device(flops=1.0, bytes=1e30))


@pytest.mark.parametrize("options", [{}, {"peak": True}, {"measured": True}])
@pytest.mark.parametrize("rule", ["lp", "nlp", "equilibrium"])
def test_a_rule_that_runs_no_schedule_has_no_plan_and_nothing_is_measured(rule, options, monkeypatch):
    local = perceptron(rule)
    module = importlib.import_module("graphlocal.plan")
    for name in ("measured_costs", "roofline_costs", "memory_of", "simulate"):
        monkeypatch.setattr(module, name, lambda *given, name=name: pytest.fail(f"{name} ran"))
    with pytest.raises(InputError, match=f"no plan for the rule '{rule}'") as caught:
        graphlocal.plan(local, **options)
    assert "F, D and U" in caught.value.why
    assert "train_step" in caught.value.remedy


@pytest.mark.parametrize("rule", ["lp", "nlp"])
def test_the_memory_of_a_rule_that_runs_no_schedule_is_refused(rule):
    with pytest.raises(InputError, match="does not train by loss"):
        memory(perceptron(rule).compiled, torch.optim.Adam)


# Local heads


def test_the_plan_of_local_losses_has_the_heads_in_it_and_waits_for_no_other_subgraph():
    local = perceptron(LocalLoss(head="similarity"))
    costs = flops(local)
    samples = 2 * BATCH * BATCH * WIDTH  # the similarities between samples, and their derivative in either factor
    assert 0 <= costs.local["D", 1] - 3 * PRODUCT - 3 * samples < SLACK
    plan = graphlocal.plan(local, devices=4, microbatches=2)
    slots = {slot.task.name: slot for slot in plan.timelines["local"].slots}
    assert slots["D1.1"].task.after == ("F1.1",)
    assert all(name == "F4" for name in {n.split(".")[0] for n in slots["D4.1"].task.after})
    assert "one class for each row" in str(plan)


@pytest.mark.parametrize("head", ["prediction", "both"])
def test_local_losses_are_measured_with_their_heads(head):
    local = perceptron(LocalLoss(head=head))
    before = {key: value.clone() for key, value in local.state_dict().items()}
    plan = graphlocal.plan(local, devices=2, measured=True)
    assert plan.measured is not None
    assert {("D", n) for n in (1, 2, 3)} <= set(plan.measured.actions)
    assert all(torch.equal(before[key], value) for key, value in local.state_dict().items())


def test_local_losses_of_token_outputs_are_planned_for_a_label_each():
    model = zoo.MODELS["language_model"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="local-loss")
    assert "one class for each row" in str(graphlocal.plan(local, devices=2))


def test_the_memory_of_local_losses_is_refused_before_anything_else():
    with pytest.raises(InputError, match="memory of a step of the rule 'local-loss'") as caught:
        graphlocal.plan(perceptron("local-loss"), peak=True, measured=True)
    assert "labels" in caught.value.why


# What the graph does not tell


def test_every_further_inner_step_costs_the_reader_forward_and_back():
    found = [flops(perceptron(LRADiff(steps=k))).local["D", 2] for k in (2, 3, 4)]
    assert found[1] - found[0] == found[2] - found[1]
    assert 0 <= found[1] - found[0] - 2 * PRODUCT < SLACK
    assert flops(perceptron(LRADiff())).local["D", 2] < SLACK  # one step evaluates nothing again


def test_a_decoder_costs_its_messages_and_its_update():
    costs = flops(perceptron(DifferenceTargetPropagation()))
    assert 0 <= costs.local["D", 1] - 5 * PRODUCT < SLACK  # g(z), g(y), the reader, g of it, and E's gradient


def test_a_learned_feedback_map_costs_its_update():
    fixed, learned = (flops(perceptron(RecLRA(error_weights=kind))).local["D", 1] for kind in ("fixed", "kp"))
    assert learned - fixed >= 2 * BATCH * WIDTH * CLASSES


def test_fixed_twins_cost_what_backpropagation_does_and_signs_cost_more():
    costs = flops(perceptron("fa"))
    assert costs.local == costs.backprop
    assert sum(flops(perceptron("sign-symmetric")).local.values()) > sum(costs.local.values())


def test_normalized_updates_and_errors_are_in_the_roofline():
    local = perceptron(LRAFeedback())
    sizes = Sizes(local.graph, {"B": BATCH})
    by_graph = roofline(local.graph, sizes, Device())
    assert sum(roofline_costs(local.compiled, sizes, Device()).local.values()) > 1.2 * sum(by_graph.values())


@pytest.mark.parametrize("rule", ["rec-lra", "dfa", "backprop"])
def test_rules_that_the_graph_tells_all_about_are_costed_by_it(rule):
    local = perceptron(rule)
    sizes = Sizes(local.graph, {"B": BATCH})
    assert told_by_graph(local.options.rule, local.graph)
    costs = roofline_costs(local.compiled, sizes, Device())
    assert costs.local == roofline(local.graph, sizes, Device())
    assert costs.backprop == roofline(local.graph, sizes, Device(), exact=True)


@pytest.mark.parametrize("rule", ["fa", "dtp", "lra-diff", "lra-fdbk", "auto", "local-loss", RecLRA(reprojection=1.0)])
def test_other_rules_are_not(rule):
    local = perceptron(rule)
    assert not told_by_graph(local.options.rule, local.graph)


def test_a_step_without_a_lowered_form_says_what_its_roofline_leaves_out():
    shown = str(graphlocal.plan(perceptron(LRADiff(epsilon=1e-3)), devices=2))
    assert "what the rule 'lra-diff' does beyond products is left out" in shown


def test_attention_and_recurrent_layers_are_counted_in_products():
    for name in ("transformer_encoder", "lstm"):
        model = zoo.MODELS[name]
        local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="fa")
        sizes = Sizes(local.graph, open_sizes(local.graph, local.compiled.traced.arguments.leaves))
        forward = sum(op.flops for op in local.graph.operations)
        found = sum(seconds for (kind, _), seconds in flops(local).local.items() if kind == "F")
        assert found == pytest.approx(forward, rel=0.35), name
        assert sizes.batch > 1


def test_a_roofline_of_operators_leaves_model_and_random_numbers_alone():
    local = perceptron(Calibrated())
    before = {key: value.clone() for key, value in local.state_dict().items()}
    state = torch.get_rng_state()
    graphlocal.plan(local, devices=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in local.state_dict().items())


# Calibration steps


@pytest.mark.parametrize("measured", [False, True])
def test_calibration_steps_are_in_the_mean_of_a_step(measured):
    plan = graphlocal.plan(perceptron(Calibrated(every=4)), devices=2, measured=measured)
    alone, here = plan.one_device, plan.timelines
    assert plan.every == 4
    assert alone["calibration"] > alone["local"]
    assert plan.mean(one_device=True) == pytest.approx(0.75 * alone["local"] + 0.25 * alone["calibration"])
    assert plan.mean() == pytest.approx(0.75 * here["local"].makespan + 0.25 * here["calibration"].makespan)
    assert "Every 4th step is a calibration" in str(plan)


def test_a_calibration_waits_for_the_errors_that_its_maps_read_and_factors_their_moments():
    local = perceptron(Calibrated())
    costs = flops(local)
    assert costs.calibration is not None
    assert costs.calibration["D", 1] >= 2 * PRODUCT + WIDTH**3 / 3 + 2 * WIDTH**3  # two moments, and their solution
    plan = graphlocal.plan(local, devices=4)
    after = {slot.task.name: slot.task.after for slot in plan.timelines["calibration"].slots}
    assert any(name.startswith("e ") for name in after["D1.1"])


def test_other_rules_have_no_calibration_and_their_mean_is_the_step():
    plan = graphlocal.plan(perceptron("rec-lra"), devices=2)
    assert set(plan.timelines) == {"local", "gpipe", "1f1b"}
    assert plan.mean() == plan.timelines["local"].makespan
    assert "calibration" not in str(plan)
