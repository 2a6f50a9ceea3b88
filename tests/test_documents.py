"""What the documents name is there."""

import re
from pathlib import Path

import pytest

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
