"""`bridge-rl eval` as a user runs it: files, controls, probes, resumption after SIGKILL, two ranks, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import switch_on

import bridge_rl as br
from bridge_rl.cli import main
from bridge_rl.config import ModelSection
from bridge_rl.errors import UserError
from bridge_rl.evaluation import command
from bridge_rl.evaluation.job import earlier_probes
from bridge_rl.evaluation.results import Estimate, Results, Summary, read_results
from bridge_rl.evaluation.run import PATIENCE
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.evaluation.settings import claim, digest_of_config
from bridge_rl.files import alone_in
from bridge_rl.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--widths", "1,2,4", "--samples", "4", "--problems", "8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The embedded model with a Bridge that does something, whole in one directory."""
    section = ModelSection("package://bridge_rl/tiny/model")
    torch.manual_seed(0)
    model = br.attach_bridge(load_model(section), br.BridgeConfig(num_heads=2, head_dim=8))
    with torch.no_grad():
        for _, parameter in br.bridge_parameters(switch_on(model)):
            parameter.mul_(0.6)
    directory = tmp_path_factory.mktemp("model") / "bridge"
    br.save_bridge(model, directory, merged=True)
    load_tokenizer(section).save_pretrained(directory)
    return directory


def evaluate(model, output, *options) -> Results:
    main(["eval", "--model", str(model), *SMALL, "--output", str(output), *options])
    return read_results(Path(output) / "results.json")


@pytest.fixture(scope="module")
def evaluated(checkpoint, tmp_path_factory) -> tuple[Path, Results]:
    output = tmp_path_factory.mktemp("eval") / "out"
    return output, evaluate(checkpoint, output, "--controls", "--probes", "--lengths", "8,32")


def test_an_evaluation_leaves_table_json_plots_and_page(evaluated):
    names = {path.name for path in evaluated[0].iterdir()}
    wanted = {"results.json", "samples", "report.html", "table.md", "table.tex", "widths.png", "controls.png"}
    assert wanted <= names
    assert len((evaluated[0] / "problems.jsonl").read_text().splitlines()) == 8


def test_every_condition_has_its_widths(evaluated):
    settings = {(summary.condition, summary.width) for summary in evaluated[1].summaries}
    assert settings == {
        *((condition, width) for condition in ("model", "disabled") for width in (1, 2, 4)),
        ("shuffled", 2),
        ("shuffled", 4),
    }
    assert evaluated[1].verdicts
    assert evaluated[1].comparisons
    assert {point.limit for point in evaluated[1].lengths} == {8, 32}
    assert evaluated[1].probes is not None
    assert evaluated[1].probes.width == 4


def test_shuffled_siblings_are_other_samples_on_the_same_draws(evaluated):
    groups = {group.key: group for group in SampleStore(evaluated[0] / "samples").read()}
    pairs = [(g, groups[("model", *key[1:])]) for key, g in groups.items() if key.condition == "shuffled"]
    assert pairs
    # The first token comes before any sibling is heard.
    assert all([row[0] for row in a.tokens] == [row[0] for row in b.tokens] for a, b in pairs)
    assert sum(a.tokens != b.tokens for a, b in pairs) > len(pairs) / 4


def test_the_model_judged_at_a_limit_is_the_model_sampled_with_it(checkpoint, evaluated, tmp_path):
    short = evaluate(checkpoint, tmp_path, "--max-new-tokens", "8", "--lengths", "8")
    cut = {(p.condition, p.width): p for p in evaluated[1].lengths if p.limit == 8}
    for point in short.lengths:
        assert point == cut[point.condition, point.width]


def test_a_second_run_samples_nothing_and_finds_the_same(checkpoint, evaluated, capsys):
    before = (evaluated[0] / "samples" / "rank_0.jsonl").read_bytes()
    again = evaluate(checkpoint, evaluated[0], "--controls", "--probes", "--lengths", "8,32")
    assert "groups are there already" in capsys.readouterr().out
    assert (evaluated[0] / "samples" / "rank_0.jsonl").read_bytes() == before
    assert again.summaries == evaluated[1].summaries
    assert again.verdicts == evaluated[1].verdicts


def test_probes_are_kept_for_the_same_samples_only(evaluated, tmp_path):
    settings = json.loads((evaluated[0] / "evaluation.json").read_text())
    assert earlier_probes(evaluated[0], settings) == evaluated[1].probes
    assert earlier_probes(evaluated[0], settings | {"weights": "of another model"}) is None
    assert earlier_probes(evaluated[0], settings | {"seed": 1}) is None
    assert earlier_probes(tmp_path, settings) is None


def test_results_of_another_model_leave_no_probes_behind(evaluated, tmp_path):
    output = shutil.copytree(evaluated[0], tmp_path / "out")
    shutil.rmtree(output / "samples")
    assert evaluate("package://bridge_rl/tiny/model", output).probes is None


@pytest.mark.parametrize("content", ["{", '{"probes": 1}'])
def test_results_that_cannot_be_read_give_way_to_new_ones(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert evaluate("package://bridge_rl/tiny/model", tmp_path).summaries


def test_a_base_is_sampled_once_and_says_what_it_leaves_out(tmp_path, capsys):
    results = evaluate("package://bridge_rl/tiny/model", tmp_path, "--controls")
    assert "--controls and --probes are left out: without a Bridge" in capsys.readouterr().out
    assert [(summary.condition, summary.width) for summary in results.summaries] == [("model", w) for w in (1, 2, 4)]
    assert len({summary.metrics["pass@1"].value for summary in results.summaries}) == 1
    assert [(found.method, found.samples) for found in results.aggregated] == [
        (method, width) for width in (1, 2, 4) for method in ("majority", "best-of-n")
    ]
    assert len(SampleStore(tmp_path / "samples").read()) == 8 * 4


def test_a_users_file_reward_and_function_are_taken(checkpoint, tmp_path):
    (tmp_path / "problems.jsonl").write_text(
        "".join(json.dumps({"problem": f"{n},11,12,13,14,15:{n + 11}", "answer": str(n)}) + "\n" for n in (20, 21, 22))
    )
    (tmp_path / "mine.py").write_text(
        "def reward(completions, **kwargs):\n    return [float('!' in c[-1]['content']) for c in completions]\n"
        "def final_answer(completion):\n    return completion[-1:] or None\n"
        "def last(rows):\n    return len(rows) - 1\n"
    )
    mine = f"{tmp_path / 'mine.py'}"
    options = ["--suite", str(tmp_path / "problems.jsonl"), "--reward", f"{mine}:reward", "--aggregate", f"{mine}:last"]
    results = evaluate(checkpoint, tmp_path / "out", *options)
    assert {found.method for found in results.aggregated} == {"majority", "best-of-n", "last"}
    groups = SampleStore(tmp_path / "out" / "samples").read()
    assert {group.problem for group in groups} == {0, 1, 2}
    for group in groups:
        assert group.correct == ["!" in text for text in group.completions]
        assert group.answers == [text[-1:] or None for text in group.completions]
    of_4 = [group for group in groups if group.width == 4]
    [last] = [found for found in results.aggregated if (found.method, found.width) == ("last", 4)]
    assert last.accuracy.value == pytest.approx(sum(group.correct[-1] for group in of_4) / len(of_4))


def test_ranks_wait_longer_where_the_main_one_probes_between_suites(monkeypatch):
    given = []

    def state(timeout, **kwargs):
        given.append(timeout)
        raise UserError("far enough")

    monkeypatch.setattr(command, "PartialState", state)
    for options in ([], ["--probes"]):
        with pytest.raises(SystemExit):
            main(["eval", "--model", "unused", *options])
    assert given == [PATIENCE, command.PATIENCE_FOR_PROBES]


def test_a_way_to_one_answer_is_not_called_as_one_that_is_there(checkpoint, tmp_path, capsys):
    """It would take the place of that one in every table."""
    (tmp_path / "mine.py").write_text("def majority(rows):\n    return 0\n")
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "out", "--aggregate", f"{tmp_path / 'mine.py'}:majority")
    assert "mine.py:majority is called 'majority', as the one that is always there" in capsys.readouterr().err


def test_several_suites_have_a_directory_each_and_a_mean(checkpoint, tmp_path, capsys):
    for name, numbers in (("a", (20, 21)), ("b", (22,))):
        rows = [{"problem": f"{n},11,12,13,14,15:{n + 11}", "answer": str(n)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suites = f"tiny,{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    overall = evaluate(checkpoint, tmp_path / "out", "--suite", suites, "--reward", "rewards/two_tries.py:correct")
    parts = [read_results(tmp_path / "out" / name / "results.json") for name in ("tiny", "a", "b")]
    for place, summary in enumerate(overall.summaries):
        mean = sum(part.summaries[place].metrics["any"].value for part in parts) / 3
        assert summary.metrics["any"].value == pytest.approx(mean)
    assert "mean over 3 suites" in capsys.readouterr().out


def test_controls_that_a_later_suite_cannot_have_are_refused_before_anything_is_sampled(checkpoint, tmp_path, capsys):
    problem = {"problem": "20,11,12,13,14,15:31", "answer": "31"}
    (tmp_path / "short.jsonl").write_text(json.dumps(problem) + "\n")
    options = ["--controls", "--reward", "rewards/two_tries.py:correct"]
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "out", "--suite", f"tiny,{tmp_path / 'short.jsonl'}", *options)
    assert "need 4 problems at width 4, short has 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_mean_over_suites_by_hand():
    from bridge_rl.evaluation.command import mean_over_suites

    def results(value, low, high):
        return Results({}, [Summary("model", 4, 10, 2, {"pass@1": Estimate(value, low, high)})])

    [found] = mean_over_suites({"a": results(0.5, 0.2, 0.7), "b": results(0.3, -0.1, 0.5)})
    assert found.problems == 20
    # below .3 and .4: sqrt(.09 + .16) / 2 = .25; above .2 and .2: sqrt(.08) / 2
    assert found.metrics["pass@1"].value == pytest.approx(0.4)
    assert found.metrics["pass@1"].low == pytest.approx(0.15)
    assert found.metrics["pass@1"].high == pytest.approx(0.4 + 0.08**0.5 / 2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--suite", "math50"], "there is no suite 'math50'"),
        (["--suite", "no.jsonl"], "there is no file no.jsonl"),
        (["--suite", "tiny,champ"], "holds the samples of one suite, several have a directory each: name another"),
        (["--widths", "1,x"], "--widths is '1,x'"),
        (["--widths", "0"], "each must be at least 1"),
        (["--lengths", "64"], "--lengths goes up to 64, but completions have at most 32"),
        (["--aggregate", "mean"], "--aggregate: 'mean' names no function"),
        (["--reward", "rewards/set_aware.py:sole_solver"], "error: --reward: rewards/set_aware.py:sole_solver needs"),
        (["--reward", "rewards/answer.py:wrong"], "rewards/answer.py has no function 'wrong'"),
        (["--widths", "1,9", "--controls", "--problems", "8"], "need 9 problems at width 9, tiny has 8"),
        (["--max-rows", "2"], "--max-rows is 2: it must hold a group of the largest of --widths, 4"),
        (["--samples", "0"], "--samples is 0: it must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0 and --top-p 1.0: the temperature must be"),
        (["--top-p", "0"], "--temperature is 1.0 and --top-p 0.0: the temperature must be"),
        (["--seed", "1"], "holds samples made with seed 0, not 1"),
        (["--problems", "4"], "holds samples made with other problems or prompts"),
        (["--problems", "0"], "--problems is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--probe-rows", "0"], "--probe-rows is 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_a_mistake_is_one_sentence(checkpoint, evaluated, capsys, options, complaint):
    with pytest.raises(SystemExit) as exit_:
        evaluate(checkpoint, evaluated[0], "--lengths", "8,32", *options)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert complaint in error


def test_a_group_wider_than_the_default_of_rows_is_sampled_whole(checkpoint, tmp_path):
    options = ["--widths", "65", "--samples", "65", "--problems", "1", "--max-new-tokens", "1"]
    [summary] = evaluate(checkpoint, tmp_path, *options).summaries
    assert (summary.width, summary.groups_per_problem) == (65, 1)


def test_two_evaluations_do_not_work_in_one_directory(checkpoint, tmp_path, capsys):
    with alone_in(tmp_path), pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path)
    assert f"Another process works in {tmp_path}" in capsys.readouterr().err


def test_other_weights_do_not_go_on_with_samples(checkpoint, evaluated, tmp_path, capsys):
    model = br.load_bridge(checkpoint)
    with torch.no_grad():
        next(p for _, p in br.bridge_parameters(model)).add_(1e-5)
    br.save_bridge(model, checkpoint, merged=True)
    with pytest.raises(SystemExit):
        evaluate(checkpoint, evaluated[0], "--lengths", "8,32")
    assert "holds samples made with other weights" in capsys.readouterr().err


@pytest.fixture
def own_copy(tmp_path) -> Path:
    """The embedded base in a directory that a test may edit."""
    return Path(shutil.copytree(ROOT / "bridge_rl/tiny/model", tmp_path / "model"))


def test_another_chat_template_does_not_go_on_with_samples(own_copy, tmp_path, capsys):
    evaluate(own_copy, tmp_path / "out")
    tokenizer = load_tokenizer(ModelSection(str(own_copy)))
    tokenizer.chat_template = tokenizer.chat_template + "="
    tokenizer.save_pretrained(own_copy)
    with pytest.raises(SystemExit):
        evaluate(own_copy, tmp_path / "out", "--samples", "8")
    assert "holds samples made with another chat template or tokenizer" in capsys.readouterr().err


def test_other_ends_of_a_completion_do_not_go_on_with_samples(own_copy, tmp_path, capsys):
    evaluate(own_copy, tmp_path / "out")
    config = own_copy / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, 5]}))
    with pytest.raises(SystemExit):
        evaluate(own_copy, tmp_path / "out", "--samples", "8")
    assert "holds samples made with eos_ids [2], not [2, 5]" in capsys.readouterr().err


def test_samples_of_a_version_that_wrote_down_less_are_refused_by_what_it_lacks(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "rank_0.jsonl").write_text("")
    (tmp_path / "evaluation.json").write_text('{"seed": 0}')
    claim(tmp_path, {"seed": 0})
    with pytest.raises(UserError, match="of an earlier version, which did not write down their prompt_ids"):
        claim(tmp_path, {"seed": 0, "prompt_ids": "12ab"})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"bridge": {"num_heads": 2, "head_dim": 8, "relative": True}},
    ],
    ids=["rope", "bridge"],
)
def test_another_configuration_does_not_go_on_with_samples(checkpoint, tmp_path, capsys, change):
    """The weights are the same, and what they say is not."""
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    evaluate(model, tmp_path / "out")
    path = model / ("bridge_config.json" if "bridge" in change else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit):
        evaluate(model, tmp_path / "out", "--samples", "8")
    assert "holds samples made with another configuration of the model or its Bridge" in capsys.readouterr().err


def test_a_model_that_is_copied_has_the_same_configuration(own_copy):
    configs = [load_model(ModelSection(str(path))).config for path in (ROOT / "bridge_rl/tiny/model", own_copy)]
    configs[1].transformers_version, configs[1].use_cache = "9.0", False
    assert len({digest_of_config(config) for config in configs}) == 1


@pytest.mark.parametrize("left", [None, "", '{"seed": '])
def test_samples_without_settings_are_refused(tmp_path, left):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "rank_0.jsonl").write_text("")
    if left is not None:
        (tmp_path / "evaluation.json").write_text(left)
    with pytest.raises(UserError, match=r"holds samples, but evaluation.json does not say what of .*: give another"):
        claim(tmp_path, {"seed": 0})


def test_a_reward_that_was_edited_does_not_go_on_with_old_verdicts(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    options = ["--reward", f"{tmp_path / 'mine.py'}:reward"]
    assert evaluate(checkpoint, tmp_path / "out", *options).summaries[0].metrics["pass@1"].value == 1.0
    (tmp_path / "mine.py").write_text("def reward(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "out", *options)
    assert "made with another version of the reward's file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [1 / 0 for c in completions]", "failed with ZeroDivisionError in line 2 of"),
        ("return ['yes'] * len(completions)", "returned 'yes' for a row: return a number or None"),
        ("return [1.0]", "returned 1 values for"),
    ],
)
def test_a_reward_that_fails_is_one_sentence(checkpoint, tmp_path, capsys, body, complaint):
    (tmp_path / "mine.py").write_text(f"def reward(completions, **kwargs):\n    {body}\n")
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "out", "--reward", f"{tmp_path / 'mine.py'}:reward")
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [][0]", r"mine.py:reward failed with IndexError in line 4 of"),
        ("return 24", r"mine.py:reward returned 24 on '"),
    ],
)
def test_a_final_answer_that_fails_is_one_sentence(checkpoint, tmp_path, capsys, body, complaint):
    (tmp_path / "mine.py").write_text(
        "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"
        f"def final_answer(completion):\n    {body}\n"
    )
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "out", "--reward", f"{tmp_path / 'mine.py'}:reward")
    error = capsys.readouterr().err
    assert error.count("error: final_answer beside") == 1
    assert complaint in error


def test_rows_without_a_score_are_wrong_and_counted(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(completions, **kwargs):\n    return [None] * len(completions)\n")
    results = evaluate(checkpoint, tmp_path / "out", "--reward", f"{tmp_path / 'mine.py'}:reward")
    assert results.summaries[0].metrics["unjudged"].value == 1.0
    assert any(verdict.startswith("Caution: 100% of rows could not be judged") for verdict in results.verdicts)


@pytest.mark.parametrize("found", ["None", "completion"])
def test_right_rows_that_no_vote_counts_are_told_of(checkpoint, tmp_path, found):
    (tmp_path / "mine.py").write_text(
        "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"
        f"def final_answer(completion):\n    return {found}\n"
    )
    results = evaluate(checkpoint, tmp_path / "out", "--reward", f"{tmp_path / 'mine.py'}:reward")
    told = [verdict for verdict in results.verdicts if "of right rows mark no answer" in verdict]
    assert [verdict.startswith("Caution: 100%") for verdict in told] == ([True] if found == "None" else [])


def test_answers_that_math_verify_cannot_read_do_for_a_reward_that_can(checkpoint, tmp_path):
    (tmp_path / "words.jsonl").write_text(json.dumps({"problem": "20,11,12,13,14,15:31", "answer": "x^2 +"}) + "\n")
    suite = ["--suite", str(tmp_path / "words.jsonl")]
    evaluate(checkpoint, tmp_path / "out", *suite, "--reward", "rewards/two_tries.py:correct")
    with pytest.raises(SystemExit):
        evaluate(checkpoint, tmp_path / "math", *suite)


def test_a_checkpoint_of_a_run_is_evaluated_as_the_run(tmp_path):
    from bridge_rl.evaluation.settings import trained_with

    (tmp_path / "recipe.yaml").write_text((ROOT / "recipes/tiny_arith.yaml").read_text())
    (tmp_path / "checkpoint-4").mkdir()
    for directory in (tmp_path, tmp_path / "checkpoint-4"):
        assert trained_with(str(directory)).rollout.max_new_tokens == 32
    assert trained_with(str(tmp_path / "other")) is None


def test_an_adapter_goes_on_where_it_was(tmp_path, capsys):
    """PEFT keeps blocks that it has replaced, with random weights: they are no part of what is evaluated."""
    small = ["training.max_steps=1", "warmup.problems=16", "warmup.steps=1", "data.eval=null", "train=lora"]
    rows = ["training.per_device_train_batch_size=16", f"output_dir={tmp_path / 'run'}"]
    main(["train", "recipes/tiny_arith.yaml", *small, *rows])
    first = evaluate(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    assert evaluate(tmp_path / "run", tmp_path / "out").summaries == first.summaries
    assert "groups are there already" in capsys.readouterr().out


def start(command: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_of(directory: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in directory.glob("rank_*.jsonl"))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_numbers(tmp_path):
    """SIGKILL while it samples, in every kind of sweep; and two ranks end with the numbers of one."""
    run = tmp_path / "run"
    training = ["training.max_steps=2", "warmup.problems=32", "warmup.steps=3", "data.eval=null", f"output_dir={run}"]
    main(["train", "recipes/tiny_arith.yaml", *training, "training.per_device_train_batch_size=16"])
    options = ["--model", str(run), "--problems", "64", "--widths", "1,4", "--samples", "8", "--controls"]
    command = [sys.executable, "launch/eval.py", *options, "--output"]
    # In a process as the others are: another number of threads rounds sums otherwise, and now and then draws otherwise.
    whole = start([*command, str(tmp_path / "whole")])
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output[-3000:]
    expected = read_results(tmp_path / "whole" / "results.json")
    total = lines_of(tmp_path / "whole" / "samples")

    command += [str(tmp_path / "cut")]
    seen = []
    for share in (0.1, 0.5, 0.8):
        process = start(command)
        while lines_of(tmp_path / "cut" / "samples") < share * total and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(lines_of(tmp_path / "cut" / "samples"))
    assert 0 < seen[0] < seen[1] < seen[2] < total, "a kill came too late: it would prove little"
    # The last launch is of two ranks, which share what is left.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    last = start([*launcher, "--config_file", "launch/accelerate/cpu_ddp.yaml", *command[1:]])
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output[-3000:]
    found = read_results(tmp_path / "cut" / "results.json")
    assert found.verdicts == expected.verdicts
    for part in ("summaries", "comparisons", "aggregated", "lengths"):
        assert getattr(found, part) == getattr(expected, part), part
    assert lines_of(tmp_path / "cut" / "samples") == total
    assert (tmp_path / "cut" / "samples" / "rank_1.jsonl").is_file()
    whole, cut = (SampleStore(tmp_path / name / "samples").read() for name in ("whole", "cut"))
    assert [(g.key, g.tokens, g.answers, g.correct) for g in whole] == [
        (g.key, g.tokens, g.answers, g.correct) for g in cut
    ]
