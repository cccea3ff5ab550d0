"""Warm up a recipe's new parameters: `accelerate launch launch/warmup.py recipes/tiny_arith.yaml [key=value ...]`."""

import sys

from bridge_rl.cli import main

if __name__ == "__main__":
    main(["warmup", *sys.argv[1:]])
