#!/bin/bash
# One process a GPU on two nodes of eight; srun gives every process the variables that
# megjax.sharding.start_processes reads, and JAX then shows each process one GPU.
#   sbatch tpu_configs/slurm-gpu.sh
#   sbatch tpu_configs/slurm-gpu.sh eval.sweep --preset images
#SBATCH --job-name=megjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.out

set -euo pipefail

# A proxy would be asked for the coordinator's address, which it cannot reach.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
export JAX_COMPILATION_CACHE_DIR="${SCRATCH:-$HOME}/megjax-xla"

# The job's own command, or a training with one share of the batch for every GPU.
command=("$@")
[ $# -gt 0 ] || command=(train.ldm --preset scenes128 --shards 16)
srun --kill-on-bad-exit=1 .venv/bin/python -m "${command[@]}"
