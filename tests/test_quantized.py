"""A frozen base in 8 or 4 bits: what is trained, saved and loaded is the Bridge, and the base stays what it was."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from conftest import make_base, switch_on
from pydantic import TypeAdapter
from test_trainer import make_trainer

import bridge_rl as br
from bridge_rl.config import ModelSection, Recipe
from bridge_rl.errors import UserError
from bridge_rl.models import load_model, load_policy, load_tokenizer
from bridge_rl.plan import make_plan
from bridge_rl.run_options import lora_config

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra 'quantized'"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base on disk, whose layers hold whole blocks of 64 weights."""
    directory = tmp_path_factory.mktemp("base")
    make_base("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(directory)
    return str(directory)


def recipe(base, quantization, train="bridge", max_rollout_kl=0.1, **launch):
    content = {
        "model": {"path": base, "quantization": quantization},
        "bridge": {"num_heads": 2, "head_dim": 8},
        "train": train,
        "data": {"train": {"path": "bridge_rl.tiny.task:dataset"}},
        "rewards": [{"function": "rewards/answer.py:correct"}],
        "rollout": {"max_new_tokens": 8},
        "training": {"per_device_train_batch_size": 8},
        "launch": launch,
        "guards": {"max_rollout_kl": max_rollout_kl},
        "output_dir": "runs/unused",
    }
    return TypeAdapter(Recipe).validate_python(content)


@needs_bitsandbytes
@pytest.mark.parametrize("train", ["bridge", "lora"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_bridge_is_trained_on_a_quantized_base_saved_and_loaded(base, tmp_path, quantization, train):
    section = recipe(base, quantization, train)
    model = load_policy(section)
    weights = {name: p for name, p in model.named_parameters() if ".bridge." not in name}
    assert {weights[name].dtype for name in weights if "q_proj" in name} <= {torch.int8, torch.uint8}
    before = {name: p.detach().clone() for name, p in weights.items()}
    peft = lora_config(section) if train == "lora" else None
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    trainer = make_trainer(tokenizer, tmp_path, model, train=train, peft=peft, beta=0.1, max_steps=2)
    trainer.train()
    blocks = dict(br.surgery.bridge_parameters(trainer.model))
    assert any((p != 0).any() for name, p in blocks.items() if "o_proj" in name)
    trainer.save_model(str(tmp_path / "saved"))

    loaded = load_model(ModelSection(str(tmp_path / "saved")))
    for name, p in br.surgery.bridge_parameters(loaded):
        assert torch.equal(p, blocks[name]), name
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p for name, p in loaded.named_parameters()
    }
    assert all(torch.equal(after[name], before[name]) for name in before)


@needs_bitsandbytes
@pytest.mark.parametrize("train", ["bridge", "lora"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_what_is_trained_on_a_quantized_base_is_in_float32(base, tmp_path, quantization, train):
    """TRL would round it to bf16, where a step of AdamW at a usual learning rate changes next to nothing."""
    section = recipe(base, quantization, train)
    model = switch_on(load_policy(section))
    before = [p.detach().clone() for _, p in br.surgery.bridge_parameters(model)]
    peft = lora_config(section) if train == "lora" else None
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    trainer = make_trainer(tokenizer, tmp_path, model, train=train, peft=peft, learning_rate=1e-5, beta=0.1)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    blocks = dict(br.surgery.bridge_parameters(trainer.model))
    for p, was in zip(blocks.values(), before, strict=True):
        torch.testing.assert_close(p.detach(), was, atol=0, rtol=0)
    trainer.train()
    for (name, p), was in zip(blocks.items(), before, strict=True):
        assert (p != was).float().mean() > 0.9, name


@needs_bitsandbytes
def test_an_adapter_without_a_bridge_is_in_float32_too(base, tmp_path):
    section = replace(recipe(base, "nf4", "lora"), bridge=None)
    tokenizer = load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))
    options = {"train": "lora", "peft": lora_config(section)}
    trainer = make_trainer(tokenizer, tmp_path, load_policy(section), **options)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-4), ("int8", 0.05)])
def test_gradients_are_those_of_the_dequantized_base_after_sampling_too(base, quantization, tolerance):
    """Products of int8 round activations as well. Sampling may change how a weight is stored."""
    ids = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for dequantized in (False, True):
        model = load_model(ModelSection(base, quantization=quantization))
        model = model.dequantize() if dequantized else model
        torch.manual_seed(0)
        switch_on(br.attach_bridge(model, br.BridgeConfig(num_heads=2, head_dim=8)))
        br.surgery.freeze_base(model)
        br.generate_groups(model, [[1, 5, 6]], 4, br.SamplingParams(max_new_tokens=3))
        model.train()
        with br.surgery.group_width(model, 4):
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in br.surgery.bridge_parameters(model)})
    ours, oracle = gradients
    for name, gradient in oracle.items():
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_what_cannot_be_quantized_is_refused(base, monkeypatch):
    def conflicts(*args, **launch):
        found = make_plan(recipe(base, *args, **launch)).conflicts
        return [conflict for conflict in found if "bitsandbytes" not in conflict]

    [found] = conflicts("nf4", "full")
    assert found.startswith("model.quantization is nf4 with train=full")
    [found] = conflicts("int8", num_processes=2, zero_stage=3)
    assert found.startswith("model.quantization is int8 with launch.zero_stage=3")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="quantization is int8 under DeepSpeed"):
        load_policy(recipe(base, "int8"))
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(UserError, match=r"pip install -e '.\[quantized\]'"):
        load_model(ModelSection(base, quantization="nf4"))
    assert any(".[quantized]" in conflict for conflict in make_plan(recipe(base, "nf4")).conflicts)


def test_int8_and_a_tight_guard_of_the_rollout_are_a_conflict(base):
    def conflicts(quantization, limit):
        found = make_plan(recipe(base, quantization, max_rollout_kl=limit)).conflicts
        return [conflict for conflict in found if "bitsandbytes" not in conflict]

    [found] = conflicts("int8", 0.01)
    assert found.startswith("model.quantization is int8, which rounds activations by the batch")
    assert "guards.max_rollout_kl is 0.01): set guards.max_rollout_kl=0.1 or null" in found
    for quantization, limit in (("int8", 0.1), ("int8", None), ("nf4", 0.01), (None, 0.01)):
        assert conflicts(quantization, limit) == []


def test_a_quantized_base_is_planned_as_smaller(base):
    sizes = [make_plan(recipe(base, q)).memory.update.terms["weights"] for q in (None, "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
