"""A run that is asked to leave saves everything, leaves with its own exit code, and goes on as if nothing had been."""

import re

import pytest
from chain import RECIPE, history, run_all, weights

from bridge_rl.errors import STOPPED_CODE
from bridge_rl.report import names

pytestmark = pytest.mark.slow
EVALUATED = [  # in the loop, and not at a save
    "data.eval={path: 'bridge_rl.tiny.task:dataset', kwargs: {seed: 11, size: 16}, check_answers: false}",
    "evaluation={widths: [1, 4], problems: 16, samples: 4, max_rows: 16, every: 5}",
]
# Rollouts at every micro-step, of which two make an update.
OPTIONS = [
    *RECIPE,
    "training.steps_per_generation=1",
    "training.gradient_accumulation_steps=2",
    "training.num_iterations=1",
    "training.max_steps=12",
    *EVALUATED,
]
STOPS = [
    # (what is sent, where, after how many steps, at the how manieth time, micro-step in which that is)
    ("SIGTERM", "in the rollout", 2, 12, 5),
    ("SIGINT", "after the rollout", 2, 1, 4),
    ("SIGTERM", "before the forward", 4, 2, 9),
    ("SIGTERM", "in the evaluation", 5, 1, 10),
    ("SIGINT", "in the rollout", 11, 3, 22),
    ("SIGTERM", "in the evaluation", 12, 1, 24),
]
SAVED_AT = [2, 2, 5, 5, 11, 12]


def as_run(output, stop=None, ranks=1):
    argv = [*OPTIONS, f"output_dir={output}", f"training.per_device_train_batch_size={16 // ranks}"]
    if stop is None:
        return {"argv": argv}
    send, point, step, count, _ = stop
    return {"argv": argv, "send": send, "point": point, "step": step, "count": count, "rank": ranks - 1}


@pytest.mark.parametrize("ranks", [1, 2])
def test_stops_anywhere_change_nothing(tmp_path, ranks):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs = [as_run(whole, ranks=ranks), *(as_run(stopped, stop, ranks) for stop in STOPS), as_run(stopped, ranks=ranks)]
    codes = run_all(tmp_path, runs, ranks)
    log = (tmp_path / "log.txt").read_text()
    assert codes == [[0] * ranks, *([[STOPPED_CODE] * ranks] * len(STOPS)), [0] * ranks], log[-3000:]
    sent = re.findall(r"signal \d+ at micro-step (\d+)", log)
    assert [int(step) for step in sent] == [stop[-1] for stop in STOPS]
    assert re.findall(r"stopped by [^:]+: \S+/checkpoint-(\d+) is whole", log) == list(map(str, SAVED_AT))
    assert weights(stopped) == weights(whole)
    assert history(stopped) == history(whole)
    evaluated = [entry["step"] for entry in history(whole) if names.evaluation("pass@1", 4) in entry]
    assert evaluated == [5, 10, 12]


def test_a_time_limit_is_kept(tmp_path):
    limit = 12
    argv = [*RECIPE, "training.max_steps=100000", f"save_before={limit}s", f"output_dir={tmp_path / 'out'}"]
    assert run_all(tmp_path, [{"argv": argv}]) == [[STOPPED_CODE]]
    [*_, last] = sorted((tmp_path / "out").glob("checkpoint-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    log = (tmp_path / "log.txt").read_text()
    assert "stopped by save_before" in log
    [started] = re.findall(r"started at ([\d.]+)", log)
    assert limit / 2 < last.stat().st_mtime - float(started) < limit
    assert run_all(tmp_path, [{"argv": argv}]) == [[STOPPED_CODE]]  # goes on, until the limit of a new process
