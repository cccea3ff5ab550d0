#!/usr/bin/env bash
#SBATCH --job-name=bridge-rl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm-%j.log
# sbatch launch/slurm.sh recipes/r1_distill_7b.yaml [key=value ...]
# The warm-up runs without ZeRO and is skipped when OUTPUT/warmup is there already; a job that is submitted again goes
# on from its last checkpoint.
set -euo pipefail
source .venv/bin/activate
accelerate launch --config_file launch/accelerate/ddp.yaml launch/warmup.py "$@"
accelerate launch --config_file launch/accelerate/zero3.yaml launch/train.py "$@"
