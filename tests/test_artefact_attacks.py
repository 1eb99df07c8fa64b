"""Files that are damaged or hostile: each is refused with a clear error, and nothing in one is ever run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import stat
import zipfile

import pytest
import torch
from artefacts import Net, edited, header, members_of, net_steps, pictures, rewritten, with_header
from hypothesis import given, settings
from hypothesis import strategies as st

import graphlocal
from graphlocal.artefact.container import MANIFEST
from graphlocal.artefact.operators import find
from graphlocal.artefact.tensors import from_safetensors
from graphlocal.artefact.values import NeedsModel
from graphlocal.errors import FileFormatError, InputError
from graphlocal.rules import RecLRA


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model, its members and its bytes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "m.local"
    graphlocal.compile(Net(), example_inputs=pictures(), rule=RecLRA(error_weights="kp")).save(path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.local"


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Nothing is unpickled, and the command that the hostile files try to run is never reached."""

    def refuse(*args, **kwargs):
        raise AssertionError("the file was trusted")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(os, "system", refuse)


def copied(source, path, change=lambda name, data, info: (name, data, info), more=()):
    """A copy of a zip file, member by member, with its manifest as it was."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as copy:
        for info in archive.infolist():
            found = change(info.filename, archive.read(info), info)
            if found is not None:
                name, data, info = found
                info.filename = name
                copy.writestr(info, data)
        for name, data in more:
            copy.writestr(name, data)
    return path


def refusal(path, **arguments):
    with pytest.raises(FileFormatError) as caught:
        graphlocal.load(path, **arguments)
    assert caught.value.message
    return str(caught.value)


# The container.


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip file at all", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_such_file_is_refused(content, path):
    path.write_bytes(content)
    assert re.search("not a file that local.save wrote|no manifest.json", refusal(path))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(share, saved, path):
    content = saved.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged or cut short" in refusal(path)


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "a/../../b", "..\\evil", "C:\\x", "sub/graph.json"])
def test_a_member_whose_path_leads_elsewhere_is_refused(name, saved, path):
    message = refusal(copied(saved, path, more=[(name, b"{}")]))
    assert "a member" in message
    assert "leads out of the file" in message or "the members are" in message
    assert sorted(os.listdir(path.parent)) == ["m.local"]


def test_unknown_members_links_and_repeated_ones_are_refused(saved, path):
    assert "does not belong" in refusal(copied(saved, path, more=[("model.pkl", b"cos\nsystem\n")]))
    with pytest.warns(UserWarning, match="Duplicate"):
        copied(saved, path, more=[("graph.json", b"{}")])
    assert "it is there twice" in refusal(path)

    def link(name, data, info):
        if name == "graph.json":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        return name, data, info

    assert "it is a link or a folder" in refusal(copied(saved, path, link))


def test_a_missing_member_is_refused(saved, path):
    drop = lambda missing: lambda name, data, info: None if name == missing else (name, data, info)  # noqa: E731
    assert "no manifest.json" in refusal(copied(saved, path, drop(MANIFEST)))
    assert "but the file holds" in refusal(copied(saved, path, drop("trace.json")))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(saved, path, monkeypatch):
    def bomb(name, data, info):
        return name, (b" " * 50_000_000 if name == "graph.json" else data), info

    copied(saved, path, bomb)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *args: pytest.fail("it was unpacked"))
    assert "a zip bomb" in refusal(path)


def test_a_member_that_lies_about_its_size_is_refused(saved, path):
    content = bytearray(saved.read_bytes())
    for entry in (m.start() for m in re.finditer(b"PK\x01\x02", bytes(content))):
        if content[entry + 46 : entry + 56] == b"graph.json":
            content[entry + 24 : entry + 28] = (200).to_bytes(4, "little")
    path.write_bytes(content)
    refusal(path)


def test_compressed_tensors_are_refused(saved, path):
    def compress(name, data, info):
        if name == "weights.safetensors":
            info.compress_type = zipfile.ZIP_DEFLATED
        return name, data, info

    assert "without compression" in refusal(copied(saved, path, compress))


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.0, True, 10**400])
def test_an_unknown_version_is_refused(version, saved, path):
    def change(name, data, info):
        if name == MANIFEST:
            data = json.dumps({**json.loads(data), "version": version}).encode()
        return name, data, info

    message = refusal(copied(saved, path, change))
    assert "this graphlocal reads version 1" in message


@pytest.mark.parametrize("member", ["module.json", "weights.safetensors"])
def test_a_wrong_checksum_is_refused(member, saved, path):
    def change(name, data, info):
        if name == member:
            data = data.replace(b"0", b"1", 1) if name.endswith("json") else data[:-1] + bytes([data[-1] ^ 1])
        return name, data, info

    assert f"the checksum of {member} is wrong" in refusal(copied(saved, path, change))


# JSON.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"name": NaN}', "NaN is not a number"),
        (b'{"name": 1e999}', "too large"),
        (b'{"name": "a", "name": "b"}', "a key is given twice"),
        (b"[" * 4000, "nested too deep"),
        (b'{"name": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "expected fields in braces"),
        (b"{}", "the field 'name' is missing"),
    ],
)
def test_json_that_is_none_is_refused(text, message, saved):
    assert message in refusal(rewritten(saved, lambda members: members.update({"module.json": text})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited("module.json", "extra", to=1), "unknown field 'extra'"),
        (edited("module.json", "tensors", 0, "shape", to=[2**47, 2**47]), "fits into no memory"),
        (edited("module.json", "tensors", 0, "shape", to=[10**6, 10**6]), "expected the shape"),
        (edited("module.json", "tensors", 0, "shape", to=[-4, 1, 3, 3]), "expected a number from 0"),
        (edited("module.json", "tensors", 0, "dtype", to="float64"), "expected float64|the model has not so"),
        (edited("module.json", "tensors", 0, "dtype", to="object"), "'object' is unknown"),
        (edited("module.json", "tensors", 0, "strides", to=[10**9, 1, 1, 1]), "leave gaps or overlap"),
        (edited("module.json", "tensors", 0, "name", to="__class__.weight"), "stands for nothing|first name|no module"),
        (edited("module.json", "modules", 1, "path", to="conv.weight.x"), "no new path"),
        (edited("module.json", "modules", 1, "same_as", to=""), "can't stand in"),
        (edited("module.json", "device", to="gpu:x"), "no such device"),
        (edited("module.json", "options", "rule", "options", "beta", to="large"), "is no <class 'float'>"),
        (edited("module.json", "options", "rule", "options", "beta", to=-1), "RecLRA\\(beta=-1\\)"),
        (edited("module.json", "options", "rule", "options", "exec", to=1), "'exec' is unknown"),
        (edited("module.json", "options", "streams", to=10**9), "expected a number from 1 to 1024"),
        (edited("module.json", "call", "structure", to={"registered": "os.system", "context": None, "parts": []}),
         "the model takes or returns a os.system"),
        (edited("graph.json", "graph", "operations", 0, "name", to="x"), "another value"),
        (edited("graph.json", "version", to=99), "version 99"),
        (edited("graph.json", "graph", "connections", 0, "target", to="nowhere"), "nowhere"),
        (edited("graph.json", "graph", "operations", 0, "inputs", to=[]), "tell of different operations"),
        (edited("trace.json", "nodes", 0, "name", to="x=__import__('os').system('id')"), "is not a name"),
        (edited("trace.json", "nodes", 0, "op", to="input"), "unknown field|is not a name|inputs"),
        (edited("trace.json", "nodes", -1, "op", to="state"), "expected one output"),
        (edited("trace.json", "rung", to=3), "expected a string"),
    ],
)  # fmt: skip
def test_fields_that_can_not_be_are_refused(change, message, saved):
    with pytest.raises(InputError, match=message):
        graphlocal.load(rewritten(saved, change))


def call_number(saved, target):
    nodes = json.loads(members_of(saved)["trace.json"])["nodes"]
    return next(i for i, node in enumerate(nodes) if target in str(node.get("target")))


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.from_file.default", "aten.save.default", "aten.set_.source_Storage",
     "prim.Print.default", "aten.__class__.default", "torch.load", "operator.attrgetter", "aten.relu.nothing"],
)  # fmt: skip
def test_only_known_operators_can_be_called(target, saved):
    with pytest.raises(NeedsModel, match="can't be loaded from a file"):
        find(target)
    change = edited("trace.json", "nodes", call_number(saved, "relu"), "target", to=target)
    with pytest.raises(InputError, match="the graph calls"):
        graphlocal.load(rewritten(saved, change))


def test_names_can_not_become_code(saved):
    conv = call_number(saved, "conv2d")
    evil = "x); __import__('os').system('id'); (y"
    with pytest.raises(InputError, match="unknown"):
        graphlocal.load(rewritten(saved, edited("trace.json", "nodes", conv, "kwargs", to={evil: 1})))
    state = next(i for i, n in enumerate(json.loads(members_of(saved)["trace.json"])["nodes"]) if n["op"] == "state")
    quoted = 'a"); __import__("os").system("id"); ("'
    with pytest.raises(InputError, match="can't be the name of a tensor"):
        graphlocal.load(rewritten(saved, edited("trace.json", "nodes", state, "target", to=quoted)))


def test_feedback_maps_of_a_hostile_size_are_never_drawn(saved, monkeypatch):
    monkeypatch.setattr(RecLRA, "initial_feedback", lambda *args: pytest.fail("it was drawn"))
    weight = edited("graph.json", "graph", "connections", -1, "weight", to=[2**40, 2**40])
    with pytest.raises(InputError, match=r"message-shapes|make another graph"):
        graphlocal.load(rewritten(saved, weight))

    def without_maps(members):
        edited("module.json", "error_weights", to=[])(members)
        members["error_weights.safetensors"] = with_header({}, b"")

    with pytest.raises(InputError, match="has no feedback map"):
        graphlocal.load(rewritten(saved, without_maps))


# Tensors.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "shape": [2**60]}}, v), "expected the shape"),
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "dtype": "F64"}}, v), "expected float32"),
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "dtype": "PICKLE"}}, v), "is unknown"),
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "data_offsets": [0, 16]}}, v), "overlap or leave gaps"),
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "data_offsets": [0, 2**62]}}, v), "are not what a tensor"),
        (lambda h, v: ({**h, "conv.bias": {**h["conv.bias"], "data_offsets": [16]}}, v), "expected two numbers"),
        (lambda h, v: ({k: x for k, x in h.items() if k != "conv.bias"}, v), "lacks the tensor 'conv.bias'"),
        (lambda h, v: ({**h, "more": h["conv.bias"]}, v), "that module.json does not know"),
        (lambda h, v: (h, v + b"more"), "its tensors take"),
        (lambda h, v: (h, v[:-4]), "its tensors take"),
    ],
)
def test_safetensors_that_lie_are_refused_before_they_are_read(change, message, saved, monkeypatch):
    monkeypatch.setattr("safetensors.torch.load", lambda *args: pytest.fail("they were read"))

    def rewrite(members):
        members["weights.safetensors"] = with_header(*change(*header(members["weights.safetensors"])))

    monkeypatch.setattr("graphlocal.artefact.read.from_safetensors", only_the_weights)
    assert message in refusal(rewritten(saved, rewrite))


def only_the_weights(data, member, expected):
    """`from_safetensors` of one member; the others are not read."""
    return from_safetensors(data, member, expected) if member == "weights.safetensors" else {}


@pytest.mark.parametrize("content", [b"", b"\x01", (2**63).to_bytes(8, "little") + b"{}", bytes(8)])
def test_safetensors_without_a_header_are_refused(content, saved):
    message = refusal(rewritten(saved, lambda members: members.update({"weights.safetensors": content})))
    assert "weights.safetensors" in message


# Fuzz: it works, or it raises the clear error.


def loads_or_refuses(path):
    with contextlib.suppress(InputError):
        return graphlocal.load(path)
    return None


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_bytes_load_unharmed_or_are_refused(data, saved):
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(("flip", "cut", "set", "insert")))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 200))]
        elif kind == "set":
            content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
        else:
            content[at:at] = data.draw(st.binary(max_size=8))
    path = saved.with_name("fuzzed.local")
    path.write_bytes(content)
    loaded = loads_or_refuses(path)
    if loaded is not None:
        expected = graphlocal.load(saved)
        assert all(map(torch.equal, loaded.state_dict().values(), expected.state_dict().values()))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.sampled_from(("", "x", "output", "aten.relu.default", "float32", "self", "conv.weight")),
    st.lists(st.integers(0, 3), max_size=3), st.just({}), st.just({"node": "x"}), st.just({"tuple": [None]}),
)  # fmt: skip


@settings(max_examples=150)
@given(data=st.data(), member=st.sampled_from(("module.json", "graph.json", "trace.json", "evaluation.json")))
def test_edited_json_loads_or_is_refused(data, member, saved):
    def change(members):
        document = json.loads(members[member])
        place, key = document, None
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = data.draw(st.sampled_from(keys))
            inner = place[key]
            if not (isinstance(inner, (dict, list)) and inner) or data.draw(st.integers(0, 5)) == 0:
                break
            place = inner
        if data.draw(st.booleans()):
            place[key] = data.draw(JUNK)
        else:
            del place[key]
        members[member] = json.dumps(document).encode()

    loaded = loads_or_refuses(rewritten(saved, change))
    if loaded is not None:
        assert isinstance(loaded, graphlocal.LocalModule)


def test_the_file_itself_is_fine(saved):
    assert len(net_steps(graphlocal.load(saved))) == 2
    assert len(saved.read_bytes()) < 40_000
