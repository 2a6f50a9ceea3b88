"""Where the threads of a rank run: as the launcher and OpenMP's variables say."""

import os
import re
from collections.abc import Mapping

PLACE = re.compile(r"\{(\d+)[^}]*\}(?::(\d+))?(?::(\d+))?")
"""A place by its first processor, how many of its kind follow, and how far apart."""
ANYWHERE = -1


def thread_places(threads: int, environment: Mapping[str, str] = os.environ) -> list[int]:
    """The processor of each thread, ANYWHERE where the system may choose among those that this rank may use.

    Threads are bound by an explicit OMP_PLACES ("{0},{2}", "{0}:4:2"), or to the rank's own processors one by one if
    OMP_PLACES names threads or cores or OMP_PROC_BIND is true, close or spread. Thread 0 is the program's own.
    """
    allowed = sorted(os.sched_getaffinity(0))
    places = environment.get("OMP_PLACES", "").strip().lower()
    binds = environment.get("OMP_PROC_BIND", "").strip().lower().split(",")[0]
    if binds == "false" or not (places or binds):
        return [ANYWHERE] * threads
    listed = [cpu for cpu in _listed(places) if cpu in allowed] or allowed
    return [ANYWHERE, *(listed[i] for i in range(1, threads))] if len(listed) >= threads else [ANYWHERE] * threads


def _listed(places: str) -> list[int]:
    """The first processor of each explicit place."""
    found = []
    for first, count, stride in PLACE.findall(places):
        found += [int(first) + i * int(stride or 1) for i in range(int(count or 1))]
    return found
