"""Saving and loading, and what must be refused."""

import json
import shutil

import pytest
import torch
from conftest import make_base, make_bridged, switch_on
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bridge_rl as br
from bridge_rl.checkpoint import write_config
from bridge_rl.config import ModelSection, Recipe, RewardSection
from bridge_rl.convert import convert, read_zero
from bridge_rl.errors import UserError
from bridge_rl.fingerprint import fingerprint
from bridge_rl.models import load_model, load_policy, load_tokenizer
from bridge_rl.surgery import find_state, group_width

REWARD = RewardSection("rewards/answer.py:correct")
IDS = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    with group_width(model, 4):
        return model(IDS).logits


@pytest.fixture
def base_directory(tmp_path, family):
    make_base(family).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def attach_to(directory, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return switch_on(br.attach_bridge(model, br.BridgeConfig(num_heads=2, head_dim=8)))


def test_a_bridge_goes_back_into_its_base(base_directory, tmp_path):
    model = attach_to(base_directory)
    br.save_bridge(model, tmp_path / "bridge")
    files = {path.name for path in (tmp_path / "bridge").iterdir()}
    assert files == {"bridge.safetensors", "bridge_config.json"}
    assert torch.equal(logits(br.load_bridge(tmp_path / "bridge")), logits(model))
    moved = shutil.move(base_directory, str(tmp_path / "elsewhere"))
    assert torch.equal(logits(br.load_bridge(tmp_path / "bridge", moved)), logits(model))


@pytest.mark.parametrize("kind", ["blocks", "merged", "adapter"])
def test_blocks_keep_the_dtype_that_they_were_saved_in(kind, tmp_path):
    """A bf16 base carries float32 blocks in training: rounded, they would be others than were trained."""
    make_base("llama").save_pretrained(tmp_path / "base")
    model = attach_to(str(tmp_path / "base"), torch.bfloat16)
    for _, parameter in br.bridge_parameters(model):
        parameter.data = torch.rand_like(parameter, dtype=torch.float32)
    if kind == "adapter":
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["bridge"])
        get_peft_model(model, config).save_pretrained(tmp_path / "saved")
        write_config(model, tmp_path / "saved")
    else:
        br.save_bridge(model, tmp_path / "saved", merged=kind == "merged")
    loaded = br.load_bridge(tmp_path / "saved", dtype=torch.bfloat16)
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16
    ours, theirs = ([p.detach() for _, p in br.bridge_parameters(m)] for m in (loaded, model))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_conversion_keeps_all_eos_ids(tmp_path, monkeypatch):
    model = make_bridged("llama")
    model.generation_config.eos_token_id = [2, 3]
    br.save_bridge(model, tmp_path / "full", merged=True)
    monkeypatch.setattr("bridge_rl.convert.read_zero", lambda checkpoint, trained_only: model.state_dict())
    convert(tmp_path / "full", tmp_path / "whole")
    assert br.load_bridge(tmp_path / "whole").generation_config.eos_token_id == [2, 3]


def test_conversion_without_the_base_leaves_nothing(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = attach_to(str(tmp_path / "base"))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["bridge"])).save_pretrained(
        tmp_path / "adapter"
    )
    write_config(model, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"there is no directory .*base, the base of .*adapter"):
        convert(tmp_path / "adapter", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_checkpoint_says_which_base_it_lacks(tmp_path):
    br.save_bridge(make_bridged("llama"), tmp_path / "nameless")
    with pytest.raises(ValueError, match="does not name its base"):
        br.load_bridge(tmp_path / "nameless")
    make_base("llama").save_pretrained(tmp_path / "base")
    br.save_bridge(attach_to(str(tmp_path / "base")), tmp_path / "bridge")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match=r"goes into the base .* cannot be loaded .* base_model"):
        br.load_bridge(tmp_path / "bridge")


def test_a_base_of_a_hub_is_found_again_at_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, (branch, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        make_base("llama", seed).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    bridge = br.BridgeConfig(num_heads=2, head_dim=8)
    recipe = Recipe(
        ModelSection("org/tiny", revision="v1"), data=None, rewards=[REWARD], output_dir="out", bridge=bridge
    )
    model = switch_on(load_policy(recipe))
    br.save_bridge(model, tmp_path / "bridge")
    loaded = br.load_bridge(tmp_path / "bridge")
    assert torch.equal(logits(loaded), logits(model))
    br.save_bridge(loaded, tmp_path / "again")
    assert torch.equal(logits(load_model(ModelSection(str(tmp_path / "again")))), logits(model))


def damage(directory, kind):
    """Of a whole model with a Bridge."""
    path = directory / "model.safetensors"
    if kind == "a matrix less":
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, {"format": "pt"})
    elif kind == "another shape":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("a matrix less", r"lacks model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        ("another shape", r"has another shape than its config\.json for model\.layers\.0\.mlp"),
        ("cut off", "has damaged weights"),
        ("gone", "cannot be loaded"),
    ],
)
def test_weights_that_are_not_whole_are_refused(kind, sentence, tmp_path):
    """transformers would put random numbers in their place."""
    br.save_bridge(make_bridged("llama"), tmp_path / "full", merged=True)
    damage(tmp_path / "full", kind)
    with pytest.raises(UserError, match=sentence):
        br.load_bridge(tmp_path / "full")
    with pytest.raises(UserError, match=sentence):
        load_model(ModelSection(str(tmp_path / "full")))


def test_a_base_that_is_not_whole_is_refused(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    damage(tmp_path / "base", "a matrix less")
    with pytest.raises(UserError, match=r"model\.path: .*base lacks model\.layers\.1"):
        load_model(ModelSection(str(tmp_path / "base")))


def test_no_new_bridge_takes_the_place_of_one_that_a_plain_load_dropped(tmp_path):
    br.save_bridge(make_bridged("llama"), tmp_path / "full", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with pytest.raises(UserError, match="load it with load_bridge"):
        br.attach_bridge(plain, br.BridgeConfig(num_heads=2, head_dim=8))


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    br.save_bridge(make_bridged("llama"), tmp_path / "full", merged=True)
    with pytest.raises(UserError, match=r"full has no tokenizer_config\.json and names no base"):
        load_tokenizer(ModelSection(str(tmp_path / "full")))


def test_what_would_be_ignored_is_refused(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = attach_to(str(tmp_path / "base"))
    br.save_bridge(model, tmp_path / "bridge")
    br.save_bridge(model, tmp_path / "full", merged=True)
    with pytest.raises(ValueError, match="dtype: of no use"):
        br.load_bridge(tmp_path / "bridge", make_base("llama"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="leave base_model out"):
        br.load_bridge(tmp_path / "full", make_base("llama"))


def test_what_is_no_base_directory_or_mode_of_saving_is_refused(tmp_path):
    model = make_bridged("llama")
    br.save_bridge(model, tmp_path / "bridge")
    with pytest.raises(UserError, match=r"base_model is 2\.5: give a path"):
        br.load_bridge(tmp_path / "bridge", 2.5)
    with pytest.raises(UserError, match=r"does not serve the model family 'None' \(Linear\)"):
        br.load_bridge(tmp_path / "bridge", torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="merged is 'no': it must be true or false"):
        br.save_bridge(model, tmp_path / "full", merged="no")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: name a directory"):
        br.save_bridge(model, tmp_path / "file")
    with pytest.raises(UserError, match=r"config is \{'num_heads': 2\}: give bridge_rl.BridgeConfig"):
        br.attach_bridge(make_base("llama"), {"num_heads": 2})


def test_a_full_checkpoint_keeps_its_bridge(base_directory, tmp_path):
    model = attach_to(base_directory)
    br.save_bridge(model, tmp_path / "full", merged=True)
    shutil.rmtree(base_directory)
    assert torch.equal(logits(br.load_bridge(tmp_path / "full")), logits(model))
    assert "silently drops the blocks" in (tmp_path / "full" / "README.md").read_text()


@pytest.mark.parametrize("train", ["bridge", "lora"])
def test_what_is_trained_on_a_full_checkpoint_can_be_loaded(train, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    br.save_bridge(attach_to(str(tmp_path / "base")), tmp_path / "full", merged=True)
    model = load_model(ModelSection(str(tmp_path / "full"), dtype="float32"))
    for _, parameter in br.bridge_parameters(model):
        parameter.data = torch.rand_like(parameter)
    if train == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["bridge"]))
        model.save_pretrained(tmp_path / "next")
        write_config(model, tmp_path / "next")
    else:
        br.save_bridge(model, tmp_path / "next")
    assert torch.equal(logits(br.load_bridge(tmp_path / "next")), logits(model))


def test_a_sharded_full_checkpoint_keeps_its_bridge(base_directory, tmp_path):
    model = attach_to(base_directory)
    br.save_bridge(model, tmp_path / "full", merged=True)
    (tmp_path / "full" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "full", max_shard_size="20KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1
    assert torch.equal(logits(br.load_bridge(tmp_path / "full")), logits(model))


@pytest.mark.parametrize("merged", [False, True])
def test_a_directory_whose_old_checkpoint_would_be_loaded_is_refused(merged, tmp_path):
    model = make_bridged("llama")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="save elsewhere"):
        br.save_bridge(model, tmp_path, merged=merged)
    br.save_bridge(model, tmp_path / "blocks")
    br.save_bridge(model, tmp_path / "blocks")  # the same kind is replaced
    with pytest.raises(ValueError, match=r"bridge\.safetensors"):
        br.save_bridge(model, tmp_path / "blocks", merged=True)


def test_a_plain_load_drops_the_bridge_which_is_why_the_card_warns(base_directory, tmp_path):
    model = attach_to(base_directory)
    br.save_bridge(model, tmp_path / "full", merged=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with br.disable_bridge(model), torch.no_grad():
        assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_a_wrong_base_is_refused(base_directory, tmp_path, family):
    br.save_bridge(attach_to(base_directory), tmp_path / "bridge")
    with pytest.raises(ValueError, match="trained on another base"):
        br.load_bridge(tmp_path / "bridge", make_base(family, seed=1))


def test_a_fingerprint_does_not_depend_on_the_load_dtype(base_directory):
    found = {find_state(attach_to(base_directory, dtype)).fingerprint for dtype in (torch.float32, torch.bfloat16)}
    assert len(found) == 1
    assert fingerprint(make_base("llama")) != fingerprint(make_base("llama", seed=1))


def test_a_base_that_cannot_take_blocks_stays_as_it_was(tmp_path):
    model = make_bridged("llama")
    br.save_bridge(model, tmp_path / "bridge")
    with pytest.raises(UserError, match="has a Bridge already"):
        br.load_bridge(tmp_path / "bridge", model)
    assert model.config.bridge is not None
    with pytest.raises(UserError, match="wrapped by PEFT"):
        br.load_bridge(tmp_path / "bridge", get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"])))


def test_a_base_over_several_devices_is_told_from_a_wrong_one(tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    br.save_bridge(attach_to(tmp_path / "base"), tmp_path / "bridge")
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(UserError, match="load the model on one device"):
        br.load_bridge(tmp_path / "bridge", device_map=places, offload_folder=tmp_path / "offload")


def test_blocks_come_from_the_file_that_the_base_comes_from(tmp_path):
    model = make_bridged("llama")
    br.save_bridge(switch_on(model, seed=2), tmp_path, merged=True)
    shutil.copyfile(tmp_path / "model.safetensors", tmp_path / "model_of_before.safetensors")
    br.save_bridge(switch_on(model), tmp_path, merged=True)
    assert torch.equal(logits(br.load_bridge(tmp_path)), logits(model))


def test_a_base_in_float16_is_told_from_a_wrong_one(base_directory, tmp_path):
    model = attach_to(base_directory)
    br.save_bridge(model, tmp_path / "bridge")
    with pytest.raises(ValueError, match=r"float16 rounds weights away, and call \.half\(\) then\.$"):
        br.load_bridge(tmp_path / "bridge", dtype=torch.float16)
    halved = br.load_bridge(tmp_path / "bridge", dtype=torch.float32).half()
    assert torch.allclose(logits(halved).float(), logits(model), atol=0.02)


def test_a_bridge_only_save_of_a_trained_base_is_refused(bridged, tmp_path):
    with torch.no_grad():
        for parameter in bridged.parameters():
            parameter.add_(0.1)
    with pytest.raises(ValueError, match="merged=True"):
        br.save_bridge(bridged, tmp_path / "bridge")


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "shape", "config"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    br.save_bridge(attach_to(str(tmp_path / "base")), tmp_path / "bridge")
    weights, config = tmp_path / "bridge" / "bridge.safetensors", tmp_path / "bridge" / "bridge_config.json"
    tensors = load_file(weights)
    name = next(iter(tensors))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing tensor":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    elif damage == "shape":
        save_file({**tensors, name: torch.zeros(3)}, weights)
    else:
        config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match=r"damaged|lacks|another shape"):
        br.load_bridge(tmp_path / "bridge")


def test_a_directory_without_a_bridge_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no Bridge"):
        br.load_bridge(tmp_path)


def test_the_config_file_says_what_is_inside(tmp_path):
    br.save_bridge(make_bridged("llama"), tmp_path)
    content = json.loads((tmp_path / "bridge_config.json").read_text())
    assert content["bridge"] == {"kind": "bridge", "num_heads": 2, "head_dim": 8, "layers": "all", "relative": False}
    assert len(content["base_fingerprint"]) == 32


def test_a_bridge_that_a_plain_save_and_load_lost_is_noticed(bridged, tmp_path):
    bridged.save_pretrained(tmp_path)  # not save_bridge
    with pytest.raises(ValueError, match="its blocks would be dropped"):
        load_model(ModelSection(str(tmp_path)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names a Bridge that is not there"):
        br.generate_groups(plain, [[5]], 4, br.SamplingParams(4))


def test_a_fingerprint_sees_every_layer_and_every_shape():
    base = make_base("llama", num_hidden_layers=6)
    before = fingerprint(base)
    with torch.no_grad():
        for parameter in base.model.layers[1].parameters():
            parameter.add_(1.0)
    assert fingerprint(base) != before
    with torch.device("meta"):
        assert fingerprint(make_base("llama")) != fingerprint(make_base("llama", intermediate_size=128))


def test_a_model_inside_peft_is_not_saved_as_a_bridge(bridged, tmp_path):
    wrapped = get_peft_model(bridged, LoraConfig(target_modules="all-linear", modules_to_save=["bridge"]))
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        br.save_bridge(wrapped, tmp_path)


@pytest.mark.parametrize("empty", [True, False])
def test_shards_that_are_not_there_are_named(tmp_path, empty):
    (tmp_path / "latest").write_text("global_step4")
    if empty:
        (tmp_path / "global_step4").mkdir()
    with pytest.raises(UserError, match="its shards cannot be read"):
        read_zero(tmp_path, trained_only=False)
