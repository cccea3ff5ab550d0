"""The group contract."""

import pytest
import torch

from bridge_rl.group import (
    alive_from_mask,
    groups_of,
    merge_rows,
    pad_left,
    pad_right,
    prompts_of_groups,
    repeat_for_rows,
    split_rows,
)


def test_splitting_and_merging_are_inverse():
    x = torch.arange(24).view(6, 4)
    assert split_rows(x, 3).shape == (2, 3, 4)
    assert torch.equal(merge_rows(split_rows(x, 3)), x)


def test_rows_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="6 rows are not whole groups of width 4"):
        split_rows(torch.zeros(6, 1), 4)
    with pytest.raises(ValueError, match="3 rows are not whole groups of width 2"):
        groups_of([1, 2, 3], 2)


def test_a_layout_is_the_mask_by_groups():
    mask = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1], [1, 1, 0]])
    expected = [[[False, True, True], [False, True, False]], [[True, True, True], [True, True, False]]]
    assert alive_from_mask(mask, 2).tolist() == expected


def test_a_group_that_mixes_prompts_is_refused():
    assert prompts_of_groups(["a", "a", "b", "b"], 2) == ["a", "b"]
    with pytest.raises(ValueError, match="group 1 do not share one prompt"):
        prompts_of_groups(["a", "a", "b", "a"], 2)


def test_one_item_a_group_becomes_one_a_row():
    assert repeat_for_rows(["a", "b"], 2) == ["a", "a", "b", "b"]


def test_padding_goes_where_it_says():
    ids, mask = pad_left([[5], [6, 7]], 0, "cpu")
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert mask.tolist() == [[0, 1], [1, 1]]
    ids, mask = pad_right([[5], [6, 7]], 0, "cpu")
    assert ids.tolist() == [[5, 0], [6, 7]]
    assert mask.tolist() == [[1, 0], [1, 1]]
