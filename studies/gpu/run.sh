#!/usr/bin/env bash
# The small study's task with a model of 21 M parameters on one GPU: its base, if there is none, then what is not done of
# the study, JOBS cells at a time (default 4), then the report. Cut off anywhere, the same command goes on.
set -euo pipefail
BASE=runs/base_21m
if [ ! -f "$BASE/tokenizer.json" ]; then  # the last file of it
  python -m bridge_rl.tiny.make_base two_tries --output "$BASE" --stop-at 0.245 --check-every 100 \
    --hidden-size 512 --layers 8 --heads 8 --batch-size 512 --lr 3e-4
fi
exec bridge-rl study studies/gpu/study.yaml --jobs "${JOBS:-4}"
