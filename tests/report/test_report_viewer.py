import random
from collections import Counter

import pytest
from report.made import EOS, WORDS, make_group, make_results, make_samples

from bridge_rl.errors import UserError
from bridge_rl.report.viewer import choose_groups, is_mixed, read_pieces, read_problems, viewer_data

PIECES = {str(number): piece for number, piece in enumerate(WORDS)}
PROBLEMS = {number: {"text": "t", "answer": "a", "prompt": "p"} for number in range(20)}


def settings(groups):
    return Counter((group.condition, group.width) for group in groups)


def test_at_most_so_many_of_each_condition_and_width():
    groups = make_samples(make_results((1, 2, 8)))
    sampled, chosen = settings(groups), settings(choose_groups(groups, 30))
    assert chosen == {key: min(30, count) for key, count in sampled.items()}
    assert sampled["model", 8] == 20  # fewer than 30: all of them


def test_mixed_groups_are_preferred_and_others_are_there():
    groups = [group for group in make_samples(make_results((2,)), problems=100) if group.condition == "model"]
    chosen = choose_groups(groups, 40)
    assert sum(map(is_mixed, chosen)) == 30
    assert len(chosen) == 40
    all_mixed = [group for group in groups if is_mixed(group)]
    assert len(choose_groups(all_mixed, 40)) == 40


def test_chosen_groups_are_spread_over_the_problems_in_order():
    rng = random.Random(0)
    groups = [make_group(rng, "model", 1, problem, 0, 10) for problem in range(100)]
    problems = [group.problem for group in choose_groups(groups, 10)]
    assert problems == sorted(problems)
    assert [problem // 20 for problem in problems] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_long_completions_leave_room_for_fewer_groups():
    rng = random.Random(0)
    groups = [make_group(rng, "model", width, problem, 0, 500) for width in (1, 16) for problem in range(20)]
    chosen = choose_groups(groups, most_tokens=60_000)
    assert sum(len(row) for group in chosen for row in group.tokens) < 80_000
    assert settings(chosen)["model", 1] == 20
    assert 1 <= settings(chosen)["model", 16] < 10
    assert settings(choose_groups(groups, most_tokens=10)) == {("model", 1): 1, ("model", 16): 1}


def test_data_give_back_every_completion():
    groups = make_samples(make_results((1, 4)))
    data = viewer_data(groups, PROBLEMS, PIECES, start_width=4)
    assert data["startWidth"] == 4
    assert viewer_data(groups, PROBLEMS, PIECES, start_width=3)["startWidth"] == 4
    for shown, group in zip(data["groups"], groups, strict=True):
        assert shown["mixed"] == is_mixed(group)
        for row, completion, tokens in zip(shown["rows"], group.completions, group.tokens, strict=True):
            pieces = [data["pieces"][token] for token in row["tokens"]]
            assert "".join(piece for piece in pieces if piece != WORDS[EOS]) == completion
            assert len(pieces) == len(tokens)


def test_what_is_missing_is_named(tmp_path):
    groups = make_samples(make_results((1,)), problems=3)
    with pytest.raises(UserError, match=r"pieces.json has no text for token 1 "):
        viewer_data(groups, PROBLEMS, {key: text for key, text in PIECES.items() if key != "1"})
    with pytest.raises(UserError, match=r"problems.jsonl has no problem 2 "):
        viewer_data(groups, {0: PROBLEMS[0], 1: PROBLEMS[1]}, PIECES)
    with pytest.raises(UserError, match=r"problems.jsonl cannot be read \(FileNotFoundError\)"):
        read_problems(tmp_path / "problems.jsonl")
    (tmp_path / "pieces.json").write_text("{")
    with pytest.raises(UserError, match=r"pieces.json cannot be read \(JSONDecodeError\)"):
        read_pieces(tmp_path / "pieces.json")
