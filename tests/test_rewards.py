"""Rewards in TRL's signature, loaded by file as a recipe loads them."""

import pytest

from bridge_rl.config import RewardSection
from bridge_rl.errors import UserError
from bridge_rl.evaluation import settings
from bridge_rl.evaluation.judge import Judge
from bridge_rl.evaluation.settings import digest_of_reward
from bridge_rl.reward_functions import load_final_answer, load_reward


def load(function: str, **kwargs):
    return load_reward(RewardSection(function=function, kwargs=kwargs), 1)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_answers_of_both_kinds_of_completion_are_judged_and_their_failures_logged():
    logged: dict[str, float] = {}
    score = load("rewards/answer.py:correct")
    completions = [r"so \boxed{2\sqrt{3}}", chat(r"\boxed{2}"), chat(r"\boxed{\sqrt{12}}"), "who knows?"]
    rewards = score(
        completions=completions,
        answer=[r"2\sqrt{3}"] * 4,
        log_metric=logged.__setitem__,
        prompts=["p"] * 4,
        completion_ids=[[1]] * 4,
    )
    assert rewards == [1.0, 0.0, 1.0, 0.0]
    assert logged == {"verify/timeout": 0.0, "verify/error": 0.0, "verify/unparsed": 0.25}


def test_a_reward_that_fails_names_its_line_and_row(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("def inverse(text):\n    return 1 / int(text)\n\ndef score(completions, log_extra, **kwargs):\n")
    with path.open("a") as file:
        file.write("    log_extra('seen', completions)\n    return [inverse(text) for text in completions]\n")
    logged = []
    with pytest.raises(UserError) as raised:
        load(f"{path}:score")(completions=["1", "2", "0", "0"], log_extra=lambda *args: logged.append(args))
    assert str(raised.value) == (
        f"{path}:score failed with ZeroDivisionError in line 2 of {path} at row 2 ('0'): division by zero"
    )
    assert len(logged) == 1  # not again for the rows that are tried alone
    printed = capsys.readouterr().err
    assert "line 6, in score" in printed
    assert "line 2, in inverse" in printed
    assert "user_code.py" not in printed


def test_columns_of_any_name_reach_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text("def score(name, function, **kwargs):\n    return [float(x) for x in name]\n")
    score = load(f"{tmp_path / 'mine.py'}:score")
    assert score(completions=["a", "b"], name=["1", "2"], function=["f", "g"]) == [1.0, 2.0]


@pytest.mark.parametrize(
    "given", ["1.0", "None", "{0: 1.0, 1: 1.0}", "(1.0 for text in completions)", "__import__('torch').tensor(1.0)"]
)
def test_what_is_no_list_of_rewards_is_refused(given, tmp_path):
    (tmp_path / "mine.py").write_text(f"def score(completions, **kwargs):\n    return {given}\n")
    with pytest.raises(UserError, match=r"mine.py:score returned .*: return a list, with a number or None for each"):
        load(f"{tmp_path / 'mine.py'}:score")(completions=["a", "b"])


def test_a_reward_that_fails_for_a_batch_only_names_no_row(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, **kwargs):\n    return {1: [0.0]}[len(completions)]\n")
    with pytest.raises(UserError, match=r"KeyError in line 2 of \S+mine.py: 2$"):
        load(f"{tmp_path / 'mine.py'}:score")(completions=["1", "2"])


def test_timeouts_and_bad_gold_are_logged_by_name():
    logged: dict[str, float] = {}
    score = load("rewards/answer.py:correct", timeout_s=1.0)
    rewards = score(
        completions=[r"\boxed{x+9^{9^{9^9}}}", "1"], answer=["x", r"\frac{1}{"], log_metric=logged.__setitem__
    )
    assert rewards == [0.0, 0.0]
    assert logged == {"verify/timeout": 0.5, "verify/error": 0.5, "verify/unparsed": 0.0}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"so \boxed{4}", 1.0),
        (r"<think>hm \boxed{3}</think> \boxed{4}", 1.0),
        (r"hm</think> \boxed{4}", 1.0),  # the prompt ended in <think>
        (r"<think>hm \boxed{4}", 0.0),
        (r"<think>hm \boxed{4}</think> it is 4", 0.0),
        (r"<think>a</think><think>b</think>\boxed{4}", 0.0),
        (r"</think><think>\boxed{4}", 0.0),
        (r"\boxed{4} or \boxed{5}", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed{}", 0.0),
        ("4", 0.0),
    ],
)
def test_format_wants_one_closed_box_after_closed_thinking(text, reward):
    boxed = load("rewards/format.py:boxed")
    assert boxed(completions=[text, chat(text)], answer=["4", "4"]) == [reward, reward]


def test_soft_overlong_falls_from_zero_to_minus_one():
    soft = load("rewards/length.py:soft_overlong", max_completion_len=100, soft_punish_cache=20)
    ids = [[1] * length for length in (10, 80, 90, 100, 101)]
    assert soft(completions=["x"] * 5, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="soft_punish_cache"):
        load("rewards/length.py:soft_overlong", max_completion_len=10, soft_punish_cache=20)(completion_ids=ids)


def test_two_tries_reads_the_problem():
    score = load("rewards/two_tries.py:correct")
    problem = "12,35,27,19,31,22:49"
    completions = ["12+35=47;27+22=49:!27+22", chat("12+35=47;27+22=49:!12+35")]
    assert score(completions=completions, problem=[problem] * 2, answer=["49"] * 2) == [1.0, 0.0]


def test_only_the_sole_solver_of_a_group_gets_the_bonus():
    score = load("rewards/set_aware.py:sole_solver")
    completions = ["4", "5", "4", "4", "5", "5", "5", chat("4")]
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    assert score(completions=completions, answer=["4"] * 8, group_index=groups) == [1.0, 0, 0, 0, 0, 0, 0, 1.0]


def test_another_reward_may_say_who_solves_and_logs_nothing_for_it():
    score = load("rewards/set_aware.py:sole_solver", judge="rewards/two_tries.py:correct")
    problem, right, wrong = "12,35,27,19,31,22:49", "!27+22", "!12+35"
    logged = []
    rows = {"problem": [problem] * 4, "group_index": [0, 0, 1, 1], "log_extra": lambda *args: logged.append(args)}
    assert score(completions=[right, wrong, right, right], **rows) == [1.0, 0, 0, 0]
    by_answer = load("rewards/set_aware.py:sole_solver")  # whose reward logs its verdicts
    assert by_answer(completions=["4"], answer=["4"], **rows | {"group_index": [0]}) == [1.0]
    assert logged == []
    with pytest.raises(UserError, match=r"rewards.kwargs.judge: there is no file rewards/nobody.py"):
        load("rewards/set_aware.py:sole_solver", judge="rewards/nobody.py:correct")(completions=[right], **rows)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_judge_of_the_sole_solver_may_be_async_and_leave_rows_out(tmp_path, kind):
    (tmp_path / "judge.py").write_text(
        f"{kind} score(completions, **kwargs):\n"
        "    return [{'right': 1.0, 'wrong': 0.0}.get(text) for text in completions]\n\n\n"
        f"{kind} short(completions, **kwargs):\n    return [1.0]\n"
    )
    solver = load("rewards/set_aware.py:sole_solver", judge=f"{tmp_path / 'judge.py'}:score")
    completions = ["right", "unjudged", "right", "right", "unjudged", "wrong"]
    assert solver(completions=completions, group_index=[0, 0, 1, 1, 2, 2]) == [1.0, 0, 0, 0, 0, 0]
    short = load("rewards/set_aware.py:sole_solver", judge=f"{tmp_path / 'judge.py'}:short")
    with pytest.raises(UserError, match=r"judge.py:short returned 1 values for 2 rows"):
        short(completions=["right", "right"], group_index=[0, 0])


@pytest.mark.parametrize("name", ["group_index", "trainer_state"])
def test_the_first_reward_may_take_but_not_require_what_the_trainer_alone_gives(tmp_path, name):
    (tmp_path / "mine.py").write_text(
        f"def needs(completions, *, {name}, **kwargs): ...\ndef takes(completions, {name}=None, **kwargs): ...\n"
    )
    needs, takes = (RewardSection(f"{tmp_path / 'mine.py'}:{function}") for function in ("needs", "takes"))
    with pytest.raises(UserError, match=rf"^rewards\.0\.function: .*mine\.py:needs needs {name}, which neither"):
        load_reward(needs, 0)
    load_reward(takes, 0)
    load_reward(needs, 1)


def test_an_async_reward_is_awaited_in_one_loop_and_fails_as_others_do(tmp_path):
    from bridge_rl.config import RewardSection
    from bridge_rl.reward_functions import load_reward

    (tmp_path / "judge.py").write_text(
        "import asyncio\n\nloops = []\n\n"
        "async def score(completions, scale, **kwargs):\n"
        "    await asyncio.sleep(0)\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    assert all(loop is loops[0] for loop in loops)\n"
        "    return [scale / len(text) for text in completions]\n"
    )
    reward = load_reward(RewardSection(f"{tmp_path / 'judge.py'}:score", kwargs={"scale": 2.0}), 0)
    assert reward(completions=["a", "bb"]) == [2.0, 1.0]
    assert reward(completions=["a"]) == [2.0]
    with pytest.raises(UserError, match=r"ZeroDivisionError in line 9 of .*judge.py at row 1 \(''\)"):
        reward(completions=["a", ""])


def test_the_verdict_of_every_row_is_given_to_log_extra():
    extra: dict[str, list[str]] = {}
    score = load("rewards/answer.py:correct", timeout_s=1.0)
    completions = ["4", "5", "no idea, who knows?", r"\boxed{9^{9^{9^9}}+x}"]
    score(completions=completions, answer=["4"] * 4, log_extra=extra.__setitem__)
    assert extra == {"verdict": ["ok", "ok", "unparsed", "timeout"]}
    score(completions=["4"], answer=[r"\frac{1}{"], log_extra=extra.__setitem__)
    assert extra == {"verdict": ["error"]}


# -- answers for votes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completions", "vote"),
    [
        (["1/2", r"\boxed{\frac12}", "The answer is 0.5.", r"$\dfrac{1}{2}$", r"#### \frac{2}{4}"], "1/2"),
        (["33", r"\boxed{033}", r"\boxed{x = 33}", r"\boxed{33^\circ}", r"\boxed{33\text{ cm}^2}", "33.0"], "33"),
        ([r"\boxed{1,200}", r"\boxed{1{,}200}", r"\boxed{\$1200}", "#### 1200"], "1200"),
        ([r"\boxed{\text{Monday}}", "monday", r"\boxed{Monday.}"], "monday"),
        ([r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\boxed{(3,\dfrac{\pi}2)}"], r"(3,\frac{\pi}{2})"),
        ([r"\boxed{5\text{ million}}"], r"5million"),
        ([r"\boxed{\sqrt2}", r"\boxed{\sqrt{2}}"], r"\sqrt{2}"),
        ([r"\boxed{2\frac{1}{2}}", r"\boxed{2\dfrac12}", r"\boxed{2 1/2}", "2.5"], "5/2"),
        ([r"\boxed{70000}", r"\boxed{\$70,000}", r"\boxed{\$70,000.00}", r"\boxed{70,000\text{ dollars}}"], "70000"),
        ([r"\boxed{72\,\text{km/h}}", r"\boxed{72 \; \mathrm{m/s}}", r"\boxed{72\ \text{cm}^{2}}", r"72\,\%"], "72"),
        ([r"\boxed{AB = 5}", r"\boxed{\text{Area} = 5}", r"\boxed{P(A)=5}", r"\boxed{\angle ABC = 5^\circ}"], "5"),
        ([r"\boxed{1,-2}", r"\boxed{-2, 1}", r"\boxed{\{1, -2\}}", r"\boxed{x = 1 \text{ or } -2}"], "-2,1"),
        ([r"\boxed{(a,b) = (2,1)}", r"\boxed{(2, 1)}"], "(2,1)"),
        ([r"\boxed{Yes}", r"\boxed{\text{yes}}", r"\boxed{YES.}"], "yes"),
    ],
)
def test_equal_answers_give_equal_votes(completions, vote):
    final = load_final_answer(RewardSection("rewards/answer.py:correct"))
    assert [final(completion) for completion in completions] == [vote] * len(completions)


def test_no_marked_answer_is_no_vote():
    final = load_final_answer(RewardSection("rewards/answer.py:correct"))
    assert [final(text) for text in ("", r"so \boxed{4", r"\boxed{}", "I think it may well be four.")] == [None] * 4


def test_different_numbers_are_different_votes():
    final = load_final_answer(RewardSection("rewards/answer.py:correct"))
    assert len({final(text) for text in ("1/3", "0.3333333", "-1/3", "1", "10", r"1\frac{1}{3}")}) == 6


def test_different_lists_equations_and_large_numbers_are_different_votes():
    final = load_final_answer(RewardSection("rewards/answer.py:correct"))
    lists = ["1,2", "1,2,2", "(1,2)", "(2,1)", "[1,2]", "1.2", "x+y=1", "x-y=1", "2x=1", "1", "x=1,y=2", "x=2,y=1"]
    changed = ["5", r"5\text{ or 6}", r"5\mbox{ Million}", r"5\text{, 7}", r"5\text{ cubed}"]
    assert len({final(rf"\boxed{{{text}}}") for text in lists + changed}) == len(lists + changed)


def test_the_embedded_task_votes_on_pairs_in_any_order():
    final = load_final_answer(RewardSection("rewards/two_tries.py:correct"))
    assert final("12+35=47;27+22=49:!27+22") == final("12+35=47;27+22=49:!22+27") == "22+27"
    assert final("12+35=47;27+22=49:") is None


def test_a_file_of_ones_own_may_say_what_is_voted_on_or_leave_it(tmp_path):
    body = "def score(completions, **kwargs):\n    return [0.0 for _ in completions]\n"
    (tmp_path / "plain.py").write_text(body)
    (tmp_path / "own.py").write_text(body + "def final_answer(completion):\n    return completion[-1:] or None\n")
    assert load_final_answer(RewardSection(f"{tmp_path / 'plain.py'}:score"))("#### 0.5") == "1/2"
    assert load_final_answer(RewardSection(f"{tmp_path / 'own.py'}:score"))("abc") == "c"
    with pytest.raises(UserError, match="there is no file"):
        load_final_answer(RewardSection("rewards/none.py:score"))
    with pytest.raises(UserError, match="cannot import no_such_package"):
        load_final_answer(RewardSection("no_such_package:score"))


def verdicts_of(logged: object) -> list[str]:
    def reward(completions, log_extra, **kwargs):
        log_extra("verdict", logged)
        return [1.0, 0.0, None]

    completions = [["a", "b", "c"]]
    [judged] = Judge(reward, str)([{"prompt": "p", "answer": "1"}], completions, [[[1], [2], [3]]])
    return judged.verdicts


def test_an_evaluation_takes_a_word_that_it_does_not_know_for_ok():
    assert verdicts_of(["unparsed", "brilliant", "ok"]) == ["unparsed", "ok", "error"]
    assert verdicts_of([None, "timeout", "ok"]) == ["ok", "timeout", "error"]


@pytest.mark.parametrize(
    ("logged", "given"), [(["ok"], "1 values"), ([], "0 values"), ("abc", "'abc'"), (None, "'None'")]
)
def test_verdicts_that_are_not_one_a_row_are_one_sentence(logged, given):
    with pytest.raises(UserError, match=rf"log_extra\('verdict', ...\) was given {given} for 3 rows"):
        verdicts_of(logged)


def test_another_verifier_is_another_judge_for_the_rewards_that_ask_it(monkeypatch):
    judged, own = RewardSection("rewards/answer.py:correct"), RewardSection("rewards/two_tries.py:correct")
    before = [digest_of_reward(judged), digest_of_reward(own)]
    monkeypatch.setattr(settings, "digest_of_verifier", lambda: "another")
    assert digest_of_reward(judged) != before[0]
    assert digest_of_reward(own) == before[1]


@pytest.mark.parametrize(
    "mine",
    [
        "import bridge_rl as br\ndef score(completions, answer, **kwargs):\n    return br.verify_answers([], [])\n"
        "final_answer = str\n",
        "from bridge_rl.verify import verify_answers as ask\nscore = final_answer = ask\n",
        "from bridge_rl.verify.answer import last_box as final_answer\nscore = print\n",
        "score = print\n",  # without a final_answer of its own
    ],
)
def test_a_reward_asks_the_verifier_by_whatever_name(tmp_path, monkeypatch, mine):
    (tmp_path / "mine.py").write_text(mine)
    section = RewardSection(f"{tmp_path / 'mine.py'}:score")
    before = digest_of_reward(section)
    monkeypatch.setattr(settings, "digest_of_verifier", lambda: "another")
    assert digest_of_reward(section) != before


@pytest.mark.parametrize(
    "reach",
    [
        "from PACKAGE.outer import LIMIT",
        "import PACKAGE.outer as other",
        "from PACKAGE import outer",
        "def later():\n    import PACKAGE.outer",
    ],
)
def test_what_a_reward_imports_may_not_change_either(reach, tmp_path, monkeypatch):
    """A helper's helper, too; what is installed may."""
    monkeypatch.syspath_prepend(tmp_path.parent)
    package = tmp_path.name  # another for each test, since Python keeps what it has imported
    outer, inner, mine = (tmp_path / name for name in ("outer.py", "inner.py", "mine.py"))
    inner.write_text("LIMIT = 1.0\n")
    outer.write_text("import math\nimport torch\nfrom .inner import LIMIT\n")
    mine.write_text(reach.replace("PACKAGE", package) + "\nscore = final_answer = str\n")
    section = RewardSection(f"{mine}:score")
    assert settings.own_modules(mine.read_text()).keys() == {f"{package}.outer", f"{package}.inner"}
    for helper in (inner, outer):
        before = digest_of_reward(section)
        assert digest_of_reward(section) == before
        helper.write_text(helper.read_text() + "# edited\n")
        assert digest_of_reward(section) != before


def test_the_judge_of_a_reward_may_not_change_either(tmp_path):
    judge = tmp_path / "judge.py"
    judge.write_text("score = final_answer = str\n")
    section = RewardSection("rewards/set_aware.py:sole_solver", kwargs={"judge": f"{judge}:score"})
    before = digest_of_reward(section)
    judge.write_text("score = final_answer = repr\n")
    assert digest_of_reward(section) != before


@pytest.mark.parametrize(
    "score",
    [
        "def score(completions, **kwargs):\n    return [0.0 for _ in completions]\n",
        "from functools import partial\nscore = partial(lambda completions, **kwargs: [0.0 for _ in completions])\n",
        "class Score:\n    def __call__(self, completions, **kwargs):\n        return [0.0 for _ in completions]\n"
        "score = Score()\n",
        "from bridge_rl.tiny.equations import is_correct as score\n",  # of a module with a final_answer of its own
    ],
    ids=["function", "partial", "object", "re-exported"],
)
def test_the_file_that_is_named_says_what_is_voted_on_and_is_what_may_not_change(tmp_path, score):
    file = tmp_path / "mine.py"
    file.write_text(score + 'final_answer = lambda completion: "MINE"\n')
    section = RewardSection(f"{file}:score")
    assert load_final_answer(section)("#### 4") == "MINE"
    before = digest_of_reward(section)
    assert digest_of_reward(section) == before
    file.write_text(score + 'final_answer = lambda completion: "YOURS"\n')
    assert digest_of_reward(section) != before
