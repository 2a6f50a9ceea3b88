"""Rules of the package's structure, checked in its source: imports, cycles, parameters."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import mpillama

PACKAGE = Path(mpillama.__file__).parent
SOURCES = {
    ".".join(("mpillama", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(PACKAGE.rglob("*.py"))
}
OPTIONAL = {"gguf", "llguidance", "matplotlib", "safetensors"}
"""Packages of `pip install mpillama[…]`, asked for where they are needed."""
LATE = {"h5py", "rich"}
"""Imported where they are needed too: HDF5 by rank 0 alone, rich where a person watches; all ranks start sooner so."""
ENTRANCES = {"mpillama", "mpillama.__main__"}
"""Modules that import others by their names, so that `--help` is there at once, and at the top for their types only."""
MOST_PARAMETERS = 8
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def imported(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that an import names; `from package import module` is the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import"
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            yield name if name in SOURCES else str(node.module)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


for entrance in ENTRANCES:
    SOURCES[entrance].body = [node for node in SOURCES[entrance].body if not is_for_types_only(node)]


def hidden_imports(module: str) -> Iterator[str]:
    """What is imported elsewhere than at the top of the module."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, FUNCTIONS) or is_for_types_only(node):
            yield from (name for inner in ast.walk(node) for name in imported(inner, module))


def test_imports_are_at_the_top() -> None:
    allowed = OPTIONAL | LATE
    found = {module: {name.split(".")[0] for name in hidden_imports(module)} - allowed for module in SOURCES}
    assert not {module: names for module, names in found.items() if names}


def test_imports_by_name_are_left_to_entrances_and_registries() -> None:
    users = {
        module
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and "import_module" in ast.unparse(node)
    }
    registries = {module for module, tree in SOURCES.items() if "iter_modules(" in ast.unparse(tree)}
    assert users <= ENTRANCES | registries


def test_functions_have_few_parameters() -> None:
    functions = {
        f"{module}:{node.lineno}": [
            argument.arg
            for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            if argument.arg not in ("self", "cls")
        ]
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS)
    }
    assert not {place: names for place, names in functions.items() if len(names) > MOST_PARAMETERS}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        module: {name for node in ast.walk(tree) for name in imported(node, module) if name in SOURCES}
        for module, tree in SOURCES.items()
    }
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, {module: sorted(needs & graph.keys()) for module, needs in graph.items()}


def test_commands_for_a_login_node_start_no_mpi() -> None:
    modules = ", ".join(f"mpillama.cli.{command}" for command in ("client", "inspect", "plan", "tokenize"))
    script = f"import sys, {modules}; print('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"False\n"


BESIDE = [path for folder in ("benchmarks", "data", "examples") for path in (PACKAGE.parent / folder).rglob("*.py")]


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: path.name)
def test_scripts_beside_the_package_import_what_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "mpillama":
            module = import_module(str(node.module))
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module
