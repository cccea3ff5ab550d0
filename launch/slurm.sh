#!/usr/bin/env bash
#SBATCH --job-name=bridge-rl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
# sbatch launch/slurm.sh recipes/r1_distill_7b.yaml [key=value ...], or on two nodes that both see output_dir:
# sbatch --nodes=2 launch/slurm.sh recipes/r1_distill_7b.yaml launch.num_processes=16
# The warm-up runs without ZeRO and is skipped when OUTPUT/warmup is there already.
# 120 seconds before the time limit every rank gets SIGTERM, saves and leaves with 85, and the job queues again: make it
# longer than one update and one save. srun starts the ranks itself, since torchrun and accelerate launch turn every exit
# code into 1 and kill what takes more than 30 seconds to leave. ZeRO is as the recipe's launch.zero_stage says. A rank
# that has left alone is waited for 10 minutes: the others may be inside a collective, which would take hours to give up.
set -euo pipefail
source .venv/bin/activate
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
# Since Slurm 22.05 srun does not take --cpus-per-task from sbatch: each rank would have one core.
ranks() { srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=600 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$@"' _ "$@"; }

code=0
ranks launch/warmup.py "$@" && ranks launch/train.py "$@" || code=$?
if [ "$code" -eq 85 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
