"""Rollouts, training and evaluation on a device that is not the CPU: as on it, and waiting where this is known.

`tests/test_other_device.py` runs them in a process of their own, as torch is not the same after `register`.
"""

import json

import pytest
import torch
from conftest import ALL_FAMILIES, make_bridged
from simulated_device import DEVICE, NAME, as_the_device, register, uploads, waits

import bridge_rl as br
from bridge_rl.cli import main
from bridge_rl.evaluation.results import read_results
from bridge_rl.rollout.decode import Decoder
from bridge_rl.rollout.graphs import FilledDecoder, why_not_recorded
from bridge_rl.rollout.pages import Pages
from bridge_rl.update import trim

register()

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]] * 2
PARAMS = br.SamplingParams(max_new_tokens=20, seed=3, eos_token_id=[2, 4, 5])
TRAINING = {
    "bridge": ["train=bridge", "training.gradient_checkpointing=true", "rollout.dynamic_sampling={max_rounds: 1}"],
    "lora": ["train=lora", "update.token_budget=300", "training.beta=0.1"],
    "full": ["train=full", "training.beta=0.1", "update.share_prompt=false", "training.loss_type=grpo"],
}
SMALL = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "training.learning_rate=1e-3",
    "warmup.problems=16",
    "warmup.steps=2",
    "warmup.groups_per_step=4",
    "evaluation.problems=4",
    "evaluation.samples=4",
    "evaluation.widths=[1, 4]",
]
TIMES = ("seconds", "_share", "per_second", "runtime", "memory/", "rows_per_step", "cache_tokens", "step_time")


def test_a_tensor_of_the_cpu_among_those_of_the_device_is_an_error():
    there = torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="mixes devices"):
        there + torch.ones(2)
    assert (there + torch.tensor(1.0)).tolist() == [2, 2]


def test_what_the_host_waits_for_is_noted():
    there = torch.ones(2, device=DEVICE)
    for wait in (there.sum().item, there.cpu, lambda: bool(there.any()), lambda: there[there > 0], there.nonzero):
        waits.clear()
        wait()
        assert len(waits) == 1
    waits.clear()
    there[:1] = there.sum() * 2 + torch.arange(1, device=DEVICE)
    assert waits == []


def test_what_the_host_copies_to_the_device_is_noted():
    there = torch.ones(2, device=DEVICE)
    for upload in (
        lambda: torch.tensor([1, 2], device=DEVICE),
        lambda: torch.ones(2).to(DEVICE),
        lambda: there.copy_(torch.zeros(2)),
        lambda: there[torch.tensor([0])],
    ):
        uploads.clear()
        upload()
        assert len(uploads) == 1
    uploads.clear()
    there.copy_(there.clone()).mul_(torch.tensor(2.0))
    assert uploads == []


def test_autocast_casts_products():
    there = torch.ones(2, 2, device=DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        assert (there @ there).dtype == torch.bfloat16
        assert (there @ there).softmax(-1).dtype == torch.float32


def test_prompts_are_written_into_pages_without_waiting():
    states = torch.ones(2, 13, 8, device=DEVICE)
    pages = Pages(4, 8, [states[None]])
    waits.clear()
    pages.write(0, [(states, states)])
    assert waits == []
    assert pages.data.sum().item() == 2 * states.numel()


def test_a_micro_batch_is_trimmed_with_one_wait():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=DEVICE)
    waits.clear()
    trimmed = trim({"prompt_mask": mask.flip(1), "completion_mask": mask})
    assert len(waits) == 1
    assert [x.tolist() for x in trimmed.values()] == [[[1, 1], [0, 1]], [[1, 1], [1, 0]]]


@pytest.fixture
def steps_by_themselves(monkeypatch):
    """A decode step in which the host waits for the device, or copies to it, is an error."""
    step = Decoder.step

    def watched(self, *args):
        waits.clear()
        uploads.clear()
        made = step(self, *args)
        assert waits + uploads == []
        return made

    monkeypatch.setattr(Decoder, "step", watched)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("decoder", [Decoder, FilledDecoder])
def test_rollouts_draw_what_the_cpu_draws_by_steps_without_the_host(family, decoder, request, monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.engine.Decoder", decoder)
    model = make_bridged(family)
    if why_not_recorded(model, (9, 0)) is None:
        request.getfixturevalue("steps_by_themselves")
    expected = br.generate_groups(model, PROMPTS, 4, PARAMS)
    model.to(DEVICE)
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(max_rows=17))
    assert [group.tokens for group in groups] == [group.tokens for group in expected]
    oracle = br.group_logprobs(model, PROMPTS, [group.tokens for group in groups])
    for group, of_group in zip(groups, oracle, strict=True):
        for row, of_row in zip(group.logprobs, of_group, strict=True):
            assert row == pytest.approx(of_row, abs=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rollouts_of_a_float32_model_under_autocast(family):
    model = make_bridged(family).to(DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        groups = br.generate_groups(model, PROMPTS, 4, PARAMS)
        oracle = br.group_logprobs(model, PROMPTS, [group.tokens for group in groups])
    for group, of_group in zip(groups, oracle, strict=True):
        for row, of_row in zip(group.logprobs, of_group, strict=True):
            assert row == pytest.approx(of_row, abs=0.1)


def train(directory, options) -> list[dict[str, float]]:
    main(["train", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={directory}", *options])
    history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [{name: x for name, x in entry.items() if not any(time in name for time in TIMES)} for entry in history]


@pytest.mark.parametrize("mode", TRAINING)
def test_a_recipe_runs_as_on_the_cpu(mode, tmp_path):
    expected = train(tmp_path / "cpu", TRAINING[mode])
    with as_the_device():
        history = train(tmp_path / "device", TRAINING[mode])
    assert len(history) == len(expected)
    for entry, of_cpu in zip(history, expected, strict=True):
        assert entry == pytest.approx(of_cpu, rel=1e-3, abs=1e-5)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    options = ["train=bridge", "training.save_strategy=steps", "training.save_steps=1"]
    with as_the_device():
        expected = train(tmp_path / "whole", options)
        train(tmp_path / "resumed", [*options, "training.max_steps=1", "data.eval=null"])
    with as_the_device():
        history = train(tmp_path / "resumed", [*options])
    assert history[-2:] == expected[-2:]


def test_a_recipe_under_autocast(tmp_path, monkeypatch):
    """As on a GPU, where it is the default."""
    monkeypatch.setattr("bridge_rl.run_options.device_arguments", lambda recipe: {"bf16": True, "use_cpu": True})
    with as_the_device():
        history = train(tmp_path, ["train=full"])
    assert 0 < history[0]["rollout/recompute_kl"] < 0.01


def test_an_evaluation_with_controls_and_probes_is_as_on_the_cpu(tmp_path):
    train(tmp_path / "run", ["data.eval=null"])
    options = ["--suite", "tiny", "--problems", "6", "--widths", "1,4", "--samples", "8", "--controls", "--probes"]
    command = ["eval", "--model", str(tmp_path / "run"), *options]
    main([*command, "--output", str(tmp_path / "cpu")])
    with as_the_device():
        main([*command, "--output", str(tmp_path / "device")])
    expected, results = (read_results(tmp_path / where / "results.json") for where in ("cpu", "device"))
    assert results.summaries == expected.summaries
