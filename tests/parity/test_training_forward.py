"""Checkpointing, attention implementation and LoRA change neither the loss nor the Bridge's gradients."""

import pytest
import torch
from conftest import CORE_FAMILIES, make_base, switch_on
from peft import LoraConfig, get_peft_model

import bridge_rl as br
from bridge_rl.surgery import find_state, freeze_base

IDS = torch.randint(3, 50, (8, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
MASK[4:, :3] = 0


def loss_and_gradients(family, attention="sdpa", reentrant=None, lora=False):
    """Loss of groups of 4, and the gradient of every Bridge parameter, by its plain name."""
    model = make_base(family, attn_implementation=attention)
    switch_on(br.attach_bridge(model, br.BridgeConfig(num_heads=2, head_dim=8)))
    find_state(model).width = 4
    freeze_base(model)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["bridge"]))
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[4:, 3] = -100  # a first token, predicted from padding
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False).loss
    loss.backward()
    plain = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): parameter.grad
        for name, parameter in br.bridge_parameters(model)
    }
    return loss.item(), plain


@pytest.mark.parametrize("family", CORE_FAMILIES)
@pytest.mark.parametrize(
    "variant",
    [
        {"reentrant": False},
        {"reentrant": True},
        {"attention": "eager"},
        {"lora": True},
        {"lora": True, "reentrant": False, "attention": "eager"},
    ],
    ids=str,
)
def test_variants_have_the_same_loss_and_bridge_gradients(family, variant):
    loss, gradients = loss_and_gradients(family)
    found_loss, found = loss_and_gradients(family, **variant)
    assert abs(found_loss - loss) <= 1e-5
    assert found.keys() == gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
