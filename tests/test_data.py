"""Problems from files and functions, and how they become prompts."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from bridge_rl.config import DataSection, DataSource, ModelSection
from bridge_rl.data import GIVEN_TO_REWARDS, TAKEN_BY_TRL, load_problems, make_prompts, prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.models import load_tokenizer
from bridge_rl.tiny.task import dataset

TOKENIZER = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
ROWS = [{"problem": f"{n}+{n}", "answer": str(2 * n)} for n in range(10)]


def of_a_base():
    """A tokenizer without a chat template."""
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    tokenizer.chat_template = None
    return tokenizer


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_a_file_does_not_read_is_refused(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "1+1", "answer": "2"}])
    with pytest.raises(UserError, match=r"data.train.split is 'test', but .* is a file, which has none: set .*=train"):
        load(path, split="test")


def load(path, seed=0, **options):
    return load_problems(DataSource(path, **{"check_answers": False, **options}), "data.train", seed)


def test_json_lines_are_read_in_order(tmp_path):
    assert load(jsonl(tmp_path / "p.jsonl", ROWS)) == ROWS


def test_blank_lines_and_unicode_separators_do_not_cut_rows(tmp_path):
    rows = [{"problem": "a\u2028b", "answer": "1"}, {"problem": "c", "answer": "2"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    assert load(str(tmp_path / "p.jsonl")) == rows


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_the_mark_and_line_ends_of_windows_are_read_over(name, tmp_path):
    text = json.dumps(ROWS) if name == "p.json" else "".join(json.dumps(row) + "\r\n" for row in ROWS)
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert load(str(tmp_path / name)) == ROWS


def test_a_json_list_is_read(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(ROWS, indent=2))
    assert load(str(tmp_path / "p.json")) == ROWS


def test_parquet_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    assert load(str(tmp_path / "p.parquet")) == ROWS


def test_a_function_is_called_with_its_arguments():
    rows = load("bridge_rl.tiny.task:dataset", kwargs={"seed": 3, "size": 5})
    assert rows == dataset(seed=3, size=5)
    assert len(rows) == 5


def rows_with_more(size):
    return [{"problem": f"p{n}", "answer": n, "task": "t", "entry": {"n": n}} for n in range(size)]


def test_the_other_columns_of_a_functions_rows_are_kept_for_its_reward():
    rows = load("test_data:rows_with_more", kwargs={"size": 2})
    assert rows == [{"problem": f"p{n}", "answer": str(n), "task": "t", "entry": {"n": n}} for n in range(2)]


def rows_of_two_kinds():
    return [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2", "level": 3}]


def test_a_column_that_only_later_rows_have_reaches_the_reward():
    prompts = make_prompts(load("test_data:rows_of_two_kinds"), DataSection(DataSource("")), of_a_base())
    assert prompts["level"] == [None, 3]


def rows_with(column):
    return [{"problem": "p", "answer": "1", column: "x"}]


@pytest.mark.parametrize(
    "column",
    [*GIVEN_TO_REWARDS, *TAKEN_BY_TRL],
)
def test_a_column_called_as_what_the_trainer_makes_or_reads_is_refused(column):
    with pytest.raises(UserError, match=rf"data.train.path: the rows of test_data:rows_with have a column '{column}'"):
        load("test_data:rows_with", kwargs={"column": column})


@pytest.mark.parametrize("column", ["name", "function"])
def test_other_columns_may_have_any_name(column):
    [row] = load("test_data:rows_with", kwargs={"column": column})
    assert row[column] == "x"


def test_a_function_may_give_its_problems_as_prompts():
    rows = load("test_data:rows_with", kwargs={"column": "prompt"}, problem_column="prompt")
    assert rows == [{"problem": "x", "answer": "1"}]


def test_only_problem_and_answer_are_kept_under_these_names(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"id": 1, "question": "1+1", "solution": 2}])
    assert load(path, problem_column="question", answer_column="solution") == [{"problem": "1+1", "answer": "2"}]


def test_the_answer_of_gsm8k_follows_its_hashes(tmp_path):
    worked = "48/2 = <<48/2=24>>24 clips in May.\nAltogether <<48+24=72>>72.\n#### 72"
    path = jsonl(
        tmp_path / "p.jsonl", [{"question": "q", "answer": worked}, {"question": "r", "answer": "#### 1,200 "}]
    )
    rows = load(path, problem_column="question", answer_pattern="#### (.+)")
    assert [row["answer"] for row in rows] == ["72", "1,200"]


def test_an_answer_that_the_pattern_does_not_match_names_its_row(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "a", "answer": "#### 1"}, {"problem": "b", "answer": "2"}])
    with pytest.raises(UserError, match=r"data.train.answer_pattern: row 1 of .*p.jsonl"):
        load(path, answer_pattern="#### (.+)")


def test_a_pattern_whose_group_matches_nothing_names_the_row(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "a", "answer": "none"}])
    with pytest.raises(UserError, match=r"data.train.answer_pattern: row 0 of .*p.jsonl"):
        load(path, answer_pattern="#### (.+)|none")


@pytest.mark.parametrize("value", [["5", "6"], [["5"]], {"x": 5}])
def test_an_answer_that_is_no_text_is_refused_where_math_verify_would_read_it(value, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "a", "answer": value}])
    with pytest.raises(UserError, match=r"row 0 of .* for its 'answer', of type (list|dict): make it text"):
        load(path, check_answers=True)
    assert load(path)[0]["answer"] == str(value)


def test_an_answer_of_bytes_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["a"], "answer": [b"5"]}), path)
    with pytest.raises(UserError, match=r"row 0 of .* has b'5' for its 'answer', of type bytes: make it text"):
        load(str(path))


def test_an_answer_alone_in_a_list_is_that_answer(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "a", "answer": ["5"]}])
    assert load(path, check_answers=True)[0]["answer"] == "5"


@pytest.mark.parametrize(("value", "answer"), [(27.0, "27"), (0.5, "0.5"), (27, "27"), (-3.0, "-3"), (" x ", "x")])
def test_whole_floats_lose_their_fraction_and_text_its_margins(value, answer, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": "p", "answer": value}]), tmp_path / "p.parquet")
    assert load(str(tmp_path / "p.parquet"))[0]["answer"] == answer


def test_size_takes_the_first_rows_and_at_most_what_is_there(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    assert load(path, size=3) == ROWS[:3]
    assert load(path, size=100) == ROWS


def test_the_seed_alone_decides_the_shuffle(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    first = load(path, seed=1, shuffle=True)
    assert first == load(path, seed=1, shuffle=True)
    assert first != load(path, seed=2, shuffle=True)
    assert first != ROWS
    assert sorted(first, key=lambda row: int(row["answer"])) == ROWS


def test_size_is_taken_after_the_shuffle(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", ROWS)
    assert load(path, seed=1, shuffle=True, size=4) == load(path, seed=1, shuffle=True)[:4]


def test_the_shuffle_is_the_one_of_datasets(tmp_path):
    from datasets import Dataset

    path = jsonl(tmp_path / "p.jsonl", ROWS)
    assert load(path, seed=5, shuffle=True) == Dataset.from_list(ROWS).shuffle(seed=5).to_list()


def test_a_bad_row_is_named_by_its_place_in_the_file_even_when_shuffled(tmp_path):
    rows = [*ROWS, {"problem": "bad", "answer": ""}]
    with pytest.raises(UserError, match="row 10 of"):
        load(jsonl(tmp_path / "p.jsonl", rows), seed=1, shuffle=True)


def test_a_row_that_lacks_a_column_of_the_others_is_refused(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [ROWS[0], {"problem": "x"}])
    with pytest.raises(UserError, match=r"row 1 of .* has an empty 'answer'"):
        load(path)


def test_answers_that_the_verifier_reads_pass(tmp_path):
    rows = [{"problem": "p", "answer": answer} for answer in ("72", r"\frac{1}{2}", "(3,4)", r"2\sqrt{3}")]
    assert load(jsonl(tmp_path / "p.jsonl", rows), check_answers=True) == rows


def section(**options) -> DataSection:
    return DataSection(train=DataSource("unused"), **options)


def test_prompts_keep_problem_and_answer_for_the_rewards():
    made = make_prompts(ROWS[:2], section(), of_a_base())
    assert made.to_list() == [{"prompt": row["problem"], **row} for row in ROWS[:2]]


def test_the_problem_goes_where_the_template_says():
    # Braces in a problem or a template are no format fields.
    rows = [{"problem": r"{x} of \boxed{}", "answer": "1"}]
    [row] = make_prompts(rows, section(prompt=r"Q: {problem} In \boxed{}."), of_a_base()).to_list()
    assert row["prompt"] == r"Q: {x} of \boxed{} In \boxed{}."


def test_a_chat_has_the_system_prompt_first():
    [row] = make_prompts(ROWS[1:2], section(system_prompt="Be brief."), TOKENIZER).to_list()
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]


def test_a_chat_without_a_system_prompt_is_one_turn():
    [row] = make_prompts(ROWS[1:2], section(), TOKENIZER).to_list()
    assert row["prompt"] == [{"role": "user", "content": "1+1"}]


def test_a_base_without_a_chat_template_reads_the_system_prompt_as_text():
    [row] = make_prompts(ROWS[1:2], section(system_prompt="Be brief."), of_a_base()).to_list()
    assert row["prompt"] == "Be brief.\n\n1+1"


def test_a_chat_template_that_knows_no_system_prompt_refuses_it_in_a_sentence():
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('Only user roles') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    assert len(make_prompts(ROWS[:2], section(), tokenizer)) == 2
    with pytest.raises(
        UserError, match=r"data.system_prompt: .* refuses the chat of a prompt \(Only user roles\): leave it"
    ):
        make_prompts(ROWS[:2], section(system_prompt="Be brief."), tokenizer)
    tokenizer.chat_template = "{{ raise_exception('A date is missing') }}"
    with pytest.raises(UserError, match=r"model.path: .* \(A date is missing\): set .* model.chat_template_kwargs"):
        make_prompts(ROWS[:2], section(), tokenizer)


def test_a_template_that_has_no_place_for_the_problem_is_refused():
    with pytest.raises(UserError, match=r"no '\{problem\}' in it"):
        section(prompt="What is it?")


def test_chats_and_texts_become_tokens():
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    assert tokenizer.padding_side == "left"
    [row] = dataset(seed=0, size=1)
    [text] = prompt_tokens(tokenizer, [row["problem"]])
    assert tokenizer.decode(text, skip_special_tokens=True) == row["problem"]
    [chat] = prompt_tokens(tokenizer, [[{"role": "user", "content": row["problem"]}]])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["problem"]}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(chat) == rendered
    assert row["problem"] in rendered


def test_rows_with_unreadable_answers_are_dropped_when_asked(tmp_path, capsys):
    rows = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": r"\frac{1"}, {"problem": "r", "answer": "3"}]
    kept = load(jsonl(tmp_path / "p.jsonl", rows), check_answers="drop")
    assert [row["answer"] for row in kept] == ["1", "3"]
    assert "row 1 of" in capsys.readouterr().out
    kept = load(str(tmp_path / "p.jsonl"), check_answers="drop", shuffle=True, seed=0)
    assert [row["answer"] for row in kept] == ["3", "1"]
    assert "row 1 of" in capsys.readouterr().out  # as in the file
    with pytest.raises(UserError, match="cannot read the answer of row 0"):
        load(jsonl(tmp_path / "q.jsonl", rows[1:2]), check_answers="drop")
