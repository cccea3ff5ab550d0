"""A reward, or a rollout, that fails in the middle of a run loses nothing: mended, the run ends as one without that."""

import json
import re

import pytest
from chain import RECIPE, history, run_all, weights
from test_stopped_runs import EVALUATED
from test_stopped_warmups import RECIPE as WARMUP

from bridge_rl.report import names

pytestmark = pytest.mark.slow
# Generation batches are rewarded at steps 0, 4 and 8; checkpoints are at 3, 6 and 9.
REWARD = """
import os, pathlib
def score(completion_ids, trainer_state=None, **kwargs):
    broken = pathlib.Path(__file__).with_name("broken").exists()
    late = trainer_state is None or trainer_state.global_step >= 8  # there is none but in training
    if broken and late and os.environ["RANK"] == "1":
        return [1 / 0 for ids in completion_ids]
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
"""


def test_a_reward_that_fails_on_one_rank_saves_on_all(tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD)
    options = ["training.max_steps=10", "training.per_device_train_batch_size=8"]
    argv = [*RECIPE, f"rewards=[{{function: '{reward}:score'}}]", *options]
    whole, failed = ({"argv": [*argv, f"output_dir={tmp_path / name}"]} for name in ("whole", "failed"))
    runs = [whole, {**failed, "patch": "break the reward"}, {**failed, "patch": "mend the reward"}]
    codes = run_all(tmp_path, runs, ranks=2)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[0, 0], [2, 2], [0, 0]], log[-3000:]
    assert f"error: {reward}:score failed with ZeroDivisionError in line 7 of {reward} at row 0 (" in log
    checkpoint = tmp_path / "failed" / "checkpoint-8"
    assert f"({checkpoint} is whole: when the cause is mended, the same command goes on)." in log
    assert f"going on from {checkpoint}" in log
    assert weights(tmp_path / "failed") == weights(tmp_path / "whole")
    assert history(tmp_path / "failed") == history(tmp_path / "whole")


def test_a_prompt_for_which_one_rank_has_no_room_ends_all_and_the_run_goes_on_with_more(tmp_path):
    problems = [{"problem": "1," * (100 if n == 5 else 8) + f"{n}=", "answer": "1"} for n in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    data = f"data.train={{path: {tmp_path / 'p.jsonl'}, check_answers: false}}"
    argv = [*RECIPE, data, "training.max_steps=10", "training.per_device_train_batch_size=8"]
    whole, failed = ({"argv": [*argv, f"output_dir={tmp_path / name}"]} for name in ("whole", "failed"))
    small = {"argv": [*failed["argv"], "rollout.max_cache_tokens=150"]}
    codes = run_all(tmp_path, [whole, small, failed], ranks=2)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[0, 0], [2, 2], [0, 0]], log[-3000:]
    [checkpoint] = set(re.findall(r"error: The cache has room for 150 tokens.* \((\S+) is whole: when", log))
    assert f"going on from {checkpoint}" in log
    assert weights(tmp_path / "failed") == weights(tmp_path / "whole")


def test_a_reward_that_fails_in_an_evaluation_on_one_rank_saves_on_all(tmp_path):
    """At step 5, of which there is no other checkpoint. (That nothing is changed: tests/test_run.py.)"""
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD)
    options = ["training.max_steps=6", "training.per_device_train_batch_size=8", *EVALUATED]
    run = {"argv": [*RECIPE, f"rewards=[{{function: '{reward}:score'}}]", *options, f"output_dir={tmp_path / 'out'}"]}
    codes = run_all(tmp_path, [{**run, "patch": "break the reward"}, {**run, "patch": "mend the reward"}], ranks=2)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[2, 2], [0, 0]], log[-3000:]
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert f"({checkpoint} is whole: when the cause is mended, the same command goes on)." in log
    assert f"going on from {checkpoint}" in log
    evaluated = [entry["step"] for entry in history(tmp_path / "out") if names.evaluation("pass@1", 4) in entry]
    assert evaluated == [5, 6]


def test_a_reward_that_fails_in_a_warmup_on_one_rank_ends_all_and_what_was_judged_is_kept(tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text(REWARD)
    argv = [
        *WARMUP,
        "warmup.problems=16",
        f"rewards=[{{function: '{reward}:score'}}]",
        f"output_dir={tmp_path / 'out'}",
    ]
    codes = run_all(tmp_path, [{"argv": argv, "patch": "break the reward"}], ranks=2)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[2, 2]], log[-3000:]
    assert log.count("error: ") == log.count("failed with ZeroDivisionError") > 0
    judged = (tmp_path / "out" / "warmup" / "sampled" / "rank_0.jsonl").read_text()
    assert len(judged.splitlines()) == 8  # all of the other rank's half
