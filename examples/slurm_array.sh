#!/bin/bash
# Many edits as a SLURM array: each task takes its part, and goes on with it when it is started again.
#
#     sbatch examples/slurm_array.sh photos "Make it winter." --out results --model MODEL
#
# The folder of the results must be one that all nodes see.
#SBATCH --job-name=joyedit
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --output=joyedit-%A-%a.log
#SBATCH --requeue

set -eu
# In the place of this shell, so that it gets the signals.
exec python -m joyedit batch "$@"
