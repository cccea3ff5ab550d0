"""Rollouts of a model that is sharded over two real CPU processes, with different work on each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharded_job import REQUESTS, SHARDINGS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def launch(*arguments: str) -> subprocess.CompletedProcess:
    """The job on two ranks; a deadlock ends in TimeoutExpired."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "tests/distributed/sharded_job.py", *arguments]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}tests", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("sharded")
    done = launch(str(directory))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_each_rank_holds_half_of_a_layer_before_and_after(ranks, sharding):
    for found in ranks:
        whole = found["alone"]["elements"][0]
        assert found[sharding]["elements"] == [whole // 2, whole // 2]


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_ranks_with_different_work_sample_what_each_does_alone(ranks, sharding, name):
    for found in ranks:
        (groups, _), (expected, _) = found[sharding]["served"][name], found["alone"]["served"][name]
        assert len(groups) == len(expected)
        for ours, theirs in zip(groups, expected, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["finish_reasons"] == theirs["finish_reasons"]
            for row, expected_row in zip(ours["logprobs"], theirs["logprobs"], strict=True):
                assert row == pytest.approx(expected_row, abs=1e-5)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_both_ranks_run_the_passes_of_the_one_that_needs_most(ranks, sharding, name):
    most = max(found["alone"]["served"][name][1] for found in ranks)
    assert [found[sharding]["served"][name][1] for found in ranks] == [most, most]


def test_a_reward_that_fails_on_one_rank_leaves_no_other_waiting(ranks):
    """6 x 44 rows at each of two widths, half of them on each rank, of which the one loses its half at width 1."""
    assert [found["failed"] for found in ranks] == [["mine.py:score failed", 264], ["mine.py:score failed", 132]]


def test_a_cache_that_one_rank_has_no_room_for_ends_all_with_one_sentence(ranks):
    """An evaluation from shards that ZeRO-3 does not gather; nothing is sampled."""
    messages, sampled = zip(*(found["refused"] for found in ranks), strict=True)
    assert messages[0] == messages[1]
    assert messages[0].startswith("The cache has room for 0 tokens, and one group with its prompt can need ")
    assert sampled == (0, 0)
