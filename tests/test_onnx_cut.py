"""Cutting a flat ONNX graph: what a piece needs of tensors that it doesn't read."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, parser
from onnx.reference import ReferenceEvaluator

from graphlocal.targets.onnx.convert import Converted
from graphlocal.targets.onnx.cut import SIZES, cut
from graphlocal.text import parse

GRAPH = """graphlocal text 1
graph two
input x : f32[B,4]
op even = aten.slice.Tensor(x) : f32[S1,4]
op first = aten.mean.dim(even) : f32[1,4]
op second = aten.expand.default(first) : f32[S1,4]
output second
subgraph a
  reads x
  runs even, first
  gives first axis 1
subgraph b
  reads first
  runs second
  gives second axis 1
"""

INSIDE = """
<ir_version: 10, opset_import: ["" : 20, "graphlocal" : 1]>
flat (float[B,4] x) => (float[S,4] out)
<float[1,4] mean, float[1,4] marked, int64[2] shape, float[S,4] wide>
{
  relu = Relu(x)
  even = Compress <axis = 0> (relu, keep)
  axes = Constant <value_ints = [0]> ()
  mean = ReduceMean <keepdims = 1> (even, axes)
  marked = graphlocal.Boundary <value = "first"> (mean)
  shape = Shape(even)
  wide = Expand(marked, shape)
  out = graphlocal.Boundary <value = "second"> (wide)
}
"""


def flat(text: str) -> Converted:
    proto = parser.parse_model(text)
    keep = onnx.numpy_helper.from_array(np.array([True, False, True]), "keep")
    proto.graph.initializer.append(keep)
    return Converted(proto, ("x",), {})


def run(pieces, x: np.ndarray) -> np.ndarray:
    values = {"x": x}
    for piece in pieces.pieces:
        infos = [[helper.make_value_info(n, pieces.types[n]) for n in names] for names in (piece.inputs, piece.outputs)]
        model = helper.make_model(
            helper.make_graph(list(piece.nodes), piece.name, *infos),
            opset_imports=[helper.make_opsetid("", pieces.opset)],
            ir_version=10,
        )
        onnx.checker.check_model(model)
        found = ReferenceEvaluator(model).run(None, {name: values[name] for name in piece.inputs})
        values.update(zip(piece.outputs, found, strict=True))
    return values[pieces.outputs[0]]


def test_a_shape_inside_another_piece_is_given_by_that_piece():
    pieces = cut(flat(INSIDE), parse(GRAPH))
    first, second = pieces.pieces
    assert first.outputs == ("first", "shape_of_even")
    assert second.inputs == ("first", "shape_of_even")
    assert [node.op_type for node in second.nodes] == ["Expand"]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(run(pieces, x), np.broadcast_to(x[[0, 2]].mean(0), (2, 4)))


def test_a_shape_of_the_models_input_is_a_piece_of_its_own():
    pieces = cut(flat(INSIDE.replace("Shape(even)", "Shape(x)")), parse(GRAPH))
    assert [piece.name for piece in pieces.pieces] == [SIZES, "a", "b"]
    assert pieces.pieces[2].inputs == ("first", "shape_of_x")
    x = np.ones((3, 4), dtype=np.float32)
    assert run(pieces, x).shape == (3, 4)


def test_a_shape_of_a_tensor_that_the_piece_reads_is_its_own_business():
    pieces = cut(flat(INSIDE.replace("Shape(even)", "Shape(marked)")), parse(GRAPH))
    assert pieces.pieces[1].inputs == ("first",)
    assert [node.op_type for node in pieces.pieces[1].nodes] == ["Shape", "Expand"]
