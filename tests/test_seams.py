"""The places in TRL, transformers and PEFT that the trainer and the surgery rest on; new versions move them."""

import inspect

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from deepspeed.runtime.zero import stage3, stage_1_and_2
from transformers import AutoConfig, AutoModelForCausalLM, Trainer
from transformers.integrations.integration_utils import rewrite_logs
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from bridge_rl.report import names
from bridge_rl.safety import _UNSAFE
from bridge_rl.surgery import SERVED_FAMILIES
from bridge_rl.trainer import BridgeGRPOTrainer

OVERRIDDEN = [
    "_generate_and_score_completions",
    "_generate",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
    "training_step",
    "_clip_grad_norm",
    "_get_grad_norm",
    "_calculate_rewards",
    "_get_train_sampler",
    "_save_checkpoint",
    "_get_output_dir",
    "train",
    "create_model_card",
    "evaluate",
    "log",
    "_save",
    "_load_from_checkpoint",
]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_the_trainer_overrides_exists_in_its_host(name):
    assert name in vars(BridgeGRPOTrainer)
    assert callable(getattr(GRPOTrainer, name))


def test_the_trainer_overrides_nothing_else():
    inherited = {name for name in vars(BridgeGRPOTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    metadata = {"_tag_names", "_name", "_abc_impl"}
    assert inherited - metadata == set(OVERRIDDEN)


def test_the_fused_head_scores_what_the_backbone_gives_it():
    """Of packed groups these are the completions alone, chosen by a hook; their labels are shifted already."""
    source = inspect.getsource(add_fused_lm_head)
    assert "getattr(self, backbone_attr)(*args, **kwargs)" in source
    assert "hidden_states = backbone_outputs.last_hidden_state\n            labels = shift_labels" in source


def test_a_mask_of_four_dimensions_is_taken_for_one_that_is_made():
    mask = torch.ones(1, 1, 1, 3)
    config = AutoConfig.for_model("llama")
    assert create_causal_mask(config, torch.zeros(1, 3, 8), mask, past_key_values=None) is mask


def test_trl_shuffles_and_splits_rows_where_the_blocks_are_given():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "shuffle_sequence_dict(" in source
    assert "split_tensor_dict(" in source


def test_the_reference_is_asked_for_before_peft():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "if self.ref_model is not None:" in source


def test_the_sampler_keeps_a_generator_and_a_seed():
    sampler = RepeatSampler(range(4), mini_repeat_count=1, seed=3)
    assert sampler.generator.initial_seed() == 3
    assert "_load_from_checkpoint" in vars(Trainer)


def test_trackers_are_given_the_keys_that_dashboards_show():
    logged = [*names.TRAIN, names.norm_ratio(3), names.evaluation("pass@1", 4), "reward", "global_step"]
    assert [names.in_tracker(name) for name in logged] == list(rewrite_logs(dict.fromkeys(logged)))


def test_a_step_ends_before_its_metrics_are_logged():
    """The meter's callback takes the time that `log` then shares out; both are the host's calls."""
    source = inspect.getsource(Trainer)
    begin, end = source.index("callback_handler.on_step_begin("), source.index("callback_handler.on_step_end(")
    assert begin < end < source.index("self._maybe_log_save_evaluate(")
    assert "self._metrics[mode].clear()" in inspect.getsource(GRPOTrainer.log)


def test_the_norm_is_known_before_the_optimizer_steps_and_a_skipped_step_does_not_move_the_schedule():
    source = inspect.getsource(Trainer._run_epoch)
    parts = [
        "self._clip_grad_norm(model)",
        "self._get_grad_norm(model, grad_norm=grad_norm)",
        "self.optimizer.step()",
        "if not self.accelerator.optimizer_step_was_skipped:",
        "self.lr_scheduler.step()",
        "model.zero_grad()",
    ]
    assert [source.index(part) for part in parts] == sorted(source.index(part) for part in parts)
    assert "return self._is_overflow" in inspect.getsource(AcceleratedOptimizer.step_was_skipped.fget)


def test_deepspeed_leaves_out_steps_whose_norm_is_not_finite():
    """ZeRO-1 and -2 in bf16 only if told to."""
    condition = "self.dtype != torch.bfloat16\n                    or self.check_grad_overflow"
    assert condition in inspect.getsource(stage_1_and_2)
    source = inspect.getsource(stage3)
    assert "if is_invalid_grad_norm(scaled_global_grad_norm):\n                self.overflow = True" in source
    assert "return self.optimizer.overflow" in inspect.getsource(DeepSpeedOptimizerWrapper.step_was_skipped.fget)


def test_what_was_generated_goes_through_two_methods():
    """Dynamic sampling calls both, and then hands their results to the host."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert ") = self._generate(prompts)" in source
    assert "self._calculate_rewards(inputs, prompts, completions, completion_ids_list)" in source
    assert "values = self._pending_extra_logs.get(column, [None] * len(prompts))" in source


def test_checkpoints_go_where_the_trainer_says_and_their_parts_come_in_this_order():
    """Everything of a checkpoint is written below `_get_output_dir`; counters are reset before training begins."""
    source = inspect.getsource(Trainer._save_checkpoint)
    parts = ["_get_output_dir(", "save_model(", "_save_optimizer_and_scheduler(", "_save_rng_state(", "save_to_json("]
    assert [source.index(part) for part in parts] == sorted(source.index(part) for part in parts)
    assert "self._get_output_dir(trial=trial)" in inspect.getsource(GRPOTrainer._save_checkpoint)
    loop = inspect.getsource(Trainer._inner_training_loop)
    begin = loop.index("callback_handler.on_train_begin(")
    for counter in ("self._tr_loss = ", "self._total_loss_scalar = ", "self._globalstep_last_logged = "):
        assert loop.index(counter) < begin
    assert begin < loop.index("callback_handler.on_epoch_begin(") < loop.index("self._run_epoch(")
    for name in ("_step", "_buffered_inputs", "_metrics", "_logs", "_current_train_step_time"):
        assert f"self.{name} = " in inspect.getsource(GRPOTrainer.__init__)


@pytest.mark.parametrize("option", [option for option, _, _ in _UNSAFE])
def test_every_refused_option_still_exists(option):
    assert option in GRPOConfig.__dataclass_fields__


@pytest.mark.parametrize("family", SERVED_FAMILIES)
def test_layers_of_served_families_checkpoint_and_take_keywords(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=1))
    layer = model.base_model.layers[0]
    assert isinstance(layer, GradientCheckpointingLayer)
    kinds = {parameter.kind for parameter in inspect.signature(type(layer).forward).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD in kinds
