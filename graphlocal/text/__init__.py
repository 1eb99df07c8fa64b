"""Graphs as text: the complete form, which parses back, beside the short `summary`.

The complete form has one line per object (a subgraph has a few, indented), in this order:

    graphlocal text 1
    graph mlp rule rec-lra
    input x : f32[B,4]
    state parameter 0.weight : f32[8,4] trainable
    size batch = aten.sym_size.int(x)
    op tanh = aten.tanh.default(linear) : f32[B,8] @ 1 | mlp.py:7 | pointwise
    output linear_1
    subgraph first in stem
      reads x; 0.weight, 0.bias
      runs linear, tanh
      gives tanh from linear axis 1
    neuron first measures tanh
    feedback last : linear_1 -> first : tanh depth 1 weight [8,2]
    step 3: D1 | -

`op NAME = TARGET(values; states)`; after `@` the module, after the bars the source line and what else is
known of the operation. A name that would not read as one word is quoted as in JSON. A step has one column per
stream; `-` is an idle one. Lines that start with `#` are skipped.

`to_document` and `from_document` are the same as plain dictionaries and lists, for JSON.
"""

from graphlocal.text.document import from_document, to_document
from graphlocal.text.reader import parse, parse_actions
from graphlocal.text.summary import connection_label, schedule_grid, summary, type_label
from graphlocal.text.writer import actions_to_text, difference, to_text

__all__ = [
    "actions_to_text",
    "connection_label",
    "difference",
    "from_document",
    "parse",
    "parse_actions",
    "schedule_grid",
    "summary",
    "to_document",
    "to_text",
    "type_label",
]
