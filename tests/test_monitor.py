"""Observing a training: what is measured, that measuring changes nothing, and where it is written."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import graphlocal
import zoo
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.live_view import BARS, LiveView, sparkline
from graphlocal.observation import observe
from graphlocal.rules import RULES
from graphlocal.run_log import LOG, RunLog, read_run
from graphlocal.training_records import EpochRecord, StepRecord

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


class Kept:
    """A view that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.epochs: list[EpochRecord] = []
        self.status = ""

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)

    def close(self, status: str) -> None:
        self.status = status


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def noisy() -> nn.Sequential:
    """With buffers that a step changes and random numbers that it draws."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 4), nn.Tanh(),
                         nn.Linear(4, 3))  # fmt: skip


def compiled(model: nn.Module, x: Tensor = X, **options: Any) -> graphlocal.LocalModule:
    return graphlocal.compile(model, example_inputs=(x,), **options)


def trained(local: graphlocal.LocalModule, monitor: graphlocal.Monitor | None, steps: int = 5) -> dict[str, Tensor]:
    step = graphlocal.train_step(local, cross_entropy, torch.optim.Adam(local.parameters(), 0.01))
    if monitor is not None:
        step = monitor.watch(step)
    torch.manual_seed(3)
    for _ in range(steps):
        step(X, Y)
    return {name: value.clone() for name, value in local.state_dict().items()} | {"random": torch.get_rng_state()}


# What is measured.


def test_the_local_loss_of_rec_lra_is_half_the_squared_mismatch_of_representation_and_target() -> None:
    model = mlp().double()
    x = X.double()
    local = compiled(model, x, rule=graphlocal.rules.RecLRA(beta=0.2))
    seen = observe(local, cross_entropy, x, Y)
    w1, b1, w2, b2, w3, b3 = (p.detach() for p in model.parameters())
    h1 = x @ w1.T + b1
    h2 = torch.tanh(h1) @ w2.T + b2
    output_error = torch.softmax(torch.tanh(h2) @ w3.T + b3, 1) - torch.eye(3, dtype=torch.float64)[Y]
    names = weight_names(local.graph)
    expected = {"4": 0.5 * output_error.square().sum(1).mean()}
    for subgraph, h in (("0", h1), ("2", h2)):
        (name,) = (names[c.name] for c in local.graph.connections if c.target == subgraph and c.kind == "feedback")
        d = output_error @ local.error_weights.get_buffer(name[0]).T
        s = d.square().mean().sqrt()
        e = s * (torch.tanh(h) - torch.tanh(h - 0.2 * d / s))
        expected[subgraph] = 0.5 * e.square().sum(1).mean()
    assert list(seen.local_loss) == ["0", "2", "4"]
    assert seen.local_loss == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    assert seen.loss == pytest.approx(cross_entropy(model(x), Y).item())


def test_the_local_loss_of_an_exact_gradient_does_not_depend_on_the_batch_size() -> None:
    local = compiled(mlp(), rule="backprop")
    once, twice = observe(local, cross_entropy, X, Y), observe(local, cross_entropy, X.repeat(2, 1), Y.repeat(2))
    assert once.local_loss == pytest.approx(twice.local_loss, rel=1e-5)


def test_updates_norms_and_step_ratios_are_those_of_the_step() -> None:
    local, kept = compiled(mlp()), Kept()
    monitor = graphlocal.Monitor(local, cross_entropy, every=1, angle_every=0, views=[kept])
    before = {name: p.detach().clone() for name, p in local.original.named_parameters()}
    with monitor.step(X, Y):
        cross_entropy(local(X), Y).backward()
        torch.optim.SGD(local.parameters(), 0.1).step()
    (record,) = kept.steps
    for subgraph in local.graph.subgraphs:
        names = local.graph.trainable(subgraph)
        update = math.sqrt(sum(float(local.original.get_parameter(n).grad.square().sum()) for n in names))
        weight = math.sqrt(sum(float(before[n].square().sum()) for n in names))
        assert record.update_norm[subgraph.name] == pytest.approx(update, rel=1e-5)
        assert record.weight_norm[subgraph.name] == pytest.approx(weight, rel=1e-5)
        assert record.step_ratio[subgraph.name] == pytest.approx(0.1 * update / weight, rel=1e-4)
    assert record.angle is None
    assert record.credit_depth is None


def test_angles_are_those_of_the_alignment_report_on_the_held_batch() -> None:
    local, kept = compiled(noisy()), Kept()
    held = torch.randn(12, 6), torch.arange(12) % 3
    monitor = graphlocal.Monitor(local, cross_entropy, every=2, angle_every=4, held=held, views=[kept])
    step = monitor.watch(graphlocal.train_step(local, cross_entropy, torch.optim.SGD(local.parameters(), 0.0)))
    for _ in range(4):
        state = torch.get_rng_state()
        step(X, Y)
    assert [record.step for record in kept.steps] == [2, 4]
    assert kept.steps[0].angle is None
    torch.set_rng_state(state)
    expected = graphlocal.alignment(local, held[0], lambda output: cross_entropy(output, held[1]))
    assert kept.steps[1].angle == pytest.approx(expected.by_subgraph, abs=1e-3)
    assert kept.steps[1].overall_angle == pytest.approx(expected.overall, abs=1e-3)


def test_the_credit_depth_is_taken_where_the_rule_reports_one(monkeypatch: pytest.MonkeyPatch) -> None:
    local, kept = compiled(mlp()), Kept()
    monitor = graphlocal.Monitor(local, cross_entropy, every=1, views=[kept])
    monkeypatch.setattr(graphlocal.LocalModule, "credit_depth", 1.5, raising=False)
    trained(local, monitor, 1)

    def refuse(self: object) -> float:
        raise InputError("the rule lets errors go all the way")

    monkeypatch.setattr(graphlocal.LocalModule, "credit_depth", property(refuse))
    trained(local, monitor, 1)
    assert [record.credit_depth for record in kept.steps] == [1.5, None]


# That it changes nothing.


@pytest.mark.parametrize("rule", [name for name, r in RULES.items() if r.engine == "schedule" and not r.relaxes])
def test_monitoring_leaves_the_training_as_it_is_bit_for_bit(rule: str) -> None:
    plain, watched = compiled(noisy(), rule=rule, target="eager"), compiled(noisy(), rule=rule, target="eager")
    held = torch.randn(12, 6), torch.arange(12) % 3
    kept = Kept()
    monitor = graphlocal.Monitor(watched, cross_entropy, every=2, angle_every=2, held=held, views=[kept])
    expected, found = trained(plain, None), trained(watched, monitor)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(kept.steps) == 2
    assert all(math.isfinite(value) for record in kept.steps for value in record.local_loss.values())
    assert set(kept.steps[-1].local_loss) == {neuron.subgraph for neuron in watched.graph.error_neurons}


@pytest.mark.parametrize("target", ["lowered", "auto"])
def test_monitoring_leaves_lowered_training_as_it_is_bit_for_bit(target: str) -> None:
    plain, watched = (compiled(noisy(), rule="kolen-pollack", target=target) for _ in range(2))
    monitor = graphlocal.Monitor(watched, cross_entropy, every=1, views=[Kept()])
    expected, found = trained(plain, None), trained(watched, monitor)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert watched.compiled.execution.not_lowered is None


@pytest.mark.parametrize("rule", ["equilibrium", "lp", "nlp"])
def test_rules_without_error_neurons_to_look_at_are_refused(rule: str) -> None:
    with pytest.raises(InputError, match="can't be observed"):
        graphlocal.Monitor(compiled(mlp(), rule=rule), cross_entropy)


def test_observing_keeps_gradients_and_hooks() -> None:
    local = compiled(mlp())
    calls: list[int] = []
    weight = next(local.original.parameters())
    weight.grad = torch.ones_like(weight)
    weight.register_hook(lambda gradient: calls.append(1))
    observe(local, cross_entropy, X, Y)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not calls


@pytest.mark.parametrize("name", ["EncoderLayer", "ConvNet", "Recurrent"])
def test_other_kinds_of_models_are_observed(name: str) -> None:
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, Tensor]] = {
        "EncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(4, 5, 8)),
        "ConvNet": (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
                    torch.randn(4, 1, 8, 8)),
        "Recurrent": (LastState(), torch.randn(4, 5, 8)),
    }  # fmt: skip
    model, x = models[name]
    local = compiled(model, x)
    seen = observe(local, lambda output, y: mse_loss(output, torch.zeros_like(output)), x, None)
    assert set(seen.local_loss) == set(seen.update_norm) == {n.subgraph for n in local.graph.error_neurons}
    assert all(value > 0 for value in seen.local_loss.values())


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


@pytest.mark.parametrize(
    "model", [m for tag in ("several-inputs", "several-outputs", "shared", "keywords")
              for m in zoo.models(include=(tag,), exclude=("large", "torchvision"))[:2]],
)  # fmt: skip
def test_models_of_the_zoo_are_observed(model: zoo.ZooModel) -> None:
    made, example = model.make(), model.example()
    local = graphlocal.compile(made, example_inputs=example)
    seen = observe(local, lambda output, y: zoo.fit(output), example, None)
    assert set(seen.local_loss) <= {neuron.subgraph for neuron in local.graph.error_neurons}
    assert seen.local_loss
    assert all(math.isfinite(value) for value in seen.local_loss.values())
    expected = observe(local, lambda output, y: zoo.fit(output), example, None)
    assert expected.local_loss == seen.local_loss


def test_wrong_options_are_refused() -> None:
    local = compiled(mlp())
    with pytest.raises(InputError, match="compiled model"):
        graphlocal.Monitor(mlp(), cross_entropy)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="angle_every=3"):
        graphlocal.Monitor(local, cross_entropy, every=2, angle_every=3)
    with pytest.raises(InputError, match="without a run"):
        graphlocal.Monitor(local, cross_entropy, resume=True)
    with pytest.raises(InputError, match="scalar"):
        observe(local, lambda output, y: output, X, Y)


# The run's log.


def test_a_run_is_logged_and_read_back(tmp_path: Path) -> None:
    local = compiled(mlp())
    with graphlocal.Monitor(local, cross_entropy, every=2, angle_every=4, run=tmp_path / "run", meta={"seed": 5}) as m:
        trained(local, m)
        m.epoch(1, 0.5, test_error=20.0, seconds=1.0)
        m.epoch(1, math.nan, of="backprop")
    run = read_run(tmp_path / "run")
    assert run.graph == local.graph
    assert (run.meta["rule"], run.meta["seed"], run.meta["model"]) == ("RecLRA()", 5, "Sequential")
    assert [record["kind"] for record in run.records] == ["start", "step", "step", "epoch", "epoch", "end"]
    steps = run.of("step")
    assert [record["step"] for record in steps] == [2, 4]
    assert "angle" not in steps[0]
    assert set(steps[1]["angle"]) == set(steps[1]["local_loss"]) == {"0", "2", "4"}
    assert run.of("epoch")[1]["loss"] is None
    assert run.of("end") == [{"kind": "end", "status": "finished"}]


def test_a_run_goes_on_after_its_last_line_was_cut_off(tmp_path: Path) -> None:
    local = compiled(mlp())
    monitor = graphlocal.Monitor(local, cross_entropy, every=1, angle_every=0, run=tmp_path)
    trained(local, monitor, 3)
    log = tmp_path / LOG
    whole = log.read_bytes()
    log.write_bytes(whole[:-40])  # the process died in the third record
    assert read_run(tmp_path).damaged
    assert [record["step"] for record in read_run(tmp_path).of("step")] == [1, 2]
    with graphlocal.Monitor(local, cross_entropy, every=1, angle_every=0, run=tmp_path, resume=True) as again:
        trained(local, again, 2)
    run = read_run(tmp_path)
    assert not run.damaged
    assert [record["step"] for record in run.of("step")] == [1, 2, 3, 4]
    assert [record["step"] for record in run.of("start")] == [0, 2]
    assert log.read_bytes().startswith(whole[:-40])


def test_a_log_that_is_not_one_is_refused(tmp_path: Path) -> None:
    local = compiled(mlp())
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)
    RunLog(tmp_path, local.graph, {})
    with pytest.raises(InputError, match="holds a run already"):
        RunLog(tmp_path, local.graph, {})
    with pytest.raises(InputError, match="another partition"):
        RunLog(tmp_path, compiled(mlp(), partition=1).graph, {}, resume=True)
    log = tmp_path / LOG
    good = log.read_text()
    log.write_text(good + "{broken\n" + json.dumps({"kind": "end", "status": "finished"}) + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_run(tmp_path)
    log.write_text(good.replace('"schema":1', '"schema":99'))
    with pytest.raises(InputError, match="schema 99"):
        read_run(tmp_path)


# TensorBoard.


def test_tensorboard_gets_scalars_histograms_and_the_partition(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    local = compiled(noisy(), rule="kolen-pollack")
    kept = Kept()
    with graphlocal.Monitor(local, cross_entropy, every=2, angle_every=2, tensorboard=tmp_path, views=[kept]) as m:
        trained(local, m)
        m.epoch(1, 0.5, test_error=20.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    names = [s.name for s in local.graph.subgraphs if s.name in local.graph.neuron]
    assert {f"{group}/{n}" for group in ("local loss", "angle", "step ratio") for n in names} <= set(tags["scalars"])
    found = [(event.step, event.value) for event in events.Scalars(f"local loss/{names[0]}")]
    assert found == [(r.step, pytest.approx(r.local_loss[names[0]], rel=1e-5)) for r in kept.steps]
    assert events.Scalars("test error/local")[0].value == 20
    weights = {name for name, p in local.original.named_parameters() if p.requires_grad}
    assert {f"{kind}/{name}" for kind in ("weights", "updates") for name in weights} <= set(tags["histograms"])
    assert any(tag.startswith("E/") for tag in tags["histograms"])
    text = events.Tensors("partition/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(name in text for name in names)


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        graphlocal.Monitor(compiled(mlp()), cross_entropy, tensorboard=tmp_path)


# The terminal.


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0.0, 7.0, math.nan, 3.0]) == f"{BARS[0]}{BARS[7]} {BARS[3]}"
    assert sparkline([2.0, 2.0]) == BARS[0] * 2
    assert sparkline([math.inf]) == " "


def test_the_live_table_shows_every_subgraph_and_leaves_the_terminal_sane_when_stopped() -> None:
    local = compiled(mlp())
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, _environ={"TERM": "xterm"})
    live = LiveView(console, local.graph)
    monitor = graphlocal.Monitor(local, cross_entropy, every=1, angle_every=1, views=[live])

    def stopped() -> None:
        with monitor, live.around(Progress(console=console)):
            trained(local, monitor, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    shown = out.getvalue()
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is shown again
    last = shown[shown.rindex("step 3,") :]
    assert all(f"│ {name} " in last for name in ("0", "2", "4"))
    assert "0°" in last


def test_without_a_terminal_there_are_plain_lines() -> None:
    local = compiled(mlp())
    out = io.StringIO()
    live = LiveView(Console(file=out, width=200), local.graph)
    monitor = graphlocal.Monitor(local, cross_entropy, every=1, angle_every=2, views=[live])
    with live.around(Progress(console=live.console)):
        trained(local, monitor, 4)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "\x1b" not in out.getvalue()


def test_a_long_table_shows_the_subgraphs_with_the_largest_angles() -> None:
    graph = compiled(mlp()).graph
    live = LiveView(Console(file=io.StringIO(), width=100, height=15), graph)
    names = [f"block{i}" for i in range(30)]
    values = {name: float(i) for i, name in enumerate(names)}
    live.on_step(StepRecord(1, 0.0, 1.0, values, values, values, values, angle=values))
    assert live.table().row_count == 3
    assert "3 of 30 subgraphs" in str(live.table().title)
    assert live._shown(3) == names[-3:]
