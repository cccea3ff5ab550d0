"""What is refused of a recipe, in which sentence; and what is not."""

import json
import re
from pathlib import Path

import pytest
from conftest import make_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import bridge_rl as br
from bridge_rl import safety
from bridge_rl.checkpoint import write_config
from bridge_rl.config import load_recipe
from bridge_rl.errors import UserError
from bridge_rl.models import load_policy
from bridge_rl.plan import make_plan

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = RECIPES / "tiny_arith.yaml"


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


UNSAFE = {
    "use_vllm": True,
    "use_transformers_paged": True,
    "use_transformers_continuous_batching": True,
    "mask_truncated_completions": True,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "generation_kwargs": {"num_beams": 2},
    "cache_implementation": "static",
    "use_liger_kernel": True,
    "sync_ref_model": True,
    "save_only_model": True,
    "enable_jit_checkpoint": True,
    "save_on_each_node": True,
    "remove_unused_columns": True,
    "ignore_data_skip": True,
    "auto_find_batch_size": True,
    "load_best_model_at_end": True,
    "dataloader_persistent_workers": True,
    "push_to_hub": True,
}


def test_every_unsafe_option_is_in_the_table_of_these_tests():
    assert {key for key, _, _ in safety._UNSAFE} == set(UNSAFE)


@pytest.mark.parametrize(("key", "value"), UNSAFE.items())
def test_an_unsafe_option_is_a_conflict_and_its_safe_value_is_none(key, value):
    [found] = safety.conflicts({key: value}, width=4)
    assert found.startswith(f"training.{key} is {value!r}: ")
    safe = next(safe for name, safe, _ in safety._UNSAFE if name == key)
    assert list(safety.conflicts({key: safe}, width=4)) == []
    assert make_plan(load_recipe(TINY, [f"training.{key}={value}"])).conflicts == [found]


def test_cutting_groups_is_a_conflict():
    assert "split_batches is on" in next(safety.conflicts({"accelerator_config": {"split_batches": True}}, 4))
    assert "training.fsdp is set" in next(safety.conflicts({"fsdp": "full_shard"}, 4))
    [found] = safety.conflicts({"per_device_train_batch_size": 6}, 4)
    assert found == "training.per_device_train_batch_size is 6, which splits groups: make it a multiple of the width 4."
    [found] = safety.conflicts({"num_generations": 6}, 4)
    assert found.startswith("training.num_generations is 6, which splits groups")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["training.resume_from_checkpoint=runs/x/checkpoint-3"],
            "training.resume_from_checkpoint is decided elsewhere",
        ),
        (["training.chat_template_kwargs={a: 1}"], "use model.chat_template_kwargs"),
        (["training.accelerator_config=file.json"], "write what is in that file into the recipe"),
        (["training.neftune_noise_alpha=5"], "training with noise computes other log-probs"),
        (["training.metric_for_best_model=pass@1", "evaluation.every=5"], "is not measured .* eval_pass@1/w4"),
        (["training.metric_for_best_model=eval_pass@1/w4", "evaluation.every=null"], "set evaluation.every"),
        (["training.lr_scheduler_type=reduce_lr_on_plateau", "evaluation.every=5"], "metric_for_best_model is loss"),
        (["training.model_init_kwargs={dtype: bfloat16}"], "use model.dtype, model.revision or"),
        (["training.trust_remote_code=true"], "use model.trust_remote_code"),
        (["training.project=mine"], "use logging.project"),
        (["training.data_seed=3"], "use seed"),
        (["training.hub_token=hf_x"], "training.hub_token is decided elsewhere: use the environment's HF_TOKEN or"),
        (["training.per_device_eval_batch_size=8"], "use evaluation.max_rows"),
        (["training.train_sampling_strategy=sequential"], "train_sampling_strategy has no effect"),
        (["training.label_smoothing_factor=0.1"], "label_smoothing_factor has no effect"),
        (["training.bf16_full_eval=true"], "bf16_full_eval has no effect"),
        (["training.vllm_gpu_memory_utilization=0.5"], "vllm_gpu_memory_utilization has no effect"),
        (["training.activation_checkpointing=false"], "use training.gradient_checkpointing"),
        (["training.accelerator_config={dispatch_batches: true}"], "dispatch_batches is on"),
        (["training.dataloader_multiprocessing_context=fork"], "without training.dataloader_num_workers"),
        (
            ["training.dataloader_multiprocessing_context=frok", "training.dataloader_num_workers=1"],
            "dataloader_multiprocessing_context is 'frok': this system has fork",
        ),
        (["update.token_budget=999", "training.entropy_coef=0.1"], "token_budget is set with training.entropy_coef"),
        (["update.token_budget=999", "training.use_adaptive_entropy=true"], "set with training.use_adaptive_entropy"),
        (["update.token_budget=999", "training.top_entropy_quantile=0.2"], "set with training.top_entropy_quantile"),
        (["train=lora", "training.cast_lm_head_to_fp32=true"], "TRL cannot where the embedding is the head"),
        (["training.router_aux_loss_coef=0.1"], "router_aux_loss_coef is 0.1, but llama has no experts"),
        (["training.log_level=loud"], "training.log_level is 'loud': use one of detail, debug"),
        (["training.debug=underflow_overflow"], "debug is 'underflow_overflow': transformers' hooks fail at what the"),
        (["train=full", "output_dir=bridge_rl/tiny/model"], "the run would write over its base"),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_a_conflict(overrides, expected):
    [found] = make_plan(load_recipe(TINY, overrides)).conflicts
    assert re.search(expected, found)


def test_a_model_without_a_bridge_may_be_debugged():
    overrides = ["training.debug=underflow_overflow", "bridge=null", "warmup=null", "train=full"]
    assert make_plan(load_recipe(TINY, overrides)).conflicts == []


def test_a_metric_that_is_measured_may_choose_the_best():
    options = ["training.metric_for_best_model=pass@1/w4", "evaluation.every=5", "guards.max_rollout_kl=null"]
    assert make_plan(load_recipe(TINY, [*options, "training.neftune_noise_alpha=5"])).conflicts == []


def test_an_adapter_is_not_trained_further(tmp_path):
    save_adapter(tmp_path)
    recipe = load_recipe(TINY, [f"model.path={tmp_path}", "bridge={num_heads: 2, head_dim: 8}"])
    [found] = make_plan(recipe).conflicts
    assert f"{tmp_path} is a LoRA adapter, which is not trained further: merge it" in found
    with pytest.raises(UserError, match="merge it"):
        load_policy(recipe)


def test_a_bridge_on_a_quantized_base_is_trained_on_one(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = br.attach_bridge(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), br.BridgeConfig(num_heads=2))
    br.save_bridge(model, tmp_path / "saved")
    path = tmp_path / "saved" / "bridge_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": {"load_in_8bit": True}}))
    recipe = load_recipe(TINY, [f"model.path={tmp_path / 'saved'}", "bridge={num_heads: 2}"])
    [found] = make_plan(recipe).conflicts
    assert found.endswith("was trained on a quantized base: set model.quantization as it was.")


@pytest.mark.parametrize(
    ("recipe", "overrides", "rows"),
    [
        ("r1_distill_7b.yaml", ["rollout.width=8"], 4),
        (
            "tiny_arith.yaml",
            ["rollout.width=3", "rollout.num_generations=6", "training={gradient_accumulation_steps: 3}"],
            8,
        ),
    ],
)
def test_a_batch_that_splits_groups_is_a_conflict_and_no_traceback(recipe, overrides, rows):
    [found] = make_plan(load_recipe(RECIPES / recipe, overrides)).conflicts
    assert found.startswith(f"training.per_device_train_batch_size is {rows}, which splits groups")


def save_adapter(directory):
    """A checkpoint as a run with train=lora leaves it."""
    make_base("llama").save_pretrained(directory / "base")
    model = br.attach_bridge(
        AutoModelForCausalLM.from_pretrained(directory / "base"), br.BridgeConfig(num_heads=2, head_dim=8)
    )
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["bridge"])).save_pretrained(directory)
    write_config(model, directory)


def test_trl_options_as_they_are_by_default_are_no_conflict():
    from trl import GRPOConfig

    args = GRPOConfig(use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=8)
    assert list(safety.conflicts(vars(args), 4)) == []
    safety.check_safe(vars(args), 4)


def test_checking_raises_the_first_conflict():
    with pytest.raises(UserError, match=r"training\.use_vllm is True"):
        safety.check_safe({"use_vllm": True, "top_k": 5}, 4)
    with pytest.raises(UserError, match="width is 0"):
        safety.check_safe({}, 0)


def test_a_generation_batch_that_splits_a_prompt_is_a_conflict():
    # 4 rows are one group of 4, and half of a prompt's 8 completions.
    [found] = make_plan(load_recipe(TINY, ["training.per_device_train_batch_size=4"])).conflicts
    assert found.startswith("a generation batch of 4 rows")
    assert "rollout.num_generations 8" in found


def test_dropout_of_lora_and_a_guard_of_the_rollout_are_a_conflict():
    options = ["train=lora", "lora.dropout=0.1"]
    [found] = make_plan(load_recipe(TINY, options)).conflicts
    assert found.startswith("lora.dropout is 0.1: training with dropout computes other log-probs than the rollout")
    assert "set guards.max_rollout_kl=null or lora.dropout=0" in found
    for cure in ("guards.max_rollout_kl=null", "lora.dropout=0", "training.disable_dropout=true", "train=bridge"):
        assert make_plan(load_recipe(TINY, [*options, cure])).conflicts == []


@pytest.mark.parametrize(
    ("overrides", "positions"),
    [
        ({}, 128),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 128),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                }
            },
            64,
        ),
    ],
)
def test_completions_longer_than_the_positions_of_the_model_are_a_conflict(tmp_path, overrides, positions):
    make_base("llama", **overrides).config.save_pretrained(tmp_path)
    for length, found in ((positions - 1, False), (positions, True)):
        recipe = load_recipe("recipes/tiny_arith.yaml", [f"model.path={tmp_path}", f"rollout.max_new_tokens={length}"])
        sentence = f"rollout.max_new_tokens is {length}, but the model knows {positions} positions"
        assert any(sentence in conflict for conflict in make_plan(recipe).conflicts) is found


@pytest.mark.parametrize(("family", "key"), [("llama", "attention_dropout"), ("phi3", "resid_pdrop")])
def test_dropout_of_the_base_and_a_guard_of_the_rollout_are_a_conflict(tmp_path, family, key):
    make_base(family, **{key: 0.2}).config.save_pretrained(tmp_path)
    base = f"model.path={tmp_path}"
    [found] = make_plan(load_recipe(TINY, [base])).conflicts
    assert found.startswith(f"model.path: the base's {key} is 0.2: training with dropout")
    assert make_plan(load_recipe(TINY, [base, "guards.max_rollout_kl=null"])).conflicts == []
    disabled = make_plan(load_recipe(TINY, [base, "training.disable_dropout=true"])).conflicts
    assert disabled == ([found] if key == "attention_dropout" else [])


def test_beta_with_full_training_of_a_gguf_model_is_a_conflict():
    recipe = load_recipe(RECIPES / "smollm2_135m.yaml", ["train=full", "training.beta=0.1"])
    assert any("training.beta with train=full" in conflict for conflict in make_plan(recipe).conflicts)


def test_options_that_another_section_decides_name_that_section():
    [found] = make_plan(load_recipe(TINY, ["training.max_completion_length=9"])).conflicts
    assert found == "training.max_completion_length is decided elsewhere: use rollout.max_new_tokens."
