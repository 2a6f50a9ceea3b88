"""The kernels' tests once more for each instruction set that is not this processor's best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpillama.errors import UserError
from mpillama.kernels.isa import AMX_GRANTED, NAMES, OTHER_SETS, X86_SETS, choose_isa, host_features

EVERYTHING = dict.fromkeys((feature for isa in X86_SETS for feature in isa.needs), True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_of_another_instruction_set(target, name):
    """A process has one instruction set, so this is another process; compiling takes most of the first run."""
    if name == target.isa.name:
        pytest.skip("the other tests run with this one")
    try:
        choose_isa(name, host_features())
    except UserError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_kernels.py"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "MPILLAMA_ISA": name},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def without(*features: str) -> dict[str, bool]:
    return {**EVERYTHING, **dict.fromkeys(features, False)}


@pytest.mark.parametrize(
    ("features", "best"),
    [
        (EVERYTHING, "amx"),
        (without("amx-tile"), "vnni512"),
        (without(AMX_GRANTED), "vnni512"),
        (without("avx512vnni"), "avx2"),
        (without("avx512bw"), "avx2"),
        (without("avx512vnni", "f16c"), "portable"),
        (without("avx512vnni", "fma"), "portable"),
        ({}, "portable"),
    ],
)
def test_the_best_set_needs_all_its_features(monkeypatch, features, best):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert choose_isa("", features).name == best


def test_a_set_that_the_processor_lacks_is_refused_with_those_it_has(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=vnni512 .*avx2, portable"):
        choose_isa("vnni512", without("avx512vnni"))
    with pytest.raises(UserError, match=r"MPILLAMA_ISA=sse9 .*vnni512, avx2, portable"):
        choose_isa("sse9", EVERYTHING)


def test_a_weaker_set_may_be_asked_for(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert [choose_isa(name, EVERYTHING).name for name in NAMES] == list(NAMES)


def test_other_processors_have_the_portable_set(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert choose_isa("", {}) == OTHER_SETS[0]
    with pytest.raises(UserError, match="MPILLAMA_ISA=avx2"):
        choose_isa("avx2", EVERYTHING)
