"""Who may import whom, and that `import graphlocal` works however the project came onto the machine.

The order of imports keeps the compiler readable from the bottom up: every module stands in a layer of
`LAYERS` and imports its own layer and those below, at the top of the file and inside functions alike.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"graphlocal": "graphlocal", "graphlocal.passes": "passes", "graphlocal.targets": "targets"}

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "version"}),
    frozenset(
        {
            "addresses",
            "alike",
            "arguments",
            "autocast",
            "capture",
            "data",
            "files",
            "goals",
            "guards",
            "ir",
            "live_memory",
            "norms",
            "preserve",
            "source",
        }
    ),
    frozenset({"torchvision_operators", "units"}),
    frozenset({"text", "verify"}),
    frozenset({"cost", "feedback", "fitting", "partial_optimizer", "sample_store", "statistics_lag", "watch"}),
    frozenset({"nn", "unrolled", "normalize", "opaque", "selfcheck"}),
    frozenset({"cache", "record", "trace"}),
    frozenset({"lift", "pipeline", "stored"}),
    frozenset({"rules"}),
    frozenset({"passes"}),
    frozenset({"targets"}),
    frozenset({"execution"}),
    frozenset({"compiler", "finite", "measured", "memory", "step_costs"}),
    frozenset({"local_step"}),
    frozenset({"repeat"}),
    frozenset({"artefact"}),
    frozenset({"runtime"}),
    frozenset({"compile", "load", "overlap"}),
    frozenset({"alignment", "check", "partition", "plan", "recalibrate", "representations", "step"}),
    frozenset({"captured_step", "model_spec", "onnx_training", "sweep", "training"}),
    frozenset({"training_records"}),
    frozenset({"live_view", "meta", "monitor", "observation", "run_log", "snapshots", "tensorboard_view"}),
    frozenset({"graphlocal"}),  # graphlocal/__init__.py, the public names
    frozenset({"report"}),
    frozenset({"cli", "demo"}),
    frozenset({"__main__"}),
)
"""The modules, lowest layer first; a subpackage (`rules`, `passes`, `targets`) is one entry."""

CALLS_BACK = {
    ("graphlocal.ir", "text"): "str(graph) is the text form",
}
"""The few imports inside functions that go upwards all the same, each with its reason."""


def modules() -> dict[str, Path]:
    """Every module of the project by its name as a user imports it: `graphlocal.passes.schedule`."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *inside])] = path
    return found


MODULES = modules()


def entry(module: str) -> str:
    """The name under which a module stands in LAYERS: `graphlocal.passes.schedule` -> `passes`."""
    return module.split(".")[1] if "." in module else module


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if entry(module) in names:
            return number
    pytest.fail(
        f"{module} stands in no layer: add {entry(module)!r} to LAYERS in tests/test_imports.py, "
        "above all that it imports and below all that imports it"
    )


def imports(name: str, path: Path) -> Iterator[tuple[str, int, bool]]:
    """Name, line and whether it stands at the top level, of each import of a module of the project."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    deferred = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = list(imported_from(node, package))
        else:
            continue
        for target in targets:
            if target.split(".")[0] in ("graphlocal", "passes", "targets"):
                yield target, node.lineno, id(node) not in deferred


def imported_from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """`from graphlocal import ir, data` -> `graphlocal.ir`, `graphlocal.data`, where these are modules."""
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    for alias in node.names:
        inside = f"{base}.{alias.name}"
        yield inside if inside in MODULES else base


IMPORTS = [
    (name, target, f"{path.relative_to(ROOT)}:{line}", eager)
    for name, path in MODULES.items()
    for target, line, eager in imports(name, path)
]


@pytest.mark.parametrize("module", MODULES)
def test_order_every_module_has_one_layer(module: str) -> None:
    layer(module)
    assert sum(entry(module) in names for names in LAYERS) == 1


def test_order_nothing_imports_upwards() -> None:
    wrong = [
        f"{where}: {name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
        for name, target, where, eager in IMPORTS
        if layer(target) > layer(name) and (eager or (name, entry(target)) not in CALLS_BACK)
    ]
    assert not wrong, "imports go upwards; move what is needed down, or pass it in:\n" + "\n".join(wrong)


def test_order_has_no_needless_exception() -> None:
    upwards = {(name, entry(target)) for name, target, _, eager in IMPORTS if not eager}
    assert set(CALLS_BACK) <= upwards


def test_order_is_free_of_cycles() -> None:
    graph = nx.DiGraph((name, target) for name, target, _, _ in IMPORTS if (name, entry(target)) not in CALLS_BACK)
    cycles = [" -> ".join([*cycle, cycle[0]]) for cycle in nx.simple_cycles(graph)]
    assert not cycles


def test_order_knows_the_folders_by_their_package_names_only() -> None:
    bare = [f"{where}: {target}" for _, target, where, _ in IMPORTS if target.split(".")[0] in ("passes", "targets")]
    assert not bare, "import graphlocal.passes and graphlocal.targets:\n" + "\n".join(bare)


def test_order_finds_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import graphlocal.errors, os\n"
        "from graphlocal import data, no_module\n"
        "from . import strange\n"
        "from ..text import render\n"
        "import passes.partition\n"
        "if True:\n    from graphlocal.compile import compile\n"
        "def late():\n    import graphlocal.verify\n"
    )
    assert [(target, line, eager) for target, line, eager in imports("graphlocal.passes.x", path)] == [
        ("graphlocal.errors", 1, True),
        ("graphlocal.data", 2, True),
        ("graphlocal", 2, True),
        ("graphlocal.passes", 3, True),
        ("graphlocal.text", 4, True),
        ("passes.partition", 5, True),
        ("graphlocal.compile", 7, True),
        ("graphlocal.verify", 9, False),
    ]


# From here on: the project really imported, in fresh interpreters.

IMPORT_ALL = f"""
import importlib, importlib.util
for name in {sorted(name for name in MODULES if not name.endswith("__main__"))}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed
        if error.name.startswith("graphlocal"):
            raise
import graphlocal, graphlocal.passes, graphlocal.targets
print(graphlocal.__file__, graphlocal.passes.__file__, graphlocal.targets.__file__, sep="\\n")
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints, without what this process's environment says about the project."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def folders(printed: str) -> list[Path]:
    return [Path(line).resolve().parent for line in printed.splitlines()[-3:]]


IN_CHECKOUT = [ROOT / folder for folder in FOLDERS.values()]


def test_checkout_imports_without_an_install() -> None:
    assert folders(python("-c", IMPORT_ALL, cwd=ROOT)) == IN_CHECKOUT


def test_checkout_imports_from_another_folder(tmp_path: Path) -> None:
    assert folders(python("-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=str(ROOT))) == IN_CHECKOUT


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the project is built from, so that no build leaves anything in the checkout."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    copy.mkdir()
    for name in (*FOLDERS.values(), "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def install(*what: str, into: Path) -> None:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    python("-m", "pip", "install", *options, "--target", str(into), *what, cwd=into.parent)


def import_installed(site_packages: Path) -> list[Path]:
    """Import everything with `site_packages` as the only place where graphlocal is installed.

    `-S` leaves out this environment's own site-packages, whose .pth files may name the checkout; it is added
    again as a plain folder, in which .pth files say nothing, for the sake of torch.
    """
    libraries = sysconfig.get_path("purelib")
    start = f"import site, sys; site.addsitedir({str(site_packages)!r}); sys.path.append({libraries!r})\n"
    absent = "assert not any(map(importlib.util.find_spec, ('passes', 'targets', 'tests')))\n"
    return folders(python("-S", "-c", start + IMPORT_ALL + absent, cwd=site_packages.parent))


def top_level(site_packages: Path) -> set[str]:
    return {path.name for path in site_packages.iterdir() if path.suffix != ".dist-info"} - {
        "bin",
        "__pycache__",
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "sdist to wheel"])
def test_install_holds_every_module_under_graphlocal_alone(form: str, checkout: Path, tmp_path: Path) -> None:
    site_packages = tmp_path / "site"
    source = checkout
    if form == "sdist to wheel":
        build = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
        source = tmp_path / python("-c", build, cwd=checkout).splitlines()[-1]
    install(str(source), into=site_packages)
    assert top_level(site_packages) == {"graphlocal"}
    expected = [site_packages / "graphlocal" / part for part in ("", "passes", "targets")]
    assert import_installed(site_packages) == expected
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert site_packages.joinpath(*package.split("."), path.relative_to(ROOT / folder)).is_file()


@pytest.mark.slow
def test_editable_install_follows_the_checkout(checkout: Path, tmp_path: Path) -> None:
    site_packages = tmp_path / "site"
    install("--editable", str(checkout), into=site_packages)
    assert all(name.startswith("__editable__") for name in top_level(site_packages))
    assert import_installed(site_packages) == [checkout / folder for folder in FOLDERS.values()]
