"""A warm-up that is killed or stopped, in its sampling or its SFT, and started again, ends as one that was not."""

import json
import re

import pytest
from chain import run_all

from bridge_rl.errors import STOPPED_CODE

pytestmark = pytest.mark.slow
RECIPE = [
    "warmup",
    "recipes/tiny_arith.yaml",
    "warmup={problems: 48, samples: 8, min_right: 2, steps: 12, groups_per_step: 4}",
    "rewards=[{function: tests/faults/reward.py:even}]",
    "training.save_strategy=steps",
]
ENDS = [
    # (what is sent, where, after how many steps of the SFT, at the how manieth time)
    ("SIGKILL", "in the rollout", 0, 20),
    ("SIGKILL", "after a write of the warm-up", 0, 1),
    ("SIGTERM", "in the rollout", 0, 10),
    ("SIGKILL", "after a backward of the warm-up", 2, 1),
    ("SIGINT", "after a backward of the warm-up", 4, 1),
    ("SIGKILL", "before the warm-up's optimizer state", 7, 1),
]
ON_TWO_RANKS = ("after a write of the warm-up", "in the rollout", "after a backward of the warm-up")


def losses(directory) -> list[tuple]:
    entries = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_warmup_that_ends_early_anywhere_ends_the_same(tmp_path, ranks):
    ends = ENDS if ranks == 1 else [end for end in ENDS if end[1] in ON_TWO_RANKS]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs = [{"argv": [*RECIPE, f"output_dir={whole}"]}]
    for send, point, step, count in ends:
        end = {"send": send, "point": point, "step": step, "count": count, "rank": ranks - 1}
        runs.append({"argv": [*RECIPE, f"output_dir={cut}"], **end})
    codes = run_all(tmp_path, [*runs, {"argv": [*RECIPE, f"output_dir={cut}"]}], ranks)
    log = (tmp_path / "log.txt").read_text()
    assert codes[0] == codes[-1] == [0] * ranks, log[-3000:]
    for (send, *where), ended in zip(ends, codes[1:-1], strict=True):
        assert -9 in ended if send == "SIGKILL" else ended == [STOPPED_CODE] * ranks, (send, where, ended, log[-3000:])
    assert re.search(r"stopped by [^:]+: \d+ of 48 warm-up problems are sampled in \S+, and the same command", log)
    assert re.findall(r"stopped by [^:]+: \S+/checkpoint-(\d+) is whole", log) == ["5"]
    for name in ("bridge.safetensors", "groups.jsonl"):
        assert (cut / "warmup" / name).read_bytes() == (whole / "warmup" / name).read_bytes(), name
    assert len(losses(whole / "warmup")) == 12
    assert losses(cut / "warmup") == losses(whole / "warmup")
    assert sorted(path.name for path in (cut / "warmup").iterdir()) == sorted(
        path.name for path in (whole / "warmup").iterdir()
    )
