#!/usr/bin/env bash
# The same command on every node, one of which is HOST, with output_dir on a file system that all of them see:
#   NNODES=2 HOST=node0 launch/torchrun.sh launch/train.py recipes/r1_distill_7b.yaml launch.num_processes=16
# NPROC: processes a node, by default its GPUs. ZeRO is as the recipe's launch section says.
set -euo pipefail
exec python -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" --rdzv-id "${RUN:-bridge-rl}" "$@"
