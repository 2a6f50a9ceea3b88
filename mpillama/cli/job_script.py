"""The Slurm script of a planned run; it takes the same variables as the scripts in jobs/."""

import shlex

from mpillama.cli.options import PlanOptions

ENVIRONMENT = r"""# -- environment: the same lines in every script; jobs/README.md explains them --
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
# -- end of the environment --"""
"""The lines that every script in jobs/ has too."""


def job_script(options: PlanOptions) -> str:
    """Return the text of a script that runs what was planned."""
    return "\n".join([*_head(options), "", ENVIRONMENT, "", *_command(options), ""])


def _head(options: PlanOptions) -> list[str]:
    return [
        "#!/bin/bash",
        "#SBATCH --job-name=mpillama",
        "#SBATCH --output=%x-%j.out",
        f"#SBATCH --nodes={options.nodes}",
        f"#SBATCH --ntasks-per-node={options.ranks_per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --time=01:00:00",
        '# Words after the script\'s name are passed on to `mpillama generate`, for example --prompt "Once".',
        "#   MODEL  model on the shared file system",
        "#   ARGS   more options, separated by blanks",
        "#   VENV, MODULES, LAUNCH: see jobs/README.md",
    ]


def _command(options: PlanOptions) -> list[str]:
    words = ["--kv-type", options.kv_type]
    if options.max_seq_len is not None:
        words += ["--max-seq-len", str(options.max_seq_len)]
    if options.model is not None:
        model = f"MODEL=${{MODEL:-{shlex.quote(options.model)}}}"
        words += ["--weights", options.weights] if options.weights != "as-stored" else []
        words += ["--tokenizer", options.tokenizer] if options.tokenizer is not None else []
    else:
        model = f': "${{MODEL:?is not set: give the {options.shape} that was planned, as a file}}"'
    return [
        model,
        "# shellcheck disable=SC2086  # LAUNCH and ARGS are lists of words",
        f'exec $LAUNCH python -m mpillama generate --model "$MODEL" {shlex.join(words)} ${{ARGS:-}} "$@"',
    ]
