#!/bin/bash
# A conversation on nodes of its own: asks Slurm for them (words after the script's name are options of salloc), waits,
# talks, and gives them back.
#   jobs/chat.sh --nodes 4 --ntasks-per-node 1 --time 02:00:00
#   MODEL  model on the shared file system (default: data/demo.h5)
#   ARGS   options of `mpillama chat`, separated by blanks
#   VENV, MODULES, LAUNCH: see jobs/README.md; srun needs --pty, e.g. LAUNCH="srun --pty --mpi=pmi2"

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    exec salloc --job-name=mpillama-chat --time=01:00:00 "$@" bash "$(realpath "${BASH_SOURCE[0]}")"
fi

# -- environment: the same lines in every script; jobs/README.md explains them --
if [[ -n ${MODULES:-} ]]; then
    # shellcheck disable=SC1091  # where the shell has not inherited `module`, the profile defines it
    [[ $(type -t module) == function ]] || source /etc/profile
    # shellcheck disable=SC2086  # a list of modules
    module load $MODULES || exit 2
fi
set -euf -o pipefail
unset SLURM_EXPORT_ENV # after `sbatch --export=...`, srun would start ranks without this environment
if [[ -n ${VENV:-} || -d .venv ]]; then
    PATH=$(realpath --canonicalize-existing "${VENV:-.venv}/bin"):$PATH
fi
export PATH
LAUNCH=${LAUNCH:-mpirun -n ${SLURM_NTASKS:-${SLURM_NNODES:-1}}}
if [[ $LAUNCH != srun* ]]; then
    unset SRUN_CPUS_PER_TASK # mpirun's own srun would squeeze all ranks of a node into these cores
elif [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since 22.05, srun does not take it over by itself
fi
# -- end of the environment --

# shellcheck disable=SC2086  # LAUNCH and ARGS are lists of words
exec $LAUNCH python -m mpillama chat ${MODEL:+--model "$MODEL"} ${ARGS:-}
