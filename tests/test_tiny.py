"""The embedded tasks and their models."""

import random
from itertools import islice

import pytest

import bridge_rl as br
from bridge_rl.config import ModelSection
from bridge_rl.data import prompt_tokens
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.tiny import equations, products
from bridge_rl.tiny.make_base import TASKS, make_tokenizer
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


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("07*19=133;133*12=01596", True),
        ("12*19=228;228*07=01596", True),  # any order
        ("07*19=144;144*12=01596", True),  # the answer counts, not the way
        ("=1596", True),
        ("07*19=133;133*12=01597", False),
        ("07*19=133;133*12=01596;", False),
        ("07*19=133;133*12=", False),
        ("01596", False),
        ("", False),
    ],
)
def test_a_product_is_right_iff_it_ends_in_the_product(completion, right):
    assert equations.is_correct("1596", completion) is right


def test_splits_of_products_share_no_three_numbers_in_any_order():
    of_split = {
        split: {
            tuple(sorted(products.Problem.parse(row["problem"]).numbers)) for row in products.dataset(3, 2000, split)
        }
        for split in ("train", "validation", "test")
    }
    assert not of_split["train"] & of_split["test"]
    assert not of_split["train"] & of_split["validation"]
    assert not of_split["validation"] & of_split["test"]
    assert min(map(len, of_split.values())) > 300  # of 4060 in all


def test_products_are_repeatable_and_answered_by_what_they_multiply_to():
    assert products.dataset(7, 5) == products.dataset(7, 5) != products.dataset(8, 5)
    for row in products.dataset(7, 200):
        first, second, third = map(int, row["problem"].split("*"))
        assert row["answer"] == str(first * second * third)


def test_demonstrated_products_are_right_and_stand_at_fixed_columns():
    rng, problems = random.Random(0), products.make_problems(3)
    orders = set()
    for _ in range(200):
        problem = next(problems)
        text = products.demonstrate(problem, rng)
        assert equations.is_correct(str(problem.product), text)
        assert [place for place, character in enumerate(text) if character in "*=;"] == [2, 5, 9, 13, 16]
        first, second, rest = int(text[:2]), int(text[3:5]), int(text[14:16])
        assert sorted((first, second, rest)) == sorted(problem.numbers)
        assert first * second == int(text[6:9]) == int(text[10:13])
        orders.add(tuple(problem.numbers.index(number) for number in (first, second, rest)))
    assert len(orders) >= 6


@pytest.mark.parametrize(
    ("path", "task", "problem"), [("model", "two_tries", PROBLEM), ("products_model", "products", "07*12*19")]
)
def test_a_shipped_tokenizer_is_the_one_that_make_base_makes(path, task, problem):
    shipped = load_tokenizer(ModelSection(f"package://bridge_rl/tiny/{path}"))
    made = make_tokenizer(TASKS[task].characters)
    turns = [[{"role": "user", "content": problem}]]
    assert prompt_tokens(shipped, turns) == prompt_tokens(made, turns)
    assert shipped.decode(prompt_tokens(shipped, turns)[0]) == f"<bos>{problem}="


@pytest.mark.parametrize(("path", "task"), [("model", "two_tries"), ("products_model", "products")])
def test_a_shipped_base_solves_20_to_40_percent(path, task):
    section = ModelSection(f"package://bridge_rl/tiny/{path}")
    model, tokenizer = load_model(section), load_tokenizer(section)
    problems = list(islice(TASKS[task].make_held_out(99), 128))
    prompts = prompt_tokens(tokenizer, [[{"role": "user", "content": problem.text}] for problem in problems])
    params = br.SamplingParams(32, seed=0, eos_token_id=tokenizer.eos_token_id)
    groups = br.generate_groups(model, prompts, 8, params)
    right = [
        TASKS[task].is_correct(problem, tokenizer.decode(tokens, skip_special_tokens=True))
        for problem, group in zip(problems, groups, strict=True)
        for tokens in group.tokens
    ]
    assert 0.2 <= sum(right) / len(right) <= 0.4
