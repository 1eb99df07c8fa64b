"""Unroll: recurrent layers step by step, with the layer's own weights and an error neuron for every hidden step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import graphlocal
from graphlocal.errors import InputError
from graphlocal.feedback import weight_names
from graphlocal.passes.unroll import Unroll
from graphlocal.rules import RecLRA

DOUBLE = torch.float64
KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
}
EXTRA = [
    pytest.param(nn.RNN, {"nonlinearity": "relu"}, id="rnn relu"),
    pytest.param(nn.LSTM, {"proj_size": 3, "bidirectional": True}, id="lstm projected"),
    pytest.param(nn.LSTM, {"proj_size": 3, "bias": False, "num_layers": 2}, id="lstm projected, no bias"),
]
CASES = [(name, case) for name in KINDS for case in OPTIONS]
LAYERS = [*(pytest.param(KINDS[name], OPTIONS[case], id=f"{name} {case}") for name, case in CASES), *EXTRA]


class Reader(nn.Module):
    """Classifies a sequence (batch, steps, 4) by the last hidden state."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU, **options) -> None:
        super().__init__()
        self.rnn = kind(4, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def both(kind, options) -> tuple[nn.RNNBase, nn.Module]:
    layer = kind(4, 5, **options).double()
    return layer, Unroll().rewrite(layer).model


def flat(result) -> list[Tensor]:
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_an_unrolled_layer_computes_what_the_layer_does(kind, options):
    layer, unrolled = both(kind, options)
    x = torch.randn(3, 6, 4, dtype=DOUBLE)
    for a, b in zip(flat(layer(x)), flat(unrolled(x)), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_it_takes_an_initial_state_and_a_single_sequence(kind, options):
    layer, unrolled = both(kind, options)
    x = torch.randn(6, 4, dtype=DOUBLE)
    _, state = layer(x)
    for hx in (None, state):
        for a, b in zip(flat(layer(x, hx)), flat(unrolled(x, hx)), strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_local_backprop_through_the_steps_gives_the_layer_its_gradients(kind, options):
    layer, unrolled = both(kind, options)
    x = torch.randn(3, 6, 4, dtype=DOUBLE)
    flat(layer(x))[0].square().sum().backward()
    true = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    local = graphlocal.compile(unrolled, example_inputs=(x,), rule="backprop")
    flat(local(x))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.grad, true[name], rtol=1e-9, atol=1e-12), name


def test_dropout_between_layers_draws_as_often():
    layer = nn.LSTM(4, 200, num_layers=2, dropout=0.5)
    unrolled = Unroll().rewrite(layer).model
    x = torch.randn(50, 2, 4)
    for module in (layer, unrolled):
        module.eval()
    assert torch.allclose(layer(x)[0], unrolled(x)[0], atol=1e-6)
    for module in (layer, unrolled):
        module.train()
    torch.manual_seed(3)
    spread = (unrolled(x)[0] - unrolled.eval()(x)[0]).std()
    true = (layer(x)[0] - layer.eval()(x)[0]).std()
    assert abs(float((spread / true).detach()) - 1) < 0.2


def test_every_hidden_step_is_a_subgraph_with_an_error_neuron():
    model = Unroll().rewrite(Reader()).model
    local = graphlocal.compile(model, example_inputs=(torch.randn(2, 6, 4),))
    cells = [f"rnn.cell_l0{f'@{t}' if t else ''}" for t in range(6)]
    assert [name for name in local.graph.subgraph if "cell" in name] == cells
    assert set(cells) <= set(local.graph.neuron)


@pytest.mark.parametrize("error_weights", ["fixed", "kp"])
def test_the_steps_share_one_feedback_map_for_each_representation(error_weights):
    model = Unroll().rewrite(Reader()).model
    rule = RecLRA(error_weights=error_weights)
    local = graphlocal.compile(model, example_inputs=(torch.randn(2, 6, 4),), rule=rule)
    assert len(weight_names(local.graph)) == 6
    assert len(set(weight_names(local.graph).values())) == 1
    local(torch.randn(2, 6, 4)).square().sum().backward()
    if error_weights == "kp":
        (feedback,) = local.error_weights.parameters()
        assert feedback.grad.abs().sum() > 0


def test_updates_sum_over_the_steps():
    """Appendix B of the LRA paper, on tanh(W x_t + U h_(t-1)): e_t = h_t - tanh(a_t - beta E e), summed over t."""
    reader = Reader(nn.RNN).double()
    rule = RecLRA(beta=0.3, rescale=None, feedback_share=10.0)
    x = torch.randn(2, 6, 4, dtype=DOUBLE)
    local = graphlocal.compile(Unroll().rewrite(reader).model, example_inputs=(x,), rule=rule)
    output = local(x)
    output.square().mean().backward()
    (feedback,) = local.error_weights.buffers()
    d = 2 * (2 * output.detach() / output.numel()) @ feedback.T
    weights = {name: p.detach() for name, p in reader.rnn.named_parameters()}
    h, expected = torch.zeros(2, 5, dtype=DOUBLE), {name: torch.zeros_like(w) for name, w in weights.items()}
    for t in range(6):
        a = x[:, t] @ weights["weight_ih_l0"].T + h @ weights["weight_hh_l0"].T
        a = a + weights["bias_ih_l0"] + weights["bias_hh_l0"]
        e = (torch.tanh(a) - torch.tanh(a - 0.3 * d)) / 2
        expected["weight_ih_l0"] += e.T @ x[:, t]
        expected["weight_hh_l0"] += e.T @ h
        expected["bias_ih_l0"] += e.sum(0)
        expected["bias_hh_l0"] += e.sum(0)
        h = torch.tanh(a)
    for name, update in expected.items():
        assert torch.allclose(getattr(reader.rnn, name).grad, update, rtol=1e-10, atol=1e-14), name


def test_another_length_is_compiled_anew():
    reader = Reader(nn.LSTM)
    local = graphlocal.compile(Unroll().rewrite(reader).model, example_inputs=(torch.randn(2, 6, 4),))
    x = torch.randn(2, 9, 4)
    assert torch.allclose(local(x), reader(x), atol=1e-6)


def test_the_model_is_left_as_it_was_and_shares_its_tensors():
    reader = Reader(nn.LSTM)
    before = list(reader.state_dict())
    model = Unroll().rewrite(reader).model
    assert type(reader.rnn) is nn.LSTM
    assert not list(reader.rnn.children())
    assert list(reader.state_dict()) == list(model.state_dict()) == before
    assert all(a is b for a, b in zip(reader.parameters(), model.parameters(), strict=True))


class Named(nn.GRU):
    pass


def test_what_stays_a_layer_is_reported_with_its_reason():
    model = nn.ModuleList([nn.GRU(2, 2), Named(2, 2), nn.LSTM(2, 2, bidirectional=True, num_layers=3)])
    model[0].register_forward_pre_hook(lambda *_: None)
    report = Unroll().rewrite(model).report
    assert str(report).splitlines() == [
        "ModuleList: 1 of 3 recurrent layers run step by step",
        "",
        "unrolled  kind  cells a step",
        "2         LSTM             6",
        "",
        "left alone",
        "0           it has hooks, such as those of weight_norm",
        "1           a Named, not a plain nn.RNN, nn.LSTM or nn.GRU",
    ]


def test_a_packed_sequence_is_refused():
    _, unrolled = both(nn.LSTM, {})
    packed = pack_padded_sequence(torch.randn(3, 2, 4, dtype=DOUBLE), torch.tensor([3, 2]))
    with pytest.raises(InputError, match=r"the unrolled LSTM is called with a packed sequence(.|\n)*pass the padded"):
        unrolled(packed)


@pytest.mark.parametrize(
    ("model", "said"), [(nn.Linear(2, 2), "Linear has no recurrent layer to unroll"), ("gru", "model is a str")]
)
def test_a_model_without_recurrent_layers_is_refused(model, said):
    with pytest.raises(InputError, match=said):
        Unroll().rewrite(model)
