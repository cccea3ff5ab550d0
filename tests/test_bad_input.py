"""A user's mistake in a recipe, in data or in a checkpoint: exit code 2 and one sentence that says what and where."""

import errno
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import bridge_rl as br
from bridge_rl.cli import main
from bridge_rl.files import alone_in
from bridge_rl.run_checkpoints import writing

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny_arith.yaml"
TINY_MODEL = ROOT / "bridge_rl" / "tiny" / "model"
BRIDGE = "bridge={num_heads: 4, head_dim: 12}"
SMALL = [
    BRIDGE,
    "warmup=null",
    "rollout.max_new_tokens=4",
    "data.train.kwargs.size=16",
    "data.eval.kwargs.size=4",
    "training={max_steps: 1, per_device_train_batch_size: 8}",
    "evaluation={problems: 2, samples: 1, widths: [1]}",
]
ROW = {"problem": "1+1", "answer": "2"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A run starts in an empty directory, as one process without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("bridge_rl.models.load_model", refuse)


@pytest.fixture
def no_bars():
    """The bars of loading go to stderr, too."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def error_lines(arguments, capsys) -> list[str]:
    """What `bridge-rl` wrote to stderr; it must have stopped with exit code 2 and one sentence at the end."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert "Traceback" not in written
    lines = written.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines


def error_of(arguments, capsys) -> str:
    """The one line that `bridge-rl` wrote to stderr."""
    [line] = error_lines(arguments, capsys)
    return line


def error_of_tiny(overrides, capsys) -> str:
    return error_of(["train", TINY, *SMALL, "output_dir=out", *overrides], capsys)


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = {
    "invalid YAML": (b"model: [", ["r.yaml is not valid YAML"]),
    "a tab": (b"model:\n\tpath: x\n", ["r.yaml is not valid YAML", "line 2"]),
    "a section twice": (
        b"rollout: {width: 8}\nrollout: {}\n",
        ["r.yaml is not valid YAML: 'rollout' stands", "line 2"],
    ),
    "a key twice": (b"rollout:\n  width: 8\n  width: 4\n", ["r.yaml is not valid YAML: 'width' stands", "line 3"]),
    "a number too long": (b"seed: " + b"9" * 5000, ["r.yaml is not valid YAML", "Exceeds the limit"]),
    "brackets without end": (b"training: " + b"[" * 3000, ["r.yaml is not valid YAML"]),
    "no text": (b"\xff\xfe\x00\x81", ["r.yaml is not valid YAML"]),
    "an anchor in itself": (b"model: &m\n  path: *m\n", ["r.yaml is not valid YAML", "Circular"]),
    "empty": (b"", ["r.yaml is empty"]),
    "a list": (b"- model\n", ["r.yaml is empty or no mapping"]),
    "a number for extends": (b"extends: 3\n", ["r.yaml", "'extends' is 3"]),
    "extends itself": (b"extends: r.yaml\n", ["r.yaml", "break the circle"]),
    "extends what is not there": (b"extends: base.yaml\n", ["no recipe", "base.yaml", "which", "r.yaml extends"]),
    "a key is missing": (
        b"model: {path: a}\noutput_dir: b\nrewards: [{function: c}]\n",
        ["r.yaml", "'data' is missing"],
    ),
}


@pytest.mark.parametrize(("content", "words"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_cannot_be_read_is_refused(content, words, tmp_path, no_weights, capsys):
    (tmp_path / "r.yaml").write_bytes(content)
    error = error_of(["train", tmp_path / "r.yaml"], capsys)
    assert [word for word in words if word not in error] == []


@pytest.mark.parametrize("command", ["train", "warmup"])
def test_a_recipe_that_is_not_there_is_answered_with_the_nearest(command, no_weights, capsys):
    error = error_of([command, TINY.with_name("tiny_arit.yaml")], capsys)
    assert error == f"error: There is no recipe {TINY.parent}/tiny_arit.yaml: did you mean {TINY}?"


def test_a_directory_or_a_name_that_no_file_can_have_is_no_recipe(tmp_path, no_weights, capsys):
    (tmp_path / "runs.yaml").mkdir()
    assert error_of(["train", "runs.yaml"], capsys) == "error: runs.yaml is a directory: name a recipe in it."
    assert error_of(["train", "run.yaml"], capsys) == "error: There is no recipe run.yaml."
    assert error_of(["train", 300 * "a"], capsys) == f"error: There is no recipe {300 * 'a'}."


def test_options_that_are_none_are_named_and_overrides_are_not(capsys):
    with pytest.raises(SystemExit):
        main(["train", str(TINY), "--seed=4", "output_dir=out"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "unrecognized arguments: --seed=4: keys of the recipe are set by key=value, such as rollout.width=8"
    )


def test_a_prompt_of_bytes_that_are_no_text_is_refused(capsys):
    [*_, error] = error_lines(["generate", "--model", TINY_MODEL, "\udcff"], capsys)
    assert error == "error: The prompt is not valid UTF-8: give it in the encoding of the terminal."


def test_a_chat_template_that_refuses_the_prompt_is_one_sentence(tmp_path, capsys):
    shutil.copytree(TINY_MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('a system prompt is needed') }}")
    [*_, error] = error_lines(["generate", "--model", str(tmp_path / "model"), "2+2"], capsys)
    assert error == "error: The model's chat template refuses the messages: a system prompt is needed"


# -- keys and values --------------------------------------------------------------------------------------------------

OVERRIDES = {
    "unknown key": ("rolout.width=4", ["tiny_arith.yaml", "'rolout'", "did you mean 'rollout'?"]),
    "unknown key of a section": ("rollout.widht=4", ["'rollout.widht'", "did you mean 'width'?"]),
    "a capital": ("SEED=1", ["unknown key 'SEED': did you mean 'seed'?"]),
    "a section with a capital": ("Rollout.width=4", ["unknown key 'Rollout': did you mean 'rollout'?"]),
    "a capital in a section": ("rollout.Width=8", ["unknown key 'rollout.Width': did you mean 'width'?"]),
    "a capital in a reward": ("rewards=[{Function: a}]", ["'rewards.0.Function': did you mean 'function'?"]),
    "a capital in training": ("training.Beta=1", ["'training.Beta': did you mean 'beta'?"]),
    "a bracket": ("rewards[0].weight=2", ["unknown key 'rewards[0]': did you mean 'rewards'?"]),
    "a number for a key": ("rollout={1: 2}", ["'rollout.1' is 1", "keys should be strings"]),
    "unknown key of data": ("data.train.pth=4", ["'data.train.pth'", "did you mean 'path'?"]),
    "unknown key of a reward": ("rewards=[{functon: a}]", ["'rewards.0.functon'", "did you mean 'function'?"]),
    "unknown key of training": (
        "training.learning_rte=1",
        ["'training.learning_rte'", "did you mean 'learning_rate'?"],
    ),
    "key that another section decides": ("training.num_generations=8", ["training.num_gen", "use rollout.num_gen"]),
    "a learning rate without end": (
        "training.learning_rate=.inf",
        ["training.learning_rate is inf", "a finite number"],
    ),
    "a bound that is no number": ("training.max_grad_norm=.nan", ["training.max_grad_norm is nan", "a finite number"]),
    "neither form": ("data.train.check_answers=5", ["should be 'drop' or a valid boolean"]),
    "neither form in a list": ("bridge.layers=[1.5]", ["should be 'all' or a valid integer"]),
    "no equals sign": ("rollout.width", ["'rollout.width' is not key=value"]),
    "value that is no YAML": ("rollout.width=[", ["'rollout.width=['", "not valid YAML"]),
    "anchor in itself": ("rollout=&r {width: *r}", ["not valid YAML (Circular"]),
    "key twice in a value": ("rollout={width: 4, width: 8}", ["not valid YAML ('width' stands twice)"]),
    "key inside a value": ("seed.x=4", ["'seed.x=4' goes into 'seed'"]),
    "word for a number": ("rollout.width=four", ["tiny_arith.yaml", "'rollout.width' is 'four'", "integer"]),
    "yes for a number": ("rollout.width=yes", ["tiny_arith.yaml", "'rollout.width' is True", "must be a number"]),
    "no for a number in a list": ("bridge.layers=[no]", ["'bridge.layers.0' is False", "must be a number"]),
    "value for a section": ("rollout=4", ["'rollout' is 4"]),
    "an entry that a list lacks": ("rewards.1.weight=2", ["'rewards.1.weight=2'", "by its number, from 0 to 0"]),
    "a name for an entry": ("rewards.weight=2", ["goes into a list by 'weight'", "by its number, from 0 to 0"]),
    "comment behind a number": ("rollout.width=8 # wide", ["'rollout.width' is '8 # wide'", "integer"]),
    "list for training": ("training=[1]", ["'training' is [1]", "dictionary"]),
    "unknown choice": ("train=some", ["'train' is 'some'", "'bridge', 'lora' or 'full'"]),
    "unknown kind of block": ("bridge.kind=mlp", ["'bridge.kind' is 'mlp'", "'bridge' or 'pmatch'"]),
    "no heads": ("bridge.num_heads=0", ["bridge.num_heads is 0"]),
    "layer that does not exist": ("bridge.layers=[0,9]", ["bridge.layers names layer 9", "layers 0 to 3"]),
    "width that splits a prompt": ("rollout.width=3", ["rollout.num_generations is 8", "rollout.width 3"]),
    "width that splits a batch": (
        "training.per_device_train_batch_size=6",
        ["training.per_device_train_batch_size is 6", "multiple of the width 4"],
    ),
    "fewer rows than a prompt has": ("training.per_device_train_batch_size=4", ["4 rows", "rollout.num_generations 8"]),
    "a quantile below 0": ("training.top_entropy_quantile=-0.5", ["top_entropy_quantile is -0.5", "from 0 to 1"]),
    "a percentage": ("training.top_entropy_quantile=20.0", ["top_entropy_quantile is 20.0", "from 0 to 1"]),
    "no prefetching": ("training.dataloader_prefetch_factor=0", ["dataloader_prefetch_factor is 0", "at least 1"]),
    "no batch": ("training.per_device_train_batch_size=0", ["training.per_device_train_batch_size is 0", "at least 1"]),
    "word for a batch": ("training.per_device_train_batch_size=six", ["per_device_train_batch_size is 'six'", "int"]),
    "no accumulation": ("training.gradient_accumulation_steps=0", ["training.gradient_accumulation_steps is 0"]),
    "half an accumulation": ("training.gradient_accumulation_steps=1.5", ["gradient_accumulation_steps is 1.5", "int"]),
    "word for a learning rate": ("training.learning_rate=fast", ["training.learning_rate is 'fast'", "float"]),
    "unknown loss": ("training.loss_type=nonsense", ["training.loss_type is 'nonsense'", "grpo", "dapo"]),
    "unknown scaling": ("training.scale_rewards=std", ["training.scale_rewards is 'std'", "group"]),
    "workers below 0": ("training.dataloader_num_workers=-1", ["dataloader_num_workers is -1", "at least 0"]),
    "unknown option of checkpoints": (
        "training.gradient_checkpointing_kwargs={use_reentrnt: false}",
        ["'training.gradient_checkpointing_kwargs.use_reentrnt'", "did you mean 'use_reentrant'?"],
    ),
    "learning rate below 0": ("training.learning_rate=-1", ["training.learning_rate", "Invalid learning rate: -1"]),
    "beta above 1": ("training.adam_beta2=2", ["training.adam_*", "Invalid beta parameter"]),
    "learning rate of a warm-up of 0": ("warmup={learning_rate: 0}", ["warmup.learning_rate is 0.0"]),
    "no number": ("rollout.temperature=.nan", ["'rollout.temperature' is nan", "finite"]),
    "unknown schedule": ("training.lr_scheduler_type=nonsense", ["training: ", "nonsense", "linear"]),
    "greedy training": ("rollout.temperature=0", ["rollout.temperature is 0.0", "0.01 or more"]),
    "nearly greedy training": ("rollout.temperature=1e-4", ["rollout.temperature is 0.0001", "0.01 or more"]),
    "nearly greedy evaluation": ("evaluation.temperature=1e-4", ["evaluation.temperature is 0.0001", "0.01"]),
    "top_p in the rollout": ("rollout.top_p=0.9", ["rollout.top_p is 0.9", "set top_p=1.0"]),
    "rows that hold no group": ("rollout.max_rows=2", ["rollout.max_rows is 2", "a group of 4"]),
    "a cache that holds no group": (
        "rollout.max_cache_tokens=9",
        ["rollout.max_cache_tokens is 9", "must hold a prompt"],
    ),
    "vLLM": ("training.use_vllm=true", ["training.use_vllm is True", "siblings"]),
    "masking of TRL": (
        "training.mask_truncated_completions=true",
        ["training.mask_truncated_completions is True", "rollout.mask_truncated=true"],
    ),
    "top_p in training": ("training.top_p=0.9", ["training.top_p is 0.9", "set it to 1.0"]),
    "top_k in training": ("training.top_k=5", ["training.top_k is 5", "set it to 0"]),
    "batches split over ranks": (
        "training.accelerator_config={split_batches: true}",
        ["accelerator_config.split_batches"],
    ),
    "bf16 without a GPU": ("training.bf16=true", ["training.bf16 is on", "no GPU"]),
    "fp16 without a GPU": ("training.fp16=true", ["training.fp16 is on", "no GPU"]),
    "no width to evaluate": ("evaluation.widths=[]", ["evaluation.widths is []"]),
    "a width twice": ("evaluation.widths=[1,4,4]", ["evaluation.widths is [1, 4, 4]: name each width once"]),
    "no samples to evaluate": ("evaluation.samples=0", ["evaluation.samples is 0"]),
    "seed below 0": ("seed=-1", ["seed is -1"]),
    "no processes": ("launch.num_processes=0", ["launch.num_processes is 0", "at least 1"]),
    "processes below 0": ("launch.num_processes=-8", ["launch.num_processes is -8", "at least 1"]),
    "no memory": ("launch.gpu_memory_gb=0", ["launch.gpu_memory_gb is 0", "above 0"]),
    "memory below 0": ("launch.gpu_memory_gb=-80", ["launch.gpu_memory_gb is -80", "above 0"]),
    "no rank of LoRA": ("lora.r=0", ["lora.r is 0"]),
    "prompt without the problem": ("data.prompt=hello", ["data.prompt", "'{problem}'"]),
    "nothing to train": ("bridge=null", ["train is 'bridge' but bridge is null"]),
    "warm-up of single completions": ("warmup={min_right: 1}", ["warmup.min_right is 1"]),
    "no rewards": ("rewards=[]", ["rewards is empty", "rewards/answer.py:correct"]),
    "reward without a function": (
        "rewards=[{function: rewards/answer.py}]",
        ["rewards.0.function", "names no function"],
    ),
    "reward file that is not there": ("rewards=[{function: 'no.py:correct'}]", ["rewards.0.function", "no file no.py"]),
    "function that the file lacks": (
        "rewards=[{function: 'rewards/answer.py:wrong'}]",
        ["rewards.0.function", "rewards/answer.py has no function 'wrong'"],
    ),
    "module that is not there": (
        "rewards=[{function: 'no_such.module:correct'}]",
        ["rewards.0.function", "cannot import no_such.module:correct"],
    ),
    "function that the module lacks": ("rewards=[{function: 'json:correct'}]", ["rewards.0.function", "json:correct"]),
    "reward that is no function": ("rewards=[{function: 'string:digits'}]", ["rewards.0.function", "'string:digits'"]),
    "second reward": (
        "rewards=[{function: 'rewards/answer.py:correct'}, {function: 'no.py:f'}]",
        ["rewards.1.function", "no.py"],
    ),
    "weight that is no number": (
        "rewards=[{function: 'rewards/answer.py:correct', weight: heavy}]",
        ["'rewards.0.weight' is 'heavy'"],
    ),
    "model that is not there": ("model.path=/no/such/model", ["model.path", "no directory /no/such/model"]),
    "model that is not on the hub": (
        "model.path=no/such-model",
        ["model.path", "hf download no/such-model"],
    ),
    "package that is not there": ("model.path=package://no_such/model", ["model.path", "pip install no-such"]),
    "package that has no such directory": (
        "model.path=package://bridge_rl/no",
        ["model.path", "bridge_rl", "directory no"],
    ),
    "data that is not there": ("data.train={path: no.jsonl}", ["data.train.path", "no file no.jsonl"]),
    "evaluation data that is not there": ("data.eval={path: no.parquet}", ["data.eval.path", "no file no.parquet"]),
    "data that is not on the hub": ("data.train={path: no/such-set}", ["data.train.path", "no/such-set", "dataset"]),
    "data of a module that is not there": ("data.train={path: 'no.such:rows'}", ["data.train.path", "no.such:rows"]),
    "data function called wrongly": ("data.train.kwargs={colour: 3}", ["data.train.kwargs", "bridge_rl.tiny.task"]),
    "kwargs of a file": (
        "data.train.path=p.jsonl",
        ["data.train.kwargs is {", "p.jsonl is a file", "set data.train.kwargs=null"],
    ),
    "split of a file": ("data.eval={path: p.jsonl, split: test}", ["p.jsonl is a file", "set data.eval.split=train"]),
    "name of a file": ("data.train={path: p.jsonl, name: main}", ["data.train.name is 'main'", "data.train.name=null"]),
    "split of a function": ("data.eval.split=test", ["bridge_rl.tiny.task:dataset is a function", "split=train"]),
    "revision of a function": ("data.eval.revision=a1", ["data.eval.revision is 'a1'", "a function, which has none"]),
    "kwargs of a set on the hub": ("data.train.path=no/such-set", ["no/such-set is a data set on", "kwargs=null"]),
    "kwargs of a directory": ("data.train.path=.", [". is a directory", "set data.train.kwargs=null"]),
    "evaluation of nothing": (
        "data.eval=null",
        ["evaluation.every is 2", "data.eval is null", "evaluation.every=null"],
    ),
    "no size": ("data.train.size=0", ["data.train.size is 0"]),
    "no place of data": ("data.train.path=''", ["'data.train.path' is ''", "at least 1 character"]),
    "no place of a model": ("model.path=''", ["'model.path' is ''", "at least 1 character"]),
    "no place of completions": ("warmup.path=''", ["'warmup.path' is ''", "at least 1 character"]),
    "no place to write to": ("output_dir=''", ["'output_dir' is ''", "at least 1 character"]),
    "data of a format that is not read": ("data.train={path: no.csv}", ["data.train.path", "no.csv is no .jsonl"]),
    "a directory that is not there": ("data.train={path: ./no}", ["data.train.path", "there is no directory no"]),
    "pattern that is no pattern": ("data.train.answer_pattern='('", ["data.train.answer_pattern is '('"]),
    "pattern without a group": ("data.train.answer_pattern='.+'", ["data.train.answer_pattern is '.+'", "parentheses"]),
}


@pytest.mark.parametrize(("override", "words"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_wrong_key_or_value_is_named_before_weights_load(override, words, no_weights, capsys):
    others = {"bridge=null": ["train=bridge"], "data.eval=null": ["evaluation.every=2"]}.get(override, [])
    Path("p.jsonl").write_text(json.dumps(ROW))
    error = error_of_tiny([*others, override], capsys)
    assert [word for word in words if word not in error] == []


def test_a_run_on_another_number_of_processes_than_planned_is_refused(no_weights, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = error_of_tiny(["launch.num_processes=8"], capsys)
    assert "launch.num_processes is 8 but this run has 2" in error


def test_an_output_directory_that_is_a_file_is_refused(tmp_path, no_weights, capsys):
    (tmp_path / "file").touch()
    assert "output_dir: file is a file" in error_of_tiny(["output_dir=file"], capsys)


@pytest.mark.parametrize("command", ["train", "warmup"])
def test_an_output_directory_that_cannot_be_made_is_refused(command, tmp_path, no_weights, capsys):
    (tmp_path / "file").touch()
    error = error_of([command, TINY, "output_dir=file/out"], capsys)
    assert "Nothing can be written to file/out" in error


@pytest.mark.parametrize("command", ["train", "warmup"])
def test_a_second_run_in_the_same_directory_is_refused(command, no_weights, capsys):
    with alone_in(Path("out")):
        assert "Another process works in out" in error_of([command, TINY, "output_dir=out"], capsys)


FAULTS_OF_DISK = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), ["a write failed", "No space left", "make room"]),
    "full, as torch says it": (
        RuntimeError("PytorchStreamWriter failed writing file"),
        ["a write failed", "make room"],
    ),
    "closed": (PermissionError(errno.EACCES, "Permission denied", "out/x"), ["out/x cannot be", "its permissions"]),
}


@pytest.mark.parametrize(("raised", "words"), FAULTS_OF_DISK.values(), ids=FAULTS_OF_DISK)
def test_a_disk_that_is_full_or_closed_is_one_sentence(raised, words, monkeypatch, capsys):
    def refuse(recipe):
        raise raised

    monkeypatch.setattr("bridge_rl.run.train", refuse)
    error = error_of_tiny([], capsys)
    assert [word for word in words if word not in error] == []


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    def fail(recipe):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("bridge_rl.run.train", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["train", str(TINY), *SMALL, "output_dir=out"])


@pytest.mark.parametrize("text", ["def (", "import no_such_module", "1 / 0"])
def test_a_reward_file_that_cannot_be_imported_is_named(text, tmp_path, no_weights, capsys):
    (tmp_path / "mine.py").write_text(text)
    error = error_of_tiny(["rewards=[{function: 'mine.py:correct'}]"], capsys)
    assert "rewards.0.function: mine.py cannot be imported" in error


# -- data -------------------------------------------------------------------------------------------------------------


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# (file, content, more of the source, words)
DATA = {
    "empty": ("d.jsonl", "", "", ["data.train.path", "d.jsonl is empty"]),
    "blank": ("d.jsonl", "\n\n", "", ["data.train.path", "d.jsonl holds no rows"]),
    "damaged": ("d.jsonl", lines(ROW) + '{"problem": "1+\n', "", ["data.train.path", "d.jsonl, line 2, is no JSON"]),
    "numbers for rows": ("d.jsonl", "3\n", "", ["data.train.path", "d.jsonl, line 1, is no row"]),
    "damaged list": ("d.json", "[{", "", ["data.train.path", "d.json cannot be read as json"]),
    "damaged parquet": ("d.parquet", "PAR1", "", ["data.train.path", "d.parquet cannot be read as parquet"]),
    "unknown format": ("d.txt", "1+1\n", "", ["data.train.path", "d.txt is no .jsonl"]),
    "no problem": ("d.jsonl", lines({"q": "1+1", "answer": "2"}), "", ["data.train.problem_column", "answer, q"]),
    "no answer": ("d.jsonl", lines({"problem": "1+1", "a": "2"}), "", ["data.train.answer_column", "a, problem"]),
    "empty problem": ("d.jsonl", lines(ROW, {"problem": " ", "answer": "2"}), "", ["data.train", "row 1", "'problem'"]),
    "empty answer": ("d.jsonl", lines(ROW, {"problem": "1", "answer": ""}), "", ["data.train", "row 1", "'answer'"]),
    "null answer": ("d.jsonl", lines(ROW, {"problem": "1", "answer": None}), "", ["data.train", "row 1", "'answer'"]),
    "unmatched answer": (
        "d.jsonl",
        lines({"problem": "1", "answer": "#### 1"}, ROW),
        ", answer_pattern: '#### (.+)'",
        ["data.train.answer_pattern", "row 1 of d.jsonl"],
    ),
    "number for a problem": ("d.jsonl", lines({"problem": 5, "answer": "5"}), "", ["row 0", "has 5", "of type int"]),
    "answer that pandas missed": ("d.jsonl", '{"problem": "1", "answer": NaN}', "", ["row 0", "empty 'answer'"]),
    "half a character": (
        "d.jsonl",
        '{"problem": "\\ud83d", "answer": "1"}',
        "",
        ["column 'problem'", "whole characters"],
    ),
    "a number too long": ("d.jsonl", f'{{"answer": {"9" * 5000}}}', "", ["d.jsonl, line 1,", "Exceeds the limit"]),
    "unreadable answer": (
        "d.jsonl",
        lines(ROW, {"problem": "1", "answer": "\\frac{1"}),
        "",
        ["data.train", "row 1 of d.jsonl", "'\\\\frac{1'", "check_answers=false"],
    ),
}


@pytest.mark.parametrize(("name", "content", "more", "words"), DATA.values(), ids=DATA)
def test_bad_data_is_named_before_weights_load(name, content, more, words, tmp_path, no_weights, capsys):
    (tmp_path / name).write_text(content)
    error = error_of_tiny([f"data.train={{path: {name}{more}}}"], capsys)
    assert [word for word in words if word not in error] == []


FUNCTIONS = {
    "fails": ("def rows(): return 1 / 0", ["m:rows failed with ZeroDivisionError in line 1 of", "m.py"]),
    "fails while it yields": ("def rows():\n    yield 1 / 0", ["m:rows failed with ZeroDivisionError in line 2 of"]),
    "gives nothing": ("def rows(): pass", ["m:rows failed with TypeError", "not iterable"]),
    "gives pairs": ("def rows(): return [('1+1', '2')]", ["data.train.path", "('1+1', '2') for a row", "dictionary"]),
    "gives a column of two types": (
        "def rows(): return [{'problem': 'p', 'answer': '1', 'x': x} for x in (1, 'a')]",
        ["data.train.path", "the column 'x' of", "one type"],
    ),
    "cannot be imported": ("1 / 0", ["data.train.path", "cannot import", "division by zero"]),
}


@pytest.mark.parametrize(("text", "words"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_function_of_problems_that_fails_is_named(text, words, tmp_path, no_weights, monkeypatch, capsys):
    (tmp_path / "m.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "m", raising=False)
    *_, error = error_lines(["train", TINY, *SMALL, "output_dir=out", "data.train={path: 'm:rows'}"], capsys)
    monkeypatch.delitem(sys.modules, "m", raising=False)
    assert [word for word in words if word not in error] == []


# -- models and checkpoints -------------------------------------------------------------------------------------------

FOREIGN = {
    "bloom": {"vocab_size": 19, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "gpt2": {"vocab_size": 19, "n_embd": 16, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_family_that_is_not_served_is_refused_from_its_configuration(family, tmp_path, no_weights, capsys):
    config = AutoConfig.for_model(family, **FOREIGN[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    capsys.readouterr()
    error = error_of_tiny([f"model.path={family}"], capsys)
    assert f"does not serve the model family '{family}'" in error
    assert "qwen2" in error


def test_a_model_that_writes_no_text_is_refused(tmp_path, no_weights, capsys):
    AutoConfig.for_model("t5", vocab_size=19, d_model=16).save_pretrained(tmp_path / "t5")
    assert "model.path: t5 is a 't5', no causal language model" in error_of_tiny(["model.path=t5"], capsys)


def test_an_attention_that_is_not_installed_is_one_sentence(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ImportError("the package for FlashAttention2 doesn't seem to be installed")

    monkeypatch.setattr("bridge_rl.checkpoint.AutoModelForCausalLM.from_pretrained", refuse)
    error = error_of_tiny(["model.attn_implementation=flash_attention_2"], capsys)
    assert "model.path" in error
    assert "FlashAttention2" in error


def test_damaged_base_weights_are_named(tmp_path, capsys):
    shutil.copytree(TINY_MODEL, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"damaged")
    assert "model.path: base has damaged weights" in error_of_tiny(["model.path=base"], capsys)


def test_a_damaged_configuration_of_a_base_is_named(tmp_path, no_weights, capsys):
    shutil.copytree(TINY_MODEL, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{")
    error = error_of_tiny(["model.path=base"], capsys)
    assert "model.path: base cannot be loaded" in error
    assert "config.json" in error


@pytest.fixture
def checkpoint(tmp_path, no_bars, capsys) -> Path:
    """A Bridge of the embedded model, which each test damages in its own way."""
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    br.save_bridge(br.attach_bridge(base, br.BridgeConfig(num_heads=4, head_dim=12)), tmp_path / "ckpt")
    capsys.readouterr()
    return tmp_path / "ckpt"


def edit(directory: Path, **changes) -> None:
    path = directory / "bridge_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_blocks_are_named(checkpoint, capsys):
    weights = checkpoint / "bridge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "ckpt/bridge.safetensors is damaged" in error_of_tiny(["model.path=ckpt"], capsys)


def test_a_damaged_description_of_the_blocks_is_named(checkpoint, no_weights, capsys):
    (checkpoint / "bridge_config.json").write_text('{"bridge": {')
    assert "ckpt/bridge_config.json is damaged" in error_of_tiny(["model.path=ckpt"], capsys)


def test_a_description_with_an_unknown_key_is_named(checkpoint, no_weights, capsys):
    edit(checkpoint, bridge={"num_heads": 4, "head_dim": 12, "colour": "red"})
    error = error_of_tiny(["model.path=ckpt"], capsys)
    assert "ckpt/bridge_config.json is damaged" in error
    assert "colour" in error


def test_blocks_of_another_shape_than_described_are_named(checkpoint, capsys):
    edit(checkpoint, bridge={"num_heads": 4, "head_dim": 8})
    error = error_of_tiny(["model.path=ckpt"], capsys)
    assert "ckpt has another shape for model.layers.0.bridge" in error


def test_a_bridge_is_not_put_into_another_base(checkpoint, tmp_path, capsys):
    config = AutoConfig.from_pretrained(TINY_MODEL)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    shutil.copy(TINY_MODEL / "tokenizer.json", tmp_path / "other")
    shutil.copy(TINY_MODEL / "tokenizer_config.json", tmp_path / "other")
    edit(checkpoint, base=str(tmp_path / "other"))
    capsys.readouterr()
    assert "ckpt was trained on another base" in error_of_tiny(["model.path=ckpt"], capsys)


def test_a_tokenizer_without_an_end_is_named(checkpoint, no_weights, tmp_path, capsys):
    """TRL cannot compare its rows' last tokens with none."""
    shutil.copytree(TINY_MODEL, tmp_path / "endless")
    path = tmp_path / "endless" / "tokenizer_config.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "eos_token"}))
    for command in ("train", "warmup"):
        overrides = [f"model.path={tmp_path / 'endless'}", "warmup={problems: 4, samples: 2}"]
        error = error_of([command, TINY, *SMALL, "output_dir=out", *overrides], capsys)
        assert "has no EOS token, which TRL needs: set eos_token in" in error


def test_a_base_that_is_gone_is_named(checkpoint, no_weights, capsys):
    edit(checkpoint, base="/no/such/base")
    error = error_of_tiny(["model.path=ckpt"], capsys)
    assert "model.path: there is no directory /no/such/base, the base of ckpt" in error


def test_a_checkpoint_with_a_bridge_is_no_control(checkpoint, capsys):
    error = error_of_tiny(["model.path=ckpt", "bridge=null", "train=full"], capsys)
    assert "ckpt carries a Bridge but bridge is null" in error


# -- warm-up and going on ---------------------------------------------------------------------------------------------

WARMUP = "warmup={problems: 2, samples: 2, steps: 1, groups_per_step: 1, max_new_tokens: 2}"


@pytest.mark.parametrize("command", ["train", "warmup"])
def test_a_base_that_never_solves_enough_problems_cannot_warm_up(command, no_bars, capsys):
    # Two tokens are too few for any answer.
    *_, error = error_lines([command, TINY, *SMALL, WARMUP, "output_dir=out"], capsys)
    assert "warmup: none of 2 problems had 2 right completions of 2" in error
    assert "warmup.data" in error


@pytest.mark.parametrize("line", [b'{"problem": "1"', b'{"problem": "1"}', b"3", b"\xff\xfe\x00\x81"])
def test_a_damaged_file_of_warm_up_completions_is_named_with_its_line(line, tmp_path, no_bars, capsys):
    (tmp_path / "groups.jsonl").write_bytes(line + b"\n")
    error = error_of_tiny(["warmup={path: groups.jsonl, steps: 1}"], capsys)
    assert "groups.jsonl, line 1, is no warm-up group" in error


def test_warm_up_completions_of_another_tokenizer_are_not_taken(tmp_path, no_bars, capsys):
    group = {"problem": "1", "prompt_ids": [4, 5], "completion_ids": [[4, 5], [6, 7]], "completions": ["ab", "cd"]}
    (tmp_path / "groups.jsonl").write_text(json.dumps(group | {"correct": [True, True]}) + "\n")
    error = error_of_tiny(["warmup={path: groups.jsonl, steps: 1}"], capsys)
    assert "groups.jsonl, line 1, was written with another tokenizer: name another warmup.path" in error


@pytest.mark.parametrize(("key", "size"), [("data.train", 16), ("data.eval", 4)])
def test_a_prompt_that_the_rollout_would_refuse_is_named_before_the_warm_up(key, size, tmp_path, no_weights, capsys):
    """In a model whose positions beyond the first ones depend on the longest row."""
    shutil.copytree(TINY_MODEL, tmp_path / "dynamic")
    config = json.loads((tmp_path / "dynamic" / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    (tmp_path / "dynamic" / "config.json").write_text(json.dumps(config))
    rows = [{"problem": "12,35,27,19,31,22:49" * (1 + 4 * (n == 0)), "answer": "49"} for n in range(size)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{key}={{path: long.jsonl}}"
    error = error_of_tiny([f"model.path={tmp_path / 'dynamic'}", data, "rollout.max_new_tokens=32"], capsys)
    assert f"{key}: its longest prompt has" in error
    assert "128 positions" in error


def test_the_warm_up_of_another_recipe_is_not_taken(checkpoint, tmp_path, no_weights, capsys):
    shutil.copytree(checkpoint, tmp_path / "out" / "warmup")
    shutil.copy(TINY, tmp_path / "out" / "warmup" / "recipe.yaml")
    error = error_of_tiny([WARMUP], capsys)
    assert "out/warmup was made by a recipe with another" in error
    assert "output_dir" in error


def test_the_run_of_another_recipe_is_not_gone_on_with(tmp_path, no_weights, capsys):
    PartialState(cpu=True)
    with writing(tmp_path / "out", 1, 0, None):
        pass
    shutil.copy(TINY, tmp_path / "out" / "recipe.yaml")
    error = error_of_tiny([], capsys)
    assert "out was made by a recipe with another" in error
    assert "out/recipe.yaml" in error
