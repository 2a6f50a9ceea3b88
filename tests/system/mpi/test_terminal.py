"""Tables where no terminal is: full width, no frames, no colours, whatever the launcher and the environment say."""

import json
import re
from pathlib import Path

import pytest

from tests.system.mpi.launch import PROGRAM, ROOT, TIMEOUT, python, run
from tests.system.mpi.terminal import on_terminal

pytestmark = pytest.mark.timeout(TIMEOUT + 60)

FRAME = re.compile("[\u2500-\u257f]")
COLOURS = {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "40"}
PLAN = ("plan", "--shape", "llama-3.1-405b", "--nodes", "1000", "--ranks-per-node", "8")
TABLES = {
    "plan": (None, PLAN, "rank embedding, head KV cache buffers Python total reads"),
    "doctor": (2, ("doctor",), "rank host cores it may use threads instructions of those that work here"),
    "bench": (None, ("bench", "--decode", "1", "--repetitions", "1"), "batch context tok/s bytes per token all-reduce"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_file_holds_plain_lines(name: str, toy: Path) -> None:
    ranks, command, words = TABLES[name]
    model = ("--model", str(toy), "--prefill", "8", "--context", "8") if name == "bench" else ()
    result = run(ranks, *PROGRAM, *command, *model, env=COLOURS)
    assert not FRAME.search(result.stdout)
    assert "\x1b" not in result.stdout
    assert "…" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())
    assert any(all(word in line for word in words.split()) for line in result.stdout.splitlines())


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_terminal_has_frames(ranks: int | None) -> None:
    advice = json.loads(run(ranks, *PROGRAM, "doctor", "--json").stdout)["advice"]  # hosts differ
    with on_terminal(ranks, *PROGRAM, "doctor") as terminal:
        terminal.expect("┏━")
        terminal.expect("└─")
        terminal.expect(" ".join(advice[0].split()[:3]) if advice else "All is well.")


def test_a_terminal_that_the_launcher_made_is_none(tmp_path: Path) -> None:
    """As under Open MPI, which gives each rank a terminal for its output, whatever its own output is."""
    launcher = tmp_path / "prterun"
    launcher.write_text(
        "#!/usr/bin/env python3\n"
        "import os, pty, sys\n"
        "os.environ['PMIX_RANK'] = os.environ['OMPI_COMM_WORLD_RANK'] = '0'\n"
        "open('/proc/self/comm', 'w').write('prterun')\n"
        "pty.spawn(sys.argv[1:])\n"
    )
    result = run(None, launcher, *python(None, *PROGRAM, *PLAN))
    assert "rank" in result.stdout
    assert not FRAME.search(result.stdout)


def test_a_pipe_within_a_rank_is_no_terminal() -> None:
    """`mpirun … sh -c "mpillama doctor | cat"` on a terminal."""
    command = " ".join(python(None, *PROGRAM, *PLAN))
    script = f"import subprocess; subprocess.run({command!r} + ' | cat; echo end', shell=True, cwd={str(ROOT)!r})"
    with on_terminal(1, "-c", script) as terminal:
        assert not FRAME.search(terminal.expect("end"))


def test_a_plan_for_thousands_of_ranks_comes_at_once() -> None:
    """Most ranks are alike; remedies plan again and again."""
    result = run(None, *PROGRAM, *PLAN, "--memory-per-node", "0.2GB")
    assert result.status == 1
    assert "does not fit" in result.stdout


NAMES = ("rank", "embedding, head", "KV cache", "per all-reduce")
CELLS = ("1 (most)", "197.0 MB", "264.2 MB", "1205.3 µs")
TENSOR = ("model.layers.10.post_attention_layernorm.weight", "8192", "q4_0", "1,024")


@pytest.mark.parametrize(
    ("columns", "cells", "line"),
    [
        (60, CELLS, "┃ rank     ┃ embedding, head ┃ KV cache ┃ per all-reduce ┃"),
        (50, CELLS, r"│ 1 \(most\) │ 197.0 MB *│ 264.2 MB │ 1205.3 µs *│"),
        (45, CELLS, r"1 \(most\)  197.0 MB +264.2 MB  1205.3 µs *"),
        (40, CELLS, r"1 \(most\) 197.0 MB +264.2 MB 1205.3 µs *"),
        (30, CELLS, "  197.0 MB +264.2 MB +1205.3 µs"),
        (50, TENSOR, "model.layers.10.post_attention_layernorm.weight"),
    ],
)
def test_a_table_fits_a_narrow_terminal(columns: int, cells: tuple[str, ...], line: str) -> None:
    """Headers are broken between words, then there is no frame, then two lines for each row; no value is cut."""
    script = (
        "import fcntl, struct, sys, termios\n"
        f"fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, {columns}, 0, 0))\n"
        "from mpillama.cli.display import print_table\n"
        f"print_table({NAMES!r}, [{cells!r}])\n"
        "print('end')\n"
    )
    with on_terminal(None, "-c", script) as terminal:
        shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.expect("end")).replace("\r", "")
    assert any(re.fullmatch(line, one) for one in shown.splitlines()), shown
    assert columns == 30 or all(len(one) <= columns for one in shown.splitlines()), shown
