import argparse
import json
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from report.made import make_evaluation, make_group

from bridge_rl.cli import add_report_arguments
from bridge_rl.errors import UserError
from bridge_rl.evaluation.aggregate import compare
from bridge_rl.evaluation.analyse import analyse
from bridge_rl.evaluation.results import write_results
from bridge_rl.evaluation.samples import SampleStore
from bridge_rl.report import command, tables

WRITTEN = [
    "report.html",
    "table.md",
    "table.tex",
    "widths.png",
    "g_pass.png",
    "controls.png",
    "lengths.png",
    "norm_ratio.png",
    "attention.png",
]


def report(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_report_arguments(parser)
    command.report(parser.parse_args(words))


def copy(evaluation: Path, to: Path, **meta) -> Path:
    """The same evaluation of another model, with `meta` changed."""
    shutil.copytree(evaluation, to)
    results = json.loads((to / "results.json").read_text())
    results["meta"] |= {"model": f"runs/{to.name}", **meta}
    (to / "results.json").write_text(json.dumps(results))
    return to


def test_one_directory_gives_page_tables_and_figures(tmp_path, run, capsys):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    report(str(directory))
    assert capsys.readouterr().out.split() == [str(directory / name) for name in WRITTEN]
    assert {path.name for path in directory.iterdir()} == {
        *WRITTEN, "results.json", "samples", "problems.jsonl", "pieces.json"
    }  # fmt: skip
    assert "| model | 2 | 3 | 4 | 0.480 [0.450, 0.510] |" in (directory / "table.md").read_text()
    assert "model & 2 & 3 & 4 & 0.480 [0.450, 0.510] &" in (directory / "table.tex").read_text()
    report(str(directory), "--run", str(run))
    assert (directory / "training.png").is_file()


def test_a_half_line_of_the_history_is_named(tmp_path, run):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    lines = (run / "history.jsonl").read_text().splitlines()
    (tmp_path / "history.jsonl").write_text("\n".join([*lines[:2], lines[2][:9]]))
    with pytest.raises(UserError, match=r"history.jsonl, line 3, is no log entry .*: mend or delete the line"):
        report(str(directory), "--run", str(tmp_path))


def test_curves_of_the_model_itself_are_found(tmp_path, run):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2), model=str(run))
    assert directory / "training.png" in command.write_report(directory)


def test_a_base_that_is_evaluated_beside_a_run_does_not_get_its_curves(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    directory = make_evaluation(tmp_path / "run" / "eval" / "math", problems=3, widths=(1, 2))
    assert directory / "training.png" in command.write_report(directory)
    base = copy(directory, tmp_path / "run" / "eval" / "base", trained_width=None)
    assert base / "training.png" not in command.write_report(base)
    assert not (base / "training.png").exists()


def test_page_of_four_widths_and_controls_takes_a_few_seconds(tmp_path, run):
    """About 2 s on one core, with matplotlib loaded; evaluations promise to end within a time of which this is part."""
    directory = make_evaluation(tmp_path / "eval", problems=60, steps=200)
    start = time.process_time()
    command.write_report(directory, run)
    assert time.process_time() - start < 8


def test_results_without_samples_give_a_page_without_a_viewer(tmp_path):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    shutil.rmtree(directory / "samples")
    [page, *_] = command.write_report(directory)
    assert 'id="groups"' not in page.read_text()
    assert not (directory / "samples").exists()


@pytest.mark.parametrize("name", ["results.json", "problems.jsonl", "pieces.json"])
def test_missing_files_are_named(tmp_path, name):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    (directory / name).unlink()
    with pytest.raises(UserError, match=name):
        command.write_report(directory)


def test_a_run_without_history_is_refused(tmp_path):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    with pytest.raises(UserError, match="--run: there is no"):
        report(str(directory), "--run", str(tmp_path))


def test_runs_are_compared_on_the_same_problems(tmp_path, capsys):
    first = copy(make_evaluation(tmp_path / "made", problems=12, widths=(1, 4)), tmp_path / "first")
    made = make_evaluation(tmp_path / "other", problems=12, widths=(1, 4), seed=5)
    second = copy(made, tmp_path / "second")
    report(str(first), str(second))
    assert (first / "runs.png").is_file()
    assert not (second / "comparison.md").exists()
    lines = (first / "comparison.md").read_text().splitlines()[4:]
    found = [line.split(" | ")[0].removeprefix("| width ") for line in lines]
    assert found == ["1", *"4444"]  # of a row alone, every metric is the same

    groups = [
        [g for g in SampleStore(d / "samples").read() if (g.condition, g.width) == ("model", 4)]
        for d in (first, second)
    ]
    expected = compare(*groups, "pass@1", "width 4", "runs/first", "runs/second")
    assert expected.difference.value != 0
    [row] = tables.comparison_table([expected]).rows
    assert any(line.startswith("| " + " | ".join(row[:6]) + " |") for line in lines)
    page = (first / "report.html").read_text()
    assert "Runs compared" in page
    assert "Caution" not in page
    out = capsys.readouterr().out
    assert "Caution" not in out
    assert f"{first} is compared with {second} in {first / 'report.html'}" in out

    report(str(second), str(first))  # which leaves the other's comparison as it is
    assert (first / "comparison.md").is_file()
    report(str(first))  # alone: what was drawn of several runs is out of date
    assert not (first / "runs.png").exists()
    assert not (first / "comparison.md").exists()


def test_runs_are_compared_on_the_samples_of_their_results(tmp_path):
    first = make_evaluation(tmp_path / "first", problems=12, widths=(1, 4))
    second = make_evaluation(tmp_path / "second", problems=12, widths=(1, 4), seed=5)
    before = command.compare_runs(command.Evaluation(first), command.Evaluation(second))
    rng = random.Random(1)
    more = [make_group(rng, "model", 4, problem, 2, 20) for problem in range(5)]  # --samples 12, cut off
    wider = [make_group(rng, "model", 8, problem, 0, 20) for problem in range(12)]
    SampleStore(first / "samples").append([*more, *wider])
    SampleStore(second / "samples").append(wider)
    assert command.compare_runs(command.Evaluation(first), command.Evaluation(second)) == before


@pytest.mark.parametrize("kept", [{"width": 1}, {"problem": 0}, {"condition": "model"}])
def test_samples_that_are_not_those_of_the_results_are_refused(tmp_path, kept):
    """A copy that was cut off, a line that was deleted. Rows of width 1 alone would pass for those of a base."""
    directory = make_evaluation(tmp_path / "eval", widths=(1, 4), problems=12)
    groups = SampleStore(directory / "samples").read()
    for path in (directory / "samples").iterdir():
        path.unlink()
    SampleStore(directory / "samples").append([g for g in groups if all(getattr(g, k) == v for k, v in kept.items())])
    for use in (command.write_report, lambda place: command.compare_runs(*[command.Evaluation(place)] * 2)):
        with pytest.raises(UserError, match=r"samples holds other groups than those of results\.json .* again"):
            use(directory)


def test_without_samples_there_is_nothing_to_compare(tmp_path):
    first = make_evaluation(tmp_path / "first", problems=3, widths=(1, 2))
    second = make_evaluation(tmp_path / "second", problems=3, widths=(1, 2))
    shutil.rmtree(second / "samples")
    with pytest.raises(UserError, match="second has no samples"):
        report(str(first), str(second))


def test_curves_of_a_run_are_shown_on_the_page_of_its_model_alone(tmp_path, run):
    first = make_evaluation(tmp_path / "first", problems=3, widths=(1, 2))
    second = make_evaluation(tmp_path / "second", problems=3, widths=(1, 2))
    report(str(first), str(second), "--run", str(run))
    assert (first / "training.png").is_file()
    assert not (second / "training.png").exists()


@pytest.mark.parametrize("line", ["5", "{}"])
def test_a_line_of_the_history_that_is_no_entry_is_named(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1, is no log entry"):
        command.read_history(tmp_path)


def test_pieces_of_another_kind_are_named(tmp_path):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    (directory / "pieces.json").write_text("5")
    with pytest.raises(UserError, match=r"pieces\.json cannot be read"):
        command.write_report(directory)


def test_figures_of_an_earlier_report_go_and_other_files_stay(tmp_path):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    for name in ("training.png", "mine.png"):
        (directory / name).write_bytes(b"old")
    command.write_report(directory)
    assert not (directory / "training.png").exists()
    assert (directory / "mine.png").read_bytes() == b"old"


def test_runs_evaluated_otherwise_are_compared_with_caution(tmp_path, capsys):
    first = copy(make_evaluation(tmp_path / "made", problems=3, widths=(1, 2)), tmp_path / "first")
    second = copy(first, tmp_path / "second", temperature=0.7, prompt="{problem} Think.")
    report(str(first), str(second))
    caution = (
        "Caution: these runs were evaluated with other settings, which may be why they differ: temperature (1.0 in "
        "runs/first, 0.7 in runs/second); prompt ({problem} in runs/first, {problem} Think. in runs/second)."
    )
    assert caution in capsys.readouterr().out
    page = (first / "report.html").read_text()
    assert caution in page
    assert "runs/first (first) with runs/second, on the same problems" in page
    assert caution in (first / "comparison.md").read_text()


def test_runs_judged_or_asked_otherwise_are_compared_with_caution(tmp_path, capsys):
    first = copy(make_evaluation(tmp_path / "made", problems=3, widths=(1, 2)), tmp_path / "first", judging="0a")
    second = copy(first, tmp_path / "second", judging="0b")  # the reward's file was edited in between
    path = second / "problems.jsonl"
    path.write_text(path.read_text().replace('"prompt": "', '"prompt": "Think. '))
    report(str(first), str(second))
    assert (
        "fingerprint of the reward's file and the verifier (0a in runs/first, 0b in runs/second); what stands around "
        "each problem, as a system prompt (problems.jsonl)."
    ) in capsys.readouterr().out


def test_a_directory_named_twice_is_refused(tmp_path):
    directory = make_evaluation(tmp_path / "eval", problems=3, widths=(1, 2))
    with pytest.raises(UserError, match="is named twice"):
        report(str(directory), str(directory / ".." / "eval"))
    assert not (directory / "report.html").exists()


def test_of_a_run_its_evaluations_are_named(tmp_path):
    run = tmp_path / "run"
    for place in ("eval/tiny", "evaluation/step_000060"):
        make_evaluation(run / place, problems=3, widths=(1, 2))
    with pytest.raises(UserError) as raised:
        report(str(run))
    assert f"name one of {run / 'eval/tiny'}, {run / 'evaluation/step_000060'}." in str(raised.value)


def test_rows_without_a_bridge_are_compared_at_every_width(tmp_path):
    first = command.Evaluation(make_evaluation(tmp_path / "bridge", widths=(1, 2, 4), problems=12))
    second = command.Evaluation(make_evaluation(tmp_path / "base", widths=(1, 2, 4), problems=12, model="base"))
    for path in (second.directory / "samples").iterdir():
        path.unlink()
    rng = random.Random(0)
    alone = [make_group(rng, "model", 1, problem, number, 20) for problem in range(12) for number in range(8)]
    SampleStore(second.directory / "samples").append(alone)
    write_results(analyse(alone, (1, 2, 4), False, second.results.meta), second.directory / "results.json")
    second = command.Evaluation(second.directory)
    comparisons = command.compare_runs(first, second)
    assert [(c.name, c.metric) for c in comparisons if c.metric in ("pass@1", "any")] == [
        ("width 1", "pass@1"), ("width 2", "pass@1"), ("width 2", "any"), ("width 4", "pass@1"), ("width 4", "any")
    ]  # fmt: skip
    pairs = [any(group.correct[0] for group in alone[at : at + 2]) for at in range(0, len(alone), 2)]
    ours = [any(group.correct) for group in first.groups if group.key[:2] == ("model", 2)]
    [any_of_two] = [c for c in comparisons if (c.name, c.metric) == ("width 2", "any")]
    assert any_of_two.difference.value == pytest.approx(sum(ours) / len(ours) - sum(pairs) / len(pairs))


def test_runs_of_one_model_are_called_by_their_directories(tmp_path):
    first = make_evaluation(tmp_path / "first", problems=3, widths=(1, 2))
    second = make_evaluation(tmp_path / "second", problems=3, widths=(1, 2))
    names = command.run_names([command.Evaluation(first), command.Evaluation(second)])
    assert names == [str(first), str(second)]


def test_runs_on_other_problems_are_refused(tmp_path):
    first = make_evaluation(tmp_path / "first", problems=3, widths=(1, 2))
    with pytest.raises(UserError, match="one is on math & <b>more</b>, the other on tiny; evaluate both on one suite"):
        report(str(first), str(copy(first, tmp_path / "suite", suite="tiny")))
    fewer = make_evaluation(tmp_path / "fewer", problems=2, widths=(1, 2))
    with pytest.raises(UserError, match="their problems differ"):
        report(str(first), str(fewer))
    other_widths = make_evaluation(tmp_path / "widths", problems=3, widths=(3,))
    with pytest.raises(UserError, match="no width in common"):
        report(str(first), str(other_widths))
    assert not (first / "comparison.md").exists()


def test_means_over_suites_are_not_compared(tmp_path):
    directories = [make_evaluation(tmp_path / name, problems=3, widths=(1, 2)) for name in "ab"]
    means = [copy(path, tmp_path / f"mean_{path.name}", suite=None, suites=["tiny"]) for path in directories]
    sentence = f"{means[0]} is a mean over suites, without samples: compare one suite, as {means[0] / 'tiny'}."
    with pytest.raises(UserError, match=re.escape(sentence)):
        report(*map(str, means))


def test_nothing_to_report_on_is_refused():
    with pytest.raises(UserError, match="name a directory"):
        report()


def test_the_wandb_view_needs_no_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report("--wandb", "some-project", "--dry-run")
    assert "nothing was sent" in capsys.readouterr().out
    assert "some-project" in (tmp_path / "wandb_workspace.json").read_text()
