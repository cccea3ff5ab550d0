"""The embedded task and its model."""

import random

import pytest

import bridge_rl as br
from bridge_rl.config import ModelSection
from bridge_rl.data import prompt_tokens
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.tiny.make_base import make_tokenizer
from bridge_rl.tiny.task import Problem, dataset, demonstrate, is_correct, make_problems

PROBLEM = "12,35,27,19,31,22:49"


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("12+35=47;27+22=49:!27+22", True),
        ("12+35=47;27+22=49:!22+27", True),
        ("anything!27+22", True),  # the answer counts, not the way
        ("12+35=47;27+22=49:!12+35", False),  # another sum
        ("12+35=47;27+22=49:!30+19", False),  # the sum, but 30 is not in the list
        ("12+35=47;27+22=49:!27+22+", False),
        ("12+35=47;27+22=49:", False),
        ("", False),
    ],
)
def test_an_answer_is_right_iff_it_is_a_pair_of_the_list_with_the_sum(completion, right):
    assert is_correct(PROBLEM, completion) is right


def test_a_number_may_not_be_used_twice():
    assert not is_correct("20,11,12,13,14,15:40", "!20+20")


def test_problems_are_solvable_and_repeatable():
    problems = make_problems(7)
    for _ in range(200):
        problem = next(problems)
        assert len(set(problem.numbers)) == 6
        assert any(is_correct(problem.text, f"!{a}+{b}") for a in problem.numbers for b in problem.numbers)
        assert Problem.parse(problem.text) == problem
    assert dataset(7, 5) == dataset(7, 5)
    assert dataset(7, 5) != dataset(8, 5)


def test_training_and_held_out_problems_of_the_recipe_do_not_meet():
    train = {row["problem"] for row in dataset(10, 8192)}
    assert not train & {row["problem"] for row in dataset(11, 512)}


def test_demonstrations_have_one_length_and_copy_hits():
    rng, problems = random.Random(0), make_problems(3)
    for _ in range(200):
        problem = next(problems)
        text = demonstrate(problem, rng)
        assert len(text) == 24
        if ":" in text:
            assert is_correct(problem.text, text)


def test_the_shipped_tokenizer_is_the_one_that_make_base_makes():
    shipped, made = load_tokenizer(ModelSection("package://bridge_rl/tiny/model")), make_tokenizer()
    turns = [[{"role": "user", "content": PROBLEM}]]
    assert prompt_tokens(shipped, turns) == prompt_tokens(made, turns)
    assert shipped.decode(prompt_tokens(shipped, turns)[0]) == f"<bos>{PROBLEM}="


def test_the_shipped_base_solves_20_to_40_percent():
    section = ModelSection("package://bridge_rl/tiny/model")
    model, tokenizer = load_model(section), load_tokenizer(section)
    rows = dataset(99, 128)
    prompts = prompt_tokens(tokenizer, [[{"role": "user", "content": row["problem"]}] for row in rows])
    params = br.SamplingParams(32, seed=0, eos_token_id=tokenizer.eos_token_id)
    groups = br.generate_groups(model, prompts, 8, params)
    right = [
        is_correct(row["problem"], tokenizer.decode(tokens, skip_special_tokens=True))
        for row, group in zip(rows, groups, strict=True)
        for tokens in group.tokens
    ]
    assert 0.2 <= sum(right) / len(right) <= 0.4
