"""The trainer keeps groups whole, and its loss and gradients are those of a slow computation."""

import json
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_base, make_bridged
from datasets import Dataset
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import PROMPTS, quiet_config, reward_of_tokens
from trl import GRPOConfig, GRPOTrainer

import bridge_rl as br
from bridge_rl.config import ModelSection, UpdateSection
from bridge_rl.errors import UserError
from bridge_rl.models import load_tokenizer
from bridge_rl.report import names
from bridge_rl.resume import _plain, checkpoint_bytes
from bridge_rl.rollout import Rollout
from bridge_rl.rollout.budget import bytes_per_token
from bridge_rl.surgery import find_state, group_width, has_bridge
from bridge_rl.trainer import BridgeGRPOTrainer

WIDTH = 4


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))


def make_trainer(
    tokenizer,
    tmp_path,
    model=None,
    train="bridge",
    width=WIDTH,
    peft=None,
    cls=BridgeGRPOTrainer,
    update=None,
    **options,
):
    return cls(
        make_bridged("llama") if model is None else model,
        [reward_of_tokens],
        quiet_config(tmp_path, **{"max_steps": 1, **options}),
        width=width,
        train=train,
        update=update,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=peft,
    )


class Recording(BridgeGRPOTrainer):
    """Keeps what was sampled and what each loss was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampled, self.losses = [], []

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.sampled.append(batch)
        return batch

    def _compute_loss(self, model, inputs):
        self.losses.append(inputs)
        return super()._compute_loss(model, inputs)


def as_set(blocks):
    return {tuple(map(tuple, block)) for block in blocks.tolist()}


def test_shuffle_and_split_keep_groups_whole(tokenizer, tmp_path):
    trainer = make_trainer(
        tokenizer, tmp_path, cls=Recording, per_device_train_batch_size=8, gradient_accumulation_steps=4, max_steps=2
    )
    trainer.train()
    assert len(trainer.sampled) == 2
    assert len(trainer.losses) == 8
    for step, batch in enumerate(trainer.sampled):
        given = torch.cat([inputs["completion_ids"] for inputs in trainer.losses[4 * step : 4 * step + 4]])
        assert as_set(given) == as_set(batch["completion_ids"])
        for prompts in batch["prompt_ids"]:
            assert (prompts == prompts[0]).all()


def test_without_blocks_the_shuffle_would_break_groups(tokenizer, tmp_path):
    """Negative control: the same run, TRL's own rows."""

    class Broken(Recording):
        def _generate_and_score_completions(self, inputs):
            batch = GRPOTrainer._generate_and_score_completions(self, inputs)
            self.sampled.append({key: x.unflatten(0, (-1, WIDTH)) for key, x in batch.items() if x.dim()})
            return batch

        def _compute_loss(self, model, inputs):
            self.losses.append({key: x.unflatten(0, (-1, WIDTH)) for key, x in inputs.items() if x.dim()})
            return GRPOTrainer._compute_loss(self, model, inputs)

    plain = UpdateSection(share_prompt=False)  # or it would find that rows have changed places
    trainer = make_trainer(tokenizer, tmp_path, cls=Broken, update=plain, per_device_train_batch_size=32)
    trainer.train()
    assert as_set(trainer.losses[0]["completion_ids"]) != as_set(trainer.sampled[0]["completion_ids"])


def test_gradients_are_those_of_a_slow_policy_gradient(tokenizer, tmp_path):
    """DAPO on policy: -sum_i,t A_i log p / (tokens of the batch), A = (r - mean) / (std + 1e-4) over G rows."""
    torch.manual_seed(0)
    trainer = make_trainer(tokenizer, tmp_path, cls=Recording, loss_type="dapo", max_grad_norm=1e9)
    gradients = {}
    start = {name: p.detach().clone() for name, p in br.bridge_parameters(trainer.model)}

    def keep(optimizer, args, kwargs):
        gradients.update({name: p.grad.clone() for name, p in br.bridge_parameters(trainer.model)})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()

    model = make_bridged("llama")
    with torch.no_grad():
        for name, parameter in br.bridge_parameters(model):
            parameter.copy_(start[name])
    batch = {key: x.flatten(0, 1) if x.dim() else x for key, x in trainer.losses[0].items()}
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with group_width(model, WIDTH):
        logps = model(ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    columns = batch["completion_ids"].shape[1]
    chosen = logps[:, -columns - 1 : -1].gather(-1, batch["completion_ids"][:, :, None])[:, :, 0]
    rewards = (batch["completion_ids"][:, 0] % 2 == 0).float()
    # The shuffle moved groups of a prompt apart: advantages are compared per prompt.
    advantages = torch.zeros_like(rewards)
    for prompt in batch["prompt_ids"].unique(dim=0):
        rows = (batch["prompt_ids"] == prompt).all(1)
        advantages[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std() + 1e-4)
    torch.testing.assert_close(batch["advantages"], advantages, atol=1e-5, rtol=0)
    loss = -(advantages[:, None] * chosen * batch["completion_mask"]).sum() / batch["completion_mask"].sum()
    expected = dict(zip(start, torch.autograd.grad(loss, [p for _, p in br.bridge_parameters(model)]), strict=True))
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_of_trl_trains_the_bridge(tokenizer, tmp_path, loss_type):
    trainer = make_trainer(tokenizer, tmp_path, loss_type=loss_type)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter) == (".bridge." not in name), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_bf16_base_has_no_gradients_no_optimizer_state_and_no_fp32_copy(tokenizer, tmp_path, checkpointing):
    model = make_bridged("llama").to(torch.bfloat16)
    for _, parameter in br.bridge_parameters(model):
        parameter.data = parameter.data.float()  # as `load_policy` does
    blocks = dict(br.bridge_parameters(model))
    given = {}  # gradients, before the trainer lets go of them
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: given.__setitem__(name, p.grad.dtype))
    trainer = make_trainer(tokenizer, tmp_path, model=model, gradient_checkpointing=checkpointing, max_steps=2)
    trainer.train()
    assert given == dict.fromkeys(blocks, torch.float32)
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in blocks.values()}
    held = sum(x.numel() for state in trainer.optimizer.state.values() for x in state.values() if x.dim())
    assert held == 2 * sum(p.numel() for p in blocks.values())  # Adam's two moments
    assert all(p.dtype == torch.bfloat16 for name, p in trainer.model.named_parameters() if name not in blocks)
    assert all(entry["loss"] == entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("train", ["bridge", "full"])
def test_an_fp32_model_is_sampled_and_trained_under_autocast_alike(tokenizer, tmp_path, train):
    """As on a GPU, where `training.bf16` is the default and so are fp32 weights."""
    trainer = make_trainer(tokenizer, tmp_path, model=make_bridged("llama"), train=train, bf16=True, max_steps=2)
    trainer.train()
    drift = [abs(entry["rollout/recompute_kl"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(drift) == 2
    assert 1e-7 < max(drift) < 1e-2
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_rollout_casts_trained_fp32_weights_once_and_plans_a_cache_in_bf16(tokenizer, tmp_path, monkeypatch):
    """Under autocast, which each pass would otherwise begin anew."""
    trainer = make_trainer(tokenizer, tmp_path, model=make_bridged("llama"), train="full", bf16=True)
    head, casts, of_token, run = trainer.model.lm_head.weight, [], [], Rollout.run

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            casts.extend(args[:1] if func is torch.ops.aten._to_copy.default else ())
            return func(*args, **(kwargs or {}))

    def watched(rollout):
        of_token.append(bytes_per_token(rollout.model))
        with Casts():
            return run(rollout)

    monkeypatch.setattr(Rollout, "run", watched)
    trainer.train()
    assert sum(cast is head for cast in casts) == 1
    assert of_token == [bytes_per_token(trainer.model) / 2]


def test_what_is_frozen_below_the_first_block_has_no_backward_pass(tokenizer, tmp_path):
    model = make_base("llama", num_hidden_layers=4)
    br.attach_bridge(model, br.BridgeConfig("bridge", 2, 8, layers=[2, 3]))
    reached = []

    def watch(number, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.append(number))

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, number=number: watch(number, output))
    make_trainer(tokenizer, tmp_path, model=model).train()
    assert set(reached) == {2, 3}


@pytest.mark.parametrize(("train", "lora"), [("bridge", False), ("lora", True)])
def test_the_reference_is_the_base_without_a_second_model(tokenizer, tmp_path, train, lora):
    peft = LoraConfig(target_modules="all-linear", modules_to_save=["bridge"]) if lora else None
    trainer = make_trainer(tokenizer, tmp_path, cls=Recording, train=train, peft=peft, beta=0.1, max_steps=2)
    trainer.train()
    assert not isinstance(trainer.ref_model, torch.nn.Module)
    base = make_base("llama")
    batch = {key: x.flatten(0, 1) if x.dim() else x for key, x in trainer.losses[1].items()}
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logps = base(ids, attention_mask=mask).logits.log_softmax(-1)
    columns = batch["completion_ids"].shape[1]
    expected = logps[:, -columns - 1 : -1].gather(-1, batch["completion_ids"][:, :, None])[:, :, 0]
    alive = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["ref_per_token_logps"][alive], expected[alive], atol=1e-5, rtol=0)
    assert trainer.state.log_history[-2]["kl"] > 0


def test_full_training_with_beta_has_a_second_model_as_reference(tokenizer, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = br.attach_bridge(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), br.BridgeConfig("bridge", 2, 8))
    trainer = make_trainer(tokenizer, tmp_path, model=model, cls=Recording, train="full", beta=0.1)
    assert isinstance(trainer.ref_model, torch.nn.Module)
    assert not has_bridge(trainer.ref_model)
    trainer.train()
    batch = {key: x.flatten(0, 1) if x.dim() else x for key, x in trainer.losses[0].items()}
    with torch.no_grad():
        expected = make_base("llama")(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        ).logits[:, -batch["completion_ids"].shape[1] - 1 : -1]
    chosen = expected.log_softmax(-1).gather(-1, batch["completion_ids"][:, :, None])[:, :, 0]
    alive = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["ref_per_token_logps"][alive], chosen[alive], atol=1e-5, rtol=0)


def test_lora_trains_adapter_and_blocks_and_keeps_lora_out_of_the_blocks(tokenizer, tmp_path):
    peft = LoraConfig(target_modules="all-linear", modules_to_save=["bridge"])
    trainer = make_trainer(tokenizer, tmp_path, train="lora", peft=peft, max_steps=2)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(".bridge.modules_to_save." in name for name in trained)
    assert any("lora_A" in name for name in trained)
    assert not any("bridge" in name and "lora" in name for name in trained)
    assert {name for name, _ in br.bridge_parameters(trainer.model)} == {name for name in trained if "bridge" in name}
    make_base("llama").save_pretrained(tmp_path / "base")
    find_state(trainer.model).base_name = str(tmp_path / "base")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.randint(3, 19, (4, 6), generator=torch.Generator().manual_seed(0))
    loaded = br.load_bridge(tmp_path / "adapter").eval()
    with torch.no_grad(), group_width(trainer.model, 4), group_width(loaded, 4):
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-6, rtol=0)


def test_every_generation_batch_draws_anew(tokenizer, tmp_path):
    """A run of one prompt, whose weights do not change."""
    model = make_bridged("llama")
    trainer = Recording(
        model,
        [reward_of_tokens],
        quiet_config(tmp_path, max_steps=3, learning_rate=0.0, per_device_train_batch_size=8),
        width=WIDTH,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:1]}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(set().union(*(as_set(batch["completion_ids"]) for batch in trainer.sampled))) == 3 * 2  # two groups each


def test_right_rows_are_counted_by_group_and_by_prompt(tokenizer, tmp_path):
    """Three prompts of two groups: one all right and one half, one all right and one wrong, and both wrong."""
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.model.train()
    groups = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    trainer._log_right(torch.tensor(groups).flatten().bool())
    trainer._log_right(torch.ones(24, dtype=torch.bool))
    logged = trainer._metrics["train"]
    assert logged[names.ALL_RIGHT] == [pytest.approx(2 / 6), 1.0]
    assert logged[names.ANY_RIGHT] == [pytest.approx(3 / 6), 1.0]
    assert logged[names.PROMPT_ALL_RIGHT] == [0.0, 1.0]
    assert logged[names.PROMPT_ALL_WRONG] == [pytest.approx(1 / 3), 0.0]


def test_several_iterations_use_the_sampled_batch_again(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, cls=Recording, num_iterations=2, max_steps=4)
    trainer.train()
    assert len(trainer.sampled) == 2
    assert "old_per_token_logps" in trainer.losses[0]


def test_recomputed_logprobs_agree_with_those_of_sampling(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, max_steps=3, temperature=0.7)
    trainer.train()
    found = [entry[names.RECOMPUTE_KL] for entry in trainer.state.log_history if names.RECOMPUTE_KL in entry]
    assert len(found) == 3
    assert max(map(abs, found)) < 1e-6


def test_the_trainer_logs_every_metric_it_names(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.train()
    assert set(names.TRAIN) <= set(trainer.state.log_history[0])


def test_rewards_of_one_name_are_logged_apart(tokenizer, tmp_path):
    def reward(completion_ids, value=0.0, **kwargs):
        return [value for _ in completion_ids]

    trainer = BridgeGRPOTrainer(
        make_bridged("llama"),
        [reward, partial(reward, value=3.0), reward_of_tokens],
        quiet_config(tmp_path, max_steps=1),
        width=WIDTH,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    trainer.train()
    means = {key: x for key, x in trainer.state.log_history[0].items() if key.startswith("rewards/") and "mean" in key}
    assert list(means) == [f"rewards/{name}/mean" for name in ("reward", "reward_2", "reward_of_tokens")]
    assert [means["rewards/reward/mean"], means["rewards/reward_2/mean"]] == [0.0, 3.0]


def test_cut_rows_stay_visible_and_out_of_the_loss(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, cls=Recording, max_completion_length=3, per_device_train_batch_size=32)
    trainer.mask_truncated = True
    trainer.train()
    batch = trainer.losses[0]
    seen, counted = batch["completion_mask"].flatten(0, 1), batch["tool_mask"].flatten(0, 1)
    ended = torch.isin(batch["completion_ids"].flatten(0, 1), torch.tensor(trainer.eos_token_ids)).any(1)
    assert 0 < ended.sum() < len(ended)
    assert (seen[~ended].sum(1) == 3).all()
    assert torch.equal(counted, seen * ended[:, None])


def test_a_bridge_checkpoint_holds_the_blocks_only_and_loads(tokenizer, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = br.attach_bridge(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), br.BridgeConfig("bridge", 2, 8))
    trainer = make_trainer(tokenizer, tmp_path, model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = dict(br.bridge_parameters(br.load_bridge(tmp_path / "out")))
    for name, parameter in br.bridge_parameters(trainer.model):
        assert torch.equal(loaded[name], parameter), name


def test_the_card_of_a_full_checkpoint_warns(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, train="full")
    trainer.save_model(str(tmp_path / "out"))
    assert "silently drops the blocks" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("train", ["bridge", "full"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_ends_with_the_same_weights(tokenizer, tmp_path, train, stop):
    """Two iterations over batches that serve two updates, 3 updates an epoch: mid-generation and second epoch."""
    options = {
        "per_device_train_batch_size": 16,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 8,
        "save_steps": stop,
        "save_strategy": "steps",
        "lr_scheduler_type": "constant",
    }
    whole = make_trainer(tokenizer, tmp_path, train=train, **options)
    whole.train()
    resumed = make_trainer(tokenizer, tmp_path, train=train, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 8
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert resumed.state.log_history[-1]["train_loss"] == whole.state.log_history[-1]["train_loss"]


def test_what_rewards_log_is_kept_as_types_that_load_without_running_code():
    logged = {"extra": deque([np.float32(0.5), None, "text", (1, True)], maxlen=9)}
    assert _plain(logged) == {"extra": [0.5, None, "text", [1, True]]}
    with pytest.raises(UserError, match=r"A reward logs \{7\}, a set, beside its completions: log text or numbers"):
        _plain({"extra": deque([{7}])})


@pytest.mark.parametrize(
    ("steps", "iterations"), [(4, 1), (1, 4)]
)  # a batch serves as many updates, which are of other rows
def test_a_generation_batch_that_is_cut_otherwise_is_refused(tokenizer, tmp_path, steps, iterations):
    options = {"per_device_train_batch_size": 16, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tokenizer, tmp_path, steps_per_generation=2, num_iterations=2, **options).train()
    other = make_trainer(tokenizer, tmp_path, steps_per_generation=steps, num_iterations=iterations, **options)
    with pytest.raises(UserError, match=rf"\[16, 1, {steps}, {iterations}\], and in the checkpoint \[16, 1, 2, 2\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_resumed_run_logs_saves_and_evaluates_as_often_as_it_is_told_now(tokenizer, tmp_path):
    options = {"save_strategy": "steps", "lr_scheduler_type": "constant"}
    make_trainer(tokenizer, tmp_path, max_steps=2, save_steps=2, **options).train()
    resumed = make_trainer(tokenizer, tmp_path, max_steps=6, save_steps=3, **{**options, "logging_steps": 2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 4, 6]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (2, 3, 6)}


@pytest.mark.parametrize(
    ("before", "now", "file"),
    [
        ("bridge", "full", "bridge.safetensors"),
        ("lora", "full", "adapter_config.json"),
    ],
)
def test_a_directory_with_a_model_that_would_be_read_instead_is_refused(tokenizer, tmp_path, before, now, file):
    def make(train):
        return make_trainer(tokenizer, tmp_path, train=train, peft=LoraConfig() if train == "lora" else None)

    trainer = make(before)
    trainer.save_model(str(tmp_path))
    make(before)
    with pytest.raises(UserError, match=rf"output_dir: .* holds a model that was trained in another way \({file}\)"):
        make(now)


def test_hooks_that_fail_on_a_model_with_blocks_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"debug is .*: transformers' hooks fail at what the blocks are given"):
        make_trainer(tokenizer, tmp_path, debug="underflow_overflow")


@pytest.mark.parametrize("train", ["bridge", "lora", "full"])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(tokenizer, tmp_path, train):
    """All but a few texts: those of the tokenizer, of the configuration, of the state of the trainer."""
    peft = LoraConfig(target_modules="all-linear", modules_to_save=["bridge"]) if train == "lora" else None
    make_base("llama").save_pretrained(tmp_path / "base")
    model = make_bridged("llama", hidden_size=256)
    trainer = make_trainer(tokenizer, tmp_path, model=model, train=train, peft=peft, save_strategy="steps")
    trainer.train()
    content = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())["content"]
    written = sum(entry["bytes"] for entry in content["files"].values())
    assert checkpoint_bytes(trainer) == pytest.approx(written, rel=0.15)


def test_accumulation_takes_the_same_step_as_one_batch(tokenizer, tmp_path):
    """Same groups, one batch of 32 rows or four of 8."""
    results = []
    for rows, steps in ((32, 1), (8, 4)):
        trainer = make_trainer(
            tokenizer, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=3
        )
        trainer.train()
        results.append({name: p.detach() for name, p in br.bridge_parameters(trainer.model)})
    for name, parameter in results[0].items():
        torch.testing.assert_close(results[1][name], parameter, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask_truncated_completions": True}, "rollout.mask_truncated"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"use_transformers_continuous_batching": True}, "no common token step"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, "splits groups"),
    ],
    ids=str,
)
def test_options_that_break_groups_are_refused_with_a_reason(tokenizer, tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        make_trainer(tokenizer, tmp_path, **options)


def test_lora_without_its_configuration_and_tools_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="a peft_config is needed for 'lora'"):
        make_trainer(tokenizer, tmp_path, train="lora")
    with pytest.raises(ValueError, match="tools is set"):
        BridgeGRPOTrainer(
            make_bridged("llama"),
            [reward_of_tokens],
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            width=4,
            tools=[print],
        )
