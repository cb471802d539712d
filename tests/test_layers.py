"""Checks by reading the source which module may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "switchkd"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

LAYERS = [
    "types",
    "algo",
    "config",
    "engines",
    "data",
    "learner",
    "rollout",
    "controller",
    "actors",
    "train",
    "tools",
    "cli",
]
"""Each entry may import itself and the entries before it."""
HEAVY = {
    "ray": ("actors/", "tools/bench/ray_cluster.py"),
    "deepspeed": ("learner/deepspeed.py",),
    "triton": ("algo/kernels/draw.py", "algo/kernels/divergence.py"),
    "vllm": ("engines/vllm/engine.py", "engines/vllm/teacher.py", "engines/vllm/worker.py"),
}
"""The only places that import these packages. DeepSpeed and vLLM cannot share a process."""
LIGHT_FILES = [
    "__init__.py",
    "cli.py",
    "types.py",
    "config/__init__.py",
    "config/schema.py",
    "config/resources.py",
    "config/kinds.py",
    "config/explain.py",
    "config/contradictions.py",
    "config/words.py",
    "config/yaml_file.py",
    "config/loader.py",
    "config/secret_keys.py",
    "config/errors.py",
    "config/renamed.py",
    "tools/__init__.py",
    "tools/bench/__init__.py",
    "tools/bench/cli.py",
    "tools/error_log.py",
]
"""Files behind the answer to a typo; they import no heavy package at load."""
LIGHT_PACKAGES = {"yaml", "pydantic", "typer", "numpy"}


def imports(file: str, *, at_load: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `at_load` only outside functions and TYPE_CHECKING blocks."""
    yield from _imports(ast.parse((ROOT / file).read_text()), at_load)


def _imports(node: ast.AST, at_load: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not (at_load and _runs_later(child)):
            yield from _imports(child, at_load)


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def module_of(name: str) -> str | None:
    """The file of a dotted name of this package, which may name a module or an object in one."""
    parts = name.split(".")[1:]
    for path in (parts, parts[:-1]):
        for file in (f"{'/'.join(path)}.py", f"{'/'.join(path)}/__init__.py"):
            if path and file in FILES:
                return file
    return None


def graph() -> dict[str, set[str]]:
    """Each file with the files of this package that it imports, now or later."""
    names = {file: [name for name in imports(file) if name.startswith("switchkd.")] for file in FILES}
    return {file: {module for name in names[file] if (module := module_of(name))} - {file} for file in FILES}


def layer(file: str) -> int:
    return LAYERS.index(file.removesuffix(".py").split("/")[0])


def wrong_imports(edges: dict[str, set[str]]) -> list[str]:
    inner = {file: targets for file, targets in edges.items() if file != "__init__.py"}
    return [f"{a} imports {b}" for a, targets in inner.items() for b in sorted(targets) if layer(b) > layer(a)]


def import_circle(edges: dict[str, Iterable[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_file_has_a_layer():
    tops = {file.removesuffix(".py").split("/")[0] for file in FILES} - {"__init__"}
    assert tops == set(LAYERS)


def test_no_layer_imports_a_later_one():
    assert wrong_imports(graph()) == []


def test_there_are_no_import_circles():
    """Files do not import each other in circles, also within a folder and inside functions."""
    assert import_circle(graph()) == []


def test_a_reversed_import_is_found():
    """Any reversed import fails one of the two tests above."""
    edges = graph()
    pairs = [(a, b) for a, targets in edges.items() for b in targets if a != "__init__.py"]
    assert len(pairs) > 400
    for a, b in pairs:
        turned = edges | {b: edges[b] | {a}}
        assert wrong_imports(turned) or import_circle(turned), f"{b} -> {a}"


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_in_their_place_only(package):
    users = [file for file in FILES if package in {name.split(".")[0] for name in imports(file)}]
    assert users and not [file for file in users if not file.startswith(HEAVY[package])]


def test_algo_imports_no_other_package():
    """algo/ imports torch, NumPy, the standard library and itself; its kernels also Triton, when they are chosen."""
    allowed = {"torch", "numpy", "triton", *sys.stdlib_module_names}
    kernels = {"algo/kernels/draw.py", "algo/kernels/divergence.py"}
    assert not [file for file, targets in graph().items() if targets & kernels]
    for file in (file for file in FILES if file.startswith("algo/")):
        names = [name for name in imports(file) if name.split(".")[0] not in allowed]
        assert not [name for name in names if not name.startswith("switchkd.algo")], file


@pytest.mark.parametrize("file", LIGHT_FILES)
def test_light_files_import_no_heavy_package(file):
    for name in imports(file, at_load=True):
        if name.startswith("switchkd."):
            assert (module_of(name) or "__init__.py") in LIGHT_FILES, name
        else:
            assert name.split(".")[0] in LIGHT_PACKAGES | sys.stdlib_module_names, name
