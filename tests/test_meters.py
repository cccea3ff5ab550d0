"""What training measures about itself agrees with a slow computation, and measuring changes nothing."""

import time
from contextlib import nullcontext

import pytest
import torch
from conftest import make_base, make_bridged, switch_on
from peft import LoraConfig
from test_trainer import make_trainer, tokenizer  # noqa: F401
from transformers import TrainerCallback
from trl import GRPOTrainer

import bridge_rl as br
from bridge_rl.meters import GenerationMeter, StepMeter, find_blocks, record_norm_ratios
from bridge_rl.report import names
from bridge_rl.rollout.request import RolloutStats
from bridge_rl.surgery import group_width

WIDTH = 2


@pytest.fixture
def batch():
    """ids [4, 7] with two columns of prompt; of the completion's five, rows end at columns 5, 3, 4, 1."""
    ids = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5)[None, :] < torch.tensor([5, 3, 4, 1])[:, None]
    return ids, mask.long()


def attention_mask(mask):
    return torch.cat([torch.ones(len(mask), 2, dtype=torch.long), mask], 1)


def slow_ratio(model, ids, mask):
    """{layer: mean over the marked tokens of |output - input| / |input| of the block}."""
    found = {}

    def keep(layer):
        return lambda block, inputs, output: found.update({layer: (inputs[0], output)})

    handles = [block.register_forward_hook(keep(layer)) for layer, block in find_blocks(model)]
    with torch.no_grad(), group_width(model, WIDTH):
        model(ids, attention_mask=attention_mask(mask))
    for handle in handles:
        handle.remove()
    means = {}
    for layer, (x, y) in found.items():
        ratios = [
            float((y[row, 2 + column] - x[row, 2 + column]).norm() / x[row, 2 + column].norm())
            for row in range(4)
            for column in range(5)
            if mask[row, column]
        ]
        means[layer] = sum(ratios) / len(ratios)
    return means


@pytest.mark.parametrize("kind", ["bridge", "pmatch"])
def test_norm_ratios_are_those_of_a_slow_computation(kind, batch):
    ids, mask = batch
    model = make_bridged("qwen3", kind)
    with record_norm_ratios(model, mask) as sums, group_width(model, WIDTH):
        model(ids, attention_mask=attention_mask(mask))
    expected = slow_ratio(model, ids, mask)
    assert set(expected) == {0, 1, 2}
    assert {layer: float(total / mask.sum()) for layer, total in sums.items()} == pytest.approx(expected, rel=1e-4)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_without_a_block_have_no_ratio(batch):
    ids, mask = batch
    model = switch_on(br.attach_bridge(make_base("llama"), br.BridgeConfig("bridge", 2, 8, layers=[2])))
    with record_norm_ratios(model, mask) as sums, group_width(model, WIDTH):
        model(ids, attention_mask=attention_mask(mask))
    assert list(sums) == [2]


def test_what_bf16_rounds_away_in_the_sum_is_still_seen(batch):
    ids, mask = batch
    model = make_bridged("llama")
    with torch.no_grad():
        for _, block in find_blocks(model):
            block.o_proj.weight.mul_(1e-6)
    expected = slow_ratio(model, ids, mask)
    model.to(torch.bfloat16)
    with record_norm_ratios(model, mask) as sums, group_width(model, WIDTH):
        model(ids, attention_mask=attention_mask(mask))
    assert {layer: float(total / mask.sum()) for layer, total in sums.items()} == pytest.approx(expected, rel=0.05)
    rounded = slow_ratio(model, ids, mask)
    assert all(abs(rounded[layer] / expected[layer] - 1) > 0.3 for layer in range(3))


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_recording_leaves_gradients_as_they_are_and_counts_a_checkpointed_layer_once(reentrant, batch):
    ids, mask = batch
    model = make_bridged("llama").train()
    expected = slow_ratio(model, ids, mask)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()

    def gradients(recorded):
        recording = record_norm_ratios(model, mask) if recorded else nullcontext({})
        with recording as sums, group_width(model, WIDTH):
            logits = model(ids, attention_mask=attention_mask(mask), use_cache=False).logits
        with group_width(model, WIDTH):
            logits.square().mean().backward()
        found = [p.grad.clone() for _, p in br.bridge_parameters(model)]
        model.zero_grad()
        return found, {layer: float(total / mask.sum()) for layer, total in sums.items()}

    without, _ = gradients(recorded=False)
    recorded, ratios = gradients(recorded=True)
    assert ratios == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(without, recorded, strict=True))


def test_a_step_meter_shares_out_its_time(monkeypatch):
    """Two steps of 4 and 6 s, 7 of them spent elsewhere, 300 tokens: 3 s of update."""
    clock = iter([0.0, 4.0, 100.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = StepMeter()
    assert meter.take(0.0, 0.0) == {}
    for tokens in (100, 200):
        meter.on_step_begin()
        meter.add_tokens(torch.ones(2, tokens // 2))
        meter.on_step_end()
    metrics = meter.take(rollout=6.0, reward=1.0)
    assert metrics.pop(names.PEAK_MEMORY) > 0.05  # torch alone takes more
    assert metrics == pytest.approx(
        {
            names.STEP_SECONDS: 5.0,
            names.STEP_ROLLOUT: 0.6,
            names.STEP_REWARD: 0.1,
            names.STEP_UPDATE: 0.3,
            names.STEP_TOKENS_PER_SECOND: 30.0,
            names.UPDATE_TOKENS_PER_SECOND: 100.0,
        }
    )
    assert meter.take(0.0, 0.0) == {}


def test_the_rollouts_of_a_generation_batch_are_added_up():
    """Two of 2 and 3 s, one after the other: what they took is added, but the cache was used again."""
    meter = GenerationMeter(reward_seconds=1.5)
    meter.add(2.0, 40, [True, False, False], RolloutStats(steps=5, row_steps=15, peak_cache_tokens=90, preempted=1))
    meter.add(3.0, 60, [True], RolloutStats(steps=15, row_steps=25, peak_cache_tokens=70, preempted=2))
    assert meter.metrics() == {
        names.ROLLOUT_SECONDS: 5.0,
        names.ROLLOUT_TOKENS_PER_SECOND: 20.0,
        names.ROLLOUT_TRUNCATED: 0.5,
        names.ROLLOUT_ROWS_PER_STEP: 2.0,
        names.ROLLOUT_CACHE_TOKENS: 90,
        names.ROLLOUT_PREEMPTED: 3,
        names.REWARD_SECONDS: 1.5,
    }


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_generation_batch_that_serves_two_steps_counts_in_the_first(tokenizer, tmp_path):  # noqa: F811
    trainer = make_trainer(tokenizer, tmp_path, steps_per_generation=2, max_steps=4)
    trainer.train()
    steps = steps_of(trainer)
    assert [entry[names.STEP_ROLLOUT] > 0 for entry in steps] == [True, False, True, False]
    assert [names.NORM_RATIO in entry for entry in steps] == [True, False, True, False]
    for entry in steps:
        assert entry[names.STEP_ROLLOUT] + entry[names.STEP_REWARD] + entry[names.STEP_UPDATE] == pytest.approx(1)
        assert entry[names.STEP_ROLLOUT] * entry[names.STEP_SECONDS] == pytest.approx(
            entry.get(names.ROLLOUT_SECONDS, 0.0)
        )


def test_evaluations_do_not_count_as_steps(tokenizer, tmp_path):  # noqa: F811
    class Evaluating(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True

    trainer = make_trainer(tokenizer, tmp_path, max_steps=2, logging_steps=2)
    trainer.evaluator = lambda trainer: time.sleep(1.5) or {"eval_x": 1.0}
    trainer.add_callback(Evaluating())
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    assert sum("eval_x" in entry for entry in trainer.state.log_history) == 2
    [entry] = steps_of(trainer)
    assert 2 * entry[names.STEP_SECONDS] < whole - 2 * 1.5


def test_tokens_are_those_that_the_loss_saw(tokenizer, tmp_path):  # noqa: F811
    trainer = make_trainer(tokenizer, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    [entry] = steps_of(trainer)
    tokens = entry[names.STEP_TOKENS_PER_SECOND] * entry[names.STEP_SECONDS]
    assert tokens == pytest.approx(entry["num_tokens"])  # TRL's count of prompt and completion tokens


def test_the_trainer_logs_the_ratios_of_its_first_forward(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    """At accumulation 1 the loss sees the whole batch before any update."""
    given = {}
    loss = GRPOTrainer._compute_loss

    def keep(self, model, inputs):
        given.update(inputs)
        return loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", keep)
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.train()
    [entry] = steps_of(trainer)
    model, mask = make_bridged("llama"), given["completion_mask"]
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    with record_norm_ratios(model, mask) as sums, group_width(model, trainer.width), torch.no_grad():
        model(ids, attention_mask=torch.cat([given["prompt_mask"], mask], 1))
    expected = [float(total / mask.sum()) for total in sums.values()]
    assert [entry[names.norm_ratio(layer)] for layer in range(3)] == pytest.approx(expected, rel=1e-4)
    assert entry[names.NORM_RATIO] == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_lora_logs_each_layer_once_and_a_run_without_bridge_none(tokenizer, tmp_path):  # noqa: F811
    peft = LoraConfig(target_modules="all-linear", modules_to_save=["bridge"])
    for model, options, layers in (
        (None, {"train": "lora", "peft": peft, "beta": 0.1}, {0, 1, 2}),
        (make_base("llama"), {"train": "full", "width": 1}, set()),
    ):
        trainer = make_trainer(tokenizer, tmp_path, model=model, **options)
        trainer.train()
        [entry] = steps_of(trainer)
        logged = {name for name in entry if name.startswith(names.NORM_RATIO)}
        assert logged == ({names.NORM_RATIO} if layers else set()) | {names.norm_ratio(layer) for layer in layers}
