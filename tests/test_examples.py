"""Every example runs, alone and on two ranks."""

import json
from pathlib import Path

import pytest

from tests.system.mpi.launch import DEMO_MODEL, ROOT, mpirun, run

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted({p.name for p in EXAMPLES.glob("*.py")} - {"chat_client.py"})
HERE = {"PYTHONPATH": str(ROOT)}
ALONE_AND_TWO = pytest.mark.parametrize("ranks", [None, 2], ids=["alone", "mpirun -n 2"])


@ALONE_AND_TWO
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_the_same_on_any_number_of_ranks(script: str, ranks: int | None) -> None:
    done = run(ranks, EXAMPLES / script, env=HERE)
    assert done.status == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout == run(3, EXAMPLES / script, env=HERE).stdout


@ALONE_AND_TWO
def test_the_client_streams_an_answer(ranks: int | None, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the example needs OpenAI's client")
    from tests.server.conftest import serving  # which needs it, too

    with serving(DEMO_MODEL, tmp_path, ranks) as server:
        done = run(None, EXAMPLES / "chat_client.py", server.rendezvous, "Tell me a story about a llama.")
    assert done.status == 0, done.stderr
    assert "llama" in done.stdout


@ALONE_AND_TWO
def test_the_notebook_runs_from_top_to_bottom(ranks: int | None, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the example needs OpenAI's client")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "clear the outputs"
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells))
    launch = "" if ranks is None else f"{mpirun()} -n {ranks}"
    done = run(None, script, env={"LAUNCH": launch, "MODEL": str(DEMO_MODEL), **HERE}, directory=tmp_path)
    assert done.status == 0, done.stderr
    assert "Once upon a time" in done.stdout
