"""Cutting and trimming a micro-batch, and packing groups, on hand-made lengths."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge_rl.config import UpdateSection
from bridge_rl.group import rows_of_groups
from bridge_rl.packed import pack_groups
from bridge_rl.packed_forward import packed_attention
from bridge_rl.report import names
from bridge_rl.update import cut_groups, join_metrics, rows_of_parts, share_of_loss, sizes_of_groups, take_rows, trim


def right(lengths, columns=None):
    return (torch.arange(columns or max(lengths)) < torch.tensor(lengths)[:, None]).long()


PROMPTS = right([3, 3, 1, 1, 2, 2]).flip(1)  # padded on the left
LENGTHS = [2, 1, 4, 1, 3, 3]


def parts_of_ranks(completions, budget, packed):
    """By rank: the groups of each part, when each has the prompts PROMPTS and its own completions."""
    section, by = UpdateSection(token_budget=budget, share_prompt=packed), 2 if packed else 1
    sizes = [sizes_of_groups(PROMPTS, rows, 2) for rows in completions]
    gathered = torch.stack([rank[rank[:, by].argsort(descending=True, stable=True)] for rank in sizes])
    accelerator = SimpleNamespace(gather=lambda mine: gathered)
    cut = [rows_of_parts(PROMPTS, rows, 2, section, accelerator) for rows in completions]
    return [[(part[::2] // 2).tolist() for part in parts] for parts in cut]


def test_groups_are_sorted_by_length_and_cut_at_the_budget():
    # Tokens packed: 3+3, 1+5, 2+6; padded: 2*(3+2), 2*(1+4), 2*(2+3).
    completions = [right(LENGTHS)]
    assert parts_of_ranks(completions, None, packed=True) == [[[0, 1, 2]]]
    assert parts_of_ranks(completions, 14, packed=True) == [[[2, 1], [0]]]
    assert parts_of_ranks(completions, 13, packed=True) == [[[2], [1, 0]]]
    assert parts_of_ranks(completions, 1, packed=True) == [[[2], [1], [0]]]
    assert parts_of_ranks(completions, 24, packed=False) == [[[1, 2], [0]]]
    assert parts_of_ranks(completions, 23, packed=False) == [[[1], [2], [0]]]


def test_parts_have_as_many_groups_on_every_rank():
    """The second rank's are 3+2, 1+2, 2+8: alone it would cut them into [2], [0, 1] at 13, and at 14 too."""
    completions = [right(LENGTHS), right([1, 1, 1, 1, 4, 4])]
    assert parts_of_ranks(completions, 13, packed=True) == [[[2], [1, 0]], [[2], [0, 1]]]
    assert parts_of_ranks(completions, 14, packed=True) == [[[2], [1, 0]], [[2], [0, 1]]]
    assert parts_of_ranks(completions, 15, packed=True) == [[[2, 1], [0]], [[2, 0], [1]]]


GROUP = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(9, 18)).map(list)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 80), st.booleans(), st.data())
def test_any_cut_has_every_group_once_and_keeps_the_budget_on_every_rank(groups, ranks, budget, packed, data):
    sizes = data.draw(st.lists(st.lists(GROUP, min_size=groups, max_size=groups), min_size=ranks, max_size=ranks))
    counts = cut_groups(sizes, 2, budget, packed)
    assert sum(counts) == groups
    assert all(counts)
    for rank in sizes:
        start = 0
        for count in counts:
            prompts, longest, total = zip(*rank[start : start + count], strict=True)
            tokens = sum(prompts) + sum(total) if packed else 2 * count * (max(prompts) + max(longest))
            assert tokens <= budget or count == 1
            start += count


def test_a_part_is_trimmed_to_its_own_longest_rows():
    ids = torch.arange(6 * 4).view(6, 4)
    batch = {
        "prompt_ids": torch.arange(18).view(6, 3),
        "prompt_mask": PROMPTS,
        "completion_ids": ids,
        "completion_mask": right(LENGTHS),
        "advantages": torch.arange(6.0),
        "old_per_token_logps": -ids.float(),
        "num_items_in_batch": torch.tensor(14),
    }
    part = trim(take_rows(batch, rows_of_groups(torch.tensor([2]), 2)))
    assert part["prompt_ids"].tolist() == [[13, 14], [16, 17]]
    assert part["completion_ids"].tolist() == [[16, 17, 18], [20, 21, 22]]
    assert part["old_per_token_logps"].shape == (2, 3)
    assert part["advantages"].tolist() == [4, 5]
    assert part["num_items_in_batch"] == 14


def test_a_packed_sequence_by_hand():
    prompt_ids = torch.tensor([[0, 8, 9], [0, 8, 9], [5, 6, 7], [5, 6, 7]])
    completions = torch.tensor([[11, 12], [13, 0], [14, 0], [15, 16]])
    packed = pack_groups(prompt_ids, (prompt_ids > 0).long(), completions, (completions > 0).long(), 2)
    assert packed.ids.tolist() == [[8, 9, 5, 6, 7, 11, 12, 13, 14, 15, 16]]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 2, 3, 2, 3, 3, 4]]
    assert packed.labels.tolist() == [[11, 12, 13, 14, 15, 16]]
    assert packed.scored.tolist() == [1, 5, 1, 4, 4, 9]
    assert packed.counts.flatten().tolist() == [2] * 5 + [1] * 6
    assert packed.prompt_of_row == [0, 0, 1, 1]
    assert packed.tokens.tolist() == [[5, 6, 8, 0], [7, 0, 9, 10]]
    assert packed.alive.tolist() == [[[True, True, True, False], [True, False, True, True]]]
    assert packed.places.tolist() == [0, 1, 4, 2, 6, 7]


def test_equal_prompts_of_different_groups_are_one():
    prompts, completions = torch.full((6, 2), 3), torch.full((6, 1), 4)
    packed = pack_groups(prompts, torch.ones_like(prompts), completions, torch.ones_like(completions), 2)
    assert packed.ids.tolist() == [[3, 3] + [4] * 6]
    assert packed.counts.flatten().tolist() == [6, 6] + [1] * 6


def test_an_empty_completion_is_nowhere():
    prompts, completions = torch.full((4, 2), 3), torch.tensor([[4, 5], [0, 0], [6, 0], [0, 0]])
    packed = pack_groups(prompts, torch.ones_like(prompts), completions, (completions > 0).long(), 2)
    assert packed.ids.tolist() == [[3, 3, 4, 5, 6]]
    assert packed.scored.tolist() == [1, 2, 1]
    assert (packed.rows, packed.prompt_of_row) == ([(2, 4), (4, 5)], [0, 0])
    assert packed.counts.flatten().tolist() == [2, 2, 1, 1, 1]
    assert packed.alive[:, 1].any().item() is False


def test_groups_that_were_split_are_refused():
    prompts, completions = torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="do not share one prompt"):
        pack_groups(prompts, torch.ones_like(prompts), completions, completions, 2)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="token_budget is 0"):
        UpdateSection(token_budget=0)


def test_a_model_that_caps_attention_scores_is_refused():
    q = torch.ones(1, 1, 3, 4)
    ids = torch.ones(1, 2, dtype=torch.long)
    packed = pack_groups(ids, ids, ids[:, :1], ids[:, :1], 1)
    assert packed_attention(torch.nn.Module(), q, q, q, None, packed)[0].shape == (1, 3, 1, 4)
    with pytest.raises(ValueError, match="share_prompt=false"):
        packed_attention(torch.nn.Module(), q, q, q, None, packed, softcap=50.0)


def test_dropout_reaches_the_attention():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 3, 4)
    ids = torch.ones(1, 2, dtype=torch.long)
    packed = pack_groups(ids, ids, ids[:, :1], ids[:, :1], 1)
    without, same, dropped = (
        packed_attention(torch.nn.Module(), q, q, q, None, packed, dropout=p)[0] for p in (0, 0, 0.5)
    )
    assert torch.equal(without, same)
    assert not torch.equal(without, dropped)


def masked(*masks):
    return {"completion_mask": torch.ones(2, 3, dtype=torch.long), "tool_mask": torch.tensor(masks)}


def test_a_part_weighs_what_it_has_of_the_tokens_that_count():
    part, whole = masked([1, 0, 0], [0, 0, 0]), masked([1, 1, 1], [1, 0, 0])
    assert share_of_loss("bnpo", part, whole) == 0.25
    nothing = masked([0, 0, 0], [0, 0, 0])
    assert share_of_loss("bnpo", nothing, nothing) == 0


def test_metrics_of_parts_are_joined_over_all_ranks():
    """Parts of 4 and 2 counted tokens here and 0 and 6 there, of 6 and 6 tokens and 2 and 2 rows on either rank."""
    parts = [masked([1, 1, 1], [1, 0, 0]), masked([1, 1, 0], [0, 0, 0])]
    there = torch.tensor([[6.0, 0.0, 2.0], [6.0, 6.0, 2.0]])
    accelerator = SimpleNamespace(device="cpu", reduce=lambda mine, reduction: mine + there)
    nan = float("nan")
    logged = {
        "kl": [9.0, 1.0, 4.0],
        "vespo/phi_seq_mean": [1.0, 4.0],
        names.RECOMPUTE_KL: [1.0, 4.0],
        "clip_ratio/low_min": [nan, 4.0],
        "clip_ratio/high_max": [1.0, nan],
        "entropy_min": [nan, nan],
        "once": [7.0],
    }
    join_metrics(logged, {"kl": 1}, parts, "token", accelerator)
    assert logged == {
        "kl": [9.0, pytest.approx((4 * 1 + 8 * 4) / 12)],
        "vespo/phi_seq_mean": [2.5],
        names.RECOMPUTE_KL: [2.5],
        "clip_ratio/low_min": [4.0],
        "clip_ratio/high_max": [1.0],
        "entropy_min": [pytest.approx(nan, nan_ok=True)],
        "once": [7.0],
    }
