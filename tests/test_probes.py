"""What blocks are seen to do, against hand-written attention and planted blocks."""

import math

import pytest
import torch
from conftest import ALL_FAMILIES, make_base, make_bridged

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.evaluation.probes import probe_blocks, relative_steps
from bridge_rl.meters import find_blocks
from bridge_rl.surgery import find_state

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]
# Groups of 3: rows of 4, 2, 3 and of 1, 5, 5 tokens.
COMPLETIONS = [
    [[20, 21, 22, 2], [23, 2], [24, 25, 2]],
    [[2], [30, 31, 32, 33, 34], [35, 36, 37, 38, 39]],
]
# The tokens with another row alive at their column, as (row, token): row 0 of group 0 is alone at its fourth.
HEARING = [
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)],
    [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)],
]


def hooks_of(model):
    kinds = [(module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    return [hook for of_module in kinds for hooks in of_module for hook in hooks.values()]


def hidden_states(model, prompt, completions):
    """What goes into each block, by layer [N, T, D] at the completion's columns, from a padded forward of one group."""
    found = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: found.__setitem__(layer, args[0]))
        for layer, block in find_blocks(model)
    ]
    longest = max(map(len, completions))
    ids = torch.tensor([prompt + row + [0] * (longest - len(row)) for row in completions])
    mask = torch.tensor([[1] * (len(prompt) + len(row)) + [0] * (longest - len(row)) for row in completions])
    state = find_state(model)
    state.width = len(completions)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    state.width = 1
    for handle in handles:
        handle.remove()
    return {layer: x[:, len(prompt) :] for layer, x in found.items()}


def sibling_share_by_hand(block, x, completions, row, token, head):
    """As the paper writes it, one token of one row: the weights on the other rows that still speak."""
    y = x / (x.pow(2).mean(-1, keepdim=True) + block.norm.eps).sqrt() * block.norm.weight
    w_q, w_k, _ = block.qkv_proj.weight.chunk(3)
    part = slice(head * block.head_dim, (head + 1) * block.head_dim)
    seen = [n for n, said in enumerate(completions) if token < len(said)]
    query = w_q[part] @ y[row, token]
    scores = [(w_k[part] @ y[n, token]) @ query / math.sqrt(block.head_dim) for n in seen]
    weights = torch.stack(scores).softmax(0)
    return sum(weight.item() for n, weight in zip(seen, weights, strict=True) if n != row)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_shares_equal_hand_written_attention(family, max_tokens):
    model = make_bridged(family)
    found = probe_blocks(model, PROMPTS, COMPLETIONS, max_tokens=max_tokens)
    states = [hidden_states(model, prompt, rows) for prompt, rows in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert found.layers == [0, 1, 2]
    assert (found.width, found.groups) == (3, 2)
    for layer, block in find_blocks(model):
        for head in range(2):
            by_hand = [
                sibling_share_by_hand(block, states[g][layer], COMPLETIONS[g], row, token, head)
                for g in range(2)
                for row, token in HEARING[g]
            ]
            assert len(by_hand) == 19
            assert found.sibling_share[layer][head] == pytest.approx(sum(by_hand) / 19, abs=1e-5)


def test_norm_ratio_is_the_mean_over_completion_tokens(family):
    model = make_bridged(family)
    found = probe_blocks(model, PROMPTS[:1], COMPLETIONS[:1])
    states = hidden_states(model, PROMPTS[0], COMPLETIONS[0])
    alive = torch.tensor([[[True] * 4, [True, True, False, False], [True, True, True, False]]])
    for layer, block in find_blocks(model):
        x = states[layer]
        with torch.no_grad():
            ratios = (block(x, alive) - x).norm(dim=-1) / x.norm(dim=-1)
        assert found.norm_ratio[layer] == pytest.approx(ratios[alive[0]].mean().item(), rel=1e-4)


def test_a_block_whose_output_is_zero_has_ratio_0():
    model = make_bridged("llama")
    blocks = dict(find_blocks(model))
    torch.nn.init.zeros_(blocks[1].o_proj.weight)
    ratios = probe_blocks(model, PROMPTS, COMPLETIONS).norm_ratio
    assert ratios[1] == 0
    assert min(ratios[0], ratios[2]) > 0.01


def test_a_block_that_adds_its_normed_input_has_the_ratio_of_their_lengths():
    """W_V and W_O the identity, and three equal rows: it adds x / rms(x), of length |x| / rms(x)."""
    model = br.attach_bridge(make_base("llama"), br.BridgeConfig(num_heads=4, head_dim=8, layers=[1]))
    block = dict(find_blocks(model))[1]
    with torch.no_grad():
        block.qkv_proj.weight.copy_(torch.cat([torch.zeros(64, 32), torch.eye(32)]))
        block.o_proj.weight.copy_(torch.eye(32))
    rows = [[20, 21, 22]] * 3
    x = hidden_states(model, PROMPTS[0], rows)[1]
    expected = (x.pow(2).mean(-1) + 1e-6).rsqrt().mean().item()
    found = probe_blocks(model, PROMPTS[:1], [rows])
    assert found.layers == [1]
    assert found.norm_ratio == [pytest.approx(expected, rel=1e-5)]


def test_equal_attention_gives_every_alive_row_the_same_share():
    """Queries of 0: (n - 1) / n at columns with n rows alive; here 8 tokens of 3, 2, then 1 rows, and 11 of 3 and 2."""
    model = make_bridged("llama")
    for _, block in find_blocks(model):
        torch.nn.init.zeros_(block.qkv_proj.weight[: block.inner_width])
    one = probe_blocks(model, PROMPTS[:1], COMPLETIONS[:1])
    # Columns 0 and 1 have 3 rows, column 2 has 2, column 3 has 1, which has no siblings and does not count.
    assert one.sibling_share == [[pytest.approx((6 * 2 / 3 + 2 * 1 / 2) / 8)] * 2] * 3
    both = probe_blocks(model, PROMPTS, COMPLETIONS)
    # Group 1: column 0 has 3 rows, columns 1 to 4 have 2.
    assert both.sibling_share == [[pytest.approx((6 * 2 / 3 + 2 / 2 + 3 * 2 / 3 + 8 / 2) / 19)] * 2] * 3


def test_shares_by_step_follow_each_rows_own_length():
    """Queries of 0, two rows of 4 and 2 tokens. Halves: row 0 hears in its first only, row 1 in both; always 1/2.

    A third row of 4 makes it 2/3 while row 1 speaks, then 1/2.
    """
    model = make_bridged("llama")
    for _, block in find_blocks(model):
        torch.nn.init.zeros_(block.qkv_proj.weight[: block.inner_width])
    rows = [[20, 21, 22, 23], [24, 25]]
    assert probe_blocks(model, PROMPTS[:1], [rows], bins=2).share_by_step == [[pytest.approx(1 / 2)] * 2] * 3
    rows = [*rows, [30, 31, 32, 33]]
    # First half: two tokens of rows 0 and 2 and one of row 1, all 2/3. Second: one of row 1 at 2/3, two each at 1/2.
    expected = [2 / 3, (2 / 3 + 4 * 1 / 2) / 5]
    assert probe_blocks(model, PROMPTS[:1], [rows], bins=2).share_by_step == [pytest.approx(expected)] * 3


def test_rows_that_attend_to_themselves_have_share_0():
    """One head as wide as the model, queries and keys ten times the normed input: all are of one length, so that each
    row is most like itself, and by far."""
    model = br.attach_bridge(make_base("llama"), br.BridgeConfig(num_heads=1, head_dim=32))
    for _, block in find_blocks(model):
        with torch.no_grad():
            block.qkv_proj.weight.copy_(torch.cat([10 * torch.eye(32), 10 * torch.eye(32), torch.eye(32)]))
    rows = [[20, 21], [30, 31], [40, 41]]
    found = probe_blocks(model, PROMPTS[:1], [rows], bins=3)
    assert found.sibling_share == [[pytest.approx(0, abs=1e-6)]] * 3
    assert found.share_by_step == [[pytest.approx(0, abs=1e-6)] * 3] * 3


def test_a_row_alone_has_share_0():
    model = make_bridged("llama")
    found = probe_blocks(model, PROMPTS, [[[20, 21, 2]], [[30, 2]]], bins=4)
    assert found.width == 1
    assert found.sibling_share == [[0.0, 0.0]] * 3
    assert found.share_by_step == [[0.0] * 4] * 3
    assert min(found.norm_ratio) > 0.01


def test_matched_mlp_has_ratios_and_no_attention():
    model = make_bridged("llama", kind="pmatch")
    found = probe_blocks(model, PROMPTS, COMPLETIONS)
    assert found.sibling_share == []
    assert found.share_by_step == []
    assert len(found.norm_ratio) == 3
    assert min(found.norm_ratio) > 0.01


def test_parts_of_a_completion_by_hand():
    """Two tokens in four parts: each fills two; four tokens in two parts; five in two: the middle one is in both."""
    assert relative_steps(torch.tensor([2]), 2, 4)[0].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert relative_steps(torch.tensor([4]), 4, 2)[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    torch.testing.assert_close(
        relative_steps(torch.tensor([5]), 5, 2)[0],
        torch.tensor([[1.0, 0], [1, 0], [0.5, 0.5], [0, 1], [0, 1]]),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bfloat16_agrees_within_its_rounding(family):
    """8 bits of mantissa: each of three layers moves a share or a ratio by a few times 2^-8."""
    model = make_bridged(family)
    exact = probe_blocks(model, PROMPTS, COMPLETIONS)
    rounded = probe_blocks(model.to(torch.bfloat16), PROMPTS, COMPLETIONS)
    assert rounded.norm_ratio == pytest.approx(exact.norm_ratio, rel=0.05)
    for ours, theirs in zip(rounded.sibling_share, exact.sibling_share, strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


def test_the_model_is_left_as_it_was(monkeypatch):
    model = make_bridged("llama", attention_dropout=0.5)
    expected = probe_blocks(model, PROMPTS, COMPLETIONS)
    model.train()
    state = find_state(model)
    state.width, state.enabled = 2, False
    before = hooks_of(model)
    found = probe_blocks(model, PROMPTS, COMPLETIONS)
    assert found == expected, "there was dropout"
    assert min(found.norm_ratio) > 0.01, "the blocks were not switched on"
    assert (model.training, state.width, state.enabled, hooks_of(model)) == (True, 2, False, before)

    def fail(*args):
        assert len(hooks_of(model)) > len(before), "there was no hook to be left behind"
        raise RuntimeError("as if out of memory")

    monkeypatch.setattr(dict(find_blocks(model))[2].norm, "forward", fail)
    with pytest.raises(RuntimeError, match="as if out of memory"):
        probe_blocks(model, PROMPTS, COMPLETIONS)
    assert (model.training, state.width, state.enabled, hooks_of(model)) == (True, 2, False, before)


def test_a_model_without_a_bridge_is_refused_in_words():
    with pytest.raises(UserError, match="no Bridge"):
        probe_blocks(make_base("llama"), PROMPTS, COMPLETIONS)


def test_groups_of_several_widths_are_refused():
    with pytest.raises(ValueError, match="all of one width"):
        probe_blocks(make_bridged("llama"), PROMPTS, [COMPLETIONS[0], COMPLETIONS[1][:2]])
