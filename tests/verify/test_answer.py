r"""What counts as the answer of a completion, and what is decided without a parser."""

import time

import pytest

from bridge_rl.verify.answer import (
    completion_text,
    count_boxes,
    extract_answer,
    find_answer,
    gold_answer,
    last_box,
)
from bridge_rl.verify.common_form import Answer, canonical, clean, for_worker
from bridge_rl.verify.decide import decide


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1}\boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5}. I put it in \boxed{} as asked.", "5"),
        (r"<think>\boxed{3}</think> It is \boxed{4}", "4"),
        (r"<think>\boxed{3}</think> Done.", "3"),
        (r"<think>\boxed{3}</think> I put it in \boxed{} as asked.", "3"),
        (r"<think>try \boxed{7}? no, 5</think> The answer is 5.", "5"),
        (r"<think>try \boxed{7}? no, 5</think> So we have it." + "\n#### 5", "5"),
        (r"<think>try \boxed{7}? no, 5</think> **5**", "5"),
        (r"\boxed{5} and the answer is 6", "5"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 5\n no\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### 7\n \n", "7"),
        ("1 + 6 = 7\n#### 7\n\nQuestion: The answer is 9?", "7"),  # which goes on as few-shot prompts do
        ("#### 8\n#### Check\n#### 1007 apples\nDone.", "1007"),
        ("#### Conclusion\n\nThe answer is 5.", "5"),
        ("#### Final Answer:\n\nThe answer is: $5$", "5"),
        ("The answer is 42.", "42"),
        ("The answer is 3.14.", "3.14"),
        ("The answer is: 42", "42"),
        ("**Answer:** 42", "42"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
        ("The answer is 41. Wait, the answer is 42.", "42"),
        (r"The answer is $2\sqrt{3}$, as shown above.", r"2\sqrt{3}"),
        ("Answer:\n$$\nx^2\n$$\nas claimed", "x^2"),
        ("the answer to this question is 5 apples", "5"),
        ("42", "42"),
        (" $x^2+1$ ", "x^2+1"),
        (r"2\sqrt{3}", r"2\sqrt{3}"),
        ("Monday", "Monday"),
        ("<think>the answer is 3</think>the answer is 4", "4"),
    ],
)
def test_marked_and_bare_answers_are_extracted(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("completion", ["", "   ", r"\boxed{42", r"\boxed{5} no, \boxed{6", r"\boxed{}", r"\boxed{ }"])
def test_open_and_empty_boxes_give_no_answer(completion):
    assert find_answer(completion) is None


def test_prose_is_left_to_the_worker_and_cut():
    found = find_answer("blah blah " * 1000 + "which makes 7")
    assert found is not None
    assert found.prose
    assert found.text.endswith("which makes 7")
    assert len(found.text) <= 320
    assert extract_answer("we count and see that it makes 7") is None


def test_prose_after_a_mark_keeps_the_mark_for_math_verify():
    assert find_answer("The answer is 42, since there are 7 days") == Answer(
        "The answer is 42, since there are 7 days", prose=True
    )


def test_undelimited_latex_in_prose_is_not_cut_down_to_a_number():
    assert find_answer(r"we see that x is 2\sqrt{3}") is None


def test_an_answer_beyond_the_cap_is_none_rather_than_cut():
    assert find_answer(r"\boxed{" + "1" * 1001 + "}") is None
    assert gold_answer("1" * 1001) is None


def test_a_box_in_a_box_counts_as_the_outer():
    assert last_box(r"\boxed{a\boxed{b}}") == r"a\boxed{b}"


@pytest.mark.parametrize(
    ("text", "count"), [("none", 0), (r"\boxed{1}", 1), (r"\boxed{1} \boxed{2}", 2), (r"\boxed{", None)]
)
def test_boxes_are_counted(text, count):
    assert count_boxes(text) == count


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        (r"10\,000", "10000"),
        ("10{,}000", "10000"),
        (r"11,\! 111", "11111"),
        ("1 234 567", "1234567"),
        ("1,234,567.5", "1234567.5"),
        (r"\frac{10\,000}{3}", r"\frac{10000}{3}"),
        ("(1,200)", "(1,200)"),
        ("1, 200", "1, 200"),
        ("1e3", r"1\times 10^{3}"),
        ("2.5E-4", r"2.5\times 10^{-4}"),
        ("2e", "2e"),
        (r"0.\overline{3}", r"\frac{1}{3}"),
        (r"0.1\overline{6}", r"\frac{1}{6}"),
        (r"0.\overline{142857}", r"\frac{1}{7}"),
        (r"\varnothing", r"\emptyset"),
        ("(3,oo)", r"(3,\infty )"),
        ("foot", "foot"),
        ("**42**", "42"),
        ("$$42$$", "42"),
        (r"\(42\)", "42"),
        (r"$1$ and $2$", r"$1$ and $2$"),
        ("42.", "42"),
        ("42 apples", "42"),
        ("12 square units", "12"),
        ("5 million", "5 million"),
        ("5 percent", "5 percent"),
        ("2 pi", r"2 \pi"),
        ("\N{MINUS SIGN}3", "-3"),
        (r"\displaystyle 7", "7"),
    ],
)
def test_clean_keeps_the_meaning(written, cleaned):
    assert clean(written) == cleaned


def test_canonical_ignores_spacing_size_and_decoration():
    assert canonical(r"\left( 3,\, \dfrac{1}{2} \right)") == canonical(r"(3,\frac{1}{2})")
    assert canonical("1 2") != canonical("12")


@pytest.mark.parametrize(
    ("prediction", "gold", "verdict"),
    [
        ("42", "42", True),
        ("042", "42", True),
        ("42", "43", False),
        ("42.0", "42", True),
        ("42.5", "42", False),
        (r"\frac{2}{4}", "1/2", True),
        (r"-\frac{1}{2}", "-0.5", True),
        ("1/2", "1/3", False),
        ("0.333333", r"\frac{1}{3}", True),
        ("0.33", r"\frac{1}{3}", False),
        ("2e-8", "1e-8", False),
        ("1e-8", "0.00000001", True),
        ("1e3", "1000", True),
        ("101_2", "101_3", False),
        ("101_2", "101_{2}", True),
        ("101_2", "5_{10}", True),
        (r"\text{Monday}", "monday", True),
        ("dynamo", "Monday", False),
        (r"\text{No Solution}", "no solution", True),
        ("x", "42", None),
        ("xyz", "zyx", None),
        ("a_{12}", "a_{11}", None),
        ("1/0", "1", None),
    ],
)
def test_numbers_and_words_are_decided_without_a_worker(prediction, gold, verdict):
    assert decide(Answer(clean(prediction)), Answer(clean(gold))) is verdict


@pytest.mark.parametrize("gold", ["", "  ", "$$", r"\frac{1}{", "}", "{", r"a}{b"])
def test_empty_and_unbalanced_gold_is_none(gold):
    assert gold_answer(gold) is None


def test_gold_that_comes_boxed_is_unwrapped():
    assert gold_answer(r"\boxed{5}") == Answer("5")


def test_completions_of_both_kinds_give_their_text():
    assert completion_text("a") == completion_text([{"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([]) == completion_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 20_000,
        "answer is " * 20_000,
        "answer: " + ":" * 100_000,
        "答案是 " * 20_000,
        "#" * 100_000,
        "#" * 100_000 + "\nx",
        "$" * 100_001,
        r"\text{" * 20_000,
        r"\text" + " " * 100_000 + "x",
        "{" * 100_000,
        "the " * 50_000 + r"\(" * 20_000,
        "1" * 999 + "x",
        "1 " + "a" * 990 + "1",
        r"\boxed{" + "1," * 490 + "}",
        r"\boxed{" + "9" * 990 + "." + "}",
        r"\boxed{1" + " " * 900 + "1}",
        "\x00" * 1000,
    ],
    ids=range(17),
)
def test_extraction_and_the_fast_path_take_no_time_on_any_text(text):
    start = time.perf_counter()
    answer = find_answer(text)
    if answer is not None:
        canonical(answer.text)
        for_worker(answer)
        decide(answer, Answer("42"))
    assert time.perf_counter() - start < 1.0


def test_units_in_a_row_take_no_time():
    """Two gaps side by side would be parted in as many ways as there are blanks, for each of the units."""
    started = time.perf_counter()
    for prose in (False, True):
        for_worker(Answer("5" + r"\text{a}  " * 100 + "x", prose))
    assert time.perf_counter() - started < 1
