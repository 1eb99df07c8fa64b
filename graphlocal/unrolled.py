"""Recurrent layers written out step by step, so that a partition can cut between the steps.

`UnrolledRNN`, `UnrolledLSTM` and `UnrolledGRU` are `nn.RNN`, `nn.LSTM` and `nn.GRU` with the same parameters, calls and
results (to rounding); each layer and direction runs a cell module once a step, `cell_l0`, `cell_l0_reverse`, `cell_l1`,
..., all with the layer's own weights. `graphlocal.passes.unroll.Unroll` puts them into a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphlocal.errors import InputError

State = tuple[Tensor, ...]
"""The hidden state (h,), of an LSTM (h, c); each (batch, features)."""


class _Cell(nn.Module):
    """One step of one layer in one direction; its weights are the layer's."""

    def forward(self, x: Tensor, state: State, weights: list[Tensor]) -> State:
        """The next state. x: (batch, features). weights: W_ih, W_hh, then the biases and W_hr where there are some."""
        raise NotImplementedError

    @staticmethod
    def sums(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """W_ih x + b_ih and W_hh h + b_hh."""
        biases = weights[2:4] if len(weights) > 3 else (None, None)
        return F.linear(x, weights[0], biases[0]), F.linear(h, weights[1], biases[1])


class RNNCell(_Cell):
    """h' = tanh (or relu) of W_ih x + b_ih + W_hh h + b_hh."""

    def __init__(self, nonlinearity: str) -> None:
        super().__init__()
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, state: State, weights: list[Tensor]) -> State:
        from_input, from_state = self.sums(x, state[0], weights)
        h = from_input + from_state
        return (torch.relu(h) if self.nonlinearity == "relu" else torch.tanh(h),)


class LSTMCell(_Cell):
    """i, f, g, o = gates of W_ih x + b_ih + W_hh h + b_hh; c' = f c + i g; h' = o tanh(c'), times W_hr if projected."""

    def forward(self, x: Tensor, state: State, weights: list[Tensor]) -> State:
        from_input, from_state = self.sums(x, state[0], weights)
        i, f, g, o = (from_input + from_state).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if len(weights) in (2, 4) else F.linear(h, weights[-1])), c


class GRUCell(_Cell):
    """r, z = gates; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n + z h."""

    def forward(self, x: Tensor, state: State, weights: list[Tensor]) -> State:
        from_input, from_state = self.sums(x, state[0], weights)
        (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, 1), from_state.chunk(3, 1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * n_h).tanh()
        return ((state[0] - n) * z + n,)


class _Unrolled(nn.RNNBase):
    """The loop over layers, directions and steps."""

    def unroll(self) -> None:
        """Add the cells, which hold no weights."""
        for layer in range(self.num_layers):
            for suffix in self.directions:
                self.add_module(f"cell_l{layer}{suffix}", self.new_cell())

    @property
    def directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def new_cell(self) -> _Cell:
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """As the layer that it was made of. Raises InputError for a packed sequence."""
        if not isinstance(input, Tensor):
            raise InputError(
                f"the unrolled {type(self).__bases__[-1].__name__} is called with a packed sequence",
                why="its steps have batches of different sizes, which no fixed graph can hold",
                remedy="pass the padded sequence (and mask what comes out), or compile without Unroll",
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        steps = list((x.transpose(0, 1) if batched and self.batch_first else x).unbind(0))
        initial = self._initial(steps[0], hx, batched)
        final: list[State] = []
        for layer in range(self.num_layers):
            found = [self._run(layer, suffix, steps, initial[len(final) + i])
                     for i, suffix in enumerate(self.directions)]  # fmt: skip
            final += [state for _, state in found]
            steps = [torch.cat(parts, 1) if len(parts) > 1 else parts[0]
                     for parts in zip(*(outputs for outputs, _ in found), strict=True)]  # fmt: skip
            if layer + 1 < self.num_layers and self.dropout and self.training:
                steps = list(F.dropout(torch.stack(steps), self.dropout).unbind(0))
        output = torch.stack(steps, 1 if batched and self.batch_first else 0)
        states = tuple(torch.stack(parts) for parts in zip(*final, strict=True))
        if not batched:
            output, states = output.squeeze(1), tuple(state.squeeze(1) for state in states)
        return output, states if len(states) > 1 else states[0]

    def _run(self, layer: int, suffix: str, steps: list[Tensor], state: State) -> tuple[list[Tensor], State]:
        """The hidden states of one layer in one direction, in the order of time, and its last state."""
        name = f"l{layer}{suffix}"
        cell = self.get_submodule(f"cell_{name}")
        names = (f"weight_ih_{name}", f"weight_hh_{name}", f"bias_ih_{name}", f"bias_hh_{name}", f"weight_hr_{name}")
        weights = [self._parameters[key] for key in names if key in self._parameters]
        outputs: list[Tensor] = []
        for x in reversed(steps) if suffix else steps:
            state = cell(x, state, weights)
            outputs.append(state[0])
        return outputs[::-1] if suffix else outputs, state

    def _initial(self, x: Tensor, hx: Any, batched: bool) -> list[State]:
        """The state before the first step, for each layer and direction."""
        count = self.num_layers * len(self.directions)
        sizes = [self.proj_size or self.hidden_size, *([self.hidden_size] if self.mode == "LSTM" else [])]
        if hx is None:
            return [tuple(x.new_zeros(x.shape[0], size) for size in sizes)] * count
        given = hx if self.mode == "LSTM" else (hx,)
        unbound = [(state if batched else state.unsqueeze(1)).unbind(0) for state in given]
        return list(zip(*unbound, strict=True))


class UnrolledRNN(_Unrolled, nn.RNN):  # type: ignore[misc]  # one forward for the three
    """`nn.RNN`, step by step."""

    def new_cell(self) -> _Cell:
        return RNNCell(self.nonlinearity)


class UnrolledLSTM(_Unrolled, nn.LSTM):  # type: ignore[misc]  # one forward for the three
    """`nn.LSTM`, step by step."""

    def new_cell(self) -> _Cell:
        return LSTMCell()


class UnrolledGRU(_Unrolled, nn.GRU):  # type: ignore[misc]  # one forward for the three
    """`nn.GRU`, step by step."""

    def new_cell(self) -> _Cell:
        return GRUCell()


UNROLLED: dict[type[nn.RNNBase], type[_Unrolled]] = {nn.RNN: UnrolledRNN, nn.LSTM: UnrolledLSTM, nn.GRU: UnrolledGRU}
