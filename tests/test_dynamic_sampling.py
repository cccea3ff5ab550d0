"""Prompts without a signal give way to others, and what is trained on is what a slow selection would choose."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_bridged
from datasets import Dataset
from trainers import quiet_config

from bridge_rl.config import DynamicSampling, ModelSection, load_recipe
from bridge_rl.dynamic_sampling import DynamicSampler, choose, has_signal, total_rewards
from bridge_rl.errors import UserError
from bridge_rl.group import groups_of
from bridge_rl.models import load_tokenizer
from bridge_rl.report import names
from bridge_rl.trainer import BridgeGRPOTrainer

WIDTH, GENERATIONS = 4, 8
PROMPTS = [f"<bos>{n}{n}:{m}=" for n in range(10) for m in ("1", "22", "333")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))


def hard(prompts, completion_ids, log_extra=lambda *a: None, log_metric=lambda *a: None, **kwargs):
    """No signal for a third of the problems, whatever is said, and now and then for others."""
    rewards = [
        0.0 if ":1=" in prompt else float(ids[0] % 5 == 0) for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]
    log_extra("first_token", [ids[0] for ids in completion_ids])
    log_metric("mean_first_token", sum(ids[0] for ids in completion_ids) / len(completion_ids))
    return rewards


def never(prompts, **kwargs):
    return [1.0] * len(prompts)


class Recording(BridgeGRPOTrainer):
    """Keeps what was sampled, by prompt and group index, and what TRL was given in the end."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rounds, self.batches, self.scored = [], [], 0

    def _generate(self, prompts):
        ready = self._ready is not None
        output = super()._generate(prompts)
        if not ready:
            self.rounds.append({"prompts": prompts, "ids": output[1], "groups": output[5]["group_index"]})
        return output

    def _calculate_rewards(self, inputs, *args):
        self.scored += 0 if self._ready else len(inputs)
        return super()._calculate_rewards(inputs, *args)

    def _generate_and_score_completions(self, inputs):
        self.rounds = []
        given = [example["prompt"] for example in inputs]
        batch = super()._generate_and_score_completions(inputs)
        self.batches.append((given, self.rounds, batch))
        return batch


def make_trainer(tokenizer, tmp_path, dynamic=None, reward=hard, data=PROMPTS, cls=Recording, **options):
    return cls(
        make_bridged("llama"),
        [reward],
        quiet_config(tmp_path, **{"per_device_train_batch_size": 32, "max_steps": 3, **options}),
        width=WIDTH,
        dynamic_sampling=dynamic,
        train_dataset=Dataset.from_dict({"prompt": data}),
        processing_class=tokenizer,
    )


def rows_of(batch, key):
    mask = "prompt_mask" if key.startswith("prompt") else "completion_mask"
    ids, kept = batch[key].flatten(0, 1), batch[mask].flatten(0, 1).bool()
    return [row[alive].tolist() for row, alive in zip(ids, kept, strict=True)]


def slow_selection(given, rounds, max_rounds):
    """What should be trained on: [(prompt, completions)] a slot, by looking at one candidate after the other."""
    sampled = [
        (prompts[0], ids)
        for x in rounds
        for prompts, ids in zip(groups_of(x["prompts"], GENERATIONS), groups_of(x["ids"], GENERATIONS), strict=True)
    ]
    slots, candidates = sampled[: len(given) // GENERATIONS], sampled[len(given) // GENERATIONS :]

    def signal(prompt, ids):
        return len(set(hard([prompt] * GENERATIONS, ids))) > 1

    for _ in range(max_rounds):
        empty = [slot for slot, entry in enumerate(slots) if not signal(*entry)]
        batch, candidates = candidates[: len(empty)], candidates[len(empty) :]
        for slot, entry in zip(empty, [entry for entry in batch if signal(*entry)], strict=False):
            slots[slot] = entry
    assert not candidates  # nothing was sampled that was not looked at
    return slots


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_the_batch_is_the_one_that_a_slow_selection_gives(tokenizer, tmp_path, max_rounds):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(max_rounds))
    trainer.train()
    assert sum(len(rounds) for _, rounds, _ in trainer.batches) > 3  # some were sampled again
    for given, rounds, batch in trainer.batches:
        expected = slow_selection(given, rounds, max_rounds)
        prompts = [tokenizer(prompt).input_ids for prompt, _ in expected for _ in range(GENERATIONS)]
        completions = [ids for _, group in expected for ids in group]
        assert rows_of(batch, "prompt_ids") == prompts
        assert rows_of(batch, "completion_ids") == completions
        rewards = torch.tensor(hard([p for p, _ in expected for _ in range(GENERATIONS)], completions))
        assert batch["rewards"].flatten().tolist() == rewards.tolist()
        of_prompt = rewards.view(-1, GENERATIONS)
        advantages = (of_prompt - of_prompt.mean(1, keepdim=True)) / (of_prompt.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(batch["advantages"].flatten(), advantages.flatten())
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_no_problem_is_twice_in_a_batch_and_no_group_draws_what_another_drew(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(3))
    trainer.train()
    for _, rounds, batch in trainer.batches:
        prompts = [prompt for x in rounds for prompt in x["prompts"][::GENERATIONS]]
        assert len(set(prompts)) == len(prompts)
        groups = [group for x in rounds for group in x["groups"][::WIDTH]]
        assert groups == list(range(len(groups)))
        for rows in batch["prompt_ids"]:
            assert (rows == rows[0]).all()


def test_every_generation_batch_has_an_order_of_candidates_of_its_own(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(1))
    orders = []
    for trainer._step in (0, 1):
        orders.append([example["prompt"] for example in trainer._dynamic._order(set())])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(PROMPTS)


def test_log_probs_of_the_sampling_go_along(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(3))
    trainer.train()
    found = [entry[names.RECOMPUTE_KL] for entry in trainer.state.log_history if names.RECOMPUTE_KL in entry]
    assert len(found) == 3
    assert max(map(abs, found)) < 1e-6


def test_what_was_sampled_is_counted(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(2), log_completions=True)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (given, rounds, batch) in zip(entries, trainer.batches, strict=True):
        first = [ids[0] for ids in rounds[0]["ids"]]
        assert entry["mean_first_token"] == pytest.approx(sum(first) / len(first))
        rows = sum(len(x["prompts"]) for x in rounds)
        tokens = sum(len(ids) for x in rounds for ids in x["ids"])
        slots = len(given) // GENERATIONS
        assert entry[names.DYNAMIC_SAMPLED] == rows / GENERATIONS
        assert entry[names.DYNAMIC_DROPPED] == rows / GENERATIONS - slots
        assert entry[names.DYNAMIC_ROUNDS] == len(rounds) - 1
        unfilled = entry[names.DYNAMIC_UNFILLED]
        assert unfilled == sum(len(set(x)) == 1 for x in batch["rewards"].view(-1, GENERATIONS).tolist())
        assert entry["frac_reward_zero_std"] == unfilled / slots
        first = hard(given, rounds[0]["ids"])
        assert entry[names.DYNAMIC_REWARD] == pytest.approx(sum(first) / len(first))
        assert entry[names.PROMPT_ALL_WRONG] == sum(not any(x) for x in groups_of(first, GENERATIONS)) / slots
        assert entry[names.PROMPT_ALL_RIGHT] == sum(all(x) for x in groups_of(first, GENERATIONS)) / slots
        lengths = [len(ids) for ids in rounds[0]["ids"]]
        assert entry["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert entry[names.ROLLOUT_SECONDS] * entry[names.ROLLOUT_TOKENS_PER_SECOND] == pytest.approx(tokens)
    assert trainer.scored == sum(len(x["prompts"]) for _, rounds, _ in trainer.batches for x in rounds)
    ids = [row[0] for _, _, batch in trainer.batches for row in rows_of(batch, "completion_ids")]
    assert list(trainer._logs["extra"]["first_token"])[-32:] == ids[-32:]


def test_where_every_prompt_has_a_signal_nothing_changes(tokenizer, tmp_path):
    def easy(completion_ids, **kwargs):
        return [sum(ids) + len(ids) / 100 for ids in completion_ids]

    runs = []
    for dynamic in (None, DynamicSampling(2)):
        runs.append(make_trainer(tokenizer, tmp_path, dynamic, easy))
        runs[-1].train()
    assert {len(rounds) for _, rounds, _ in runs[1].batches} == {1}
    expected = dict(runs[0].model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in runs[1].model.named_parameters())


def test_without_any_signal_the_rounds_end_and_the_batch_is_full(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(2), never, max_steps=1)
    trainer.train()
    [(_, rounds, batch)] = trainer.batches
    assert [len(x["prompts"]) for x in rounds] == [32, 32, 32]
    assert rows_of(batch, "completion_ids") == rounds[0]["ids"]
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry[name] for name in names.DYNAMIC] == [12, 8, 4, 2, 1.0]


def test_where_the_data_end_the_rounds_end(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(5), never, PROMPTS[:6], max_steps=1)
    trainer.train()
    [(_, rounds, _)] = trainer.batches
    assert [len(x["prompts"]) for x in rounds] == [32, 16]


@pytest.mark.parametrize("unit", [2, 4])
def test_where_the_data_end_in_the_middle_of_a_unit_the_rest_is_looked_at_too(tokenizer, tmp_path, unit):
    """As where ranks share a prompt's rows: 3 candidates for 4 slots, each with a signal."""
    batches = []
    for several in (1, unit):
        first: set[str] = set()

        def later(prompts, first=first, **kwargs):
            first.update(prompts if not first else ())
            return [0.0 if prompt in first else float(row % 2) for row, prompt in enumerate(prompts)]

        trainer = make_trainer(tokenizer, tmp_path, DynamicSampling(5), later, PROMPTS[:7], max_steps=1)
        trainer._dynamic.unit = several
        trainer.train()
        [(_, rounds, batch)] = trainer.batches
        assert [len(x["prompts"]) for x in rounds] == [32, 24 if several == 1 else 32]
        [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry[name] for name in names.DYNAMIC] == [7, 3, 1, 1, 0.0]
        batches.append([rows_of(batch, key) for key in ("prompt_ids", "completion_ids")])
    assert batches[0] == batches[1]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_ends_with_the_same_weights(tokenizer, tmp_path, stop):
    """Two iterations over batches that serve two updates: from the middle of a generation batch and from its end."""
    options = {
        "per_device_train_batch_size": 16,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 9,
        "save_steps": stop,
        "save_strategy": "steps",
    }
    whole = make_trainer(tokenizer, tmp_path, DynamicSampling(2), **options)
    whole.train()
    resumed = make_trainer(tokenizer, tmp_path, DynamicSampling(2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert any(len(rounds) > 1 for _, rounds, _ in resumed.batches)
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("unit", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(20))
def test_the_choice_does_not_depend_on_how_many_are_sampled_at_once(seed, unit):
    """Ranks sample candidates in whole units, so more than are missing."""
    generator = torch.Generator().manual_seed(seed)
    available = (torch.rand(60, generator=generator) < 0.3).tolist()
    missing, max_rounds = int(torch.randint(1, 12, (), generator=generator)), 4
    sampled = []

    def sample_to(number):
        while len(sampled) < number:
            sampled.extend(available[len(sampled) :][:unit])
        return sampled

    chosen, rounds = choose(missing, max_rounds, sample_to)
    expected, seen = [], 0
    for _ in range(max_rounds):
        for number in range(seen, seen + missing - len(expected)):
            seen = number + 1
            if available[number]:
                expected = [*expected, number]
        if len(expected) == missing:
            break
    # The slow one reads the bound once a round, as `range` does.
    assert chosen == expected
    assert rounds <= max_rounds


@pytest.mark.parametrize(("dynamic", "rounds"), [(None, 0), (DynamicSampling(2), 0), (DynamicSampling(2), 1)])
@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_column_without_one_value_a_row_is_named(tokenizer, tmp_path, dynamic, rounds, surplus):
    """Without dynamic sampling, in its first round, and in a further one."""
    calls = []

    def careless(prompts, log_extra, **kwargs):
        calls.append(prompts)
        log_extra("length", [0] * (len(prompts) + surplus * (len(calls) > rounds)))
        return [1.0] * len(prompts)

    trainer = make_trainer(tokenizer, tmp_path, dynamic, careless)
    given = f"gave {32 + surplus} values for 32 completions: give one for each"
    with pytest.raises(UserError, match=rf"log_extra\('length'\) of the rewards {given}"):
        trainer.train()
    assert len(calls) == rounds + 1


@pytest.mark.parametrize(("ranks", "unit"), [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_a_unit_of_candidates_is_of_whole_groups_on_every_rank(ranks, unit):
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=ranks),
        width=WIDTH,
        num_generations=GENERATIONS,
        args=SimpleNamespace(generation_batch_size=4 * GENERATIONS),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    assert DynamicSampler(trainer, DynamicSampling(2)).unit == unit


def test_rows_without_a_score_are_no_signal():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0], [0.5, nan], [nan, nan], [nan, 1.0], [nan, nan], [nan, nan]])
    totals = total_rewards(rewards, torch.tensor([2.0, 1.0]))
    assert torch.equal(totals.nan_to_num(-1.0), torch.tensor([3.0, 1.0, -1.0, 1.0, -1.0, -1.0]))
    assert has_signal(totals, 2) == [True, False, False]


def test_too_few_problems_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data.train has 4 problems and a generation batch takes 4"):
        make_trainer(tokenizer, tmp_path, DynamicSampling(2), data=PROMPTS[:4])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollout.dynamic_sampling.max_rounds=0", "max_rounds is 0: it must be at least 1"),
        ("rollout.dynamic_sampling.rounds=2", "unknown key 'rollout.dynamic_sampling.rounds'"),
        ("training.multi_objective_aggregation=normalize_then_sum", "leave one of them out"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(override, reason):
    with pytest.raises(UserError, match=reason):
        load_recipe("recipes/tiny_arith.yaml", ["rollout.dynamic_sampling={max_rounds: 2}", override])
