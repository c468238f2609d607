#!/bin/bash
# One script as one job, whatever it is.
#   sbatch config/slurm/submit.sh warp.py config/warp_tuckute.yaml
#   make neural-conv CMD="sbatch config/slurm/submit.sh"
#SBATCH --job-name=nanocortex
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the repository}"
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
.venv/bin/python "$@"
