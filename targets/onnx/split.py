"""The partitioned model as one ONNX file a subgraph, for placing parts on different devices.

    parts/
      manifest.json     order, what each part reads and gives, where it may run, checksums
      01_stem.onnx      states as initializers; a state that several subgraphs read lies in each of their files
      ...

The manifest's fields: `inputs` and `outputs` (of the model), `parts` (in an order in which they run; each with
`file`, `sha256`, `subgraph`, `number`, `reads`, `gives`, `states`, `bytes`, `flops`, `device`), `values` (dtype and
shape of all that passes between parts), `rule` and `graph` (the LocalGraph as text).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper
from torch import nn

from graphlocal.errors import InputError
from graphlocal.ir import LocalGraph
from graphlocal.targets.evaluation import evaluation
from graphlocal.targets.onnx.comparison import check as check_file
from graphlocal.targets.onnx.comparison import compare, session
from graphlocal.targets.onnx.convert import convert
from graphlocal.targets.onnx.cut import Cut, Piece
from graphlocal.targets.onnx.cut import cut as cut_into_pieces
from graphlocal.targets.onnx.files import put_folder, save, workplace
from graphlocal.targets.onnx.functions import description, set_metadata, subgraph_metadata
from graphlocal.targets.onnx.model import IR_VERSION, Exported, value_info, with_states
from graphlocal.text import to_text
from graphlocal.trace import TracedModel

MANIFEST, FORMAT, VERSION = "manifest.json", "graphlocal-split", 1


def export_split(
    graph: LocalGraph, traced: TracedModel, model: nn.Module, path: Path, devices: int = 2,
    opset: int | None = None, external_data: bool | None = None, check: bool = True,
) -> Exported:  # fmt: skip
    """Write the model as it evaluates into a folder, one ONNX file a subgraph.

    devices: on how many devices the parts are to run; each part's `device` is a suggestion that gives them equal
    work, in order. The other options are those of `export_model`. A folder that was exported before is replaced.
    Raises InputError as `graphlocal.targets.onnx.export` says.
    """
    if devices < 1:
        raise InputError(f"devices is {devices}", remedy="pass the number of devices, 1 or more")
    _require_replaceable(path)
    evaluated = evaluation(traced, graph, model)
    converted = convert(evaluated, graph, opset)
    pieces = cut_into_pieces(converted, graph)
    with workplace(path) as place:
        parts = []
        for number, (piece, device) in enumerate(
            zip(pieces.pieces, _placement(pieces, graph, devices), strict=True), 1
        ):
            file = f"{number:0{len(str(len(pieces.pieces)))}d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', piece.name)}.onnx"
            made = with_states(_part(piece, pieces, graph), converted, (piece,))
            files = save(made, place, file, external_data)
            if check:
                check_file(place / file)
            parts.append(_entry(piece, graph, place, files, device))
        manifest = _manifest(pieces, graph, evaluated.inputs, parts, devices)
        (place / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        difference = compare(evaluated, lambda: _in_order(chain(place))) if check else None
        put_folder(place, path)
    names = tuple(piece.name for piece in pieces.pieces if piece.subgraph is not None)
    files = [file for part in parts for file in part["files"]]
    return Exported(path, (MANIFEST, *files), names, pieces.unused, difference)


def chain(folder: str | Path) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Run an exported folder in ONNX Runtime on the CPU, part by part: arrays by name in, arrays by name out.

    Raises InputError if the folder is not one, or a file in it was changed.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    sessions = [(part, session(place / part["file"])) for part in manifest["parts"]]

    def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(inputs)
        for part, running in sessions:
            found = running.run(part["gives"], {name: values[name] for name in part["reads"]})
            values.update(zip(part["gives"], found, strict=True))
        return {name: values[name] for name in manifest["outputs"]}

    return run


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, its files checked against their checksums. Raises InputError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise InputError(f"{folder} is a split of version {manifest['version']!r}; this reads version {VERSION}")
        for part in manifest["parts"]:
            for file, checksum in part["sha256"].items():
                if Path(file).name != file or _checksum(folder / file) != checksum:
                    raise InputError(f"{folder / file} is not the file that was exported", remedy="export it anew")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} holds no split model", why=f"{type(error).__name__}: {error}") from error
    return dict(manifest)


def _in_order(run: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    return lambda inputs: list(run(inputs).values())


def _part(piece: Piece, cut: Cut, graph: LocalGraph) -> onnx.ModelProto:
    """A piece as a model, without its states."""
    domains = sorted({node.domain for node in piece.nodes} - {""})
    main = helper.make_graph(
        list(piece.nodes), piece.name, [value_info(cut, name) for name in piece.inputs],
        [value_info(cut, name) for name in piece.outputs], value_info=list(piece.infos),
    )  # fmt: skip
    imports = [helper.make_opsetid("", cut.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(main, opset_imports=imports, ir_version=IR_VERSION, producer_name="graphlocal")
    if piece.subgraph is not None:
        model.doc_string = description(graph, piece.subgraph)
        set_metadata(model, subgraph_metadata(graph, piece.subgraph))
    return model


def _placement(cut: Cut, graph: LocalGraph, devices: int) -> list[int]:
    """A device for each piece, in order, with about equal work on each; work is floating-point operations."""
    work = [_flops(piece, graph) for piece in cut.pieces]
    total, done, found = sum(work), 0, []
    for amount in work:
        found.append(min(devices - 1, int((done + amount / 2) * devices / total)) if total else 0)
        done += amount
    return found


def _flops(piece: Piece, graph: LocalGraph) -> int:
    return sum(graph.operation[name].flops for name in piece.subgraph.operations) if piece.subgraph else 0


def _entry(piece: Piece, graph: LocalGraph, place: Path, files: list[str], device: int) -> dict[str, Any]:
    return {
        "file": files[0],
        "files": files,
        "sha256": {file: _checksum(place / file) for file in files},
        "bytes": sum((place / file).stat().st_size for file in files),
        "subgraph": piece.subgraph.name if piece.subgraph else None,
        "number": graph.number[piece.subgraph.name] if piece.subgraph else None,
        "role": "subgraph" if piece.subgraph else piece.name,
        "reads": piece.inputs,
        "gives": piece.outputs,
        "states": piece.states,
        "flops": _flops(piece, graph),
        "device": device,
    }


def _manifest(cut: Cut, graph: LocalGraph, inputs: tuple[str, ...], parts: list[Any], devices: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": graph.name,
        "rule": graph.rule,
        "inputs": inputs,
        "outputs": cut.outputs,
        "values": {name: _described(type) for name, type in cut.types.items()},
        "parts": parts,
        "devices": devices,
        "unused_in_evaluation": cut.unused,
        "graph": to_text(graph),
    }


def _described(type: onnx.TypeProto) -> dict[str, Any]:
    dims = [dim.dim_param or dim.dim_value for dim in type.tensor_type.shape.dim]
    return {"dtype": helper.tensor_dtype_to_np_dtype(type.tensor_type.elem_type).name, "shape": dims}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _require_replaceable(path: Path) -> None:
    """Raises InputError if `path` is something that an export must not replace."""
    if path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST).is_file()):
        return
    if path.exists():
        raise InputError(f"{path} exists and is not an exported folder", remedy="give the export a new folder")
