"""What must hold of a model with a Bridge, in every family."""

import copy

import pytest
import torch
from conftest import ALL_FAMILIES, CORE_FAMILIES, make_base, make_bridged, switch_on
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.surgery import find_state, group_width


def ids(rows: int, columns: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, input_ids, width, mask=None):
    with group_width(model, width):
        return model(input_ids, attention_mask=mask).logits


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("kind", ["bridge", "pmatch"])
def test_zero_start_leaves_logits_unchanged_to_the_last_bit(family, kind):
    model = make_base(family)
    with torch.no_grad():
        expected = model(ids(8)).logits
    br.attach_bridge(model, br.BridgeConfig(kind=kind, num_heads=2, head_dim=8))
    for width in (1, 2, 4, 8):
        assert torch.equal(logits(model, ids(8), width), expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_disable_bridge_is_the_base_to_the_last_bit(family):
    base = make_base(family)
    with torch.no_grad():
        expected = base(ids(4)).logits
    model = make_bridged(family)
    assert not torch.equal(logits(model, ids(4), 4), expected)
    with br.disable_bridge(model):
        assert torch.equal(logits(model, ids(4), 4), expected)
    assert not torch.equal(logits(model, ids(4), 4), expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_permuting_siblings_permutes_outputs(family):
    model, order = make_bridged(family), torch.tensor([2, 0, 3, 1])
    expected = logits(model, ids(4), 4)[order]
    torch.testing.assert_close(logits(model, ids(4)[order], 4), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_groups_never_mix(family):
    model, rows = make_bridged(family), ids(8)
    changed = rows.clone()
    changed[4:] = ids(4, seed=1)
    before, after = logits(model, rows, 4), logits(model, changed, 4)
    torch.testing.assert_close(before[:4], after[:4], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[4:], after[4:], atol=1e-3)


def test_siblings_see_each_other_at_the_same_step_only(bridged):
    rows = ids(4)
    changed = rows.clone()
    changed[1, 6:] = ids(1, 6, seed=1)
    before, after = logits(bridged, rows, 4), logits(bridged, changed, 4)
    torch.testing.assert_close(before[:, :6], after[:, :6], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[0, 6:], after[0, 6:], atol=1e-3)


def test_width_1_equals_a_group_of_one(bridged):
    rows = ids(3)
    alone = torch.cat([logits(bridged, rows[n : n + 1], 1) for n in range(3)])
    torch.testing.assert_close(logits(bridged, rows, 1), alone, atol=1e-5, rtol=1e-5)


def test_equal_rows_stay_equal_and_match_one_row(bridged):
    """Why a prompt may be computed once per group."""
    row = ids(1)
    grouped = logits(bridged, row.repeat(4, 1), 4)
    torch.testing.assert_close(grouped, logits(bridged, row, 1).expand_as(grouped), atol=1e-5, rtol=1e-5)


def test_a_finished_row_is_not_seen_after_its_eos(bridged):
    rows, mask = ids(4), torch.ones(4, 12, dtype=torch.long)
    mask[1, 5:] = 0  # its EOS is at column 4
    changed = rows.clone()
    changed[1, 5:] = ids(1, 7, seed=1)
    others = [0, 2, 3]
    torch.testing.assert_close(
        logits(bridged, rows, 4, mask)[others], logits(bridged, changed, 4, mask)[others], atol=1e-6, rtol=1e-6
    )
    changed = rows.clone()
    changed[1, 4] = (rows[1, 4] + 1) % 50
    before, after = logits(bridged, rows, 4, mask), logits(bridged, changed, 4, mask)
    assert not torch.allclose(before[0, 4], after[0, 4], atol=1e-4)


def test_padding_is_never_seen(bridged):
    rows, mask = ids(4), torch.ones(4, 12, dtype=torch.long)
    mask[:2, :3] = 0  # left padding of a whole group of two
    changed = rows.clone()
    changed[:2, :3] = ids(2, 3, seed=1)
    found = [logits(bridged, x, 2, mask)[:2, 3:] for x in (rows, changed)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_cache_at_width_above_1_without_a_layout_is_refused(bridged):
    with group_width(bridged, 2), torch.no_grad():
        cache = bridged(ids(2), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without `bridge_alive`"):
            bridged(ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_stock_generate_is_exact_at_width_1(family):
    model, prompt = make_bridged(family), ids(2, 5)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    groups = br.generate_groups(
        model,
        prompt.tolist(),
        1,
        br.SamplingParams(8, temperature=0, eos_token_id=model.generation_config.eos_token_id),
    )
    for row, group in zip(tokens[:, 5:].tolist(), groups, strict=True):
        assert row[: len(group.tokens[0])] == group.tokens[0]


def test_siblings_carry_gradients_to_each_other(bridged):
    embeddings = bridged.get_input_embeddings()(ids(4)).detach().requires_grad_()
    with group_width(bridged, 4):
        bridged(inputs_embeds=embeddings).logits[0].sum().backward()
    assert embeddings.grad[1].abs().sum() > 0


def test_width_and_switch_are_afterwards_what_they_were():
    model = make_bridged("llama")
    state = find_state(model)
    state.width, state.enabled = 3, False
    with pytest.raises(RuntimeError, match="in between"):
        with group_width(model, 2), br.disable_bridge(model):
            raise RuntimeError("in between")
    assert (state.width, state.enabled) == (3, False)


def test_a_mask_may_be_given_by_its_position():
    model, mask = make_bridged("llama"), torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = 0
    with group_width(model, 4), torch.no_grad():
        found, expected = model.model(ids(4), mask), model.model(ids(4), attention_mask=mask)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


def test_a_mask_that_does_not_say_which_tokens_there_are_is_refused():
    model = make_bridged("llama")
    with group_width(model, 4), pytest.raises(UserError, match="mask has 4 dimensions: pass a 2-D mask"):
        model(ids(4), attention_mask=torch.ones(4, 1, 12, 12, dtype=torch.bool))


def test_a_deep_copy_has_a_state_of_its_own(bridged):
    twin = copy.deepcopy(bridged)
    with br.disable_bridge(twin):
        assert not torch.equal(logits(twin, ids(4), 4), logits(bridged, ids(4), 4))


def test_a_pickled_model_comes_back_with_its_bridge(bridged, tmp_path):
    torch.save(bridged, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded, ids(4), 4), logits(bridged, ids(4), 4))
    with br.disable_bridge(loaded):
        assert not torch.equal(logits(loaded, ids(4), 4), logits(bridged, ids(4), 4))


def test_a_model_over_several_devices_is_refused(tmp_path):
    make_base("llama").save_pretrained(tmp_path)
    places = {"model": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match="load the model on one device"):
        br.attach_bridge(model, br.BridgeConfig())


def test_blocks_may_sit_in_some_layers_only():
    model = make_base("llama")
    br.attach_bridge(model, br.BridgeConfig(num_heads=2, head_dim=8, layers=[2]))
    assert {name.split(".")[2] for name, _ in br.bridge_parameters(model)} == {"2"}
    before = logits(model, ids(4), 4)
    assert not torch.allclose(logits(switch_on(model), ids(4), 4), before)


def test_a_family_that_is_not_served_is_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model family 'bloom'"):
        br.attach_bridge(model, br.BridgeConfig())


def test_a_second_bridge_is_refused(bridged):
    with pytest.raises(ValueError, match="has a Bridge already"):
        br.attach_bridge(bridged, br.BridgeConfig())


def test_a_bridge_behind_an_adapter_is_refused():
    adapted = get_peft_model(make_base("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="wrapped by PEFT"):
        br.attach_bridge(adapted, br.BridgeConfig())


def test_a_disabled_bridge_asks_for_no_layout(bridged):
    """At any width set, the model with its Bridge off is a stock one, caches and all."""
    prompt = ids(4, 5)
    with group_width(bridged, 4), br.disable_bridge(bridged):
        tokens = bridged.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 4
