"""What is sampled in an evaluation, by whom, and that nothing is lost or doubled when it is cut off."""

import json
from itertools import count

import pytest

from bridge_rl.config import EvaluationSection
from bridge_rl.errors import UserError
from bridge_rl.evaluation.run import Evaluation, Sweep, batches, exchange_units, num_completions, plan_sweeps
from bridge_rl.evaluation.samples import GroupKey, SampledGroup, SampleStore
from bridge_rl.ranks import RankFailed

SECTION = EvaluationSection(widths=[1, 2, 4], samples=8)


def make_group(key: GroupKey, right: bool = True) -> SampledGroup:
    rows = range(key.width)
    return SampledGroup(
        **key._asdict(),
        completions=[f"{key.problem}.{key.group}.{row}" for row in rows],
        tokens=[[5, 2]] * key.width,
        answers=["1"] * key.width,
        correct=[right] * key.width,
        verdicts=["ok"] * key.width,
        finish_reasons=["stop"] * key.width,
        logprobs=[-1.0] * key.width,
        correct_at={1: [False] * key.width, 2: [right] * key.width},
    )


def sample(sweep: Sweep):
    """Every group of every unit, three at a time."""
    yield from batches(([make_group(key)] for unit in sweep.units for key in sweep.keys(unit)), 3)


class State:
    """A rank of several, of which each takes itself for the main one, and so collects."""

    is_main_process = True

    def __init__(self, process_index=0, num_processes=1):
        self.process_index, self.num_processes = process_index, num_processes

    def wait_for_everyone(self):
        pass


def test_every_width_gets_its_groups_and_controls_theirs():
    sweeps = plan_sweeps(SECTION, 6, listening=True, controls=True, seed=0)
    settings = [(sweep.condition, sweep.width) for sweep in sweeps]
    assert settings == [
        *(("model", width) for width in (1, 2, 4)),
        ("disabled", 1),
        ("shuffled", 2),
        ("shuffled", 4),
    ]
    assert num_completions(sweeps) == 6 * 8 * 6
    for sweep in sweeps:
        keys = [key for unit in sweep.units for key in sweep.keys(unit)]
        assert sorted(keys) == sorted(
            GroupKey(sweep.condition, sweep.width, problem, group)
            for problem in range(6)
            for group in range(8 // sweep.width)
        )


def test_controls_bring_width_1_along():
    section = EvaluationSection(widths=[4], samples=8)
    assert [s.width for s in plan_sweeps(section, 4, True, True, 0) if s.condition == "model"] == [1, 4]
    assert [s.width for s in plan_sweeps(section, 4, True, False, 0)] == [4]


def test_rows_that_hear_nobody_are_sampled_once_for_all_widths():
    section = EvaluationSection(widths=[1, 16], samples=8)
    [sweep] = plan_sweeps(section, 3, listening=False, controls=True, seed=0)
    assert (sweep.condition, sweep.width, num_completions([sweep])) == ("model", 1, 3 * 16)


def test_more_samples_and_widths_later_keep_those_that_are_there(tmp_path):
    store = SampleStore(tmp_path)
    few = plan_sweeps(EvaluationSection(widths=[1, 2], samples=4), 6, True, True, 0)
    before = Evaluation(few, sample, store, State()).run()
    many = plan_sweeps(SECTION, 6, True, True, 0)
    more = Evaluation(many, sample, store, State())
    assert num_completions(more.shares()) == num_completions(many) - num_completions(few)
    after = more.run()
    assert before == [group for group in after if group.key in {b.key for b in before}]
    assert Evaluation(few, sample, store, State()).run() == before, "groups that were not asked for are among them"


def test_ranks_without_a_shared_disk_are_told_so(tmp_path):
    sweeps = plan_sweeps(SECTION, 6, True, True, 0)
    with pytest.raises(UserError, match="of 168 groups after sampling: all ranks must write to one disk"):
        Evaluation(sweeps, sample, SampleStore(tmp_path, 1), State(1, 2)).run()


@pytest.mark.parametrize("num_problems", [4, 5, 7, 8])
def test_a_block_is_of_different_problems_and_filled_up(num_problems):
    units = exchange_units(num_problems, 2, 4, seed=0)
    for unit in units:
        assert len({problem for problem, _ in unit.pairs}) == len(unit.pairs) == 4
        assert len({group for _, group in unit.pairs}) == 1
    own = [pair for unit in units for pair in unit.pairs[: unit.own]]
    assert sorted(own) == [(problem, group) for problem in range(num_problems) for group in range(2)]
    assert exchange_units(num_problems, 2, 4, seed=1) != units


@pytest.mark.parametrize("dies_after", [0, 1, 5, 17])
def test_an_evaluation_that_was_cut_off_loses_and_doubles_nothing(tmp_path, dies_after):
    sweeps = plan_sweeps(SECTION, 6, listening=True, controls=True, seed=0)
    expected = Evaluation(sweeps, sample, SampleStore(tmp_path / "whole"), State()).run()

    def dying(sweep):
        for batch in sample(sweep):
            if next(written) == dies_after:
                raise KeyboardInterrupt
            yield batch

    written = count()
    with pytest.raises(KeyboardInterrupt):
        Evaluation(sweeps, dying, SampleStore(tmp_path / "cut"), State()).run()
    path = tmp_path / "cut" / "rank_0.jsonl"
    if path.is_file():  # the last line half-written
        path.write_bytes(path.read_bytes()[:-20])
    again = Evaluation(sweeps, sample, SampleStore(tmp_path / "cut"), State())
    sampled = []
    assert again.run(sampled.append) == expected
    lines = path.read_text().splitlines()
    assert len(lines) == len({tuple(json.loads(line)[k] for k in GroupKey._fields) for line in lines})
    assert num_completions(again.shares()) < num_completions(sweeps) or dies_after == 0


@pytest.mark.parametrize(("ranks", "conditions"), [(1, 0), (2, 2)])
def test_a_rank_whose_reward_fails_takes_part_in_what_the_others_still_sample(tmp_path, ranks, conditions):
    """Or ranks that hold shards would wait for it; alone, it ends at once."""

    def failing(sweep):
        if sweep.width == 1:
            raise UserError("mine.py:score failed")
        yield from sample(sweep)

    sweeps = plan_sweeps(SECTION, 6, listening=True, controls=False, seed=0)
    store = SampleStore(tmp_path)
    with pytest.raises(RankFailed, match=r"mine\.py:score failed"):
        Evaluation(sweeps, failing, store, State(0, ranks)).run()
    assert len({group.width for group in store.read()}) == conditions


def test_ranks_share_what_is_missing_and_another_number_of_ranks_goes_on(tmp_path):
    sweeps = plan_sweeps(SECTION, 7, listening=True, controls=True, seed=0)
    expected = Evaluation(sweeps, sample, SampleStore(tmp_path / "one"), State()).run()
    shared = [Evaluation(sweeps, sample, SampleStore(tmp_path / "two", rank), State(rank, 2)) for rank in range(2)]
    assert sum(num_completions(evaluation.shares()) for evaluation in shared) == num_completions(sweeps)
    with pytest.raises(UserError, match="one disk"):
        shared[0].run()  # the other is cut off before it begins
    three = [Evaluation(sweeps, sample, SampleStore(tmp_path / "two", rank), State(rank, 3)) for rank in range(3)]
    for evaluation in three[:2]:
        with pytest.raises(UserError, match="one disk"):
            evaluation.run()
    assert three[2].run() == expected
    lines = sum(len(path.read_text().splitlines()) for path in (tmp_path / "two").iterdir())
    assert lines == len(expected)


def test_a_line_that_is_no_group_is_named(tmp_path):
    store = SampleStore(tmp_path)
    store.append([make_group(GroupKey("model", 2, 0, 0))])
    store.path.write_text(store.path.read_text() + '{"width": 2}\n')
    with pytest.raises(UserError, match=r"rank_0.jsonl, line 2, is no sampled group"):
        store.read()


def test_a_batch_is_given_out_when_it_has_waited_too_long(monkeypatch):
    """Also while no other group ends: passes in which none does take 10 seconds each here."""
    clock = 0.0
    monkeypatch.setattr("bridge_rl.evaluation.run.time.monotonic", lambda: clock)

    def passes():
        nonlocal clock
        for ended in ("a", "b", "", "", "", "", "c", "", "de"):
            yield ended
            clock += 10

    given = [(batch, clock) for batch in batches(passes(), 10)]
    assert given == [(["a", "b"], 40), (["c", "d", "e"], 90)]
    assert list(batches(["abcde", "", "f"], 2)) == [["a", "b"], ["c", "d"], ["e", "f"]]
