"""Partitions are what a person would draw: blocks whole, layers with their activations, segments of equal cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from itertools import combinations, pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphlocal
import zoo
from graphlocal.arguments import Binder
from graphlocal.errors import PartitionError
from graphlocal.ir import Input, LocalGraph, Operation, State, Subgraph, TensorType
from graphlocal.lift import lift
from graphlocal.partition import explain
from graphlocal.passes.partition import FULL, Partition
from graphlocal.rules import RecLRA
from graphlocal.trace import trace


def lifted(model: nn.Module, inputs: Any) -> LocalGraph:
    return lift(trace(model, Binder(model).example(inputs)), model)


@cache
def zoo_graph(name: str) -> LocalGraph:
    return lifted(zoo.MODELS[name].make(), zoo.MODELS[name].example())


def partitioned(name: str, policy: Any = "auto", depth: int = 1) -> LocalGraph:
    return Partition(policy, depth).apply(zoo_graph(name))


def names(graph: LocalGraph) -> list[str]:
    return [subgraph.name for subgraph in graph.subgraphs]


def grouping(graph: LocalGraph) -> set[frozenset[str]]:
    return {frozenset(subgraph.operations) for subgraph in graph.subgraphs}


def parametric(graph: LocalGraph, subgraph: Subgraph) -> list[str]:
    """The operations of a subgraph that read a parameter."""
    read = {state.name for state in graph.states if state.kind == "parameter"}
    return [name for name in subgraph.operations if read.intersection(graph.operation[name].states)]


# "auto"

RESNET = ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"]
INCEPTION = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
MOBILENET = [*(f"features.{i}" for i in range(19)), "classifier"]
DENSENET = [
    "features.conv0", "features.denseblock1.denselayer1", "features.denseblock1.denselayer2", "features.transition1",
    "features.denseblock2.denselayer1", "features.denseblock2.denselayer2", "classifier",
]  # fmt: skip

DRAWN = {
    "mlp": ["0", "2", "4"],
    "deep_mlp": ["0", "2", "4", "6", "8", "10", "12", "14"],
    "dropout_mlp": ["0", "3.0", "3.2"],
    "autoencoder": ["0", "2", "4", "6"],
    "residual_mlp": ["stem", "blocks.0", "blocks.1", "blocks.2", "head"],
    "called_twice": ["first", "second", "second@1", "head"],
    "nested_output": ["first", "head", "second"],
    "small_resnet": ["0", "3", "4", "7"],
    "resnet18": RESNET,
    "densenet": DENSENET,
    "googlenet": ["conv1", "conv2", "conv3", *(f"inception{name}" for name in INCEPTION), "fc"],
    "mobilenet_v2": MOBILENET,
    "inception": ["0", "3", "5", "8"],
    "convnext": ["0", "1", "2", "5"],
    "squeeze_excite": ["0", "1", "5"],
    "audio": ["0", "4", "8"],
    "norms": ["0", "3", "6", "9"],
    "unet": ["down1", "down2", "middle", "up2", "merge2", "up1", "merge1"],
    "transformer_encoder": ["encoder.layers.0", "encoder.layers.1", "head"],
    "language_model": ["embedding", "positions", "blocks.0", "blocks.1", "head"],
    "attention_weights": ["attention", "head"],
    "lstm": ["cells", "head"],
    "lstm_bidirectional": ["cells", "head"],
    "siamese": ["first", "second", "first@1", "second@1", "head"],
    "several_inputs_outputs": ["first", "other", "head", "second"],
    "mixture_of_experts": ["experts.0", "experts.1", "experts.2", "experts.3", "gate", "head"],
    "tied_weight": ["encoder", "linear_1"],
    "scalar_gain": ["first", "second", "head"],
    "vit": ["patches", "blocks.0", "blocks.1", "head"],
    "gru_unrolled": ["cell", "cell@1", "cell@2", "cell@3", "cell@4", "head"],
}


class Seq2Seq(nn.Module):
    """Encoder and decoder, whose layers hold two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.net(source, target))


def test_auto_keeps_a_decoder_layer_with_two_attentions_whole():
    graph = lifted(Seq2Seq(), (torch.randn(2, 3, 8), torch.randn(2, 4, 8)))
    drawn = [name for name in names(Partition().apply(graph)) if ".layers." in name]
    assert drawn == [f"net.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)]


@pytest.mark.parametrize("name", DRAWN)
def test_auto_draws_the_boxes_that_a_person_would(name):
    assert names(partitioned(name)) == DRAWN[name]


def test_auto_gives_an_auxiliary_classifier_a_box_of_its_own():
    without = [name for name in names(partitioned("googlenet_aux")) if not name.startswith("aux")]
    assert without == names(partitioned("googlenet"))
    assert {"aux1", "aux2"} <= set(names(partitioned("googlenet_aux")))


@pytest.mark.parametrize("name", ["vit", "vit_torchvision"])
def test_auto_keeps_the_blocks_and_the_head_of_a_vision_transformer_whole(name):
    graph = partitioned(name)
    blocks = [s for s in graph.subgraphs if len(parametric(graph, s)) > 3]
    assert [s.name.rpartition(".")[2][-1] for s in blocks] == ["0", "1"]
    assert all(len(parametric(graph, block)) == 6 for block in blocks)  # two norms, qkv, out, and the MLP's two
    assert names(graph)[-1] in ("head", "heads")


@pytest.mark.parametrize("name", ["residual_mlp", "resnet18", "transformer_encoder", "mobilenet_v2", "convnext"])
def test_auto_puts_all_operations_of_a_repeated_block_into_its_box(name):
    graph = partitioned(name)
    blocks = [s.name for s in graph.subgraphs if re.search(r"\b\d+$", s.name) and len(parametric(graph, s)) > 1]
    assert len(blocks) > 1
    for op in graph.operations:
        inside = [block for block in blocks if op.module == block or op.module.startswith(f"{block}.")]
        assert not inside or [graph.owner[op.name]] == inside, op.name


@pytest.mark.parametrize("name", ["mlp", "deep_mlp", "audio", "unet", "small_resnet", "resnet18"])
def test_auto_ends_a_box_with_its_activation(name):
    """The elementwise tail of a representation belongs to what made it, not to the next layer."""
    graph = partitioned(name)
    for subgraph in graph.subgraphs:
        first = graph.operation[subgraph.operations[0]]
        assert not first.pointwise, f"{subgraph.name} begins with {first.name}"


class Flat(nn.Module):
    """Two residual blocks and a head, written as one forward without modules for the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(x + self.b(torch.tanh(self.a(x))))
        x = torch.tanh(x + self.d(torch.tanh(self.c(x))))
        return self.head(x)


def test_auto_finds_residual_blocks_in_a_flat_forward():
    graph = Partition().apply(lifted(Flat(), zoo.vectors()))
    assert [len(parametric(graph, s)) for s in graph.subgraphs] == [1, 2, 2, 1]
    assert [len(s.inputs) for s in graph.subgraphs] == [1, 1, 1, 1]


# Names mean nothing


def numbered(i: int) -> str:
    return f"a{i}"


def lettered(i: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[i]


def rename(model: nn.Module, name: Callable[[int], str]) -> nn.Module:
    """Give the submodules of each module meaningless names; its forward still finds them by their old ones."""
    for module in model.modules():
        renamed = {old: name(i) for i, old in enumerate(module._modules)}
        kind = type(module)

        def find(self: nn.Module, key: str, renamed: dict[str, str] = renamed, kind: type = kind) -> Any:
            return kind.__getattr__(self, renamed.get(key, key))

        def item(self: nn.Module, index: int) -> nn.Module:
            return list(self._modules.values())[index]

        methods = {"__getattr__": find} | ({"__getitem__": item} if isinstance(module, nn.ModuleList) else {})
        module.__class__ = type(kind.__name__, (kind,), methods)
        module._modules = {renamed[old]: child for old, child in module._modules.items()}
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("resnet18", numbered),
        ("transformer_encoder", numbered),
        ("transformer_encoder", lettered),
        ("resnet18", lettered),
    ],
)
def test_renaming_every_module_leaves_the_grouping_as_it_was(model, name):
    renamed = rename(zoo.MODELS[model].make(), name)
    graph = Partition().apply(lifted(renamed, zoo.MODELS[model].example()))
    seen = {part.partition("@")[0] for op in graph.operations for part in op.module.split(".")}
    assert seen - {""} <= {name(i) for i in range(10)}
    assert grouping(graph) == grouping(partitioned(model))


# "leaf"


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "small_resnet", "vit", "gru_unrolled", "googlenet"])
def test_leaf_gives_every_operation_with_parameters_a_subgraph_of_its_own(name):
    graph = partitioned(name, "leaf")
    counts = [len(parametric(graph, subgraph)) for subgraph in graph.subgraphs]
    assert set(counts) <= {0, 1}
    assert sum(counts) == len([op for op in graph.operations if parametric(graph, Subgraph("", (op.name,)))])


@pytest.mark.parametrize("name", ["mlp", "residual_mlp", "small_resnet", "vit"])
def test_full_recursion_ends_at_single_operations_with_parameters(name):
    graph = partitioned(name, "auto", FULL)
    assert max(len(parametric(graph, subgraph)) for subgraph in graph.subgraphs) == 1


def test_depth_2_divides_blocks_and_keeps_their_name_as_a_region():
    graph = partitioned("residual_mlp", depth=2)
    parts = [f"blocks.{i}.{part}" for i in range(3) for part in ("inner", "outer")]
    assert names(graph) == ["stem", *parts, "head"]
    assert [s.regions for s in graph.subgraphs] == [(), *((f"blocks.{i}",) for i in (0, 0, 1, 1, 2, 2)), ()]


# An int

FLOAT = TensorType("float32", ("B", 4))


def chain(costs: list[int]) -> LocalGraph:
    """Layers one after the other, with given costs."""
    weights = [State(f"w{i}", "parameter", TensorType("float32", (4, 4)), True) for i in range(len(costs))]
    layers = [
        Operation(f"l{i}", "aten.linear.default", (f"l{i - 1}" if i else "x",), (f"w{i}",), FLOAT, f"m{i}", flops=cost)
        for i, cost in enumerate(costs)
    ]
    return LocalGraph("Chain", (Input("x", FLOAT),), (layers[-1].name,), tuple(weights), tuple(layers))


def best_split(costs: list[int], count: int) -> int:
    """The smallest cost that the largest of `count` consecutive segments can have, by trying all."""
    places = combinations(range(1, len(costs)), count - 1)
    return min(max(sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs)))) for cuts in places)


def largest(graph: LocalGraph) -> int:
    return max(sum(graph.operation[op].flops for op in subgraph.operations) for subgraph in graph.subgraphs)


COSTS = ([3] * 8, [100] * 9, [800, 100, 100, 100, 100], [100, 100, 100, 100, 800], [400, 100, 400, 100, 400, 100],
         [100, 200, 300, 400, 500, 600])  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_segments_are_balanced_as_well_as_any_split_could_be(costs, count):
    graph = Partition(count).apply(chain(costs))
    assert names(graph) == [f"segment{i + 1}" for i in range(count)]
    assert largest(graph) <= best_split(costs, count)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_segments_of_any_chain_are_within_a_quarter_of_the_best_split(count):
    for costs in product((100, 200, 400), repeat=6):
        assert largest(Partition(count).apply(chain(list(costs)))) <= 1.25 * best_split(list(costs), count), costs


@pytest.mark.parametrize("shares", [(3, 1), (1, 3), (1, 1), (2, 1, 1)])
def test_segments_below_the_head_have_costs_near_the_given_proportions(shares):
    """The largest cost for each unit of its share, against all splits of all but the last layer."""
    for costs in product((100, 200, 400), repeat=5):
        graph = Partition(f"{':'.join(map(str, shares))}+head").apply(chain([*costs, 100]))
        assert names(graph) == [*(f"segment{i + 1}" for i in range(len(shares))), "m5"]
        found = [sum(graph.operation[name].flops + 1 for name in s.operations) for s in graph.subgraphs[:-1]]
        best = min(
            max(sum(costs[a:b]) / share for a, b, share in zip((0, *cut), (*cut, 5), shares, strict=True))
            for cut in combinations(range(1, 5), len(shares) - 1)
        )
        assert max(cost / share for cost, share in zip(found, shares, strict=True)) <= 1.28 * best, costs


def test_a_small_model_has_fewer_segments_below_its_last_layers():
    assert names(Partition("3:1+head").apply(chain([100, 100]))) == ["segment1", "m1"]
    assert names(Partition("3:1+head").apply(chain([100]))) == ["m0"]
    several = partitioned("several_inputs_outputs", "2+head")
    assert names(several)[:2] == ["segment1", "segment2"]
    heads = [s for s in several.subgraphs if set(several.outputs) & {o.value for o in s.outputs}]
    assert not any(s.name.startswith("segment") for s in heads)


def test_segments_and_last_layers_are_explained():
    model = zoo.MODELS["vit"]
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule="auto")
    lines = dict(line.split(maxsplit=1) for line in explain(local).splitlines())
    assert re.match(r"segment with \d+% of the cost", lines["segment1"])
    assert lines["head"].startswith("one of the last layers")


def test_the_normalization_before_the_last_layer_is_one_of_the_last_layers():
    """Its error is exact then; but a norm with an addition, as in a residual block, is part of the block."""
    assert names(partitioned("vit", "2+head"))[-2:] == ["norm", "head"]
    assert names(partitioned("small_resnet", "2+head")) == ["segment1", "segment2", "7"]


@pytest.mark.parametrize("policy", ["0+head", "3:0+head"])
def test_segments_of_no_size_are_refused(policy):
    with pytest.raises(PartitionError, match="are wanted"):
        Partition(policy).apply(chain([100, 100, 100]))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", ["deep_mlp", "small_resnet", "resnet18", "transformer_encoder"])
def test_segments_of_a_model_are_as_many_as_asked_for(name, count):
    graph = partitioned(name, count)
    assert names(graph) == [f"segment{i + 1}" for i in range(count)]
    assert all(parametric(graph, subgraph) for subgraph in graph.subgraphs)


def test_segments_of_a_residual_net_are_cut_between_its_blocks():
    """Inside a block two values would cross."""
    graph = partitioned("resnet18", 4)
    assert all(len(s.inputs) == 1 for s in graph.subgraphs)
    assert largest(graph) < 0.4 * sum(op.flops for op in graph.operations)


# Globs and callables


def test_globs_draw_the_modules_they_match_and_auto_the_rest():
    assert names(partitioned("resnet18", ["layer*"])) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert names(partitioned("resnet18", ["layer1", "layer[34].*"])) == [
        "conv1", "layer1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc",
    ]  # fmt: skip
    assert names(partitioned("residual_mlp", ["blocks"])) == ["stem", "blocks", "head"]


def test_a_glob_draws_the_outermost_module_that_it_matches():
    whole = partitioned("transformer_encoder", ["encoder*"])
    assert names(whole) == ["encoder", "head"]
    assert names(partitioned("transformer_encoder", ["encoder.layers.*"])) == names(partitioned("transformer_encoder"))


def test_a_callable_names_the_box_of_each_operation():
    graph = partitioned("residual_mlp", lambda op: "head" if op.module == "head" else "body")
    assert names(graph) == ["body", "head"]
    assert graph.subgraph["head"].operations == ("linear_7",)


def test_operations_that_a_callable_leaves_open_join_their_neighbours():
    graph = partitioned("mlp", lambda op: "start" if op.module in ("0", "2") else None)
    assert names(graph) == ["start", "4"]
    assert graph.owner["tanh"] == graph.owner["tanh_1"] == "start"


# Whatever the policy

POLICIES = ("auto", "leaf", 3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", zoo.models(exclude=("torchvision",)))
def test_each_operation_is_in_exactly_one_subgraph_and_no_two_need_each_other(model, policy):
    graph = zoo_graph(model.name)
    if policy == 3:
        policy = min(3, sum(bool(parametric(graph, s)) for s in partitioned(model.name, "leaf").subgraphs))
    for depth in (1, 2):
        result = Partition(policy, depth).apply(graph)
        placed = [op for subgraph in result.subgraphs for op in subgraph.operations]
        assert sorted(placed) == sorted(op.name for op in graph.operations)
        assert len(set(names(result))) == len(result.subgraphs)
        order = {name: i for i, name in enumerate(names(result))}
        assert all(order[a] < order[b] for a, b in result.quotient.edges)


# explain


def reasons(name: str, policy: Any = "auto", depth: int = 1) -> dict[str, str]:
    """The text of `explain` by subgraph; one line for each, in order."""
    model = zoo.MODELS[name]
    rule = RecLRA(depth=depth)
    local = graphlocal.compile(model.make(), example_inputs=model.example(), rule=rule, partition=policy)
    lines = dict(line.split(maxsplit=1) for line in explain(local).splitlines())
    assert list(lines) == names(local.graph)
    return lines


def test_explain_says_why_each_box_is_one():
    lines = reasons("small_resnet")
    assert lines["3"].startswith("one of 2 blocks in a row in the model; ")
    assert lines["0"].startswith("a part of the model; takes in 1, 2; ")
    assert lines["7"].startswith("a part of the model; takes in 5, 6; ")


def test_explain_names_what_crosses_each_cut():
    lines = reasons("residual_mlp")
    assert lines["stem"].endswith("hands on tanh f32[B,7]")
    assert lines["head"].endswith("hands on linear_7 f32[B,4]")
    assert lines["blocks.1"] == "one of 3 blocks in a row in blocks; hands on tanh_4 f32[B,7]"


@pytest.mark.parametrize(
    ("policy", "depth", "subgraph", "said"),
    [
        ("leaf", 1, "blocks.0.outer", "one operation with parameters; "),
        ("auto", 2, "blocks.0.inner", "a part of blocks.0, at recursion depth 2; "),
        (2, 1, "segment2", "segment with "),
        (["blocks.*"], 1, "blocks.2", "one of 3 blocks in a row in blocks; "),
        (lambda op: "all", 1, "all", "8 operations with parameters; "),
    ],
    ids=["leaf", "depth 2", "segments", "globs", "callable"],
)
def test_explain_follows_the_policy(policy, depth, subgraph, said):
    assert reasons("residual_mlp", policy, depth)[subgraph].startswith(said)


def test_explain_names_a_prelude():
    said = reasons("message_passing_batch")["prelude"]
    assert said.startswith("comes before every parameter and serves several subgraphs; hands on select_1 i64[9]")


def test_explain_says_which_layers_a_block_without_a_module_is_made_of():
    local = graphlocal.compile(Flat(), example_inputs=(torch.randn(2, 6),))
    merged = [line for line in explain(local).splitlines() if "cross between them" in line]
    assert merged
    assert all("as in a residual block" in line and "takes in" in line for line in merged)


class NamedOutput(nn.Module):
    """Its head has the name that the gradient of the loss has in the error graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.output = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.body(x)))


def test_a_module_may_be_called_output():
    local = graphlocal.compile(NamedOutput(), example_inputs=(torch.randn(2, 6),))
    assert names(local.graph) == ["body", "output:linear_1"]


def test_a_value_that_is_written_in_place_later_has_no_tail():
    """`z = tanh(h); z[:, 4:] += other` is no function of h alone."""
    model = zoo.MODELS["slice_assignment"]
    local = graphlocal.compile(model.make(), example_inputs=model.example())
    assert local.graph.representation["clone"].preactivation == "clone"
