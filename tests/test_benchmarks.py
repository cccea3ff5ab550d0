"""The benchmark scripts run, on a tiny model; their figures are committed by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def test_the_rollout_benchmark_measures_every_engine_and_bar(tmp_path):
    output = tmp_path / "rollout.json"
    command = [sys.executable, "benchmarks/rollout.py", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text())
    engines = report["results"]["scenarios"]["long_tailed"]["engines"]
    assert {"ours_with_bridge", "ours_without_bridge", "hf_generate_static", "generate_batch", "trl"} <= engines.keys()
    assert {bar["name"][0] for bar in report["bars"]} == set("12345")
    assert output.with_suffix(".png").stat().st_size > 0


def test_the_update_benchmark_measures_every_arm_and_bar(tmp_path):
    output = tmp_path / "train_step.json"
    command = [sys.executable, "benchmarks/train_step.py", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text())
    arms = {"ours", "without_share_prompt", "without_share_prompt_and_trim", "trl"}
    assert report["results"]["full"].keys() == arms
    assert all(run["seconds"] > 0 for arms in report["results"].values() for run in arms.values())
    assert len(report["bars"]) == 7


def test_quick_does_not_overwrite_the_committed_figures():
    command = [sys.executable, "benchmarks/rollout.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--quick needs --output" in done.stderr


def test_pages_hold_little_more_than_the_tokens_of_the_long_tailed_benchmark(monkeypatch):
    """The goal is 1.1: rows of about 60 tokens and prompts of 32 to 96, each of the lengths of the full benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rollout import FULL, run_rollout, tiny_model

    model = tiny_model().eval()
    rollout, _ = run_rollout(model, FULL.compared[0].work(model.config.vocab_size))
    assert rollout.stats.peak_cache_tokens <= 1.1 * rollout.stats.held_tokens_at_peak


def test_on_a_gpu_the_memory_of_sampling_is_measured_apart_from_that_of_the_update(monkeypatch, tmp_path):
    """torch's allocator is a stub here, by which each of a step's two phases peaks at what it is to be."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory

    peaks = iter((1, 7, 2, 6, 3))  # before the first rollout, in it, between them, in the second, behind it
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(memory.torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(memory.torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(memory.bridge_rl.trainer, "lockstep_rollout", memory.bridge_rl.trainer.lockstep_rollout)
    shape = memory.Shape("small", hidden=32, inner=64, layers=1, heads=4, prompt=8, new_tokens=4)
    assert memory.measure_cuda(shape, str(tmp_path)) == {"rollout": 7, "update": 3}


def test_each_arm_is_timed_in_a_rollout_of_its_own_graphs_and_without_the_steps_that_record_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rollout as benchmark

    model, arms = benchmark.tiny_model().eval(), []
    plain = benchmark.make_rollout

    def with_graphs(model, work, cuda_graphs):
        assert cuda_graphs
        made, of_rollout = plain(model, work), []
        made.decoder.graphs, advance = {}, made.advance
        arms.append(of_rollout)

        def record_every_second_step():
            advance()
            if made.stats.steps:
                of_rollout.append(benchmark.br.surgery.find_state(model).enabled)
                made.decoder.graphs[made.stats.steps // 2] = "recorded at even steps"

        made.advance = record_every_second_step
        return made

    monkeypatch.setattr(benchmark, "make_rollout", with_graphs)
    cost = benchmark.step_cost(model, replace(benchmark.QUICK, step_pairs=8), prompt=8, recorded=True)
    assert arms == [[True] * 10, [False] * 10]
    assert cost["pairs"] == 2  # of 10 passes the first and the even ones record, and two of the others warm up
