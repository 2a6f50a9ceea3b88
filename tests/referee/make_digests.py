"""Compute the referee's cases with the kernels at hand.

`python -m tests.referee.make_digests` writes digests.json, which is done once, with kernels that are known to be right;
with `--add` it computes the cases that are not in that file yet, and adds them;
with `--check` it compares all cases with that file instead, and says which differ (status 1).
MPILLAMA_ISA chooses the instruction set.
"""

import json
import sys
import time
import warnings
from pathlib import Path

from tests.referee import program
from tests.referee.cases import Case, all_cases

FILE = Path(__file__).parent / "digests.json"
THREADS = 2
Digests = dict[str, dict[str, str]]


def stored() -> Digests:
    """What the kernels gave when the file was made."""
    return json.loads(FILE.read_text())  # type: ignore[no-any-return]


def make(cases: list[Case]) -> tuple[Digests, list[str]]:
    """The digests of all cases, and the names of cases that differ from others of the same key."""
    made: Digests = {}
    differ = []
    for case in cases:
        found = case.digests()
        if made.setdefault(case.key, found) != found:
            differ.append(case.name)
    return made, differ


def check(cases: list[Case]) -> list[str]:
    """The names of cases that differ from the file."""
    known = stored()
    return [case.name for case in cases if case.digests() != known[case.key]]


def main(arguments: list[str]) -> int:
    """Write or check."""
    warnings.simplefilter("ignore", RuntimeWarning)  # what is not a number is here on purpose
    isa, began, cases = program.start(THREADS), time.perf_counter(), all_cases()
    if arguments[:1] == ["--check"]:
        differ = check(cases)
    elif arguments[:1] == ["--add"]:
        known = stored()
        cases = [case for case in cases if case.key not in known]
        made, differ = make(cases)
        if not differ:
            FILE.write_text(json.dumps({**known, **made}, indent=0) + "\n")
    else:
        made, differ = make(cases)
        if not differ:
            FILE.write_text(json.dumps(made, indent=0) + "\n")
    print(
        f"{len(cases)} cases with {isa} in {time.perf_counter() - began:.0f} s, {len(differ)} differ", *differ, sep="\n"
    )
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
