"""The embedded tasks and their models."""

import random
import re
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest

import bridge_rl as br
from bridge_rl.config import ModelSection
from bridge_rl.data import prompt_tokens
from bridge_rl.demo import place_of_demo
from bridge_rl.errors import UserError
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.tiny import checked_products, equations, make_base, products, word_problems
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
        ("=" + "0" * 9000 + "1596", True),
        ("=" + "9" * 9000, False),  # longer than Python reads as a number
        ("07*19=133;133*12=01596\n", False),
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


def test_distinct_problems_are_those_of_the_split_once_each_until_there_are_no_more():
    rows = products.dataset(11, 512, "test", distinct=True)
    texts = [row["problem"] for row in rows]
    assert len(set(texts)) == 512
    assert len({row["problem"] for row in products.dataset(11, 512, "test")}) < 512
    assert [products.Problem.parse(text).split for text in texts] == ["test"] * 512
    assert products.dataset(11, 100, "test", distinct=True) == rows[:100]
    with pytest.raises(UserError, match=r"only \d+ different problems, not 9999"):
        products.dataset(11, 9999, "test", distinct=True)


def test_a_demo_that_was_cut_off_goes_on_where_it_was_and_overwrites_no_other(tmp_path):
    path = tmp_path / "demo"
    assert place_of_demo(path) == path
    (path / "base" / "samples").mkdir(parents=True)
    assert place_of_demo(path) == path
    (path / "demo.json").write_text("{}")
    (tmp_path / "demo-2").mkdir()  # of something else
    assert place_of_demo(path) == tmp_path / "demo-3"


def test_a_demo_in_the_directory_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert place_of_demo(Path(".")) == tmp_path / "here-2"
    with pytest.raises(UserError, match="--output is /: name a directory"):
        place_of_demo(Path("/"))


def test_a_base_that_could_not_be_written_is_not_trained(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["make_base", "two_tries", "--output", str(tmp_path / "file")])
    monkeypatch.setattr(make_base, "batches", lambda *args: pytest.fail("trained"))
    with pytest.raises(FileExistsError):
        make_base.main()


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


def test_a_check_casts_out_nines():
    assert checked_products.check("19*07=133;133*12=01596") == "%17733%01663:"
    assert checked_products.check("19*07=133;133*12=01597") == "%17733%01664;"
    assert checked_products.check("09*29=261;261*02=00522") == "%02020%00570:"
    assert checked_products.check("19*07=133;133*12=01569") == "%17733%01633:"  # not every error is found


def test_demonstrated_checks_mark_every_error_and_the_answer_is_right():
    rng, problems = random.Random(0), checked_products.make_problems(3)
    wrong = 0
    for _ in range(400):
        problem = next(problems)
        text = checked_products.demonstrate(problem, rng)
        assert len(text) == 41
        assert equations.is_correct(str(problem.product), text)
        steps, mark = text[:22], text[34]
        spoilt = int(steps[17:]) != problem.product
        assert mark == (";" if spoilt else ":")
        assert text[22:35] == checked_products.check(steps)
        assert equations.is_correct(str(problem.product), steps) is not spoilt
        learned = checked_products.is_learned(problem, text)
        assert [column for column, learn in enumerate(learned) if not learn] == (list(range(17, 22)) if spoilt else [])
        wrong += spoilt
    assert 150 < wrong < 250


def test_a_base_has_labels_for_its_solutions_but_not_for_what_they_have_wrong():
    task = TASKS["checked_products"]
    tokenizer = make_tokenizer(task)
    input_ids, labels = next(make_base.batches(task, tokenizer, 64))
    lengths = set()
    for ids, row_labels in zip(input_ids.tolist(), labels.tolist(), strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        prompt, solution = text[:8], text[9:]
        product = checked_products.Problem.parse(prompt).product
        end = ids.index(tokenizer.eos_token_id)
        learned = [place for place, label in enumerate(row_labels) if label != -100]
        assert [row_labels[place] for place in learned] == [ids[place] for place in learned]
        spoilt = set() if int(solution[17:22]) == product else {10 + place for place in range(17, 22)}
        assert set(learned) == set(range(10, end + 1)) - spoilt
        lengths.add(len(learned))
    assert lengths == {42, 37}


@pytest.mark.parametrize("number", word_problems.TEMPLATES)
def test_a_word_problem_asks_for_what_reasoning_gym_says_is_its_answer(number, monkeypatch):
    made = []
    generate = word_problems._generators()[number]

    def remembered(rng, difficulty):
        made.append(generate(rng, difficulty))
        return made[-1]

    monkeypatch.setattr(word_problems, "TEMPLATES", {number: word_problems.TEMPLATES[number]})
    monkeypatch.setattr(word_problems, "_generators", lambda: {number: remembered})
    for problem in islice(word_problems.make_problems(4), 200):
        assert problem.text == made[-1]["question"]
        assert problem.answer == float(made[-1]["answer"])


def test_demonstrated_word_problems_are_true_equations_of_the_problem_in_many_orders():
    rng, orders = random.Random(0), defaultdict(set)
    for problem in islice(word_problems.make_problems(3), 600):
        text = word_problems.demonstrate(problem, rng)
        known = {2, 7, *(value for _, value in problem.values)}  # two twins, seven days
        for step in text.split(";"):
            left, sign, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()
            assert {int(left), int(right)} <= known  # said in the problem, or worked out before
            assert eval(f"{left}{sign}{right}") == int(result)
            known.add(int(result))
        assert equations.is_correct(str(problem.answer), text)
        orders[problem.template].add("".join(sign for sign in text if sign in "+-*"))
    assert sorted(orders) == sorted(word_problems.TEMPLATES)
    # Signs come in another order where terms of two kinds can be worked out in any.
    assert {number: len(found) for number, found in orders.items() if len(found) > 1} == {
        7: 2, 9: 2, 44: 2, 57: 3, 67: 2, 71: 2,
    }  # fmt: skip


@pytest.mark.parametrize("values", [(2, 3, 5), (7, 7, 7), (1, 10, 100)])
def test_any_two_terms_of_a_product_may_be_multiplied_first(values):
    problem = word_problems.Problem(58, "", tuple(zip(["calories", "num_containers", "volume"], values, strict=True)))
    rng = random.Random(0)
    firsts = {word_problems.demonstrate(problem, rng).partition("=")[0] for _ in range(200)}
    assert firsts == {f"{a}*{b}" for i, a in enumerate(values) for j, b in enumerate(values) if i != j}


def test_splits_of_word_problems_share_no_text():
    of_split = {
        split: {problem.text for problem in islice(word_problems.make_problems(3, split), 3000)}
        for split in ("train", "validation", "test")
    }
    assert not of_split["train"] & of_split["test"]
    assert not of_split["train"] & of_split["validation"]
    assert not of_split["validation"] & of_split["test"]


def test_distinct_word_problems_have_no_numbers_of_a_template_twice():
    def numbers(distinct):
        rows = word_problems.dataset(11, 512, "test", distinct=distinct)
        assert len(rows) == 512
        return [re.findall(r"\d+", row["problem"]) for row in rows if "cash register" in row["problem"]]

    assert len(numbers(distinct=True)) == len(set(map(tuple, numbers(distinct=True))))
    assert len(numbers(distinct=False)) > len(set(map(tuple, numbers(distinct=False))))


def test_word_problems_are_repeatable_and_need_reasoning_gym(monkeypatch):
    assert word_problems.dataset(7, 5) == word_problems.dataset(7, 5) != word_problems.dataset(8, 5)
    monkeypatch.setitem(sys.modules, "reasoning_gym.arithmetic.gsm_symbolic.generators_00_49", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        word_problems.dataset(7, 5)


BASES = [
    ("model", "two_tries"),
    ("products_model", "products"),
    ("word_problems_model", "word_problems"),
    ("checked_products_model", "checked_products"),
]


@pytest.mark.parametrize(("path", "task"), BASES)
def test_a_shipped_tokenizer_is_the_one_that_make_base_makes_and_knows_its_task(path, task):
    shipped = load_tokenizer(ModelSection(f"package://bridge_rl/tiny/{path}"))
    made = make_tokenizer(TASKS[task])
    assert shipped.get_vocab() == made.get_vocab()
    assert shipped.model_max_length == made.model_max_length
    rng = random.Random(0)
    for problem in islice(TASKS[task].make_held_out(99), 300):
        turns = [[{"role": "user", "content": problem.text}]]
        tokens = prompt_tokens(shipped, turns)
        assert tokens == prompt_tokens(made, turns)
        assert shipped.decode(tokens[0]) == f"<bos>{''.join(problem.text.split())}="
        assert shipped.unk_token_id not in tokens[0]
        solution = TASKS[task].demonstrate(problem, rng)
        ids = shipped(solution)["input_ids"]
        assert ids == made(solution)["input_ids"]
        assert shipped.decode(ids) == solution
        assert len(ids) < TASKS[task].max_new_tokens
        assert len(tokens[0]) + TASKS[task].max_new_tokens <= shipped.model_max_length


@pytest.mark.parametrize(
    ("path", "task", "most"), [(*base, most) for base, most in zip(BASES, (0.4, 0.4, 0.5, 0.4), strict=True)]
)
def test_a_shipped_base_solves_a_part_of_its_problems(path, task, most):
    section = ModelSection(f"package://bridge_rl/tiny/{path}")
    model, tokenizer = load_model(section), load_tokenizer(section)
    problems = list(islice(TASKS[task].make_held_out(99), 128))
    prompts = prompt_tokens(tokenizer, [[{"role": "user", "content": problem.text}] for problem in problems])
    params = br.SamplingParams(TASKS[task].max_new_tokens, seed=0, eos_token_id=tokenizer.eos_token_id)
    groups = br.generate_groups(model, prompts, 8, params)
    right = [
        TASKS[task].is_correct(problem, tokenizer.decode(tokens, skip_special_tokens=True))
        for problem, group in zip(problems, groups, strict=True)
        for tokens in group.tokens
    ]
    assert 0.2 <= sum(right) / len(right) <= most  # room for training to show in


@pytest.mark.parametrize("task", ["two_tries", "word_problems", "checked_products"])  # of one length, padded, spoilt
def test_a_base_of_any_size_is_trained_until_it_is_as_good_as_asked_for(task, tmp_path, monkeypatch, capsys):
    sizes = ["--hidden-size", "32", "--layers", "2", "--heads", "2", "--batch-size", "8"]
    steps = ["--max-steps", "40", "--check-every", "20"]
    monkeypatch.setattr(make_base, "pass_at_1", lambda *args: 0.3)
    monkeypatch.setattr("sys.argv", ["make_base", task, "--output", str(tmp_path), "--stop-at", "0.3", *sizes, *steps])
    make_base.main()
    assert "step 20 " in capsys.readouterr().out
    config = load_model(ModelSection(str(tmp_path))).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)


def test_a_base_is_measured_over_prompts_of_unequal_lengths():
    task = TASKS["word_problems"]
    section = ModelSection("package://bridge_rl/tiny/word_problems_model")
    found = make_base.pass_at_1(task, load_model(section), load_tokenizer(section), 64)
    assert 0.2 <= found <= 0.6
