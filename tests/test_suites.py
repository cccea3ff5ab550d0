"""Suites: the table, hub sets out of a cache as `hf download` leaves it, packages, files, names."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bridge_rl.config import DataSection, DataSource, ModelSection, load_recipe
from bridge_rl.data import hub_commit, make_prompts
from bridge_rl.errors import UserError
from bridge_rl.evaluation.suites import COLLECTIONS, SUITES, Suite, expand, load_suite
from bridge_rl.models import load_tokenizer
from bridge_rl.reward_functions import load_final_answer, load_reward
from bridge_rl.study.config import load_study

HUB = {name: suite for name, suite in SUITES.items() if "/" in suite.source.path}
# One row of each hub set as its card shows it, and what becomes of it.
ROWS = {
    "math500": (
        {"problem": "p", "solution": "s", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "u"},
        r"\frac{1}{2}",
    ),
    "aime24": ({"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204}, "204"),
    "aime25": ({"problem_idx": 1, "problem": "p", "answer": 70, "problem_type": ["Algebra"]}, "70"),
    "amc23": ({"id": 0, "answer": 27.0, "url": "u", "question": "p"}, "27"),
    "brumo25": ({"problem_idx": 1, "problem": "p", "answer": "2^{99}", "problem_type": ["Algebra"]}, "2^{99}"),
    "cmimc25": ({"problem_idx": 1, "problem": "p", "answer": r"4\sqrt{5}", "problem_type": ["Geometry"]}, r"4\sqrt{5}"),
    "hmmt_feb25": ({"problem_idx": 1, "problem": "p", "answer": "103", "problem_type": ["Algebra"]}, "103"),
    "gsm8k": ({"question": "p", "answer": "48+1152=<<48+1152=1200>>1200\n#### 1,200"}, "1,200"),
    "aime24_h4": ({"id": 60, "problem": "p", "solution": "s", "answer": "033", "url": "u", "year": "2024"}, "033"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in place of the user's. The network is off in all tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "hub"


def fill(cache, source: DataSource, rows, commit=None):
    """What `hf download` leaves: files under blobs/, links to them under snapshots/COMMIT/, the branch's head."""
    commit = commit or source.revision
    repository = cache / f"datasets--{source.path.replace('/', '--')}"
    config, split = source.name or "default", source.split
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: data/{split}-*\n---\n"
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), repository / "blobs" / f"data_{commit}")
    (repository / "blobs" / f"card_{commit}").write_text(card)
    snapshot = repository / "snapshots" / commit
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "README.md").symlink_to(repository / "blobs" / f"card_{commit}")
    (snapshot / "data" / f"{split}-00000-of-00001.parquet").symlink_to(repository / "blobs" / f"data_{commit}")


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_hub_suite_is_pinned_has_a_licence_and_a_row_here():
    assert HUB.keys() == ROWS.keys()
    for suite in HUB.values():
        assert suite.source.revision is not None
        assert len(suite.source.revision) == 40
        assert suite.licence
        assert suite.problems


def test_the_sets_of_math_arena_may_not_be_vendored():
    sets = [suite for suite in HUB.values() if suite.source.path.startswith("MathArena/")]
    assert {suite.name for suite in sets} == {"aime25", "brumo25", "cmimc25", "hmmt_feb25"}
    assert {suite.licence for suite in sets} == {"CC-BY-NC-SA-4.0"}


@pytest.mark.parametrize("name", HUB)
def test_a_hub_suite_loads_from_the_cache_without_a_network(name, cache):
    suite = SUITES[name]
    row, answer = ROWS[name]
    fill(cache, suite.source, [row] * suite.problems)
    rows = load_suite(suite, "--suite", 0)
    assert rows == [{"problem": "p", "answer": answer}] * suite.problems
    assert suite.commit == suite.source.revision


def test_the_pinned_commit_is_read_even_if_a_newer_one_is_here(cache):
    suite = SUITES["aime25"]
    row, _ = ROWS["aime25"]
    fill(cache, suite.source, [row] * 30)
    fill(cache, suite.source, [{**row, "answer": 0}] * 30, commit="f" * 40)
    assert {row["answer"] for row in load_suite(suite, "--suite", 0)} == {"70"}
    newest = replace(suite, source=replace(suite.source, revision=None))
    assert {row["answer"] for row in load_suite(newest, "--suite", 0)} == {"0"}
    assert newest.commit == "f" * 40


def test_a_copy_that_is_not_whole_is_refused(cache):
    suite = SUITES["aime25"]
    fill(cache, suite.source, [ROWS["aime25"][0]] * 12)
    with pytest.raises(UserError, match=r"aime25 \(MathArena/aime_2025\) holds 12 problems, not 30"):
        load_suite(suite, "--suite", 0)


def test_what_is_not_in_the_cache_names_the_command_that_fetches_it(cache):
    suite = SUITES["amc23"]
    assert suite.commit is None
    with pytest.raises(UserError) as caught:
        load_suite(suite, "--suite", 0)
    sentence = str(caught.value)
    assert f"`hf download --repo-type dataset math-ai/amc23 --revision {suite.source.revision}`" in sentence
    assert "HF_HUB_OFFLINE is set" in sentence
    assert "HF_HOME" in sentence
    assert "\n" not in sentence


def test_without_a_network_it_fails_at_once(tmp_path):
    """A closed port refuses; the libraries' own tries would take 23 s."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    script = (
        "import time\n"
        "from bridge_rl.errors import UserError\n"
        "from bridge_rl.evaluation.suites import SUITES, load_suite\n"
        "start = time.monotonic()\n"
        "try: load_suite(SUITES['hmmt_feb25'], '--suite', 0)\n"
        "except UserError as error: print(error)\n"
        "print(time.monotonic() - start)\n"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    sentence, seconds = done.stdout.strip().split("\n")
    assert "hf download --repo-type dataset MathArena/hmmt_feb_2025 --revision 6fdc42771" in sentence
    assert float(seconds) < 5


def test_files_functions_and_unknown_sets_have_no_commit(cache, tmp_path):
    assert hub_commit(DataSource("problems.jsonl")) is None
    assert hub_commit(DataSource("bridge_rl.tiny.task:dataset")) is None
    assert hub_commit(DataSource(str(tmp_path))) is None
    assert hub_commit(DataSource("no/such-set")) is None


# -- names ------------------------------------------------------------------------------------------------------------


def test_math_is_the_seven_sets_of_the_paper():
    assert [suite.name for suite in expand("math")] == [
        "math500",
        "aime24",
        "aime25",
        "amc23",
        "brumo25",
        "cmimc25",
        "hmmt_feb25",
    ]
    assert set(COLLECTIONS["math"]) < HUB.keys()


def test_names_are_joined_by_commas_and_count_once():
    assert [suite.name for suite in expand("aime25, tiny,aime25")] == ["aime25", "tiny"]
    assert [suite.name for suite in expand("gsm8k,math")][:2] == ["gsm8k", "math500"]


def test_a_file_is_a_suite_called_after_it(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n')
    [suite] = expand(str(path))
    assert suite.name == "mine"
    assert load_suite(suite, "--suite", 0) == [{"problem": "1+1", "answer": "2"}]
    with pytest.raises(UserError, match="two suites that are both called mine"):
        expand(f"{path},other/mine.jsonl")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("amie24", "no suite 'amie24': did you mean 'aime24'?"),
        ("zzz", "known are math, math500"),
        (" , ", "names no suite"),
        ("rg:", "rg:TASK"),
        ("rg:countdown:many", "rg:TASK:SIZE"),
        ("rg:countdown:0", "at least 1"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(text, sentence):
    with pytest.raises(UserError) as caught:
        expand(text)
    assert sentence in str(caught.value)


# -- packages ---------------------------------------------------------------------------------------------------------


def test_tiny_is_the_embedded_task():
    rows = load_suite(SUITES["tiny"], "--suite", 0)
    assert len(rows) == 512
    assert SUITES["tiny"].max_new_tokens == 32


@pytest.mark.parametrize("task", ["two_tries", "products", "checked_products", "word_problems"])
def test_an_embedded_suite_has_the_test_problems_of_the_small_study_and_its_recipes_reward(task):
    study = load_study(Path("studies/small/study.yaml"))
    suite = SUITES["tiny" if task == "two_tries" else f"tiny_{task}"]
    recipe = load_recipe(study.tasks[task].recipe)
    assert suite.source == study.tasks[task].test
    assert (suite.reward, suite.prompt) == (recipe.rewards[0], recipe.data.prompt)
    assert suite.max_new_tokens == recipe.rollout.max_new_tokens
    assert len(load_suite(suite, "--suite", 0)) == suite.problems


def test_champ_has_79_integers_and_9_other_numbers():
    pytest.importorskip("champ_dataset")
    answers = [row["answer"] for row in load_suite(SUITES["champ"], "--suite", 0)]
    assert sum(answer.lstrip("-").isdecimal() for answer in answers) == 79
    others = [answer for answer in answers if not answer.lstrip("-").isdecimal()]
    assert sorted(others) == sorted(["1/2", "1/3", "3/2", "3/2", "1/18", "-1/2", "2^{997}", r"\sqrt{2}", r"\sqrt{3}"])


@pytest.mark.parametrize(("module", "name", "package"), [("champ_dataset", "champ", "champ-dataset")])
def test_a_missing_package_names_its_pip_command(module, name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        load_suite(expand(name)[0], "--suite", 0)


def test_missing_reasoning_gym_names_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        load_suite(expand("rg:countdown")[0], "--suite", 0)


def gym(text: str) -> tuple[Suite, list[dict]]:
    pytest.importorskip("reasoning_gym")
    [suite] = expand(text)
    return suite, load_suite(suite, "--suite", 0)


def test_a_generator_is_seeded_and_its_rows_keep_what_the_reward_needs():
    suite, rows = gym("rg:countdown:4")
    assert len(rows) == 4
    assert suite.name == "rg_countdown_4"
    assert rows == gym("rg:countdown:4")[1] == gym("rg:countdown:4:11")[1]
    assert rows != gym("rg:countdown:4:12")[1]
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    made = make_prompts(rows, DataSection(suite.source, prompt=suite.prompt), tokenizer).to_list()
    assert made[0]["task"] == "countdown"
    assert json.loads(made[0]["entry"])["metadata"]["numbers"]
    assert made[0]["prompt"][0]["content"].startswith(rows[0]["problem"])


def test_countdown_accepts_any_right_expression_and_no_other():
    suite, rows = gym("rg:countdown:1")
    entry = json.loads(rows[0]["entry"])
    entry["metadata"] |= {"numbers": [2, 3, 4], "target": 14}
    completions = [
        "<think>2+3*4=14</think><answer>2 + 3*4</answer>",
        r"So \boxed{4*3 + 2}",
        "3*4+2",
        "<answer>14</answer>",  # the number is not made from the numbers
        "<answer>2 + 3*4</answer> no, <answer>2*3*4</answer>",
        "I do not know.\nSorry.",
        "<answer>9**9**9**9</answer>",
        "<answer>open('/etc/passwd')</answer>",
    ]
    logged: dict[str, object] = {}
    score = load_reward(replace(suite.reward, kwargs={"timeout_s": 2.0}), 0)
    rewards = score(
        completions=completions,
        task=["countdown"] * 8,
        entry=[json.dumps(entry)] * 8,
        log_metric=logged.__setitem__,
        log_extra=logged.__setitem__,
    )
    assert rewards == [1.0, 1.0, 1.0, 0, 0, 0, 0, 0]
    assert logged["verdict"] == ["ok", "ok", "ok", "ok", "ok", "unparsed", "timeout", "unparsed"]
    assert logged["verify/timeout"] == 1 / 8
    assert logged["verify/unparsed"] == 2 / 8


def test_a_fork_of_the_trainer_judges_with_processes_of_its_own():
    _, rows = gym("rg:gcd:1")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from bridge_rl.config import RewardSection
        from bridge_rl.reward_functions import load_reward
        score = load_reward(RewardSection("rewards/reasoning_gym.py:correct"), 0)
        entry, answer = sys.argv[1:]
        assert score(completions=[answer], task=["gcd"], entry=[entry]) == [1.0]
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if score(completions=["no"], task=["gcd"], entry=[entry]) == [0.0] else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
    arguments = [rows[0]["entry"], json.loads(rows[0]["entry"])["answer"]]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=Path(__file__).parents[1], check=True, timeout=120)


def test_a_near_miss_that_a_task_rewards_in_part_is_wrong():
    suite, rows = gym("rg:gcd:1")
    entry = json.dumps({"question": "q", "answer": "13", "metadata": {}})
    score = load_reward(suite.reward, 0)
    # The task gives 113 for 13 a score of 2/3.
    assert score(completions=["13", "113", "13 or 14"], task=["gcd"] * 3, entry=[entry] * 3) == [1.0, 0.0, 0.0]
    own = [json.loads(row["entry"])["answer"] for row in rows]
    assert score(completions=own, task=["gcd"], entry=[rows[0]["entry"]]) == [1.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rg:cuontdown", "no task 'cuontdown': did you mean 'countdown'?"),
        ("rg:composite", "configuration of its own"),
        ("rg:arc_agi", "denies its own answer"),
        ("rg:game_of_life_halting", "accepts the text"),
        ("rg:puzzle24", "accepts for each problem the answers of the others"),
    ],
)
def test_tasks_that_cannot_be_judged_are_refused(text, sentence):
    with pytest.raises(UserError) as caught:
        gym(text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("task", ["countdown", "n_queens", "gcd"])
def test_a_task_of_which_few_problems_share_an_answer_is_judged(task):
    assert len(gym(f"rg:{task}:6")[1]) == 6


def test_a_task_with_fractions_in_its_rows_is_judged_by_its_answers():
    suite, rows = gym("rg:gsm_symbolic:20")
    assert len(rows) == 20
    assert json.loads(rows[11]["entry"])["metadata"]["variables"]["serving_fraction"] == "6"  # was Fraction(6, 1)
    score = load_reward(suite.reward, 0)
    columns = {name: [row[name] for row in rows] for name in ("task", "entry")}
    assert score(completions=[row["answer"] for row in rows], **columns) == [1.0] * 20
    assert score(completions=["-1"] * 20, **columns) == [0.0] * 20


def test_rows_whose_own_answer_is_empty_are_dropped_and_counted(capsys):
    _, rows = gym("rg:ab:20")
    assert capsys.readouterr().out == "--suite: 1 of 20 answers of 'ab' are empty: dropped.\n"
    assert len(rows) == 19
    assert all(row["answer"] == json.loads(row["entry"])["answer"] for row in rows)


def test_votes_on_a_generator_compare_answers_up_to_spacing():
    final = load_final_answer(expand("rg:countdown")[0].reward)
    assert final("<answer>1 +\n 2</answer>") == final(r"\boxed{1 + 2}") == "1 + 2"
    assert final("two\nlines") is None
    assert final(r"cut \boxed{1") is None


def test_the_worker_refuses_what_could_call_functions():
    from bridge_rl.verify.reasoning_gym_worker import calls_function

    for harmless in ("2*(3+4)", "(1 + 2)*(3)", "-x**2*sin(3*x)/2 + C", "[['A', 'B']]", "_ _ Q _", "((1))"):
        assert not calls_function(harmless), harmless
    for call in (
        "open('x')",
        "open ('x')",
        "open\n('x')",
        "(open)('x')",
        "[open][0]('x')",
        "x.subs(1, 2)",
        "[f('x') for f in [open]]",
        "[open #+\n('x')]",
        "open\\\n('x')",
        "().__class__",
        "f'{open(1)}'",
    ):
        assert calls_function(call), call
