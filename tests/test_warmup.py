"""The warm-up's data, its batches and what it trains."""

from pathlib import Path

import pytest
import torch
from conftest import make_bridged
from transformers import TrainingArguments

import bridge_rl as br
from bridge_rl.config import ModelSection, WarmupSection, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.run import eos_ids
from bridge_rl.models import load_model, load_policy, load_tokenizer
from bridge_rl.run import warmup_groups
from bridge_rl.stop import Stop
from bridge_rl.tiny import is_correct, make_problems
from bridge_rl.warmup import (
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
    assert batch["input_ids"].tolist() == [
        [3, 4, 10, 10],
        [3, 4, 11, 0],
        [3, 4, 12, 12],
        [0, 5, 10, 0],
        [0, 5, 11, 0],
        [0, 5, 10, 0],  # the filler
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, 10, 10],
        [-100, -100, 11, -100],
        [-100, -100, -100, -100],  # a wrong row: seen by its siblings, not learnt
        [-100, -100, 10, -100],
        [-100, -100, 11, -100],
        [-100, -100, -100, -100],
    ]
    assert batch["bridge_alive"].int().tolist() == [
        [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],  # nobody sees the filler
    ]


def test_a_filler_row_changes_nothing_for_the_real_ones():
    model = make_bridged("llama")
    narrow = group([True, True])
    with torch.no_grad():
        alone = model(**collate([narrow])).logits
        beside = model(**collate([narrow, group([True, True, True])])).logits
    torch.testing.assert_close(beside[:2], alone, atol=1e-5, rtol=0)


def test_only_the_blocks_learn_and_the_loss_falls(tmp_path):
    model = make_bridged("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    history = train_blocks(model, [group([True, True]), group([True, True, True])], args, [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".bridge." not in name), name


def test_a_warmup_killed_behind_its_last_checkpoint_keeps_blocks_and_history(tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
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


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "groups.jsonl"
    write_groups(path, [group([True, True])])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="line 2"):
        read_groups(path)
