"""Drawings of graphs: every format through a tool that isn't ours, odd names, options, and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from test_ir import mlp, residual, tied
from torch import nn

import graphlocal
from graphlocal import cli
from graphlocal.errors import InputError
from graphlocal.ir import Input, LocalGraph, Operation
from graphlocal.targets.show import WRITERS, dot, graphml, mermaid, model_explorer, render, suffix, svg
from graphlocal.targets.show.mermaid import MOST_EDGES
from graphlocal.targets.show.view import view
from graphlocal.text import from_document, parse, to_document
from zoo import MODELS

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
FAST = ("gru", "mixture_of_experts", "nested_output", "several_inputs_outputs", "tied_weight", "unet")
ZOO = [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.exhaustive) for name in MODELS]
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not installed")


@cache
def compiled(name: str) -> LocalGraph:
    zoo = MODELS[name]
    return graphlocal.compile(zoo.make(), example_inputs=zoo.example()).graph


def run_dot(source: str) -> str:
    done = subprocess.run(["dot", "-Tsvg"], input=source.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


# Every format, on the zoo


@pytest.mark.parametrize("operations", [False, True], ids=["subgraphs", "operations"])
@pytest.mark.parametrize("name", ZOO)
def test_graphml_read_by_networkx_has_all_boxes_and_edges(name: str, operations: bool) -> None:
    graph = compiled(name)
    read = nx.parse_graphml(graphml(graph, operations=operations), force_multigraph=True)
    boxes = graph.operations if operations else graph.subgraphs
    kinds = [kind for _, kind in read.nodes(data="kind")]
    assert kinds.count("operation" if operations else "subgraph") == len(boxes)
    assert kinds.count("input") == len(graph.inputs)
    edges = [kind for _, _, kind in read.edges(data="kind")]
    known = {*graph.owner, *(item.name for item in graph.inputs)}
    read_values = [value for box in boxes for value in box.inputs if value in known]
    assert edges.count("data") == len(read_values) + sum(value in known for value in graph.outputs)
    for kind in ("loss", "vjp", "feedback"):
        assert edges.count(kind) == sum(c.kind == kind for c in graph.connections)


@needs_dot
@pytest.mark.parametrize("operations", [False, True], ids=["subgraphs", "operations"])
@pytest.mark.parametrize("name", ZOO)
def test_svg_by_graphviz_is_xml_and_shows_every_box(name: str, operations: bool) -> None:
    graph = compiled(name)
    assert run_dot(dot(graph, operations=operations))  # no warning either
    tree = ElementTree.fromstring(svg(graph, operations=operations))
    drawn = {title.text for title in tree.iter(f"{SVG}title")}
    assert drawn >= {box.key for box in view(graph, operations=operations).boxes}


@pytest.mark.parametrize("name", ZOO)
def test_json_and_text_come_back_as_the_graph(name: str) -> None:
    graph = compiled(name)
    assert from_document(json.loads(render(graph, ".json"))) == graph
    assert parse(render(graph, ".txt")) == graph


@pytest.mark.parametrize("name", ZOO)
def test_model_explorer_gets_every_operation_in_its_subgraph(name: str) -> None:
    graph = compiled(name)
    collection = json.loads(model_explorer(graph))
    model, *error_graph = collection["graphs"]
    for part in (model, *error_graph):
        ids = [node["id"] for node in part["nodes"]]
        assert len(set(ids)) == len(ids)
        for node in part["nodes"]:
            assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= set(ids)
            assert all(isinstance(attribute["value"], str) for attribute in node["attrs"])
    places = {attribute(node, "name"): node["namespace"] for node in model["nodes"] if node["id"].startswith("p")}
    assert len(places) == len(graph.operations)
    for subgraph in graph.subgraphs:
        (namespace,) = {places[name] for name in subgraph.operations}
        assert model["groupNodeAttributes"][namespace]["name"] == subgraph.name
    edges = [edge for part in error_graph for node in part["nodes"] for edge in node["incomingEdges"]]
    assert len(edges) == len(graph.connections)


def attribute(node: dict[str, Any], key: str) -> str:
    return next(a["value"] for a in node["attrs"] if a["key"] == key)


MERMAID = ROOT / "tests" / "vendor" / "mermaid.tiny.js"
"""Mermaid as one script, from the page's package lock; `make test` puts it there, where there is npm."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


needs_mermaid = pytest.mark.skipif(
    CHROMIUM is None or not MERMAID.is_file(),
    reason="Chromium or tests/vendor is not there: make examples/browser/vendor",
)


def in_mermaid(texts: dict[str, str], draw: str) -> tuple[dict[str, str], str]:
    """What Mermaid takes each text for (an error, if it is none of its), and the words of one that it draws."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=MERMAID)
        page.evaluate("mermaid.initialize({startOnLoad: false, maxEdges: 9999, maxTextSize: 999999})")
        parse = "text => mermaid.parse(text).then(found => found.diagramType, error => String(error))"
        found = {name: page.evaluate(parse, text) for name, text in texts.items()}
        page.set_content(page.evaluate("text => mermaid.render('drawn', text).then(found => found.svg)", texts[draw]))
        words = page.locator("svg").text_content()
        browser.close()
    return found, words


@needs_mermaid
@pytest.mark.parametrize("names", [FAST[2:4], pytest.param(tuple(MODELS), marks=pytest.mark.exhaustive)], ids=len)
def test_mermaid_parses_every_flowchart(names: tuple[str, ...]) -> None:
    texts = {
        f"{name} {opened}": mermaid(compiled(name), operations=opened) for name in names for opened in (False, True)
    }
    texts |= {
        "odd": mermaid(odd(mlp())),
        "odd, opened": mermaid(odd(mlp()), operations=True),
        "none": "flowchart LR; [",
    }
    found, words = in_mermaid(texts, "odd")
    assert "Parse error" in found.pop("none")
    assert set(found.values()) == {"flowchart-v2"}
    assert "<b>" in words
    assert '"q"' in words


# Golden texts


@pytest.mark.parametrize(("write", "file"), [(dot, "mlp_dot.txt"), (mermaid, "mlp_mermaid.txt")])
def test_mlp_draws_as_its_golden_text(write: Any, file: str) -> None:
    assert write(mlp()) == (GOLDEN / file).read_text(encoding="utf-8")


# Odd names

ODD = 'a"q"<b>&amp;|\n\\N{x}`é;#35; %% end\x07\u2028\ud800]]>'


def odd(graph: LocalGraph) -> LocalGraph:
    """The graph with an odd end to every name that is not a word of the format."""
    names = {
        graph.name, graph.rule, *graph.subgraph, *graph.state, *graph.operation, *(i.name for i in graph.inputs),
        *(region for subgraph in graph.subgraphs for region in subgraph.regions),
    }  # fmt: skip

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        known = isinstance(value, str) and value.removeprefix("writes ") in names
        return value + ODD if known else value

    document = to_document(graph)
    return from_document({**document, "graph": renamed(document["graph"])})


@pytest.mark.parametrize("make", [mlp, residual, tied])
@pytest.mark.parametrize("operations", [False, True], ids=["subgraphs", "operations"])
def test_odd_names_are_escaped_in_every_drawing(make: Any, operations: bool) -> None:
    graph, plain = odd(make()), make()
    read = nx.parse_graphml(graphml(graph, operations=operations), force_multigraph=True)
    before = nx.parse_graphml(graphml(plain, operations=operations), force_multigraph=True)
    assert sorted(read.nodes) == sorted(before.nodes)
    assert sorted(read.edges) == sorted(before.edges)
    names = {name for _, name in read.nodes(data="name")}
    assert any(name.endswith('a"q"<b>&amp;|\\n\\N{x}`é;#35; %% end\\x07\\u2028\\ud800]]>') for name in names)
    flow = mermaid(graph, operations=operations).splitlines()
    assert len(flow) == len(mermaid(plain, operations=operations).splitlines())
    assert not any(sign in line for line in flow for sign in ("<b>", "&", "`", "\\", "%%"))


@needs_dot
@pytest.mark.parametrize("make", [mlp, residual, tied])
@pytest.mark.parametrize("operations", [False, True], ids=["subgraphs", "operations"])
def test_odd_names_are_read_right_by_graphviz(make: Any, operations: bool) -> None:
    tree = ElementTree.fromstring(svg(odd(make()), operations=operations))
    text = "".join(tree.itertext())
    tooltips = [value for node in tree.iter() for key, value in node.attrib.items() if key.endswith("title")]
    assert '"q"<b>&amp;|\\n' in text
    assert any('"q"<b>&amp;|\\n\\N{x}' in tip for tip in tooltips)


def test_odd_names_come_back_from_the_texts() -> None:
    graph = odd(mlp())
    assert from_document(json.loads(render(graph, ".json"))) == graph
    assert parse(render(graph, ".txt")) == graph
    json.loads(model_explorer(graph))


def test_a_slash_in_a_name_is_no_level_of_model_explorer() -> None:
    document = to_document(mlp())
    document["graph"]["subgraphs"][0]["regions"] = document["graph"]["subgraphs"][1]["regions"] = ["a/b"]
    nodes = json.loads(model_explorer(from_document(document)))["graphs"][0]["nodes"]
    assert {node["namespace"] for node in nodes} == {"", "a|b/1: 0", "a|b/2: 2", "3: 4"}


# Options


def small() -> graphlocal.LocalModule:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    return graphlocal.compile(model, example_inputs=torch.randn(3, 6))


def test_errors_none_draws_the_data_alone() -> None:
    assert "dashed" in dot(mlp())
    assert "dashed" not in dot(mlp(), errors="none")
    assert "-.->" not in mermaid(mlp(), errors="none")


def test_errors_of_some_subgraphs_are_those_that_touch_them() -> None:
    edges = view(mlp(), errors=["2"]).errors
    assert [edge.facts["description"] for edge in edges] == ["4 ~> 2 : tanh_1  (feedback E 8x2, of linear_2, depth 1)"]


@pytest.mark.parametrize("errors", ["some", "4", ["9"], [3]])
def test_errors_that_name_nothing_are_refused(errors: Any) -> None:
    with pytest.raises(InputError, match="errors"):
        dot(mlp(), errors=errors)


def test_a_graph_that_is_not_partitioned_shows_its_operations() -> None:
    graph = small().compiled.records[0].before
    assert [box.kind for box in view(graph).boxes] == ["input", *["operation"] * 5, "output"]
    assert "cluster" not in dot(graph)


def test_vjp_connections_that_are_not_exact_are_dotted() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    exact, twins = (
        graphlocal.compile(model, example_inputs=torch.randn(3, 6), rule=r).graph for r in ("backprop", "fa")
    )
    assert "style=dotted" not in dot(exact)
    assert "style=dotted" in dot(twins)
    assert "not exact" in dot(twins)


def test_a_flowchart_above_mermaids_limits_says_what_the_page_must_set() -> None:
    names = ["x", *(f"relu_{i}" for i in range(MOST_EDGES))]
    operations = (Operation(name, "aten.relu.default", (before,)) for before, name in pairwise(names))
    graph = LocalGraph("Deep", (Input("x", None),), (names[-1],), (), tuple(operations))
    assert mermaid(graph).startswith("%% larger than Mermaid's defaults: the page must call mermaid.initialize({max")
    assert not mermaid(mlp()).startswith("%%")


# Files


@needs_dot
@pytest.mark.parametrize("format", WRITERS)
def test_show_writes_the_format_of_the_suffix(format: str, tmp_path: Path) -> None:
    local = small()
    path = tmp_path / "new" / f"drawn{format}"
    assert local.show(path) is None
    assert path.read_text(encoding="utf-8") == render(local.graph, format)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_longer_suffix_wins_and_case_does_not_matter() -> None:
    assert [suffix(name) for name in ("a.JSON", "a.me.json", "b/x.y.Dot")] == [".json", ".me.json", ".dot"]


@pytest.mark.parametrize("name", ["graph.png", "graph", ".svg", "svg"])
def test_an_unknown_suffix_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"known: .*\.svg, \.dot, \.mmd, \.txt, \.graphml, \.me\.json, \.json"):
        small().show(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_a_format_lacks_is_refused(tmp_path: Path) -> None:
    local = small()
    with pytest.raises(InputError, match=r"\.json has no option 'operations'"):
        local.show(tmp_path / "a.json", operations=True)
    with pytest.raises(InputError, match=r"no option 'operation'\n.*did you mean 'operations'"):
        local.show(tmp_path / "a.dot", operation=True)
    with pytest.raises(InputError, match="errors='E'"):
        local.show(errors="E")


def test_a_path_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        small().show(tmp_path / "file" / "a.dot")


def test_without_graphviz_an_svg_is_refused_and_a_notebook_shows_text(monkeypatch: Any, tmp_path: Path) -> None:
    local = small()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"`dot` is not installed\n  remedy: install graphviz .*\.mmd"):
        local.show(tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
    drawing = local.show()
    assert drawing._repr_svg_() is None
    assert drawing._repr_html_().startswith("<pre>Sequential: 5 operations")
    assert str(drawing) == str(local.graph)


@needs_dot
def test_what_graphviz_cannot_route_with_rails_is_drawn_without(monkeypatch: Any, tmp_path: Path) -> None:
    particular = tmp_path / "dot"
    fails = f'text=$(cat); case "$text" in *shape=point*) exit 1;; esac; printf %s "$text" | {shutil.which("dot")} "$@"'
    particular.write_text(f"#!/bin/sh\n{fails}\n")
    particular.chmod(0o755)
    assert "r2_0" in svg(mlp())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    drawn = svg(mlp())
    assert "r2_0" not in drawn
    assert "s3&#45;&gt;s1" in drawn


@needs_dot
def test_a_notebook_shows_the_svg() -> None:
    local = small()
    drawing = local.show(operations=True, errors="none")
    assert drawing._repr_svg_() == svg(local.graph, operations=True, errors="none")
    assert drawing._repr_html_().startswith('<svg class="graphlocal"')


def test_graphviz_that_fails_is_reported(monkeypatch: Any, tmp_path: Path) -> None:
    broken = tmp_path / "dot"
    broken.write_text("#!/bin/sh\necho no fonts >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"could not draw the graph\n  why: no fonts"):
        svg(mlp())


# The command


def run(monkeypatch: Any, *arguments: object) -> int:
    command = ["graphlocal", "show", "graphlocal.demo:digits_mlp", "--input", "4x1x8x8", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_prints_the_graph(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch) == 0
    assert "error connections" in capsys.readouterr().out


@needs_dot
def test_the_command_writes_several_files(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    names = {"svg": "svg", "dot": "gv", "mermaid": "md", "graphml": "xml", "json": "js", "model-explorer": "x"}
    paths = {option: tmp_path / f"graph.{name}" for option, name in names.items()}
    options = [word for option, path in paths.items() for word in (f"--{option}", path)]
    assert run(monkeypatch, *options, "--operations", "--errors", "none", "--rule", "backprop") == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [f"written: {path}" for path in paths.values()]
    graph = from_document(json.loads(paths["json"].read_text()))
    assert graph.rule.startswith("Backprop")
    assert paths["dot"].read_text() == dot(graph, operations=True, errors="none")
    assert paths["mermaid"].read_text() == mermaid(graph, operations=True, errors="none")
    assert paths["model-explorer"].read_text() == model_explorer(graph)
    assert paths["svg"].read_text() == svg(graph, operations=True, errors="none")


def test_the_command_writes_and_prints(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    assert run(monkeypatch, "--text", "--dot", tmp_path / "a", "--depth", 2, "--partition", "leaf") == 0
    assert "error connections" in capsys.readouterr().out
    assert (tmp_path / "a").is_file()


def test_the_command_fails_with_a_message_and_writes_nothing(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    assert run(monkeypatch, "--operations") == 1
    assert "are for drawings" in capsys.readouterr().err
    assert run(monkeypatch, "--errors", "some", "--dot", tmp_path / "a") == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(monkeypatch, "--dot", tmp_path / "a", "--svg", tmp_path / "b") == 1
    assert "`dot` is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
