"""The warm-up's data, its batches and what it trains."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import make_bridged
from transformers import TrainingArguments

import bridge_rl as br
from bridge_rl.config import ModelSection, UpdateSection, WarmupSection, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import eos_ids
from bridge_rl.models import load_model, load_policy, load_tokenizer
from bridge_rl.run import warm_up, warmup_groups
from bridge_rl.stop import Stop
from bridge_rl.surgery import freeze_base
from bridge_rl.tiny import is_correct, make_problems
from bridge_rl.warmup import (
    BlockTrainer,
    WarmupGroup,
    WarmupStore,
    collate,
    collect_groups,
    read_groups,
    sample_warmup_groups,
    train_blocks,
    usable,
    write_groups,
)

SECTION = WarmupSection(samples=4, min_right=2)


def group(correct, prompt=(3, 4), lengths=None):
    lengths = lengths or [2] * len(correct)
    ids = [[10 + n] * length for n, length in enumerate(lengths)]
    return WarmupGroup("p", list(prompt), ids, [str(row) for row in ids], list(correct))


def test_problems_with_too_few_right_completions_are_dropped():
    kept = usable([group([True, False, False, False]), group([True, False, True, False])], SECTION)
    assert [g.correct for g in kept] == [[True, True]]
    assert kept[0].completion_ids == [[10, 10], [12, 12]]


def test_mixed_groups_keep_their_wrong_rows():
    mixed = WarmupSection(samples=4, min_right=2, mixed=True)
    [kept] = usable([group([True, False, True, False])], mixed)
    assert kept.correct == [True, False, True, False]


def test_a_base_too_weak_for_its_problems_is_refused_with_a_cure():
    with pytest.raises(UserError, match="none of 1 problems had 2 right completions of 4"):
        usable([group([True, False, False, False])], SECTION)


def test_a_batch_by_hand():
    """A group of two with completions of 2 and 1 tokens, and one of a single right row beside a wrong one."""
    wide, narrow = group([True, True, False], lengths=[2, 1, 2]), group([True, True], prompt=(5,), lengths=[1, 1])
    batch = collate([wide, narrow])
    assert batch["width"] == 3
    assert batch["prompt_ids"].tolist() == [[3, 4]] * 3 + [[0, 5]] * 3
    assert batch["prompt_mask"].tolist() == [[1, 1]] * 3 + [[0, 1]] * 3
    assert batch["completion_ids"].tolist() == [[10, 10], [11, 0], [12, 12], [10, 0], [11, 0], [0, 0]]
    assert batch["completion_mask"].tolist() == [[1, 1], [1, 0], [1, 1], [1, 0], [1, 0], [0, 0]]  # the last is a filler
    # The third is a wrong row: seen by its siblings, not learnt.
    assert batch["counted"].int().tolist() == [[1, 1], [1, 0], [0, 0], [1, 0], [1, 0], [0, 0]]


def sft_arguments(directory, **options):
    fixed = {"report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    free = {"logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2}
    return TrainingArguments(str(directory), **fixed, **{**free, **options})


def plain_loss(model, groups):
    """The oracle: every group by itself, padded, with the logits of all its tokens."""
    total, count = torch.zeros(()), 0
    for one in groups:
        batch = collate([one])
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        logits = model(input_ids=ids, attention_mask=mask, bridge_alive=mask.bool()[None]).logits
        columns = batch["completion_ids"].shape[1]
        logprobs = logits[:, -columns - 1 : -1].log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
        total = total - logprobs[batch["counted"]].sum()
        count += int(batch["counted"].sum())
    return total / count


RAGGED = [
    group([True, True, False], prompt=(3, 4, 5), lengths=[5, 2, 7]),
    group([True, True], prompt=(6,), lengths=[1, 4]),
    group([True, True, True, True], prompt=(7, 8), lengths=[2, 2, 6, 3]),
]


@pytest.mark.parametrize("kind", ["bridge", "pmatch"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_loss_and_gradients_are_those_of_the_plain_model(tmp_path, family, kind, checkpointing, budget, share_prompt):
    """Fails if a narrower group hears its fillers, or if a part of a batch is weighted by its own tokens."""
    plain, model = make_bridged(family, kind), make_bridged(family, kind)
    freeze_base(plain)
    expected = plain_loss(plain, RAGGED)
    expected.backward()
    args = sft_arguments(
        tmp_path,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=3,
        gradient_checkpointing=checkpointing,
    )
    [entry, _] = train_blocks(model, RAGGED, args, [], update=UpdateSection(share_prompt, token_budget=budget))
    assert entry["loss"] == pytest.approx(expected.item(), abs=1e-5)
    for (name, after), (_, before) in zip(br.bridge_parameters(model), br.bridge_parameters(plain), strict=True):
        gradient, wanted = (before - after).detach(), before.grad
        torch.testing.assert_close(gradient, wanted, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_only_the_blocks_learn_and_the_loss_falls(tmp_path):
    model = make_bridged("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = sft_arguments(tmp_path, max_steps=30, learning_rate=1e-2)
    history = train_blocks(model, [group([True, True]), group([True, True, True])], args, [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".bridge." not in name), name


def test_a_warmup_killed_behind_its_last_checkpoint_keeps_blocks_and_history(tmp_path):
    args = sft_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    groups = [group([True, True]), group([True, True, True])]
    whole, again = make_bridged("llama"), make_bridged("llama")
    history = train_blocks(whole, groups, args, [])
    assert train_blocks(again, groups, args, []) == [entry for entry in history if "train_runtime" not in entry] != []
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in whole.named_parameters())


def test_the_base_samples_the_data_and_the_file_gives_it_back(tmp_path):
    section = ModelSection("package://bridge_rl/tiny/model")
    tokenizer = load_tokenizer(section)
    model = br.attach_bridge(load_model(section), br.BridgeConfig(num_heads=2, head_dim=8))
    problems = make_problems(5)
    texts = [next(problems).text for _ in range(3)]
    rows = [{"prompt": [{"role": "user", "content": text}], "problem": text, "answer": "0"} for text in texts]

    def reward(completions, problem, **kwargs):
        return [float(is_correct(p, c[-1]["content"])) for p, c in zip(problem, completions, strict=True)]

    store = WarmupStore(tmp_path / "sampled")
    params = br.SamplingParams(32, seed=3, eos_token_id=eos_ids(model, tokenizer))
    sample_warmup_groups(model, tokenizer, rows, Judge(reward, str), 4, params, None, store, lambda: False)
    groups = list(store.read().values())
    assert [g.problem for g in groups] == texts
    with br.disable_bridge(model):
        sampled = br.generate_groups(model, [g.prompt_ids for g in groups], 4, params)
    assert [g.completion_ids for g in groups] == [g.tokens for g in sampled]
    assert all(len(g.completions) == 4 for g in groups)
    for g in groups:
        assert g.correct == [is_correct(g.problem, text) for text in g.completions]
    assert collect_groups(store, 3, tmp_path / "groups.jsonl") == groups
    assert not store.directory.exists()
    assert read_groups(tmp_path / "groups.jsonl") == groups


def test_the_base_samples_at_the_temperature_of_the_rollout(tmp_path):
    recipe = load_recipe(
        Path("recipes/tiny_arith.yaml"),
        [f"output_dir={tmp_path}", "warmup.problems=4", "warmup.samples=4", "rollout.temperature=0.01"],
    )
    tokenizer, model = load_tokenizer(recipe.model), load_policy(recipe)
    groups = warmup_groups(recipe, model, tokenizer, Judge.of(recipe.rewards[0]), Stop())
    assert sum(len({tuple(ids) for ids in group.completion_ids}) for group in groups) <= 6  # at 1 all 16 differ


def line(**changed):
    return json.dumps({**asdict(group([True, True])), **changed})


@pytest.mark.parametrize(
    "damaged",
    [
        "{broken",
        line(correct=[True]),
        line(completion_ids=[[1], []]),
        line(completion_ids=[["a"], ["b"]]),
        line(prompt_ids=[]),
        line(correct=["yes", "no"]),
        line(more=1),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = tmp_path / "groups.jsonl"
    write_groups(path, [group([True, True])])
    path.write_text(f"{path.read_text()}{damaged}\n")
    with pytest.raises(UserError, match="line 2"):
        read_groups(path)


def test_a_step_that_is_not_finite_ends_the_warmup_before_it_is_taken(tmp_path, monkeypatch):
    model, sound = make_bridged("llama"), BlockTrainer.cross_entropy

    def spoiled(self, *args):
        loss = sound(self, *args)
        return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(BlockTrainer, "cross_entropy", spoiled)
    args = sft_arguments(tmp_path, max_steps=4, logging_nan_inf_filter=False)
    with pytest.raises(UserError, match="step 3 is not finite, so it was not taken: lower"):
        train_blocks(model, [group([True, True]), group([True, True, True])], args, [])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_time_limit_learns_how_long_the_saves_of_a_warmup_take(tmp_path):
    stop = Stop()
    args = sft_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    train_blocks(make_bridged("llama"), [group([True, True])], args, [], stop)
    assert len(stop.saves) == 2
    assert stop.save_bytes > 0


def test_a_model_can_be_trained_again(tmp_path):
    model, groups = make_bridged("llama"), [group([True, True], prompt=(3, 4, 5)), group([True, True, True])]
    for place in ("once", "twice"):
        history = train_blocks(model, groups, sft_arguments(tmp_path / place, max_steps=1), [])
    assert history[0]["loss"] > 0


def test_a_directory_for_the_completions_is_refused_before_sampling(tmp_path):
    options = [f"output_dir={tmp_path / 'out'}", f"warmup.path={tmp_path}"]
    with pytest.raises(UserError, match="a directory: name a file in it"):
        warm_up(load_recipe("recipes/tiny_arith.yaml", options))
    assert not (tmp_path / "out").exists()


def test_zero_is_refused_on_one_process_too(tmp_path, monkeypatch):
    """Its shards were saved as blocks without elements."""
    monkeypatch.setattr("bridge_rl.run.uses_deepspeed", lambda: True)
    with pytest.raises(UserError, match="the warm-up runs without ZeRO and FSDP"):
        warm_up(load_recipe("recipes/tiny_arith.yaml", [f"output_dir={tmp_path}"]))
