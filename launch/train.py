"""Train from a recipe: `accelerate launch launch/train.py recipes/tiny_arith.yaml [key=value ...] [--dry-run]`.

The main path: here -> `bridge_rl.run.train` -> `BridgeGRPOTrainer` (its loss: `_compute_loss`).
"""

import sys

from bridge_rl.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
