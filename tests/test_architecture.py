"""docs/architecture.md is true: its table names the packages, in an order in which imports point down."""

import ast
import re

from tests.test_documents import ROOT
from tests.test_structure import PACKAGE, SOURCES, imported

TABLE = re.findall(r"^\| `(\w+)/` \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)


def test_the_table_names_the_packages() -> None:
    assert sorted(TABLE) == sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists())


def test_imports_point_down_the_table() -> None:
    upward = {
        f"{module} imports {name}"
        for module, tree in SOURCES.items()
        for node in ast.walk(tree)
        for name in imported(node, module)
        if module.count(".") > 1 and name.startswith("mpillama.") and name.count(".") > 1
        and TABLE.index(module.split(".")[1]) > TABLE.index(name.split(".")[1])
    }  # fmt: skip
    assert not upward
