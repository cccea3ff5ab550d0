"""lm-evaluation-harness runs the model `bridge`, and finds what `generate_groups` and `bridge-rl eval` find."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import switch_on
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import warning_once

import bridge_rl as br
from bridge_rl.cli import main as bridge_rl
from bridge_rl.config import ModelSection, RewardSection
from bridge_rl.data import prompt_tokens
from bridge_rl.errors import UserError
from bridge_rl.evaluation.results import read_results
from bridge_rl.evaluation.run import group_index
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.harness import BridgeLM, split_requests
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.reward_functions import load_reward
from bridge_rl.rollout.sampling import stream_seed
from bridge_rl.tiny.task import dataset

ROOT = Path(__file__).parents[1]
TASK = ROOT / "recipes" / "lm_eval" / "two_tries.yaml"
TINY = "package://bridge_rl/tiny/model"
PROBLEMS = dataset(11, 32)  # those of two_tries.jsonl
SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 32, "until": []}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """The embedded model with a Bridge that is switched on, weakly enough that some answers stay right."""
    torch.manual_seed(0)
    model = switch_on(br.attach_bridge(load_model(ModelSection(TINY)), br.BridgeConfig(num_heads=2, head_dim=8)))
    with torch.no_grad():
        for _, parameter in br.bridge_parameters(model):
            parameter *= 0.2
    path = tmp_path_factory.mktemp("checkpoint")
    br.save_bridge(model, path)
    return str(path)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A directory for tasks, none of them yet; lm_eval reads its data sets from the repository's root."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "two_tries.py").write_text(TASK.with_suffix(".py").read_text())
    return tmp_path


def add_task(directory: Path, name: str, replaced: dict[str, str]) -> None:
    text = TASK.read_text()
    for old, new in {"task: two_tries\n": f"task: {name}\n", **replaced}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (directory / f"{name}.yaml").write_text(text)


def evaluate(directory: Path, names: list[str], model_args: dict, **options):
    """lm_eval's results, and the rows of each document by task."""
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    options = {"batch_size": 16, "apply_chat_template": True, "bootstrap_iters": 0, "device": "cpu", **options}
    results = simple_evaluate("bridge", model_args, names, task_manager=manager, log_samples=True, **options)
    return results, {name: [sample["resps"][0] for sample in results["samples"][name]] for name in names}


def ours(checkpoint: str, problems: list[dict], width: int, groups: int = 1, seed: int = 0, **sampling):
    """The texts of each problem's rows by `generate_groups`."""
    section = ModelSection(checkpoint)
    model, tokenizer = load_model(section).eval(), load_tokenizer(section)
    rows = [row for row in problems for _ in range(groups)]
    ids = prompt_tokens(tokenizer, [[{"role": "user", "content": row["problem"]}] for row in rows])
    params = br.SamplingParams(32, eos_token_id=[2], seed=stream_seed(seed, "evaluation"), **sampling)
    indices = [group_index(problem, group) for problem in range(len(problems)) for group in range(groups)]
    made = br.generate_groups(model, ids, width, params, indices, tokenizer=tokenizer)
    texts = [[tokenizer.decode(row, skip_special_tokens=True) for row in group.tokens] for group in made]
    return [list(chain(*texts[start : start + groups])) for start in range(0, len(texts), groups)]


def right_rows(problems: list[dict], texts: list[list[str]]) -> list[float]:
    """How many rows of each problem our reward finds right."""
    judge = load_reward(RewardSection("rewards/two_tries.py:correct"), 0)
    columns = [(rows, [problem["problem"]] * len(rows)) for problem, rows in zip(problems, texts, strict=True)]
    return [sum(judge(completions=rows, problem=repeated)) for rows, repeated in columns]


@pytest.mark.slow  # lm_eval reads the YAML of all its tasks
def test_lm_eval_on_the_command_line_finds_our_texts_and_our_accuracy(checkpoint, tmp_path):
    command = [sys.executable, "-m", "bridge_rl.harness", "--model", "bridge", "--tasks", "two_tries"]
    command += ["--model_args", f"pretrained={checkpoint},width=4", "--include_path", str(TASK.parent)]
    command += ["--apply_chat_template", "--batch_size", "64", "--device", "cpu"]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    [results] = tmp_path.rglob("results_*.json")
    [samples] = tmp_path.rglob("samples_two_tries_*.jsonl")
    found = [json.loads(line)["resps"][0] for line in samples.read_text().splitlines()]

    expected = ours(checkpoint, PROBLEMS, 4)
    assert found == expected
    right = right_rows(PROBLEMS, expected)
    metrics = json.loads(results.read_text())["results"]["two_tries"]
    assert 0 < sum(right) < 4 * 32
    assert metrics["accuracy,all_rows"] == sum(right) / (4 * 32)
    assert metrics["all_right,all_rows"] == right.count(4) / 32
    assert metrics["any_right,all_rows"] == 1 - right.count(0) / 32


def test_bridge_rl_eval_finds_the_same_texts_and_accuracy(checkpoint, tasks, tmp_path):
    add_task(tasks, "eight", {"repeats: 4 ": "repeats: 8 ", "k: 4}": "k: 8}"})
    arguments = {"pretrained": checkpoint, "width": 4, "seed": 5}
    results, found = evaluate(tasks, ["eight"], arguments, limit=12, device=None)
    command = ["eval", "--model", checkpoint, "--suite", "tiny", "--problems", "12", "--widths", "4", "--samples", "8"]
    bridge_rl([*command, "--seed", "5", "--output", str(tmp_path / "eval")])
    [samples] = (tmp_path / "eval").rglob("rank_0.jsonl")
    groups = {(group.problem, group.group): group for group in SampleStore(samples.parent).read()}
    assert found["eight"] == [groups[p, 0].completions + groups[p, 1].completions for p in range(12)]
    [summary] = read_results(tmp_path / "eval" / "results.json").summaries
    accuracy = sum(sum(group.correct) for group in groups.values()) / 96
    assert 0 < accuracy < 1
    assert results["results"]["eight"]["accuracy,all_rows"] == summary.metrics["pass@1"].value == accuracy


def test_repeats_arrive_whole_in_two_tasks_of_one_run(checkpoint, tasks):
    add_task(tasks, "four", {})
    add_task(tasks, "eight_cooler", {"repeats: 4 ": "repeats: 8 ", "temperature: 1.0": "temperature: 0.7"})
    results, found = evaluate(tasks, ["four", "eight_cooler"], {"pretrained": checkpoint, "width": 4}, limit=16)
    assert results["n-samples"]["four"]["effective"] == 16
    assert found["four"] == ours(checkpoint, PROBLEMS[:16], 4)
    assert found["eight_cooler"] == ours(checkpoint, PROBLEMS[:16], 4, groups=2, temperature=0.7)
    right = right_rows(PROBLEMS[:16], found["four"])
    assert 0 < sum(right) < 4 * 16
    assert results["results"]["four"]["accuracy,all_rows"] == sum(right) / (4 * 16)
    assert results["results"]["four"]["any_right,all_rows"] == 1 - right.count(0) / 16


def test_results_depend_on_width_and_seed_but_not_on_batch_size(checkpoint, tasks):
    add_task(tasks, "four", {})

    def rows(model_args: dict, **options):
        return evaluate(tasks, ["four"], {"pretrained": checkpoint, **model_args}, limit=3, **options)[1]["four"]

    by_four = rows({"width": 4}, batch_size=1)
    assert by_four == rows({"width": 4}, batch_size="auto")
    assert by_four == rows({})  # no width: all repeats
    assert by_four != rows({"width": 1})
    assert by_four != rows({"width": 4, "seed": 1})
    assert rows({"width": 4, "seed": 1}) == rows({"width": 4}, gen_kwargs={"seed": 1})
    assert rows({"width": 2}) == ours(checkpoint, PROBLEMS[:3], 2, groups=2)


def test_stop_strings_end_rows_and_are_cut_off(checkpoint, tasks):
    add_task(tasks, "short", {"until: []": 'until: ["<eos>", ":", ";"]'})
    _, found = evaluate(tasks, ["short"], {"pretrained": checkpoint, "width": 4}, limit=6)
    whole = ours(checkpoint, PROBLEMS[:6], 4, stop_strings=[":", ";"])
    assert found["short"] == [[row.split(":")[0].split(";")[0] for row in rows] for rows in whole]
    assert found["short"] != whole


def test_repeats_that_are_not_whole_groups_are_refused():
    request = Instance("generate_until", {}, ("12", SAMPLED), 0, ("gsm8k", 0, 1))
    with pytest.raises(UserError, match=r"task gsm8k has repeats 1, which are not whole groups of width 4"):
        split_requests([request], 4)


def test_each_group_of_a_document_has_an_index_of_its_own():
    requests = []
    for doc in (2, 7):
        requests += [Instance("generate_until", {}, (str(doc), SAMPLED), 0, ("task", doc, 6))] * 6
    groups = split_requests(requests, 2)
    assert [(group.context, group.width, group.index) for group in groups] == [
        ("2", 2, group_index(2, 0)),
        ("2", 2, group_index(2, 1)),
        ("2", 2, group_index(2, 2)),
        ("7", 2, group_index(7, 0)),
        ("7", 2, group_index(7, 1)),
        ("7", 2, group_index(7, 2)),
    ]


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"widht": 4}, "--model_args widht is not served by bridge"),
        ({"width": 0}, "--model_args width is 0"),
        ({"seed": -1}, "--model_args seed is -1: it must not be negative"),
        ({"seed": "abc"}, "--model_args seed is 'abc': it must be a whole number"),
        ({"pretrained": None}, "--model_args names no model: write pretrained="),
        ({"dtype": "float16"}, "--model_args dtype is float16"),
        ({"max_length": "abc"}, "--model_args max_length is 'abc': it must be a whole number"),
        ({"batch_size": "abc"}, "--batch_size is abc: use a whole number"),
        ({"batch_size": 0}, "--batch_size is 0: use a whole number"),
    ],
)
def test_model_arguments_that_are_not_served_are_named(model_args, message):
    with pytest.raises(UserError, match=message):
        BridgeLM(**{"pretrained": TINY, **model_args})


def test_lm_evals_command_line_without_a_model_is_one_sentence():
    with pytest.raises(UserError, match="--model_args names no model: write pretrained="):
        BridgeLM.create_from_arg_string("", {"batch_size": 1, "max_batch_size": None, "device": "cpu"})


@pytest.fixture(scope="module")
def model(checkpoint) -> BridgeLM:
    return BridgeLM(checkpoint, width=2, device="cpu", batch_size=8)


def requests_of(settings: dict, context: str = "<bos>12,35,27,19,31,22:49=") -> list[Instance]:
    return [Instance("generate_until", {}, (context, settings), 0, ("task", 0, 2))] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not served by bridge"),
        ({"max_gen_toks": 128}, "max_gen_toks is 128, but the model takes 128 tokens"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": None}, "generation argument top_k is None: it must be a whole number"),
        ({"temperature": "hot"}, "generation argument temperature is 'hot': it must be a number"),
        ({"max_gen_toks": "many"}, "generation argument max_gen_toks is 'many': it must be a whole number"),
        ({"seed": -1}, "generation argument seed is -1: it must not be negative"),
    ],
)
def test_generation_arguments_that_cannot_be_served_are_named(model, settings, message):
    with pytest.raises(UserError, match=message):
        model.generate_until(requests_of(SAMPLED | settings))


def test_a_long_prompt_keeps_its_end(model):
    short = "<bos>" + "1" * 95
    [first, _] = model.generate_until(requests_of(SAMPLED, short.removeprefix("<bos>") + "2"))
    [cut, _] = model.generate_until(requests_of(SAMPLED, short + "1" * 20 + "2"))
    assert first == cut  # 96 tokens and 32 to come


def test_greedy_rows_are_equal_and_said_to_be(model, caplog, monkeypatch):
    warning_once.cache_clear()
    monkeypatch.setattr("bridge_rl.harness.eval_logger.parent.propagate", True)
    settings = {"do_sample": False, "max_gen_toks": 8, "until": []}
    for _ in range(2):
        first, second = model.generate_until(requests_of(settings))
    assert first == second
    assert caplog.text.count("Greedy decoding makes the rows of a group equal") == 1


def test_a_bridge_without_siblings_is_said_to_be(checkpoint, caplog, monkeypatch):
    warning_once.cache_clear()
    monkeypatch.setattr("bridge_rl.harness.eval_logger.parent.propagate", True)
    alone = [Instance("generate_until", {}, requests_of(SAMPLED)[0].args, 0, ("task", 0, 1))]
    BridgeLM(checkpoint, device="cpu", width=1).generate_until(alone)  # as it was asked for
    assert "without siblings" not in caplog.text
    BridgeLM(checkpoint, device="cpu").generate_until(alone)
    assert "its rows run at width 1, without siblings" in caplog.text


def test_what_was_completed_before_a_failure_is_in_the_cache(model, monkeypatch):
    kept, sample = [], model.sample

    def failing(groups, params):
        yield next(iter(sample(groups, params)))
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "sample", failing)
    monkeypatch.setattr(model.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    requests = requests_of({"do_sample": False, "max_gen_toks": 4, "until": []})
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(requests)
    assert [entry[:2] for entry in kept] == [("generate_until", request.args) for request in requests]


def test_sampling_is_never_served_from_the_cache(checkpoint, tasks, tmp_path):
    add_task(tasks, "four", {})
    cached = {"limit": 3, "use_cache": str(tmp_path / "cache")}
    arguments = {"pretrained": checkpoint, "width": 4}
    _, first = evaluate(tasks, ["four"], arguments, **cached)
    _, second = evaluate(tasks, ["four"], arguments | {"seed": 1}, **cached)
    assert first["four"] == ours(checkpoint, PROBLEMS[:3], 4)
    assert second["four"] == ours(checkpoint, PROBLEMS[:3], 4, seed=1)
    add_task(tasks, "silent", {"do_sample: true": "top_k: 0"})
    with pytest.raises(UserError, match="--use_cache would give all repeats one completion"):
        evaluate(tasks, ["silent"], arguments, **cached)
    assert evaluate(tasks, ["silent"], arguments, limit=3)[1]["silent"] == first["four"]


def test_greedy_completions_come_from_the_cache(checkpoint, tasks, tmp_path, monkeypatch):
    add_task(tasks, "greedy", {"do_sample: true": "do_sample: false"})
    cached = {"limit": 3, "use_cache": str(tmp_path / "cache")}
    _, first = evaluate(tasks, ["greedy"], {"pretrained": checkpoint, "width": 4}, **cached)
    monkeypatch.setattr(BridgeLM, "generate_until", None)
    assert evaluate(tasks, ["greedy"], {"pretrained": checkpoint, "width": 4}, **cached)[1] == first


def test_likelihoods_are_of_a_row_alone(model):
    requests = [
        Instance("loglikelihood", {}, ("<bos>12,35:47=", text), 0, ("task", n, 1))
        for n, text in enumerate(["12+35", "12+3", "35"])
    ]
    found = [logprob for logprob, _ in model.loglikelihood(requests)]
    ids = [model.tok_encode(request.args[0] + request.args[1]) for request in requests]
    prompt = len(model.tok_encode("<bos>12,35:47="))
    expected = [br.group_logprobs(model.model, [row[:prompt]], [[row[prompt:]]])[0][0] for row in ids]
    # fp32; lm_eval scores in batches padded on the right, which moves the last digits.
    assert found == pytest.approx([sum(row) for row in expected], abs=1e-4)


@pytest.mark.slow  # as above
def test_a_mistake_is_one_sentence_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(ROOT)
    task = ["--include_path", str(TASK.parent), "--tasks", "two_tries", "--limit", "1"]
    model = ["--model", "bridge", "--model_args", f"pretrained={TINY},width=3", "--apply_chat_template"]
    with pytest.raises(SystemExit) as exit_:
        bridge_rl(["lm-eval", *model, *task])
    assert exit_.value.code == 2
    assert "error: task two_tries has repeats 4, which are not whole groups of width 3" in capsys.readouterr().err


def test_the_entry_point_that_lm_eval_looks_for_is_the_model():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    assert EntryPoint("bridge", scripts["bridge"], "lm_eval.models").load() is BridgeLM
