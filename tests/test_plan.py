"""What a recipe will do, by hand; and that a plan needs neither weights nor a network."""

import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from bridge_rl.block import BridgeConfig
from bridge_rl.cli import main
from bridge_rl.config import load_recipe
from bridge_rl.errors import UserError
from bridge_rl.models import load_model
from bridge_rl.plan import Batches, check, count_parameters, describe, make_plan, work_out_batches
from bridge_rl.presets import LLAMA_8B, QWEN_1_5B, QWEN_7B, preset_config
from bridge_rl.run_options import lora_config

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = RECIPES / "tiny_arith.yaml"
ALL = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def batches(path, *overrides) -> Batches:
    return work_out_batches(load_recipe(path, overrides))


# -- batch arithmetic -------------------------------------------------------------------------------------------------


def test_batches_of_one_process():
    # 128 rows: 16 prompts of 8 completions, 32 groups of 4.
    assert batches(
        TINY, "training={per_device_train_batch_size: 128}", "rollout.width=4", "rollout.num_generations=8"
    ) == Batches(
        num_processes=1,
        rows_per_micro_batch=128,
        micro_batches_per_update=1,
        rows_per_generation=128,
        prompts_per_generation=16,
        groups_per_rank=32,
        groups_per_micro_batch=32,
        updates_per_generation=1.0,
    )


@pytest.mark.parametrize("name", ["r1_distill_1.5b", "r1_distill_7b", "r1_distill_llama_8b"])
def test_batches_of_eight_processes_with_accumulation(name):
    # 4 rows x 16 micro-batches x 8 ranks = 512 rows: 64 prompts of 8 completions, 16 groups of 4 a rank.
    assert batches(RECIPES / f"{name}.yaml") == Batches(
        num_processes=8,
        rows_per_micro_batch=4,
        micro_batches_per_update=16,
        rows_per_generation=512,
        prompts_per_generation=64,
        groups_per_rank=16,
        groups_per_micro_batch=1,
        updates_per_generation=1.0,
    )


def test_batches_of_a_wider_group():
    # The same 512 rows in groups of 8: half as many groups, as many prompts, and a micro-batch of one group.
    wider = ["rollout.width=8", "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=8"]
    found = batches(RECIPES / "r1_distill_7b.yaml", *wider)
    assert (found.rows_per_generation, found.prompts_per_generation) == (512, 64)
    assert (found.groups_per_rank, found.groups_per_micro_batch) == (8, 1)


def test_a_generation_batch_may_serve_several_updates():
    # 2 micro-batches of 16 rows sampled at once, one an update, seen 3 times: 6 updates.
    options = "training={per_device_train_batch_size: 16, steps_per_generation: 2, num_iterations: 3}"
    found = batches(TINY, options)
    assert (found.rows_per_generation, found.prompts_per_generation, found.groups_per_rank) == (32, 4, 8)
    assert found.updates_per_generation == 6.0


def test_a_generation_batch_may_be_given_in_rows():
    # 64 rows over 1 process in micro-batches of 16: 4 of them, 2 an update.
    options = "training={per_device_train_batch_size: 16, generation_batch_size: 64, gradient_accumulation_steps: 2}"
    found = batches(TINY, options)
    assert (found.rows_per_generation, found.updates_per_generation) == (64, 2.0)
    found = batches(TINY, options, "launch.num_processes=2")
    assert (found.rows_per_generation, found.updates_per_generation) == (64, 1.0)


def test_the_launcher_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = batches(TINY, "training={per_device_train_batch_size: 16}")
    assert (found.num_processes, found.rows_per_generation, found.groups_per_rank) == (2, 32, 4)


def test_trl_works_out_the_same_generation_batch():
    from trl import GRPOConfig

    for options in (
        {"per_device_train_batch_size": 16, "steps_per_generation": 2, "num_iterations": 3},
        {"per_device_train_batch_size": 16, "generation_batch_size": 64, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    ):
        args = GRPOConfig(num_generations=8, use_cpu=True, bf16=False, **options)
        assert batches(TINY, f"training={options}").rows_per_generation == args.generation_batch_size


# -- parameters -------------------------------------------------------------------------------------------------------

# (recipe, base parameters as published, D, inner width W, layers L)
PRESETS = [
    ("r1_distill_1.5b", QWEN_1_5B, 1_777_088_000, 1536, 6 * 48, 28),
    ("r1_distill_7b", QWEN_7B, 7_615_616_512, 3584, 14 * 48, 28),
    ("r1_distill_llama_8b", LLAMA_8B, 8_030_261_248, 4096, 16 * 48, 32),
]


@pytest.mark.parametrize(("name", "model", "base", "d", "w", "layers"), PRESETS)
def test_a_preset_adds_four_projections_and_a_norm_to_every_layer(name, model, base, d, w, layers):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert (recipe.model.path, recipe.bridge) == (model, BridgeConfig(num_heads=w // 48, head_dim=48))
    found = count_parameters(preset_config(model), recipe)
    new = found.new
    assert new == 4 * d * w * layers + d * layers
    assert found.total - new == base
    assert 0.027 < new / base < 0.051  # the paper's band


@pytest.mark.parametrize(("name", "model", "base", "d", "w", "layers"), PRESETS)
def test_the_matched_control_of_a_preset_has_as_many_parameters(name, model, base, d, w, layers):
    bridge = 4 * d * w * layers + d * layers
    found = count_parameters(preset_config(model), load_recipe(RECIPES / f"{name}_pmatch.yaml"))
    assert abs(found.new - bridge) <= 0.01 * bridge
    assert found.total - found.new == base


def test_what_is_trained_follows_the_mode():
    bridge = "bridge={num_heads: 4, head_dim: 12}"
    new = 4 * 128 * 48 * 4 + 128 * 4  # D 128, W 48, 4 layers
    base = make_plan(load_recipe(TINY, ["bridge=null", "train=full"])).parameters.total
    found = {
        train: make_plan(load_recipe(TINY, [bridge, f"train={train}", "lora.r=2"])).parameters
        for train in ("bridge", "full", "lora")
    }
    assert [counted.new for counted in found.values()] == [new] * 3
    assert found["bridge"].trained == new
    assert found["full"].trained == base + new
    # r x (in + out) of q, k, v, o (128 -> 128) and gate, up (128 -> 256), down (256 -> 128) in 4 layers.
    assert found["lora"].trained == new + 2 * 4 * (4 * 256 + 3 * 384)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.lr_scheduler_type=nonsense", "nonsense is not a valid SchedulerType"),
        ("training.generation_batch_size=100", "must be divisible by the global batch size"),
        ("training.adam_beta2=2", "Invalid beta parameter"),
        ("training.save_strategy=best", "training.save_strategy is best without training.metric_for_best_model"),
        ("rewards=[{function: rewards/two_tries.py:correct}, {function: rewards/set_aware.py:sole_solver}]", "judge:"),
        (
            "rewards=[{function: rewards/set_aware.py:sole_solver, kwargs: {judge: rewards/two_tries.py:correct}}]",
            "rewards.0.function: rewards/set_aware.py:sole_solver needs group_index, which neither the warm-up nor",
        ),
    ],
)
def test_a_dry_run_finds_what_the_run_would_refuse_later(override, sentence):
    [conflict] = make_plan(load_recipe(TINY, [override]), read_data=True).conflicts
    assert sentence in conflict


def test_a_dry_run_takes_the_batches_of_more_processes_than_are_here():
    """4 rows a rank are half a prompt; of 8 ranks they are 4 prompts. bf16 is a GPU's."""
    overrides = ["training.per_device_train_batch_size=4", "launch.num_processes=8", "training.bf16=true"]
    assert make_plan(load_recipe(TINY, overrides), read_data=True).conflicts == []


@pytest.mark.parametrize(
    ("targets", "modules"), [("[q_proj]", 4), ("[q_proj, v_proj]", 8), ("'.*[12].self_attn.[kq]_proj'", 4)]
)
def test_a_lora_is_counted_on_the_modules_that_it_names(targets, modules):
    overrides = ["train=lora", "bridge=null", "lora.r=2", f"lora.target_modules={targets}"]
    recipe = load_recipe(TINY, [*overrides, "warmup=null"])
    counted = make_plan(recipe).parameters.trained
    assert counted == 2 * modules * 256
    model = get_peft_model(load_model(recipe.model), lora_config(recipe))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted


def test_a_lora_on_a_module_that_is_not_there_is_refused():
    """PEFT leaves it out without a word, if it finds another one."""
    recipe = load_recipe(TINY, ["train=lora", "lora.target_modules=[q_proj, v_prj]"])
    with pytest.raises(UserError, match=r"lora\.target_modules: .* has no module 'v_prj': .*q_proj, up_proj, v_proj"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("[self_attn]", "has 'self_attn', on which no LoRA is put: .*q_proj"),
        ("'.*attn.*'", r"has '\.\*attn\.\*', on which no LoRA is put"),
        ("[norm]", "has 'norm', on which no LoRA is put"),
        ("[q_proj, embed_tokens]", "has 'embed_tokens', on which no LoRA is put"),
        ("[q_proj, lm_head]", "has 'lm_head', on which no LoRA is put"),
        ("'('", "no regular expression: missing"),
        ("''", "is empty"),
        ("[]", "is empty"),
    ],
)
def test_lora_targets_that_take_none_are_refused(targets, words):
    overrides = ["train=lora", f"lora.target_modules={targets}"]
    with pytest.raises(UserError, match=rf"^lora\.target_modules.* {words}"):
        make_plan(load_recipe(TINY, overrides))
    make_plan(load_recipe(TINY, overrides[1:]))  # of a run without a LoRA nobody looks


def test_a_dry_run_reads_the_held_out_problems():
    with pytest.raises(UserError, match=r"data\.eval\.path: .* holds no rows"):
        make_plan(load_recipe(TINY, ["data.eval.kwargs.size=0"]), read_data=True)


@pytest.mark.parametrize("section", ["warmup", "evaluation"])
def test_lengths_beyond_the_positions_of_the_model_are_a_conflict(section):
    [conflict] = make_plan(load_recipe(TINY, [f"{section}.max_new_tokens=128"])).conflicts
    assert conflict == f"{section}.max_new_tokens is 128, but the model knows 128 positions, prompt included: lower it."


def test_layers_that_carry_no_block_count_nothing():
    recipe = load_recipe(TINY, ["bridge={num_heads: 4, head_dim: 12, layers: [1, 3]}"])
    assert make_plan(recipe).parameters.new == 2 * (4 * 128 * 48 + 128)


def test_memory_by_hand():
    found = make_plan(load_recipe(RECIPES / "r1_distill_llama_8b.yaml"))
    total, memory = 8_030_261_248 + 4 * 4096 * 768 * 32 + 4096 * 32, found.memory
    for moment in (memory.rollout, memory.update, memory.evaluation):
        assert moment.terms["weights"] == 2 * total / 8  # bf16, ZeRO-3 over 8
        assert moment.terms["optimizer"] == 12 * total / 8
    assert memory.update.terms["gradients"] == 2 * total / 8
    # In the evaluation at width 1, 32 rows of pages for 512 and for 8192 + 8 steps, and a page ahead: keys and values
    # of 8 heads of 128 in 32 layers.
    assert memory.evaluation.terms["cache"] == 32 * (512 + 8192 + 64 + 64) * 2 * 2 * 32 * 8 * 128
    assert memory.evaluation.terms["gathered"] == 2 * total
    # Each of 33280 tokens: of every layer its input, of one layer all, the last norm's input, what the head reads.
    tokens, scored, rows = 512 + 4 * 8192, 4 * 8192, 4 * (512 + 8192)
    one = 2 * (2 * 4096 + 2 * 1024 + 4 * 14336 + 4 * 4096 + 4096)  # q, k, v, output, MLP, normed twice, of o_proj
    layers = 32 * 2 * 4096 * tokens + (one + 2 * 4 * 4096) * tokens + 2 * 2 * 1024 * rows
    assert memory.update.terms["activations"] == layers + 4 * 4096 * tokens + 2 * 4096 * scored
    assert memory.peak == max(m.total for m in (memory.rollout, memory.update, memory.evaluation))


def test_a_bounded_cache_is_planned_as_bounded():
    path = RECIPES / "r1_distill_llama_8b.yaml"
    plan = make_plan(load_recipe(path, ["rollout.max_cache_tokens=100000"]))
    assert plan.memory.rollout.terms["cache"] == 100_000 * 2 * 2 * 32 * 8 * 128


def test_weights_that_are_not_gathered_for_sampling_are_not_counted_there():
    path = RECIPES / "r1_distill_llama_8b.yaml"
    gathered, sharded = (
        make_plan(load_recipe(path, [f"training.ds3_gather_for_generation={value}"])) for value in ("true", "false")
    )
    assert sharded.conflicts == []
    assert gathered.memory.rollout.total - sharded.memory.rollout.total == 2 * gathered.parameters.total


def test_sampling_in_an_evaluation_counts_in_the_memory_estimate():
    recipes = [load_recipe(TINY, ["evaluation.samples=64", f"evaluation.max_rows={n}"]) for n in (128, 512)]
    small, large = (make_plan(recipe).memory.evaluation.terms["cache"] for recipe in recipes)
    assert large == 4 * small


# -- dry runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan loads no weights and uses no network")

    assert os.environ["HF_HUB_OFFLINE"] == "1"  # set for all tests
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("bridge_rl.models.load_model", refuse)
    monkeypatch.setattr("bridge_rl.data.load_dataset", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_dry_run_needs_neither_weights_nor_a_network(path, no_weights_no_network, capsys):
    main(["train", str(path), "--dry-run"])
    printed = capsys.readouterr().out
    resolved, _, plan = printed.partition("\n\nmodel  ")
    assert yaml.safe_load(resolved) == yaml.safe_load(load_recipe(path).to_yaml())
    assert "generation batch" in plan
    assert "conflict" not in plan
    assert (" 0 new " in plan) == path.stem.endswith("_rlvr_only")


def test_further_rounds_of_dynamic_sampling_count_among_the_tokens(no_weights_no_network, capsys):
    # 128 rows of at most 32 tokens, up to three times over.
    for override, most in (
        ("rollout.dynamic_sampling=null", "4,096"),
        ("rollout.dynamic_sampling.max_rounds=2", "12,288"),
    ):
        main(["train", str(TINY), override, "--dry-run"])
        assert f"tokens           at most {most} a generation batch" in capsys.readouterr().out


def test_a_dry_run_says_what_its_memory_is_for(no_weights_no_network, capsys):
    main(["train", str(TINY), "--dry-run"])
    printed = capsys.readouterr().out
    # "12,35,27,19,31,22:49=" is 21 characters, each a token, behind the first.
    assert "on a CPU in float32" in printed
    assert "prompts of 22 tokens (the longest of the data)" in printed
    main(["train", str(RECIPES / "r1_distill_7b.yaml"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "of 80 on a GPU in bf16; prompts of 512 tokens (assumed)" in printed
    phases = ("rollout", "update", "evaluation", "warm-up, rollout", "warm-up, update")
    assert all(f"  {phase}, " in printed for phase in phases)
    assert "memory: the warm-up's estimate" not in printed
    main(["train", str(RECIPES / "r1_distill_7b.yaml"), "warmup.groups_per_step=32", "--dry-run"])
    assert "memory: the warm-up's estimate is above launch.gpu_memory_gb" in capsys.readouterr().out


def test_a_warmup_is_planned_for_the_longest_prompt_of_its_own_data(tmp_path, capsys):
    data = tmp_path / "warm.jsonl"
    data.write_text('{"problem": "12,35:47", "answer": "47"}\n')
    main(["train", str(TINY), f"warmup.data={{path: {data}, check_answers: false}}", "warmup.problems=1", "--dry-run"])
    told = "prompts of 22 tokens (the longest of the data), in the warm-up of 10 tokens (the longest of the data)"
    assert told in capsys.readouterr().out


def test_one_process_that_sees_several_gpus_is_refused(monkeypatch):
    """Before its warm-up, of which TRL would refuse the run."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="2 GPUs are visible to one process"):
        check(load_recipe(TINY))
    monkeypatch.setenv("WORLD_SIZE", "1")  # one that a launcher has given a GPU
    check(load_recipe(TINY))


def test_a_dry_run_lists_every_conflict(capsys):
    overrides = ["training.use_vllm=true", "training.top_k=5", "training.learning_rte=1"]
    with pytest.raises(SystemExit) as exit_code:
        main(["train", str(TINY), *overrides, "--dry-run"])
    assert exit_code.value.code == 2
    captured = capsys.readouterr()
    listed = [line for line in captured.out.splitlines() if line.startswith("conflict: ")]
    assert len(listed) == 3
    for key in ("use_vllm", "top_k", "learning_rte"):
        assert any(f"training.{key}" in line for line in listed)
    assert captured.err.startswith(f"error: {TINY}: 3 conflict(s), the first: ")


def test_a_run_stops_at_the_first_conflict_and_counts_them():
    recipe = load_recipe(TINY, ["training.use_vllm=true", "training.top_k=5"])
    with pytest.raises(UserError, match=r"training.use_vllm is True: .* \(2 conflicts in all: --dry-run lists them\)"):
        check(recipe)


def test_another_number_of_processes_than_planned_is_a_conflict(monkeypatch):
    recipe = load_recipe(RECIPES / "r1_distill_1.5b.yaml")
    assert make_plan(recipe).conflicts == []  # planned here, run elsewhere
    for world in ("1", "4"):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(UserError, match=f"launch.num_processes is 8 but this run has {world}"):
            check(recipe)


def under_launcher(monkeypatch, **settings) -> None:
    """In one of two processes that a launcher has started with these of accelerate's variables."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


ZERO_2 = {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero2.json"}
LAUNCHERS = {
    "none": (None, "8, ZeRO stage 3 unless the launcher's configuration has another"),
    "torchrun": ({}, "8, ZeRO stage 3"),
    "a file": (ZERO_2, "8, ZeRO stage 2 by the launcher's configuration; memory is planned for ZeRO stage 3"),
    "a stage": (
        {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"},
        "8, ZeRO stage 3 by the launcher's configuration",
    ),
    "a file of another machine": (
        {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "elsewhere.json"},
        "8, ZeRO by the launcher's configuration; memory is planned for ZeRO stage 3",
    ),
    "fsdp": ({"USE_FSDP": "true"}, "8, FSDP by the launcher's configuration; memory is planned for ZeRO stage 3"),
}


@pytest.mark.parametrize(("settings", "said"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_plan_says_what_shards_the_run(monkeypatch, settings, said):
    if settings is not None:
        under_launcher(monkeypatch, **settings)
    recipe = load_recipe(RECIPES / "r1_distill_1.5b.yaml")
    assert f"processes        {said}\n" in describe(recipe, make_plan(recipe))


def test_one_process_shards_nothing():
    recipe = load_recipe(TINY, ["launch.zero_stage=3"])
    assert "processes        1, ZeRO stage 0\n" in describe(recipe, make_plan(recipe))


def test_another_stage_of_zero_than_the_launchers_is_a_conflict(monkeypatch):
    under_launcher(monkeypatch, **ZERO_2)
    for stage in (0, 2):
        check(load_recipe(TINY, [f"launch.zero_stage={stage}"]))
    with pytest.raises(
        UserError, match=r"launch.zero_stage is 3, but the launcher's configuration turns on ZeRO stage 2"
    ):
        check(load_recipe(TINY, ["launch.zero_stage=3"]))
