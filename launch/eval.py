"""Evaluate at several widths: `accelerate launch launch/eval.py --model runs/tiny_arith --suite tiny`."""

import sys

from bridge_rl.cli import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
