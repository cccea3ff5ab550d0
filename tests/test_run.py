"""A whole run on a small scale, as the command line does it."""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import bridge_rl as br
from bridge_rl import run
from bridge_rl.cli import main
from bridge_rl.config import ModelSection, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.evaluation.results import read_results
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.report import names, results
from bridge_rl.report.results import provenance
from bridge_rl.resume import file_of
from bridge_rl.rollout.cache import PagedCache
from bridge_rl.run_checkpoints import MANIFEST, _seal
from bridge_rl.run_directory import check_same_recipe, deciding_keys, save_recipe
from bridge_rl.surgery import find_state

SMALL = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "warmup.problems=32",
    "warmup.steps=3",
    "warmup.groups_per_step=4",
    "evaluation.problems=4",
    "evaluation.samples=4",
]


LOGGED = ["logging.wandb=offline", "training.log_completions=true"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    main(["train", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={output}", *LOGGED])
    wandb.finish()
    wandb.teardown()  # else W&B keeps this directory for the runs of later tests
    return output


def test_a_run_leaves_recipe_history_evaluation_and_a_model_that_loads(finished):
    assert load_recipe(finished / "recipe.yaml").training["max_steps"] == 2
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert set(names.TRAIN) <= set(history[0])
    assert {names.evaluation(m, w) for m in names.EVALUATION for w in (1, 2, 4, 8)} <= set(history[-1])
    directory = finished / "evaluation" / "step_000002"
    results = read_results(directory / "results.json")
    assert [(summary.condition, summary.width) for summary in results.summaries] == [("model", w) for w in (1, 2, 4, 8)]
    assert {"commit", "hardware", "versions", "command"} <= set(results.meta)
    assert len(SampleStore(directory / "samples").read()) == 4 * (4 + 2 + 1 + 1)
    assert "training.png" in {path.name for path in directory.iterdir()}
    assert str(finished) in (directory / "report.html").read_text()
    model = br.load_bridge(finished)
    assert any(p.abs().sum() > 0 for name, p in br.bridge_parameters(model) if "o_proj" in name)


def test_the_warmup_data_can_be_inspected_and_is_used_again(finished, tmp_path, capsys):
    groups = finished / "warmup" / "groups.jsonl"
    assert len(groups.read_text().splitlines()) == 32
    main(["warmup", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={tmp_path}", f"warmup.path={groups}"])
    first, second = (dict(br.bridge_parameters(br.load_bridge(d / "warmup"))) for d in (finished, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wandb_offline_has_the_metrics_and_the_table_by_group(finished):
    [run] = (finished / "wandb").glob("offline-run-*")
    [log] = run.glob("*.wandb")
    content = log.read_bytes()
    for name in names.TRAIN:
        assert f"train/{name}".encode() in content, name
    assert b"eval/pass@1/w4" in content


def test_online_without_a_key_goes_offline_and_says_so(tmp_path):
    """In a process of its own: asking W&B for its key must not fix its mode."""
    script = (
        "import wandb; from bridge_rl.config import load_recipe; from bridge_rl.report.tracking import start_tracking\n"
        f"start_tracking(load_recipe('recipes/tiny_arith.yaml', ['logging.wandb=online', 'output_dir={tmp_path}']))\n"
        "run = wandb.init(); run.log({'a': 1}); print('mode', run.settings.mode); run.finish()"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "there is no API key" in done.stdout
    assert "mode offline" in done.stdout


def test_completions_are_logged_with_their_group(finished):
    import pandas as pd

    table = pd.read_parquet(sorted((finished / "completions").glob("*.parquet"))[-1])
    assert table["group"].tolist() == [n for n in range(4) for _ in range(4)]
    for _, rows in table.groupby("group"):
        assert len({str(prompt) for prompt in rows["prompt"]}) == 1


def test_another_recipe_does_not_take_up_the_warmup(finished, capsys):
    with pytest.raises(SystemExit):
        main(["warmup", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={finished}", "data.train.kwargs.seed=5"])
    assert "another 'data.train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ([], ["rollout.width=8"], "rollout.width"),
        ([], ["training.optim=sgd"], "training.optim"),
        ([], ["training.learning_rate=1e-6"], "training.learning_rate"),
        ([], ["training.weight_decay=0.5"], "training.weight_decay"),
        ([], ["training.adam_beta2=0.95"], "training.adam_beta2"),
        ([], ["training.loss_type=dr_grpo"], "training.loss_type"),
        ([], ["training.scale_rewards=false"], "training.scale_rewards"),
        ([], ["training.epsilon_high=0.28"], "training.epsilon_high"),
        ([], ["training.lr_scheduler_type=cosine"], "training.lr_scheduler_type"),
        ([], ["training.max_steps=4000", "training.save_steps=7", "training.logging_steps=3"], None),
        (["train=lora"], ["train=lora", "lora.alpha=8"], "lora"),
        ([], ["lora.alpha=8"], None),  # which is not trained
        ([], ["rollout.max_rows=64", "rollout.max_cache_tokens=9000"], None),  # which is what memory asks for
    ],
)
def test_a_run_goes_on_with_a_recipe_that_samples_and_trains_the_same(before, now, key, tmp_path):
    save_recipe(load_recipe("recipes/tiny_arith.yaml", before), tmp_path)
    recipe = load_recipe("recipes/tiny_arith.yaml", now)
    with pytest.raises(UserError, match=f"another '{key}'") if key else nullcontext():
        check_same_recipe(recipe, tmp_path, deciding_keys(recipe))


def test_a_disk_without_room_leaves_the_recipe_of_the_run_whole(tmp_path, monkeypatch):
    """Else a run that is started again before there is room could never go on."""
    recipe = load_recipe("recipes/tiny_arith.yaml")
    save_recipe(recipe, tmp_path)

    def write_half(path, text, **kwargs):
        path.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        save_recipe(recipe, tmp_path)
    check_same_recipe(recipe, tmp_path, deciding_keys(recipe))


def test_results_say_so_where_git_is_not_installed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] == "unknown"


def test_results_name_a_commit_only_of_a_repository_that_the_code_belongs_to(tmp_path):
    copy = tmp_path / "bridge_rl" / "report" / "results.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(results.__file__, copy)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    commit = [*git, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run(commit, check=True)
    spec = importlib.util.spec_from_file_location("copied_results", copy)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.provenance()["commit"] == "unknown"
    assert not copied.provenance()["dirty"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run(commit, check=True)
    assert re.fullmatch("[0-9a-f]{7,}", copied.provenance()["commit"])


def test_a_recipe_without_a_warm_up_has_nothing_to_warm_up(tmp_path, capsys):
    """A launcher's script runs the warm-up of any recipe first."""
    main(["warmup", "recipes/tiny_arith_rlvr_only.yaml", f"output_dir={tmp_path / 'out'}"])
    assert "nothing to warm up" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_type is cosine_with_min_lr with"),
        ("training.lr_scheduler_type=warmup_stable_decay", "is warmup_stable_decay with training.lr_scheduler_kwargs"),
        ("training={lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycle: 1}}", "unexpected keyword argument"),
        ("training.optim=galore_adamw", "training.optim is galore_adamw: You need to install"),
        ("training.optim=foo", "training: foo is not a valid OptimizerNames"),
        ("training.optim_args=foo", "training.optim_args is 'foo': write key=value"),
        ("training.lr_scheduler_type=polynomial", r"lr_end \(1e-07\) must be smaller than initial lr \(1e-08\)"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made_is_refused_before_the_warm_up(override, expected, tmp_path):
    overrides = [f"output_dir={tmp_path / 'out'}", "training.learning_rate=1e-8", override]
    recipe = load_recipe("recipes/tiny_arith.yaml", overrides)
    with pytest.raises(UserError, match=expected):
        run.train(recipe)
    assert not (tmp_path / "out").exists()


def test_variables_of_the_chat_template_go_with_the_tokenizer(tmp_path):
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    tokenizer.chat_template = (
        "{%- for message in messages %}{{ message.content }}{% endfor %}"
        "{%- if think is defined and think is false %}={% endif %}{{ [none_given, digits] }}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"think": False, "digits": [1, "2"], "none_given": None}
    loaded = load_tokenizer(ModelSection(str(tmp_path / "base"), chat_template_kwargs=options))
    loaded.save_pretrained(tmp_path / "trained")
    chat = [{"role": "user", "content": "1"}]
    for one in (loaded, load_tokenizer(ModelSection(str(tmp_path / "trained")))):
        assert one.apply_chat_template(chat, tokenize=False) == "1=[None, [1, '2']]"
    again = {"think": True, "digits": []}
    other = load_tokenizer(ModelSection(str(tmp_path / "trained"), chat_template_kwargs=again))
    assert other.apply_chat_template(chat, tokenize=False) == "1[None, []]"
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="base has no chat template"):
        load_tokenizer(ModelSection(str(tmp_path / "base"), chat_template_kwargs=options))


def test_the_model_of_the_warmup_is_gone_before_that_of_the_run_is_loaded(tmp_path, monkeypatch):
    """Two models of 7B, one of them of no use, may be more than a GPU holds."""
    loaded, load = [], run.load_policy

    def spied(recipe):
        if loaded:
            assert loaded[0]() is None
            raise KeyboardInterrupt
        model = load(recipe)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "load_policy", spied)
    small = ["warmup.problems=16", "warmup.steps=1", "warmup.groups_per_step=2"]
    with pytest.raises(KeyboardInterrupt):
        run.train(load_recipe("recipes/tiny_arith.yaml", [f"output_dir={tmp_path}", *small]))


def test_the_warmup_of_a_recipe_that_did_not_know_a_key_yet_is_taken(finished, tmp_path, capsys):
    shutil.copytree(finished / "warmup", tmp_path / "warmup")
    path = tmp_path / "warmup" / "recipe.yaml"
    before = yaml.safe_load(path.read_text())
    del before["model"]["quantization"]
    path.write_text(yaml.safe_dump(before))
    main(["warmup", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={tmp_path}"])
    assert "warm-up: taken from" in capsys.readouterr().out


def test_a_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    saving = ["training.save_strategy=steps", "training.save_steps=1", "warmup=null", "data.eval=null"]
    command = ["train", "recipes/tiny_arith.yaml", *SMALL, *saving, f"output_dir={tmp_path}"]
    main(command)
    checkpoint = tmp_path / "checkpoint-1"
    state = file_of(checkpoint, 0)
    content = torch.load(state, weights_only=True)
    del content["guards"]
    torch.save(content, state)
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "checkpoint-2")
    _seal(checkpoint, 1)
    with pytest.raises(SystemExit):
        main(command)
    error = capsys.readouterr().err
    assert f"error: {checkpoint} was written by another version of bridge_rl (they differ in guards)" in error


def test_generate_prints_one_group(finished, capsys):
    main(["generate", "--model", str(finished), "--width", "3", "--max-new-tokens", "32", "12,35,27,19,31,22:49"])
    assert capsys.readouterr().out.count("--- row") == 3


def test_generate_stays_within_the_positions_of_the_model(finished, capsys):
    generate = ["generate", "--model", str(finished), "--width", "1"]
    main([*generate, "12,35,27,19,31,22:49"])
    capsys.readouterr()
    for arguments in ([*generate, "1," * 150], [*generate, "--max-new-tokens", "200", "12,35:47"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert "of the model's 128 positions" in capsys.readouterr().err


def test_doctor_samples_and_verifies(monkeypatch, capsys):
    def without_one(name):
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("bridge_rl.doctor.version", without_one)
    main(["doctor"])
    told = capsys.readouterr().out
    assert "1/2 = 0.5 is True" in told
    assert "deepspeed is not installed" in told


@pytest.mark.parametrize("control", ["rlvr_only", "pmatch"])
def test_the_controls_run(control, tmp_path):
    main(["train", f"recipes/tiny_arith_{control}.yaml", *SMALL, f"output_dir={tmp_path}", "data.eval=null"])
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "bridge_config.json").is_file() == (control == "pmatch")


def test_lora_and_bridge_only_run_from_the_recipe(tmp_path):
    for train in ("lora", "bridge"):
        output = tmp_path / train
        main(["train", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={output}", f"train={train}", "data.eval=null"])
        assert br.load_bridge(output) is not None


@pytest.mark.parametrize("train", ["bridge", "full", "lora"])
def test_a_run_in_the_precision_of_a_gpu(train, tmp_path, monkeypatch):
    """fp32 weights under bf16 autocast, from warm-up to evaluation."""
    monkeypatch.setattr("bridge_rl.run_options.device_arguments", lambda recipe: {"bf16": True, "use_cpu": True})
    dtypes, make = [], PagedCache.__init__

    def record(cache, rows, prompts):
        dtypes.append(rows.data[0].dtype)
        make(cache, rows, prompts)

    monkeypatch.setattr(PagedCache, "__init__", record)
    main(["train", "recipes/tiny_arith.yaml", *SMALL, f"train={train}", f"output_dir={tmp_path / 'out'}"])
    assert set(dtypes) == {torch.bfloat16}
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    drift = [abs(entry[names.RECOMPUTE_KL]) for entry in history if "loss" in entry]
    assert len(drift) == 2
    assert 1e-7 < max(drift) < 1e-2
    assert names.evaluation("pass@1", 4) in history[-1]


def test_a_run_killed_after_a_checkpoint_goes_on_by_itself(tmp_path):
    options = [*SMALL, "data.eval=null", "training.save_strategy=steps", "training.save_steps=1", *LOGGED]
    main(["train", "recipes/tiny_arith.yaml", *options, f"output_dir={tmp_path}", "training.max_steps=1"])
    wandb.finish()
    main(["train", "recipes/tiny_arith.yaml", *options, f"output_dir={tmp_path}", "training.max_steps=3"])
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    wandb.finish()
    [run_id] = {run.name.rpartition("-")[2] for run in (tmp_path / "wandb").glob("offline-run-*")}
    assert (tmp_path / "wandb_run_id").read_text() == run_id


@pytest.mark.slow
def test_a_compiled_model_samples_and_learns_the_same(tmp_path):
    for name, option in (("plain", []), ("compiled", ["training.torch_compile=true"])):
        options = [*SMALL, "warmup=null", "data.eval=null", f"output_dir={tmp_path / name}", *option]
        torch._dynamo.utils.counters.clear()
        main(["train", "recipes/tiny_arith.yaml", *options])
        assert bool(torch._dynamo.utils.counters["stats"]) == bool(option)
    plain, compiled = (
        [json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    steps = [(one, other) for one, other in zip(plain, compiled, strict=True) if "loss" in one]
    assert len(steps) == 2
    for one, other in steps:
        assert other["reward"] == one["reward"]
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert abs(other[names.RECOMPUTE_KL]) < 1e-6
    weights = [br.load_bridge(tmp_path / name).state_dict() for name in ("plain", "compiled")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_smollm2_takes_three_rlvr_steps(tmp_path):
    """Real weights (GGUF, from a package), real word problems, real log-probs."""
    main(["train", "recipes/smollm2_135m.yaml", f"output_dir={tmp_path}", "data.eval=null"])
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 3
    assert all(torch.isfinite(torch.tensor([entry["loss"], entry["grad_norm"]])).all() for entry in steps)
    assert all(abs(entry[names.RECOMPUTE_KL]) < 1e-4 for entry in steps)
    blocks = load_file(tmp_path / "bridge.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in blocks.items() if "o_proj" in name)
    loaded = load_model(ModelSection(str(tmp_path)))  # as every `--model` does: its base is one of the package's files
    assert loaded.state_dict().keys() >= blocks.keys()
    assert find_state(br.load_bridge(tmp_path)).base_options == {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def test_reward_weights_reach_the_trainer():
    from bridge_rl.run_options import training_arguments

    weighted = "rewards=[{function: rewards/two_tries.py:correct, weight: 0.5}]"
    assert training_arguments(load_recipe("recipes/tiny_arith.yaml", [weighted])).reward_weights == [0.5]


def test_too_few_problems_for_one_batch_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "recipes/tiny_arith.yaml", f"output_dir={tmp_path}", "warmup=null", "data.train.size=3"])
    assert "data.train: 3 problems are fewer than" in capsys.readouterr().err


def test_data_are_read_before_the_warm_up(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "recipes/tiny_arith.yaml", f"output_dir={tmp_path}", "data.train.size=3"])
    assert "data.train: 3 problems are fewer than" in capsys.readouterr().err
    assert not (tmp_path / "warmup").exists()


def test_a_model_of_another_kind_in_the_directory_is_a_conflict(finished, capsys):
    with pytest.raises(SystemExit):
        main(["train", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={finished}", "bridge=null", "warmup=null"])
    assert f"{finished} holds a model that was trained in another way (bridge_config.json)" in capsys.readouterr().err


def test_blocks_are_not_put_into_a_base_that_has_changed_since(tmp_path, capsys):
    """A base that is trained again where it lies has the same recipe."""
    base = tmp_path / "base"
    shutil.copytree("bridge_rl/tiny/model", base)
    options = [*SMALL, f"model.path={base}", f"output_dir={tmp_path / 'out'}", "data.eval=null"]
    options += ["training.save_strategy=steps", "training.save_steps=1"]
    main(["train", "recipes/tiny_arith.yaml", *options])
    weights = load_file(base / "model.safetensors")
    save_file({name: weight * 1.5 for name, weight in weights.items()}, base / "model.safetensors", {"format": "pt"})
    for of_warmup in (False, True):
        if of_warmup:
            for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        with pytest.raises(SystemExit):
            main(["train", "recipes/tiny_arith.yaml", *options])
        source = tmp_path / "out" / ("warmup" if of_warmup else "checkpoint-2")
        assert f"error: {source} was trained on other weights of the base {base}" in capsys.readouterr().err


def test_overrides_may_follow_an_option(capsys):
    main(["train", "recipes/tiny_arith.yaml", "--dry-run", "rollout.width=8"])
    assert "width 8" in capsys.readouterr().out


def test_a_reward_of_the_wrong_length_is_named(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def score(completions, **kwargs):\n    return [1.0]\n")
    bad = f"rewards=[{{function: {tmp_path / 'bad.py'}:score}}]"
    with pytest.raises(SystemExit):
        main(["train", "recipes/tiny_arith.yaml", *SMALL, f"output_dir={tmp_path / 'out'}", bad])
    assert "bad.py:score returned 1 values for" in capsys.readouterr().err


REWARD_THAT_BREAKS = """
import pathlib
def score(completion_ids, trainer_state=None, **kwargs):
    broken = pathlib.Path(__file__).with_name("broken").exists()
    if broken and trainer_state is None:  # not in training
        raise ConnectionError("the judge is away")
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]
"""


@pytest.fixture
def breaking(tmp_path):
    """A reward that fails in warm-ups and evaluations while the file `broken` is there: (overrides, that file)."""
    (tmp_path / "mine.py").write_text(REWARD_THAT_BREAKS)
    return [*SMALL, f"rewards=[{{function: {tmp_path / 'mine.py'}:score}}]"], tmp_path / "broken"


def test_a_reward_that_fails_in_an_evaluation_saves_the_run_which_goes_on_with_it(breaking, tmp_path, capsys):
    options, broken = breaking
    options = [*options, "warmup=null", "training.save_steps=100", "evaluation.every=2", "training.max_steps=3"]
    options = [option for option in options if not option.startswith("warmup.")]
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    main(["train", "recipes/tiny_arith.yaml", *options, f"output_dir={whole}"])
    broken.touch()
    with pytest.raises(SystemExit) as left:
        main(["train", "recipes/tiny_arith.yaml", *options, f"output_dir={failed}"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "the judge is away" in said
    assert f"({failed / 'checkpoint-2'} is whole: when the cause is mended, the same command goes on)" in said
    broken.unlink()
    main(["train", "recipes/tiny_arith.yaml", *options, f"output_dir={failed}"])
    assert f"going on from {failed / 'checkpoint-2'}" in capsys.readouterr().out
    for step in ("step_000002", "step_000003"):
        summaries = [read_results(run / "evaluation" / step / "results.json").summaries for run in (whole, failed)]
        assert summaries[0] == summaries[1]
    assert (failed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_an_evaluation_of_the_last_step_is_not_done_again(tmp_path):
    options = [option for option in SMALL if not option.startswith("warmup.")]
    options += ["warmup=null", "evaluation.every=1", f"output_dir={tmp_path}"]
    recipe = load_recipe("recipes/tiny_arith.yaml", options)
    metrics = run.train(recipe)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    name = names.evaluation("pass@1", 4)
    found = {entry["step"]: entry[name] for entry in history if name in entry}
    assert len(found) == sum(name in entry for entry in history) == recipe.training["max_steps"]
    assert metrics[name] == found[recipe.training["max_steps"]]


def test_a_base_whose_choices_for_sampling_are_at_odds_can_be_trained_in_full(tmp_path):
    """transformers loads a temperature without `do_sample`, and refuses to save it once the model has changed."""
    base = Path(shutil.copytree("bridge_rl/tiny/model", tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    options = [option for option in SMALL if not option.startswith("warmup.")]
    options += ["warmup=null", "data.eval=null", "train=full", f"model.path={base}", f"output_dir={tmp_path / 'out'}"]
    run.train(load_recipe("recipes/tiny_arith.yaml", options))
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


@pytest.mark.slow
def test_a_run_that_goes_on_with_another_evaluation_keeps_no_samples_of_the_old_one(tmp_path):
    options = [option for option in SMALL if not option.startswith("warmup.")]
    options += ["warmup=null", "training.save_strategy=steps", "training.save_steps=2", f"output_dir={tmp_path}"]
    reward = Path(shutil.copy("rewards/two_tries.py", tmp_path / "mine.py"))
    options.append(f"rewards=[{{function: '{reward}:correct'}}]")
    main(["train", "recipes/tiny_arith.yaml", *options])
    directory = tmp_path / "evaluation" / "step_000002"

    def evaluated(*overrides):
        main(["train", "recipes/tiny_arith.yaml", *options, *overrides])  # from the checkpoint of the last step
        [first, *_] = (directory / "problems.jsonl").read_text().splitlines()
        groups = {group.key: group.tokens for group in SampleStore(directory / "samples").read()}
        return json.loads(first)["text"], groups, (directory / "samples" / "rank_0.jsonl").stat().st_mtime_ns

    problem, groups, written = evaluated()
    same = evaluated("evaluation.widths=[1,2]")
    assert same == (problem, groups, written)  # more or fewer widths: what is there stays
    reward.write_text(reward.read_text() + "# which judges otherwise, for all that is known\n")
    assert evaluated()[2] > written
    greedy = evaluated("evaluation.temperature=0")
    assert greedy[0] == problem
    assert greedy[1].keys() == groups.keys()
    assert all(greedy[1]["model", 1, 0, n] == greedy[1]["model", 1, 0, 0] for n in range(4))
    assert evaluated("data.eval.kwargs.seed=77")[0] != problem
    other = tmp_path / "other"  # in which a run with other weights was evaluated at the same step
    shutil.copytree(tmp_path / "evaluation", other / "evaluation")
    [samples] = other.glob("evaluation/*/samples/rank_0.jsonl")
    before = samples.stat().st_mtime_ns
    evaluated("data.eval.kwargs.seed=77", f"output_dir={other}", f"resume={tmp_path / 'checkpoint-2'}")
    assert samples.stat().st_mtime_ns > before


def test_a_run_that_goes_on_with_damaged_samples_names_their_line_and_stays_whole(tmp_path, capsys):
    options = [option for option in SMALL if not option.startswith("warmup.")]
    options += ["warmup=null", "training.save_strategy=steps", "training.save_steps=2", f"output_dir={tmp_path}"]
    main(["train", "recipes/tiny_arith.yaml", *options])
    store = SampleStore(tmp_path / "evaluation" / "step_000002" / "samples")
    samples, tokens = store.path, {group.key: group.tokens for group in store.read()}
    first, *others = samples.read_text().splitlines(keepends=True)
    samples.write_text(first.replace('"tokens"', '"letters"') + "".join(others))
    with pytest.raises(SystemExit) as left:
        main(["train", "recipes/tiny_arith.yaml", *options])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"{samples}, line 1, is no sampled group" in said
    assert f"({tmp_path / 'checkpoint-2'} is whole: when the cause is mended, the same command goes on)" in said
    samples.write_text("".join(others))  # as the sentence says
    main(["train", "recipes/tiny_arith.yaml", *options])
    assert {group.key: group.tokens for group in store.read()} == tokens


def test_a_folder_that_is_not_there_is_not_asked_of_a_hub(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--model", "runs/not_made_yet", "1"])
    assert "there is no directory runs/not_made_yet" in capsys.readouterr().err
