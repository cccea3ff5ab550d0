"""The block against a slow loop, and its control."""

import json
import math

import numpy as np
import pytest
import torch

from bridge_rl.block import BridgeBlock, BridgeConfig, MatchedMLP
from bridge_rl.group import sibling_bias

CONFIG = BridgeConfig(num_heads=2, head_dim=4)
RELATIVE = BridgeConfig(num_heads=2, head_dim=4, relative=True)


def switched_on(block):
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def slow_bridge(block: BridgeBlock, x: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Row by row, column by column, head by head, as the paper writes it."""
    num_groups, width, num_tokens = alive.shape
    out = x.clone()
    w_q, w_k, w_v = block.qkv_proj.weight.chunk(3)
    y = x / (x.pow(2).mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
    for g in range(num_groups):
        for t in range(num_tokens):
            seen = [g * width + n for n in range(width) if alive[g, n, t]]
            for row in seen:
                heads = []
                for h in range(block.num_heads):
                    part = slice(h * block.head_dim, (h + 1) * block.head_dim)
                    query = w_q[part] @ y[row, t]
                    keys = torch.stack([w_k[part] @ y[other, t] for other in seen])
                    values = torch.stack([w_v[part] @ y[other, t] for other in seen])
                    attended = torch.softmax(keys @ query / math.sqrt(block.head_dim), 0) @ values
                    heads.append(attended - w_v[part] @ y[row, t] if block.relative else attended)
                out[row, t] = x[row, t] + block.o_proj.weight @ torch.cat(heads)
    return out


@pytest.mark.parametrize("config", [CONFIG, RELATIVE])
def test_block_equals_the_slow_loop_where_rows_are_alive(config):
    block = switched_on(BridgeBlock(6, config))
    x = torch.randn(6, 5, 6)
    alive = torch.rand(2, 3, 5) > 0.3
    expected = slow_bridge(block, x, alive)
    found = block(x, alive)
    rows = alive.flatten(0, 1)
    torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("config", [CONFIG, RELATIVE])
def test_one_step_over_ragged_groups_equals_the_slow_loop(config):
    """Groups of 3, 1 and 2 rows, of which one is not alive, in mixed order."""
    block = switched_on(BridgeBlock(6, config))
    x = torch.randn(6, 1, 6)
    groups, alive = torch.tensor([0, 2, 0, 1, 2, 0]), torch.tensor([True, True, True, True, True, False])
    found = block(x, sibling_bias(groups, alive))
    for group in range(3):
        rows = torch.nonzero((groups == group) & alive)[:, 0]
        expected = slow_bridge(block, x[rows], torch.ones(1, len(rows), 1, dtype=torch.bool))
        torch.testing.assert_close(found[rows], expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


def test_a_new_block_is_the_identity_to_the_last_bit():
    x = torch.randn(4, 3, 6)
    assert torch.equal(BridgeBlock(6, CONFIG)(x, torch.ones(1, 4, 3, dtype=torch.bool)), x)
    assert torch.equal(MatchedMLP(6, CONFIG)(x), x)


def test_a_relative_block_leaves_a_row_alone_as_it_is_to_the_last_bit():
    block = switched_on(BridgeBlock(6, RELATIVE))
    x = torch.randn(3, 2, 6)
    assert torch.equal(block(x), x)
    assert torch.equal(block(x, torch.ones(3, 1, 2, dtype=torch.bool)), x)
    one_step = x[:, :1]
    bias = sibling_bias(torch.tensor([0, 1, 0]), torch.tensor([True, True, False]))  # the third has ended
    assert torch.equal(block(one_step, bias)[:2], one_step[:2])
    alike = x[:1].expand(3, 2, 6)
    torch.testing.assert_close(block(alike, torch.ones(1, 3, 2, dtype=torch.bool)), alike, atol=1e-5, rtol=0)


def test_a_trained_block_at_width_1_is_not_the_identity():
    block = switched_on(BridgeBlock(6, CONFIG))
    x = torch.randn(2, 3, 6)
    w_v = block.qkv_proj.weight.chunk(3)[2]
    expected = x + block.o_proj(block.norm(x) @ w_v.T)
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("hidden_size", [32, 1536])
def test_the_control_has_exactly_as_many_parameters(hidden_size):
    config = BridgeConfig(num_heads=6, head_dim=48)
    bridge, control = (
        sum(p.numel() for p in cls(hidden_size, config).parameters()) for cls in (BridgeBlock, MatchedMLP)
    )
    assert bridge == control == 4 * hidden_size * 288 + hidden_size


def test_the_control_is_the_mlp_that_it_says():
    control = switched_on(MatchedMLP(6, CONFIG))
    x = torch.randn(4, 3, 6)
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * control.norm.weight
    hidden = y @ control.up_proj.weight.T
    expected = x + (hidden * hidden.sigmoid()) @ control.down_proj.weight.T
    torch.testing.assert_close(control(x), expected, atol=1e-5, rtol=1e-5)


def test_a_new_blocks_projections_of_a_normed_input_have_unit_variance():
    """Of 512 x 256 draws or more: to 2 %."""
    torch.manual_seed(0)
    x = torch.nn.functional.rms_norm(torch.randn(512, 64), (64,))
    config = BridgeConfig(num_heads=16, head_dim=32)
    for block in (BridgeBlock(64, config), MatchedMLP(64, config)):
        projection = block.qkv_proj if isinstance(block, BridgeBlock) else block.up_proj
        assert projection(x).std().item() == pytest.approx(1.0, rel=0.02)


def test_siblings_do_not_reach_the_control():
    control = switched_on(MatchedMLP(6, CONFIG))
    x = torch.randn(4, 3, 6)
    changed = x.clone()
    changed[1] += 1
    alive = torch.ones(1, 4, 3, dtype=torch.bool)
    assert torch.equal(control(x, alive)[[0, 2, 3]], control(changed, alive)[[0, 2, 3]])


def test_a_float32_block_on_a_bfloat16_stream_keeps_the_stream_dtype():
    block = switched_on(BridgeBlock(6, CONFIG))
    out = block(torch.randn(4, 3, 6, dtype=torch.bfloat16), torch.ones(2, 2, 3, dtype=torch.bool))
    assert out.dtype == torch.bfloat16
    assert block.qkv_proj.weight.dtype == torch.float32
    block.to(torch.bfloat16)
    weights = block.attention_weights(torch.randn(4, 3, 6), torch.ones(2, 2, 3, dtype=torch.bool))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 2, 2), atol=1e-6, rtol=0)  # in fp32 here too


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "mlp"),
        ("num_heads", 0),
        ("num_heads", 2.5),
        ("num_heads", True),
        ("head_dim", "64"),
        ("head_dim", None),
        ("relative", "yes"),
        ("relative", 1),
        ("layers", []),
        ("layers", "last"),
        ("layers", 1),
        ("layers", [0.5]),
        ("layers", np.array([0, 1])),
    ],
)
def test_a_config_that_means_nothing_is_refused(key, value):
    with pytest.raises(ValueError, match=f"bridge.{key}"):
        BridgeConfig(**{key: value})


def test_a_control_without_siblings_has_no_values_relative_to_theirs():
    with pytest.raises(ValueError, match=r"bridge\.relative"):
        BridgeConfig(kind="pmatch", relative=True)


def test_a_config_equals_the_one_that_comes_back_from_a_file():
    config = BridgeConfig(num_heads=np.int64(2), head_dim=np.int32(8), layers=(0, 2))
    assert BridgeConfig(**json.loads(json.dumps(config.to_dict()))) == config
