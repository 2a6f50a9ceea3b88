"""What the documents name is there."""

import re
from pathlib import Path

import pytest

from mpillama.formats.dllama.model import STORED
from mpillama.quant.registry import WEIGHT_TYPES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("jobs/*.md"),
        *ROOT.glob(".github/*.md"),
    ]
)
FOLDERS = "|".join(("mpillama", "docs", "tests", "jobs", "examples", "benchmarks", "data", r"\.github"))
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
PACKAGES = "|".join(sorted(path.parent.name for path in ROOT.glob("mpillama/*/__init__.py")))
IN_PACKAGE = re.compile(rf"`((?:{PACKAGES})/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_links_exist(document: Path) -> None:
    text = document.read_text()
    named = [ROOT / name for name in NAMED.findall(text) if not re.search("[A-Z]{4}", Path(name).stem)]
    named += [
        ROOT / "mpillama" / name for name in IN_PACKAGE.findall(text) if not re.search("[A-Z]{4}", Path(name).stem)
    ]
    linked = [document.parent / link for link in LINK.findall(text)]
    missing = [path for path in (*named, *linked) if not path.exists() and not path.with_suffix(".py").exists()]
    assert not missing


# -- weight types -----------------------------------------------------------------------------------------------------


def weights_table() -> dict[str, tuple[float, str]]:
    """README's table: name -> bits of a weight, and where it is found."""
    lines = iter((ROOT / "README.md").read_text().splitlines())
    rows = [line for line in lines if line.startswith("| weights | bits each | found in |")]
    assert len(rows) == 1
    text = (ROOT / "README.md").read_text().partition(rows[0])[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.strip().splitlines()[1:]]
    found: dict[str, tuple[float, str]] = {}
    for names, bits, places in cells:
        of_each = [float(each) for each in bits.split(", ")]
        for i, name in enumerate(names.split(", ")):
            assert name not in found
            found[name] = (of_each[min(i, len(of_each) - 1)], places)
    return found


def test_readme_names_every_weight_type_and_no_other() -> None:
    assert set(weights_table()) == set(WEIGHT_TYPES)


@pytest.mark.parametrize("name", list(WEIGHT_TYPES))
def test_readme_says_what_a_weight_type_takes_and_where_it_is_found(name: str) -> None:
    """The bits in memory; and each kind of file that has rows of it, or arrays that become it."""
    kind, (bits, places) = WEIGHT_TYPES[name], weights_table()[name]
    assert bits == pytest.approx(kind.group_bytes(1 << 14) * 8 / 16 / (1 << 14), abs=0.006)
    assert "native files" in places
    assert ("GGUF" in places) == (kind.ggml is not None)
    assert ("`.m`" in places) == (name in STORED.values())
    if kind.safetensors is not None or kind.ggml is None:
        assert "safetensors" in places
