"""What the launcher (mpirun, srun) says of this process, known before MPI is started."""

import os
import re
from collections.abc import Mapping, MutableMapping

from mpillama.comm.ways import OVERLAP, RANKS_PER_HOST, virtual_host
from mpillama.errors import UserError

RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "SLURM_PROCID")
SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
SLURM_STEP_SIZE = "SLURM_STEP_NUM_TASKS"
HOST_RANK_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
OPEN_MPI = "OMPI_COMM_WORLD_SIZE"
HOST_SIZE_VARIABLES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM_STEP_HOSTS = "SLURM_STEP_NUM_NODES"
SLURM_STEP_HOST_SIZES = "SLURM_STEP_TASKS_PER_NODE"
"""Of the step's hosts in their order; SLURM_TASKS_PER_NODE may be the job's."""
SLURM_HOST = "SLURM_NODEID"
"""Which of them this one is, from 0."""
THREAD_LEVEL = "MPI4PY_RC_THREAD_LEVEL"
"""By which mpi4py asks MPI for MPI_THREAD_MULTIPLE or less."""
DEFAULT_TIMEOUT = 600.0
"""Seconds that a rank waits for another one."""


def launched_rank(environment: Mapping[str, str] | None = None) -> int:
    """This process's rank according to the launcher's environment, 0 without a launcher."""
    environment = os.environ if environment is None else environment
    for name in RANK_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def launched_size(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """The variable that tells how many processes were launched together, and its value; ("", 1) without a launcher.

    A launcher's own count comes first: inside a Slurm batch script `mpirun -n 1` is one process, whatever the job has.
    """
    environment = os.environ if environment is None else environment
    for name in (*SIZE_VARIABLES, SLURM_STEP_SIZE):
        if environment.get(name, "").isdigit():
            return name, int(environment[name])
    return "", 1


def launched_here(environment: Mapping[str, str] | None = None) -> int:
    """How many processes were launched together on this host, 1 if the launcher does not say."""
    environment = os.environ if environment is None else environment
    found = [environment[name] for name in HOST_SIZE_VARIABLES if environment.get(name, "").isdigit()]
    if found:
        return int(found[0])
    return slurm_tasks_of(environment.get(SLURM_STEP_HOST_SIZES, ""), environment.get(SLURM_HOST, "")) or 1


def slurm_tasks_of(sizes: str, host: str) -> int:
    """How many tasks a host has, by its number and Slurm's list of all hosts ("2(x3),1"); 0 if they do not say."""
    if not host.isdigit() or not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", sizes):
        return 0
    left = int(host)
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", sizes):
        left -= int(repeats or 1)
        if left < 0:
            return int(tasks)
    return 0


def launched_on_several_hosts(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the launcher says that the processes are on several hosts; those that tests make up count."""
    environment = os.environ if environment is None else environment
    _, size = launched_size(environment)
    if text := environment.get(RANKS_PER_HOST):
        return virtual_host(text, size - 1) > 0
    if any(environment.get(name, "").isdigit() for name in HOST_SIZE_VARIABLES):
        return size > launched_here(environment)
    hosts = environment.get(SLURM_STEP_HOSTS, "")
    return size > 1 and hosts.isdigit() and int(hosts) > 1


def ask_for_threads(environment: MutableMapping[str, str] | None = None) -> None:
    """Have MPI allow what this program uses, before it is loaded; what the user has set stays.

    Between hosts a thread sends sums beside the main one. On one host none does, and MPI need not lock.
    """
    environment = os.environ if environment is None else environment
    wish = environment.get(OVERLAP)
    several = wish != "never" and (wish == "always" or launched_on_several_hosts(environment))
    environment.setdefault(THREAD_LEVEL, "multiple" if several else "funneled")


def launched_first(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the first of its host, or the launcher does not say which is."""
    environment = os.environ if environment is None else environment
    found = [environment[name] for name in HOST_RANK_VARIABLES if environment.get(name, "").isdigit()]
    return not found or int(found[0]) == 0


def quiet_mpi(environment: MutableMapping[str, str] | None = None) -> None:
    """Keep MPI's own words out of the output, before it is loaded; what the user has set stays.

    UCX, below MPICH and Open MPI, logs to standard output. Open MPI's one-sided messages over UCX, which nothing here
    uses, complain at every start.
    """
    environment = os.environ if environment is None else environment
    environment.setdefault("UCX_LOG_FILE", "stderr")
    if OPEN_MPI in environment:
        environment.setdefault("OMPI_MCA_osc", "^ucx")


def check_start(threads: int | None, timeout: float) -> None:
    """UserError for numbers of threads and seconds that no rank could start with."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}: give at least 1.")
    if timeout != 0 and not timeout >= 1:
        raise UserError(f"--timeout is {timeout:g}: give seconds, at least 1, or 0 to wait for ever.")


def refuse_singletons(size: int, environment: Mapping[str, str] | None = None) -> None:
    """UserError if several processes were launched together but MPI does not know of it.

    Each would believe to be rank 0 of 1 and run the whole model by itself.
    """
    name, expected = launched_size(environment)
    if expected <= 1 or size > 1:
        return
    if name == SLURM_STEP_SIZE:
        remedy = (
            "start with `srun --mpi=pmi2` or `srun --mpi=pmix` (`srun --mpi=list` shows what there is), or with mpirun"
        )
    else:
        remedy = "use the mpirun of the MPI library that mpi4py loads (`mpillama doctor` shows which it is)"
    raise UserError(
        f"{expected} processes were started ({name}={expected}), but MPI connects none of them (size {size}): {remedy}."
    )
