"""The kernels give the bits that are stored in digests.json, which was made with kernels known to be right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.referee import program
from tests.referee.cases import Case, all_cases
from tests.referee.make_digests import stored

CASES = all_cases()
ROOT = Path(__file__).parents[2]
TIMEOUT = 1800


def test_every_case_has_a_digest_and_a_name_of_its_own():
    assert {case.key for case in CASES} == set(stored())
    assert len({case.name for case in CASES}) == len(CASES)


def test_digests_tell_models_apart():
    """Else they would prove little; where nothing is left but what is no number, some are alike."""
    found = [digests["hidden"] for digests in stored().values()]
    assert len(set(found)) > 0.9 * len(found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits(target: object, case: Case):
    assert case.digests() == stored()[case.key]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize(("name", "lacking"), program.instruction_sets().items())
def test_same_bits_of_another_instruction_set(target: object, name: str, lacking: str):
    """A process has one instruction set, so this is another process."""
    if name == program.in_use(target):
        pytest.skip("the other tests run with this one")
    if lacking:
        pytest.skip(lacking)
    done = subprocess.run(
        [sys.executable, "-m", "tests.referee.make_digests", "--check"],
        cwd=ROOT,
        env={**os.environ, "MPILLAMA_ISA": name},
        capture_output=True,
        text=True,
        timeout=TIMEOUT - 20,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
