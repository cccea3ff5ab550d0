"""A study's runner, its results, and what its report makes of them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from scipy import stats

from bridge_rl.cli import main
from bridge_rl.config import ModelSection, load_recipe
from bridge_rl.errors import Stopped, UserError
from bridge_rl.evaluation.results import Estimate, Summary
from bridge_rl.models import load_tokenizer
from bridge_rl.report import names
from bridge_rl.run_directory import save_recipe
from bridge_rl.study import cell as cell_module
from bridge_rl.study import command
from bridge_rl.study.cell import evaluation_job, thinned, train_cell, training_seconds
from bridge_rl.study.cells import (
    Cell,
    chosen_rate,
    difference,
    differing,
    find_result,
    is_trained,
    overrides_of,
    rate_name,
    recipe_of,
    result_path,
    search_cells,
    seed_cells,
    source_of,
)
from bridge_rl.study.command import expected_seconds
from bridge_rl.study.compare import (
    Setting,
    compare,
    gains,
    next_best,
    problem_values,
    read_task,
    relative_gain,
    verdicts,
    vote_differences,
)
from bridge_rl.study.config import load_study
from bridge_rl.study.report import widths_figure, write_study_report
from bridge_rl.study.results import CellResult, Counts, Seconds, read_cell, write_cell
from bridge_rl.study.statistics import over_seeds, over_seeds_and_problems, ratio
from bridge_rl.study.tables import difference_table, gain_table, main_table

SOURCE = {"path": "bridge_rl.tiny.task:dataset", "check_answers": False}
SMALL = [
    "training.max_steps=4",
    "training.per_device_train_batch_size=16",
    "training.logging_steps=1",
    "warmup.problems=32",
    "warmup.steps=2",
    "warmup.groups_per_step=4",
]
STUDY = {
    "tasks": {
        "tiny": {
            "recipe": "recipes/tiny_arith.yaml",
            "validation": {**SOURCE, "kwargs": {"seed": 12, "size": 16}},
            "test": {**SOURCE, "kwargs": {"seed": 11, "size": 16}},
            "overrides": SMALL,
        }
    },
    "arms": {
        "base": {"role": "base"},
        "rlvr": {"role": "control", "overrides": ["bridge=null"], "learning_rates": [1e-4]},
        "pmatch": {"role": "control", "overrides": ["bridge.kind=pmatch"], "learning_rates": [1e-4]},
        "bridge": {"role": "bridge", "learning_rates": [1e-4]},
    },
    "headline": "bridge",
    "seeds": [0, 1, 2],
    "search_seed": 100,
    "widths": [1, 4],
    "samples": 4,
    "overrides": ["training.save_strategy=steps", "training.save_steps=1"],
}


def write_study(directory: Path, **changes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "study.yaml"
    path.write_text(yaml.dump({**STUDY, **changes}, sort_keys=False))
    return path


def with_grids(*grids: list[float]) -> dict:
    """The arms with other learning rates each."""
    trained = [name for name in STUDY["arms"] if name != "base"]
    changed = {name: {**STUDY["arms"][name], "learning_rates": grid} for name, grid in zip(trained, grids, strict=True)}
    return {**STUDY["arms"], **changed}


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": [1]}, "unknown key 'seed': did you mean 'seeds'?"),
        ({"arms": {**STUDY["arms"], "x": {"role": "control", "learning_rate": 1}}}, "did you mean 'learning_rates'?"),
        ({"arms": {**STUDY["arms"], "x": {"role": "other"}}}, "the key 'arms.x.role' is 'other'"),
        ({"arms": {**STUDY["arms"], "x": {"role": "control"}}}, "unless its role is base"),
        ({"arms": with_grids([1e-4], [1e-4], [1e-4, 2e-4])}, "every arm must have as many as the others"),
        ({"headline": "rlvr"}, "name an arm whose role is bridge"),
        ({"tasks": {"tiny": {**STUDY["tasks"]["tiny"], "test": {**SOURCE, "shuffle": True}}}}, "test.shuffle is true"),
        ({"seeds": [0, 100]}, "none may be search_seed"),
        ({"widths": [1, 36]}, "from 1 to 35"),
        ({"widths": [1, 4, 4]}, "widths is [1, 4, 4]: name each once."),
    ],
)
def test_a_mistake_in_a_study_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError) as caught:
        load_study(write_study(tmp_path, **changes))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        ("tinny", "did you mean 'tiny'?"),
        ("tiny/bridges", "did you mean 'bridge'?"),
        ("tiny/bridge/7", "there is no '7'"),
        ("tiny/bridge/0/1", "write TASK, TASK/ARM or TASK/ARM/SEED"),
    ],
)
def test_a_cell_that_there_is_not_is_refused(tmp_path, capsys, only, sentence):
    with pytest.raises(SystemExit) as caught:
        main(["study", str(write_study(tmp_path)), "--dry-run", "--only", only])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({**SOURCE, "path": "bridge_rl.tiny.task:datasets"}, "tasks.tiny.test"),
        ({**SOURCE, "kwargs": {"seed": 11, "size": 3}}, "tasks.tiny.test has 3 problems: it needs 4"),
    ],
)
def test_problems_that_cannot_be_evaluated_are_refused_before_anything_is_trained(tmp_path, capsys, source, sentence):
    tasks = {"tiny": {**STUDY["tasks"]["tiny"], "test": source}}
    with pytest.raises(SystemExit) as caught:
        main(["study", str(write_study(tmp_path, tasks=tasks)), "--runs", str(tmp_path / "runs")])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_split_in_a_file_may_leave_out_answers_that_cannot_be_read(tmp_path):
    rows = [{"problem": f"{n},11,12,13,14,15:{n + 11}=", "answer": str(n)} for n in range(20, 24)]
    text = "".join(json.dumps(row) + "\n" for row in [{**rows[0], "answer": "x^2+"}, *rows])
    (tmp_path / "p.jsonl").write_text(text)
    test = {"path": str(tmp_path / "p.jsonl"), "check_answers": "drop"}
    tasks = {"tiny": {**STUDY["tasks"]["tiny"], "test": test}}
    judge = "rewards=[{function: rewards/answer.py:correct}]"
    path = write_study(tmp_path, tasks=tasks, overrides=[*STUDY["overrides"], judge])
    main(["study", str(path), "--runs", str(tmp_path / "runs"), "--only", "tiny/base/0"])
    [result] = [read_cell(path) for path in tmp_path.glob("results/tiny/base/*.json")]
    assert {len(right) for counts in result.counts for right in counts.groups} == {4}


def test_a_study_must_be_sampled_at_the_width_of_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["study", str(write_study(tmp_path, widths=[1, 8])), "--dry-run"])
    assert "tiny is trained at 4, add it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "overrides", "sentence"),
    [
        (
            "bridge",
            ["bridge.kind=pmatch"],
            "arms.x.role is bridge, and its recipe for tiny has bridge.kind=pmatch: take",
        ),
        (
            "bridge",
            ["bridge=null"],
            "arms.x.role is bridge, and its recipe for tiny has bridge=null: take that away, or",
        ),
        (
            "control",
            [],
            "arms.x.role is control, and its recipe for tiny has a Bridge: add bridge=null or bridge.kind=p",
        ),
    ],
)
def test_an_arm_whose_role_is_not_its_recipes_is_refused(tmp_path, capsys, role, overrides, sentence):
    arm = {"role": role, "overrides": overrides, "learning_rates": [1e-4]}
    with pytest.raises(SystemExit) as caught:
        main(["study", str(write_study(tmp_path, arms={**STUDY["arms"], "x": arm})), "--dry-run"])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("two_tries", "tiny_arith"),
        ("products", "tiny_products"),
        ("checked_products", "tiny_checked_products"),
        ("word_problems", "tiny_word_problems"),
    ],
)
def test_arms_of_the_small_study_are_the_recipes_that_are_shipped(tmp_path, task, recipe):
    study = load_study(Path("studies/small/study.yaml"))
    for arm, ending in {"rlvr_only": "_rlvr_only", "pmatch": "_pmatch", "bridge": ""}.items():
        cell = Cell(task, arm, 3, 2e-4)
        shipped = load_recipe(f"recipes/{recipe}{ending}.yaml", ["seed=3", "training.learning_rate=2e-4"])
        assert difference(shipped, recipe_of(study, cell, tmp_path)) is None
    assert difference(shipped, recipe_of(study, replace(cell, arm="pmatch"), tmp_path)) == "bridge.kind"
    assert difference(shipped, recipe_of(study, replace(cell, seed=4), tmp_path)) == "seed"


@pytest.mark.parametrize(("name", "task_name"), [("questions", "two_tries"), ("checked_products", "checked_products")])
def test_studies_of_questions_go_on_from_the_small_one(tmp_path, name, task_name):
    path = Path("studies") / name / "study.yaml"
    questions, small = load_study(path), load_study(Path("studies/small/study.yaml"))
    task = read_task(questions, task_name, path.parent / questions.results)
    shared = [arm for arm in questions.arms if arm in small.arms]
    assert shared == ["base", "rlvr_only", "pmatch", "bridge"]
    assert [sorted(task.cells[arm]) for arm in shared] == [small.seeds] * 4
    for arm in questions.arms.keys() - small.arms.keys():  # each is Bridge, changed in one thing
        changed, ours = (recipe_of(questions, Cell(task_name, name, 0, 1e-4), tmp_path) for name in (arm, "bridge"))
        assert difference(changed, ours) is not None


def test_the_study_for_a_gpu_is_the_small_one_with_another_model_and_bridge(tmp_path):
    gpu, small = load_study(Path("studies/gpu/study.yaml")), load_study(Path("studies/small/study.yaml"))
    for arm in gpu.arms.keys() - {"base"}:
        cell = Cell("two_tries", arm, 0, 2e-5)
        other = differing(recipe_of(gpu, cell, tmp_path), recipe_of(small, cell, tmp_path))
        shape = [] if arm == "rlvr_only" else ["bridge.head_dim"]
        assert other == [*shape, "model.path"]
        assert source_of(gpu, cell) == source_of(small, cell)


def test_the_script_for_a_gpu_makes_a_base_that_was_cut_off_again(tmp_path):
    """Its directory is there from the beginning of the training on, its files at the end; programs are stubs here."""
    for name in ("python", "bridge-rl"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    base = tmp_path / "runs/base_21m"
    base.mkdir(parents=True)

    def started() -> list[str]:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        script = ["bash", str(Path("studies/gpu/run.sh").resolve())]
        done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return [line.split()[0] for line in done.stdout.splitlines()]

    assert started() == ["python", "bridge-rl"]
    load_tokenizer(ModelSection("package://bridge_rl/tiny/model")).save_pretrained(base)
    assert started() == ["bridge-rl"]


@pytest.mark.parametrize(
    ("rate", "name"), [(5e-5, "5e-5"), (1e-4, "1e-4"), (0.001, "1e-3"), (1.5e-4, "1.5e-4"), (2, "2e0")]
)
def test_learning_rates_have_short_names(rate, name):
    assert rate_name(rate) == name
    assert float(name) == rate


# -- made-up results --------------------------------------------------------------------------------------------------


def make_result(study, cell: Cell, values: dict, tmp_path) -> CellResult:
    """values: (condition, width) -> right rows of each problem, in one group."""
    summaries, counts = [], []
    for (condition, width), right in values.items():
        metrics = {"pass@1": np.mean(right) / width, "all": np.mean([c == width for c in right])}
        metrics |= {"any": np.mean([c > 0 for c in right]), "maj": 0.5, "length": 25.0}
        estimates = {name: Estimate(float(value)) for name, value in metrics.items()}
        summaries.append(Summary(condition, width, len(right), 1, estimates))
        counts.append(Counts(condition, width, ["".join(map(str, right))]))
    return CellResult(
        task=cell.task,
        arm=cell.arm,
        seed=cell.seed,
        split="validation" if cell.search else "test",
        learning_rate=cell.learning_rate,
        overrides=overrides_of(study, cell),
        recipe=recipe_of(study, cell, tmp_path),
        trained_width=4,
        samples=study.samples,
        source=source_of(study, cell),
        problems="the same",
        made={
            "commit": "abc",
            "dirty": False,
            "cpu": "a CPU",
            "hardware": "CPU, 1 threads",
            "versions": {"torch": "2"},
        },
        trained=[],
        seconds=Seconds(10.0, 60.0, 30.0, 0.5),
        summaries=summaries,
        counts=counts,
    )


# Right rows of 4, of two problems: pass@1 at width 4 by seed. Gains over the base (.25): bridge .25 .5 .375, mean .375;
# pmatch .125 .25 .125, mean 1/6; rlvr 0.
RIGHT = {
    "base": [[1, 1], [1, 1], [1, 1]],
    "rlvr": [[1, 1], [1, 1], [1, 1]],
    "pmatch": [[1, 2], [2, 2], [2, 1]],
    "bridge": [[2, 2], [3, 3], [3, 2]],
}


AS_THE_STUDY_SAYS = {("model", 1): [0, 1], ("model", 4): [1, 2], ("shuffled", 4): [1, 1]}


def write_made_up(study, results: Path, tmp_path: Path, shuffled=((1, 2), (2, 2), (1, 2)), left_out=()) -> None:
    for cell in seed_cells(study, results):
        if (cell.arm, cell.seed) in left_out:
            continue
        right = RIGHT[cell.arm][cell.seed]
        values = {("model", 1): [0, 1], ("model", 4): right}
        if study.arms[cell.arm].role == "bridge":
            values |= {("shuffled", 4): list(shuffled[cell.seed]), ("disabled", 4): [1, 1]}
        write_cell(make_result(study, cell, values, tmp_path), result_path(results, cell))


@pytest.fixture
def study(tmp_path):
    return load_study(write_study(tmp_path))


def test_a_result_is_read_as_it_was_written(study, tmp_path):
    cell = Cell("tiny", "bridge", 0, 1e-4)
    result = make_result(study, cell, {("model", 4): [0, 3, 4], ("model", 1): [0, 1, 1]}, tmp_path)
    result = replace(result, counts=[Counts("model", 16, ["0g", "a1"])], history={"step": [10.0], "reward": [0.5]})
    write_cell(result, tmp_path / "a.json")
    assert read_cell(tmp_path / "a.json") == result
    assert result.right(16) == [[0, 16], [10, 1]]
    assert json.loads((tmp_path / "a.json").read_text())["seconds"]["training"] == 60.0


def test_the_learning_rate_with_the_best_validation_accuracy_is_taken_once_all_were_tried(tmp_path):
    grid = [1e-4, 2e-4, 4e-4]
    study, results = load_study(write_study(tmp_path, arms=with_grids(grid, grid, grid))), tmp_path / "results"
    for right, cell in zip([1, 3, 2], [c for c in search_cells(study) if c.arm == "rlvr"], strict=True):
        assert chosen_rate(study, "tiny", "rlvr", results) is None
        write_cell(make_result(study, cell, {("model", 4): [right, 1]}, tmp_path), result_path(results, cell))
    assert chosen_rate(study, "tiny", "rlvr", results) == 2e-4
    assert chosen_rate(study, "tiny", "bridge", results) is None
    assert {c.arm: c.learning_rate for c in seed_cells(study, results)} == {
        "base": None, "rlvr": 2e-4, "pmatch": None, "bridge": None,
    }  # fmt: skip


def test_a_result_of_another_recipe_is_refused(study, tmp_path):
    cell, results = Cell("tiny", "bridge", 0, 1e-4), tmp_path / "results"
    assert find_result(study, cell, results) is None
    write_cell(make_result(study, cell, AS_THE_STUDY_SAYS, tmp_path), result_path(results, cell))
    assert find_result(study, cell, results) is not None
    with pytest.raises(UserError, match=r"another training\.learning_rate"):
        find_result(study, replace(cell, learning_rate=2e-4), results)
    with pytest.raises(UserError, match=r"another bridge"):  # nor does a report show it
        read_task(
            load_study(write_study(tmp_path, overrides=[*STUDY["overrides"], "bridge.num_heads=2"])), "tiny", results
        )
    with pytest.raises(UserError, match="another widths or samples"):
        find_result(load_study(write_study(tmp_path, samples=8)), cell, results)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Cell("tiny", "bridge", 0, 1e-4), Cell("tiny", "base", 0, None)),
        (Cell("tiny", "base", 1, None), Cell("tiny", "base", 0, None)),
        (Cell("tiny", "pmatch", 100, 1e-4, search=True), Cell("tiny", "bridge", 100, 1e-4, search=True)),
        (Cell("tiny", "bridge", 0, 1e-4), Cell("tiny", "bridge", 0, 1e-4, search=True)),
    ],
)
def test_a_result_in_the_place_of_another_is_refused(study, tmp_path, source, target):
    results = tmp_path / "results"
    write_cell(make_result(study, source, AS_THE_STUDY_SAYS, tmp_path), result_path(results, target))
    with pytest.raises(UserError) as caught:
        find_result(study, target, results)
    assert f"holds the result of tiny/{source.arm}/{source.seed} (" in str(caught.value)
    assert f" in the place of tiny/{target.arm}/{target.seed} (" in str(caught.value)


def on_others(split: str) -> dict:
    """The tasks with other problems in one split."""
    return {"tiny": {**STUDY["tasks"]["tiny"], split: {**SOURCE, "kwargs": {"seed": 99, "size": 16}}}}


def test_a_cell_evaluates_nothing_in_training(tmp_path):
    study = load_study(write_study(tmp_path, overrides=[*STUDY["overrides"], "evaluation.every=2"]))
    recipe = recipe_of(study, Cell("tiny", "bridge", 0, 1e-4), tmp_path)
    assert (recipe.data.eval, recipe.evaluation.every) == (None, None)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"overrides": [*STUDY["overrides"], "evaluation.temperature=0.5"]}, "evaluation.temperature"),
        ({"overrides": [*STUDY["overrides"], "evaluation.top_p=0.9"]}, "evaluation.top_p"),
        ({"overrides": [*STUDY["overrides"], "evaluation.max_new_tokens=3"]}, "evaluation.max_new_tokens"),
        ({"samples": 8}, "widths or samples"),
        ({"tasks": on_others("test")}, "tasks.tiny.test"),
        ({"tasks": on_others("validation")}, "tasks.tiny.validation"),
        ({"overrides": [*STUDY["overrides"], "evaluation.every=2", "evaluation.max_rows=32"]}, None),
    ],
)
def test_a_result_that_was_evaluated_otherwise_is_refused(study, tmp_path, changes, key, search):
    cell, results = Cell("tiny", "bridge", 0, 1e-4, search), tmp_path / "results"
    result = make_result(study, cell, AS_THE_STUDY_SAYS, tmp_path)
    write_cell(result, result_path(results, cell))
    changed = load_study(write_study(tmp_path, **changes))
    if key is None or key == f"tasks.tiny.{'test' if search else 'validation'}":  # problems of the other split
        assert find_result(changed, cell, results) is not None
        return
    with pytest.raises(UserError) as caught:
        find_result(changed, cell, results)
    assert f"another {key} than the study says" in str(caught.value)


def test_a_bridge_without_controls_is_refused_where_the_study_has_them(study, tmp_path):
    results, without = tmp_path / "results", {("model", 1): [0, 1], ("model", 4): [1, 2]}
    cell = Cell("tiny", "bridge", 0, 1e-4)
    cells = [cell, replace(cell, search=True), replace(cell, arm="rlvr")]
    for each in cells:
        write_cell(make_result(study, each, without, tmp_path), result_path(results, each))
    with pytest.raises(UserError, match="another controls than the study says"):
        find_result(study, cell, results)
    assert all(find_result(study, other, results) is not None for other in cells[1:])  # these have none to have
    assert find_result(load_study(write_study(tmp_path, controls=False)), cell, results) is not None


def test_a_study_of_width_1_asks_for_no_shuffled_siblings(tmp_path):
    alone = load_study(write_study(tmp_path, widths=[1], overrides=[*STUDY["overrides"], "rollout.width=1"]))
    cell, results = Cell("tiny", "bridge", 0, 1e-4), tmp_path / "results"
    write_cell(make_result(alone, cell, {("model", 1): [0, 1]}, tmp_path), result_path(results, cell))
    assert find_result(alone, cell, results) is not None


def test_results_are_neither_refused_nor_done_while_their_learning_rate_is_searched(tmp_path, capsys):
    grids = with_grids([1e-4, 2e-4], [1e-4, 2e-4], [1e-4, 2e-4])
    path = write_study(tmp_path, arms=grids)
    study, cell = load_study(path), Cell("tiny", "bridge", 0, 2e-4)
    write_cell(make_result(study, cell, AS_THE_STUDY_SAYS, tmp_path), result_path(tmp_path / "results", cell))
    main(["study", str(path), "--dry-run", "--only", "tiny/bridge/0"])
    assert "open     tiny/bridge/seed_0 (learning rate not chosen yet)" in capsys.readouterr().out


def test_a_cell_is_expected_to_take_as_long_as_those_most_like_it():
    timed = {
        Cell("a", "bridge", 0, 1e-4): 10.0,
        Cell("a", "bridge", 1, 1e-4): 20.0,
        Cell("a", "bridge", 9, 1e-4, search=True): 5.0,
        Cell("b", "pmatch", 9, 1e-4, search=True): 7.0,
    }
    assert expected_seconds(Cell("a", "bridge", 2, 1e-4), timed) == 15.0
    assert expected_seconds(Cell("a", "bridge", 9, 2e-4, search=True), timed) == 5.0
    assert expected_seconds(Cell("b", "bridge", 0, 1e-4), timed) == 15.0  # of another task
    assert expected_seconds(Cell("b", "pmatch", 0, 1e-4), timed) == 7.0  # of the search
    assert expected_seconds(Cell("a", "rlvr", 0, 1e-4), timed) is None


def test_a_dry_run_of_a_study_that_is_done_tells_no_hours(study, tmp_path, capsys):
    path = write_study(tmp_path)
    write_made_up(study, tmp_path / "results", tmp_path)
    main(["study", str(path), "--dry-run", "--only", "tiny"])
    assert capsys.readouterr().out.endswith("12 of 12 cells are done\n")
    result_path(tmp_path / "results", Cell("tiny", "rlvr", 2, 1e-4)).unlink()
    main(["study", str(path), "--dry-run", "--only", "tiny"])
    assert "11 of 12 cells are done; about " in capsys.readouterr().out


def test_a_study_may_go_on_from_the_results_of_another(study, tmp_path, capsys):
    write_made_up(study, tmp_path / "results", tmp_path)
    narrow = {"role": "bridge", "overrides": ["bridge.num_heads=2"], "learning_rates": [1e-4]}
    more = {**STUDY["arms"], "narrow": narrow}
    path = write_study(tmp_path / "more", arms=more, results="../results", controls=False, widths=[4])
    main(["study", str(path), "--dry-run"])
    output = capsys.readouterr().out
    assert "done     tiny/bridge/seed_2" in output
    assert "open     tiny/narrow/seed_2" in output
    main(["study", str(path), "--report"])
    assert "12 of 15 cells are done" in (tmp_path / "more" / "report" / "table.md").read_text()
    assert not (tmp_path / "report").exists()


def test_arms_are_compared_at_the_width_at_which_the_headline_arm_was_trained(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    path = result_path(tmp_path / "results", Cell("tiny", "base", 0, None))
    write_cell(replace(read_cell(path), trained_width=1), path)
    assert read_task(study, "tiny", tmp_path / "results").width == 4


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.learning_rate=3e-4", None),
        ("bridge=null", None),
        ("rollout.max_new_tokens=5", "rollout.max_new_tokens"),  # which is the evaluation's limit, too
        ("model.dtype=bfloat16", "model.dtype"),
        ("data.prompt='{problem} '", "data.prompt"),
        ("data.system_prompt='try'", "data.system_prompt"),
        ("rewards=[{function: rewards/two_tries.py:correct, weight: 0.5}]", "rewards"),
        ("evaluation.temperature=0.5", "evaluation.temperature"),
    ],
)
def test_results_of_the_base_stay_when_only_training_changes(study, tmp_path, override, key):
    cell, results = Cell("tiny", "base", 0, None), tmp_path / "results"
    result = make_result(study, cell, {("model", 1): [0, 1], ("model", 4): [1, 2]}, tmp_path)
    write_cell(result, result_path(results, cell))
    changed = load_study(write_study(tmp_path, overrides=[*STUDY["overrides"], override]))
    assert recipe_of(changed, cell, tmp_path) != result.recipe
    if key is None:
        assert find_result(changed, cell, results) is not None
        return
    with pytest.raises(UserError) as caught:
        find_result(changed, cell, results)
    assert f"another {key} than the study says" in str(caught.value)


def test_the_base_is_asked_as_the_trained_arms_are(tmp_path):
    study = load_study(write_study(tmp_path, overrides=[*STUDY["overrides"], "data.system_prompt='add'"]))
    cell = Cell("tiny", "base", 0, None)
    job = evaluation_job(study, cell, recipe_of(study, cell, tmp_path), tmp_path, base=True)
    assert [turn["role"] for turn in job.rows[0]["prompt"]] == ["system", "user"]
    assert job.rows[0]["prompt"][0]["content"] == "add"


def test_a_base_that_is_a_run_of_its_own_is_asked_as_the_arms_are(tmp_path):
    base = tmp_path / "base"
    shutil.copytree("bridge_rl/tiny/model", base)
    own = load_recipe(Path("recipes/tiny_arith.yaml"), ["data.system_prompt='its own'"])
    (base / "recipe.yaml").write_text(own.to_yaml())
    study = load_study(write_study(tmp_path, overrides=[*STUDY["overrides"], f"model.path={base}"]))
    cell = Cell("tiny", "base", 0, None)
    job = evaluation_job(study, cell, recipe_of(study, cell, tmp_path), tmp_path, base=True)
    assert [turn["role"] for turn in job.rows[0]["prompt"]] == ["user"]


# -- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    found = over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    # s = sqrt(2.5), s / sqrt(5) = 0.70711, times t(4) = 2.77645
    assert found.value == 3.0
    assert found.low == pytest.approx(3 - 1.96325, abs=1e-4)
    assert found.high == pytest.approx(3 + 1.96325, abs=1e-4)
    assert over_seeds([0.5]) == Estimate(0.5)


def test_fiellers_interval_is_every_ratio_that_the_data_do_not_exclude():
    rng = np.random.default_rng(0)
    second = rng.normal(0.2, 0.03, 5)
    first = 1.4 * second + rng.normal(0, 0.02, 5)
    found = ratio(first, second)
    kept = []
    for r in np.arange(1, 2, 0.001):  # the test of each ratio, one by one
        kept += [r] if stats.ttest_1samp(first - r * second, 0).pvalue >= 0.05 else []
    assert found.value == pytest.approx(first.mean() / second.mean())
    assert (found.low, found.high) == pytest.approx((kept[0], kept[-1]), abs=0.002)
    assert np.ptp(kept) > 0.1


def test_a_ratio_to_what_may_be_nothing_has_no_interval():
    assert ratio([0.2, 0.3, 0.1], [0.1, -0.1, 0.05]).low is None
    assert ratio([0.2], [0.1]) == Estimate(2.0)


def test_the_bootstrap_over_seeds_and_problems_is_that_of_plain_loops():
    differences = np.random.default_rng(1).normal(0.1, 0.3, (5, 40)) + np.linspace(-0.1, 0.1, 5)[:, None]
    rng, means = np.random.default_rng(2), []
    for _ in range(4000):
        seeds, problems = rng.integers(0, 5, 5), rng.integers(0, 40, 40)
        means.append(np.mean([[differences[s, p] for p in problems] for s in seeds]))
    found = over_seeds_and_problems(differences)
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)


# -- the report -------------------------------------------------------------------------------------------------------


def test_gains_and_differences_are_those_computed_by_hand(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    found = relative_gain(task, 4)
    assert found.next_best == "pmatch"
    assert found.seeds == [0, 1, 2]
    assert found.gain.value == pytest.approx(0.375)
    assert found.next_gain.value == pytest.approx(1 / 6)
    assert found.relative.value == pytest.approx(2.25)
    # By seed .125, .25, .25: mean 5/24, s = .072169, times t(2) = 4.30265 / sqrt(3)
    against = compare(task, Setting("bridge", 4), Setting("pmatch", 4))
    assert found.difference == against.over_seeds
    assert against.over_seeds.value == pytest.approx(5 / 24)
    assert against.over_seeds.low == pytest.approx(5 / 24 - 4.30265 * 0.072169 / math.sqrt(3), abs=1e-5)
    assert against.over_both.value == pytest.approx(5 / 24)
    assert compare(task, Setting("bridge", 4), Setting("bridge", 4, "disabled")).over_seeds.value == pytest.approx(
        0.375
    )


def test_what_a_problem_gives_is_a_mean_over_its_groups():
    result = SimpleNamespace(right=lambda width, condition: [[0, 4, 3], [2, 4, 1]])  # two groups, three problems
    found = {metric: problem_values({7: result}, [7], Setting("a", 4), metric) for metric in ("pass@1", "any", "all")}
    assert found["pass@1"].tolist() == [[0.25, 1.0, 0.5]]
    assert found["any"].tolist() == [[0.5, 1.0, 1.0]]
    assert found["all"].tolist() == [[0.0, 1.0, 0.0]]
    assert problem_values({7: result}, [7], Setting("a", 4), "maj") is None


def test_the_next_best_arm_has_the_best_mean_over_the_seeds_that_are_compared():
    values = {"steady": {0: 0.5, 1: 0.5, 2: 0.0}, "lucky": {0: 0.9, 1: 0.0, 2: 1.0}}
    task = SimpleNamespace(arms=lambda role: list(values), values=lambda setting, metric: values[setting.arm])
    assert [next_best(task, 4, seeds) for seeds in ([0, 1], [0, 1, 2])] == ["steady", "lucky"]


def test_gains_are_those_of_every_arm_with_a_bridge_at_every_width(tmp_path, monkeypatch):
    arms = {**STUDY["arms"], "blocks": {**STUDY["arms"]["bridge"], "overrides": ["train=bridge"]}}
    study = load_study(write_study(tmp_path, arms=arms))
    monkeypatch.setitem(RIGHT, "blocks", [[4, 4], [4, 4], [4, 4]])
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    found = {(gain.arm, gain.width): gain for gain in gains(task)}
    assert set(found) == {("bridge", 1), ("bridge", 4), ("blocks", 1), ("blocks", 4)}
    assert found["bridge", 4] == relative_gain(task, 4)
    assert found["blocks", 4].gain.value == pytest.approx(0.75)
    assert found["blocks", 4].relative.value == pytest.approx(4.5)
    assert found["blocks", 1].relative is None  # at width 1 all arms are made up alike
    rows = [row for row in gain_table(task, gains(task)).rows if row[1] == "4"]
    assert [(row[0], row[3]) for row in rows] == [("bridge", "pmatch"), ("blocks", "pmatch")]
    assert [row[6].split()[0] for row in rows] == ["2.250", "4.500"]


def test_votes_of_rows_that_do_not_hear_each_other_are_what_a_row_of_the_group_stands_against(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    found = vote_differences(task)
    assert [(row.second.arm, row.first.width) for row, _ in found] == [("rlvr", 4), ("pmatch", 4)]
    row, vote = found[0]
    assert (row.metric, row.second_metric, vote.metric) == ("pass@1", "maj", "maj")
    # pass@1 by seed .5, .75, .625; every vote was made up as .5
    assert row.over_seeds.value == pytest.approx(0.125)
    assert vote.over_seeds.value == 0
    assert row.over_both is None  # counts of right rows do not tell votes


@pytest.mark.parametrize(
    ("shuffled", "answers"),
    [
        (((1, 2), (2, 2), (1, 2)), ["yes", "yes"]),  # as good as P-Match
        (((2, 2), (3, 3), (3, 2)), ["yes", "no"]),  # as good as with own siblings
    ],
)
def test_the_bars_are_computed_from_the_results(study, tmp_path, shuffled, answers):
    write_made_up(study, tmp_path / "results", tmp_path, shuffled)
    found = verdicts(read_task(study, "tiny", tmp_path / "results"))
    assert [f"**{answer}**" in sentence for answer, sentence in zip(answers, found, strict=True)] == [True, True]


def test_there_is_no_benefit_to_lose_where_the_arm_is_not_ahead(study, tmp_path, monkeypatch):
    monkeypatch.setitem(RIGHT, "pmatch", RIGHT["bridge"])  # shuffled siblings are worse than own ones, as ever
    write_made_up(study, tmp_path / "results", tmp_path, shuffled=((1, 1), (2, 2), (1, 1)))
    gain, lost = verdicts(read_task(study, "tiny", tmp_path / "results"))
    assert "**no**" in gain
    assert "siblings lose the benefit: **there is none to lose**" in lost


def test_a_bar_on_shuffled_siblings_counts_the_seeds_that_have_them(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    path = result_path(tmp_path / "results", Cell("tiny", "bridge", 2, 1e-4))
    kept = [summary for summary in read_cell(path).summaries if summary.condition == "model"]
    write_cell(replace(read_cell(path), summaries=kept), path)
    without = load_study(write_study(tmp_path, controls=False))
    gain, lost = verdicts(read_task(without, "tiny", tmp_path / "results"))
    assert "Incomplete" not in gain
    assert lost.endswith("Incomplete: 2 of 3 seeds.")


def test_a_lead_that_is_not_away_from_zero_does_not_pass(study, tmp_path, monkeypatch):
    monkeypatch.setitem(RIGHT, "bridge", [[1, 1], [3, 3], [4, 3]])  # .0, .5, .625 over the base
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    assert relative_gain(task, 4).relative.value > 1.39
    assert "**no**" in verdicts(task)[0]


def test_a_sure_lead_that_is_smaller_than_the_papers_does_not_pass(study, tmp_path, monkeypatch):
    monkeypatch.setitem(RIGHT, "pmatch", [[3, 3], [3, 2], [2, 3]])  # .5, .375, .375 over the base
    monkeypatch.setitem(RIGHT, "bridge", [[4, 3], [3, 3], [3, 3]])  # .125 more, of every seed
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    assert relative_gain(task, 4).relative.value == pytest.approx(1.3)
    assert relative_gain(task, 4).difference.low > 0
    assert "**no**" in verdicts(task)[0]


@pytest.mark.parametrize(
    ("rlvr", "bridge", "answer"),
    [
        ([[1, 0], [1, 1], [1, 1]], [[2, 2], [3, 3], [3, 2]], "yes"),
        ([[1, 0], [1, 1], [1, 1]], [[1, 1], [3, 3], [4, 3]], "no"),  # a gain of .375 that is not away from 0
        ([[1, 0], [1, 0], [1, 0]], [[1, 1], [1, 1], [1, 1]], "no"),  # ahead of it, and without a gain all the same
    ],
)
def test_beside_an_arm_that_gains_nothing_the_difference_alone_decides(
    study, tmp_path, monkeypatch, rlvr, bridge, answer
):
    monkeypatch.setitem(RIGHT, "rlvr", rlvr)
    monkeypatch.setitem(RIGHT, "pmatch", [[0, 0], [0, 0], [0, 1]])
    monkeypatch.setitem(RIGHT, "bridge", bridge)
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    found = relative_gain(task, 4)
    assert (found.next_best, found.relative) == ("rlvr", None)
    assert found.next_gain.value < 0
    said = verdicts(task)[0]
    assert f"**{answer}**" in said
    assert "the next best arm gains nothing over the base" in said
    assert ("the paired difference alone decides" in said) == (found.gain.value > 0)
    write_study_report(study, tmp_path / "results", tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert "relative gain - (the next best arm gains nothing" in text
    assert "Fieller" not in text
    written = json.loads((tmp_path / "report" / "report.json").read_text())["tasks"]["tiny"]["gains"]
    assert [gain["relative"] for gain in written if gain["width"] == 4] == [None]


def test_an_incomplete_study_compares_the_seeds_that_both_arms_have_and_says_what_is_missing(study, tmp_path):
    left_out = [("pmatch", 1), ("base", 2)]
    write_made_up(study, tmp_path / "results", tmp_path, left_out=left_out)
    task = read_task(study, "tiny", tmp_path / "results")
    assert compare(task, Setting("bridge", 4), Setting("pmatch", 4)).seeds == [0, 2]
    of_one = compare(task, Setting("pmatch", 4), Setting("base", 4))
    assert (of_one.seeds, of_one.over_seeds.low, of_one.over_both) == ([0], None, None)
    assert relative_gain(task, 4).seeds == [0]
    assert all("Incomplete: 1 of 3 seeds" in sentence for sentence in verdicts(task))
    write_study_report(study, tmp_path / "results", tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert "10 of 12 cells are done" in text
    assert "these seeds are not there yet: base 2; pmatch 1" in text
    assert "other seeds than others" in text
    assert json.loads((tmp_path / "report" / "report.json").read_text())["tasks"]["tiny"]["missing"] == {
        "base": [2],
        "pmatch": [1],
    }


def test_a_bar_is_complete_without_other_arms_with_a_bridge_but_not_without_a_control(tmp_path, monkeypatch):
    arms = {**STUDY["arms"], "blocks": {**STUDY["arms"]["bridge"], "overrides": ["train=bridge"]}}
    study = load_study(write_study(tmp_path, arms=arms))
    monkeypatch.setitem(RIGHT, "blocks", [[4, 4], [4, 4], [4, 4]])
    without = [("blocks", seed) for seed in study.seeds]
    write_made_up(study, tmp_path / "results", tmp_path, left_out=without)
    assert not any("Incomplete" in sentence for sentence in verdicts(read_task(study, "tiny", tmp_path / "results")))
    for seed in study.seeds:
        result_path(tmp_path / "results", Cell("tiny", "rlvr", seed, 1e-4)).unlink()
    found = verdicts(read_task(study, "tiny", tmp_path / "results"))
    assert all(sentence.endswith("Incomplete: 3 of 3 seeds, none of rlvr.") for sentence in found)


def test_a_bar_counts_the_same_seeds_for_ratio_and_difference(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path, left_out=[("base", 2)])
    task = read_task(study, "tiny", tmp_path / "results")
    assert relative_gain(task, 4).seeds == [0, 1]
    # bridge - P-Match by seed: .125, .25, and the third, .25, without a base. Own - shuffled: .125, .25 (.25).
    assert compare(task, Setting("bridge", 4), Setting("pmatch", 4)).over_seeds.value == pytest.approx(5 / 24)
    both, lost = verdicts(task)
    assert "relative gain 2.000" in both
    assert "paired difference 0.188" in both
    assert "shuffled siblings at width 4: 0.188" in lost


def test_the_report_shows_every_number_it_writes(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    paths = write_study_report(study, tmp_path / "results", tmp_path / "report")
    assert [path.name for path in paths] == ["table.md", "report.json", "widths_tiny.png"]
    text = (tmp_path / "report" / "table.md").read_text()
    for part in (
        "| bridge | 1e-4 | 3 |",
        "relative gain 2.250",
        "abc",
        "a CPU",
        "0.3 hours",
        "minus each arm at width 4",
    ):
        assert part in text, part
    assert "other seeds than others" not in text
    assert paths[2].stat().st_size > 10_000
    again = write_study_report(study, tmp_path / "results", tmp_path / "again")
    assert [path.read_bytes() for path in paths[:2]] == [path.read_bytes() for path in again[:2]]


def test_a_study_without_results_has_a_report_that_says_so(study, tmp_path):
    write_study_report(study, tmp_path / "results", tmp_path / "report")
    text = (tmp_path / "report" / "table.md").read_text()
    assert "0 of 12 cells are done" in text
    assert "No cell is done yet" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"problems": "others"}, "other test problems than"), ({"base": "another"}, "other weights of the base than")],
)
def test_results_of_different_problems_or_bases_are_not_put_together(study, tmp_path, changes, sentence):
    results = tmp_path / "results"
    write_made_up(study, results, tmp_path)
    paths = [result_path(results, Cell("tiny", "bridge", seed, 1e-4)) for seed in (0, 1)]
    for path in paths:
        write_cell(replace(read_cell(path), base="the same"), path)
    read_task(study, "tiny", results)  # of the others it is not known
    write_cell(replace(read_cell(paths[1]), **changes), paths[1])
    with pytest.raises(UserError, match=sentence):
        read_task(study, "tiny", results)


CUT = "of rows were cut at the limit, so accuracy is that of short answers: raise --max-new-tokens"
UNMARKED = (
    "of right rows mark no answer, and majority votes and distinct answers leave them out: let the prompt ask for a "
    "mark, or the reward's `final_answer` find it."
)


def report_with(study, results: Path, arm: str, verdicts: dict[int, list[str]]) -> str:
    """Of made-up results, in which the evaluations of an arm end with these verdicts, by seed."""
    for seed, own in verdicts.items():
        path = result_path(results, Cell("tiny", arm, seed, 1e-4))
        write_cell(replace(read_cell(path), verdicts=own), path)
    return write_study_report(study, results, results.parent / "report")[0].read_text()


def test_what_evaluations_warn_of_stands_in_the_report_once_an_arm_and_kind(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    verdicts = {
        0: [f"Caution: 25% {CUT} (condition model, width 1).", "At width 4 siblings help."],
        2: [f"Caution: 96% {CUT} (condition shuffled, width 4)."],
    }
    text = report_with(study, tmp_path / "results", "bridge", verdicts)
    assert f"- **Caution**, bridge, 2 of 3 seeds: 25% to 96% {CUT}.\n" in text
    assert text.count("Caution") == 1
    written = json.loads((tmp_path / "report" / "report.json").read_text())["tasks"]["tiny"]["arms"]
    assert written["bridge"]["cautions"] == [f"2 of 3 seeds: 25% to 96% {CUT}."]
    assert written["rlvr"]["cautions"] == []


def test_the_figure_has_no_panel_of_votes_that_no_arm_has(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    assert len(widths_figure(task).axes) == 4
    silent = {
        arm: [replace(r, verdicts=[f"Caution: 60% {UNMARKED}"]) for r in own.values()]
        for arm, own in task.cells.items()
    }
    task = replace(task, cells={arm: dict(enumerate(own)) for arm, own in silent.items()})
    assert [axis.get_title() for axis in widths_figure(task).axes if "vote" in axis.get_title()] == []
    assert len(widths_figure(task).axes) == 3


@pytest.mark.parametrize(("share", "shown"), [(30, True), (60, False)])
def test_votes_that_leave_most_right_rows_out_are_not_shown(study, tmp_path, share, shown):
    write_made_up(study, tmp_path / "results", tmp_path)
    text = report_with(study, tmp_path / "results", "rlvr", {1: [f"Caution: {share}% {UNMARKED}"]})
    ending = "" if shown else " Its votes are left out."
    assert f"- **Caution**, rlvr, 1 of 3 seeds: {share}% {UNMARKED}{ending}\n" in text
    task = read_task(study, "tiny", tmp_path / "results")
    assert main_table(task).rows[1][-1].startswith(".500" if shown else "-")
    assert main_table(task).rows[2][-1].startswith(".500")
    assert [row.second.arm for row, _ in vote_differences(task)] == (["rlvr", "pmatch"] if shown else ["pmatch"])


def test_results_that_do_not_say_so_yet_show_by_single_rows_that_answers_are_not_marked(study, tmp_path):
    write_made_up(study, tmp_path / "results", tmp_path)
    path = result_path(tmp_path / "results", Cell("tiny", "pmatch", 0, 1e-4))
    result = read_cell(path)
    alone, *others = result.summaries
    assert (alone.width, alone.metrics["pass@1"].value) == (1, 0.5)
    few = replace(alone, metrics={**alone.metrics, "maj": Estimate(0.1)})
    write_cell(replace(result, summaries=[few, *others]), path)
    text = report_with(study, tmp_path / "results", "pmatch", {})
    assert f"- **Caution**, pmatch, 1 of 3 seeds: 80% {UNMARKED} Its votes are left out.\n" in text


def test_fiellers_interval_is_spoken_of_only_where_there_is_one(study, tmp_path, monkeypatch):
    monkeypatch.setitem(RIGHT, "pmatch", [[2, 2], [2, 2], [2, 1]])
    write_made_up(study, tmp_path / "results", tmp_path)
    task = read_task(study, "tiny", tmp_path / "results")
    assert "relative gain 1.800 [" in difference_table(task, []).note
    assert "with Fieller's interval (paired seeds: 3)" in difference_table(task, []).note
    one = replace(task, cells={arm: {0: own[0]} for arm, own in task.cells.items()})
    assert "relative gain 1.000 (paired seeds: 1)" in difference_table(one, []).note


# -- a cell -----------------------------------------------------------------------------------------------------------


def test_a_reward_that_was_edited_between_cells_is_spoken_of(study, tmp_path):
    results = tmp_path / "results"
    write_made_up(study, results, tmp_path)  # as those of before, which do not say by what they were judged
    cells = seed_cells(study, results)

    def report(judging: str, cell: Cell) -> str:
        path = result_path(results, cell)
        write_cell(replace(read_cell(path), judging=judging), path)
        return write_study_report(study, results, tmp_path / "report")[0].read_text()

    assert "Caution" not in report("first", cells[0])
    assert "- **Caution**: results of tiny were judged by 2 versions of the reward's file or of the verifier" in report(
        "other", cells[1]
    )


def test_a_model_of_another_recipe_is_not_evaluated(study, tmp_path):
    cell, directory = Cell("tiny", "bridge", 0, 1e-4), tmp_path / "tiny" / "bridge" / "seed_0"
    recipe = recipe_of(study, cell, tmp_path)
    save_recipe(recipe, directory)
    assert not is_trained(directory)
    (directory / "history.jsonl").write_text("")
    train_cell(recipe, directory)  # it is there: returns at once
    with pytest.raises(UserError, match=r"trained with another training\.learning_rate"):
        train_cell(recipe_of(study, replace(cell, learning_rate=2e-4), tmp_path), directory)


def test_a_training_that_was_cut_off_does_not_go_on_by_another_recipe(study, tmp_path, monkeypatch):
    cell, directory, trained = Cell("tiny", "bridge", 0, 1e-4), tmp_path / "tiny" / "bridge" / "seed_0", []
    recipe = recipe_of(study, cell, tmp_path)
    monkeypatch.setattr(cell_module, "train", trained.append)
    monkeypatch.setattr(cell_module, "warm_up", lambda recipe: None)
    save_recipe(recipe, directory)  # what a training writes before its first step
    with pytest.raises(UserError, match=r"trained with another training\.learning_rate"):
        train_cell(recipe_of(study, replace(cell, learning_rate=2e-4), tmp_path), directory)
    assert not trained
    assert not (directory / "starts.jsonl").exists()
    train_cell(recipe, directory)
    assert trained == [recipe]


def test_seconds_and_rewards_are_those_of_the_log(tmp_path):
    entries = [
        {"step": s, names.STEP_SECONDS: t, "reward": r} for s, t, r in ((10, 1, 0.1), (20, 2, 0.2), (25, 4, 0.3))
    ]
    lines = [*entries, {"step": 25, "train_runtime": 99.0}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_seconds(tmp_path) == {"warm_up": None, "training": 10 + 20 + 20, "step": 2.0}
    assert thinned(lines) == {"step": [10, 20, 25], "reward": [0.1, 0.2, 0.3]}
    many = thinned([{"step": step, "reward": float(step)} for step in range(1, 121)])
    assert many["step"] == list(range(3, 121, 3))
    assert many["reward"][:2] == [2.0, 5.0]


# -- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_what_is_running(study, tmp_path, monkeypatch, number):
    started = []
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup
        pytest.skip(f"{number.name} is ignored here")

    def start(plan, cell):
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(command, "start", start)
    plan = command.Plan(tmp_path / "study.yaml", study, tmp_path / "results", tmp_path / "runs", [])
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Stopped, match=number.name):
        command.run_cells(plan, seed_cells(study, plan.results), jobs=2)
    assert len(started) == 2
    assert all(process.returncode == -signal.SIGTERM for process in started)


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command.leaving():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def run_study(path: Path, *options: str) -> "subprocess.Popen[str]":
    arguments = ["study", str(path), "--runs", str(path.parent / "runs"), *options]
    return subprocess.Popen([sys.executable, "-m", "bridge_rl.cli", *arguments], stdout=subprocess.PIPE, text=True)


def kill_in_training(runner: "subprocess.Popen[str]", cell: str, directory: Path) -> None:
    """SIGKILL to the cell's process once it has a checkpoint and before it has its model."""
    while not (directory / "checkpoint-1").is_dir():
        assert runner.poll() is None, "the study ended before the kill"
        time.sleep(0.01)
    [process] = [p for p in psutil.Process(runner.pid).children() if cell in p.cmdline()]
    process.kill()
    assert not (directory / "history.jsonl").exists(), "the kill came too late: it would prove little"


def undisturbed(path: Path, cell: str) -> CellResult:
    """The result of a cell in a process of its own, as the runner starts it."""
    command = [sys.executable, "-m", "bridge_rl.study.cell", str(path), str(path.parent / "runs"), cell]
    threads = str(load_study(path).threads)
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}, check=True)
    task, arm, seed = cell.split("/")
    return read_cell(path.parent / "results" / task / arm / f"seed_{seed}.json")


@pytest.mark.slow
def test_a_study_with_a_killed_cell_goes_on_and_ends_with_the_same_results(tmp_path):
    options = ["--only", "tiny/base", "--only", "tiny/rlvr", "--only", "tiny/bridge", "--jobs", "2"]
    path = write_study(tmp_path / "killed", seeds=[0])
    runner = run_study(path, *options)
    kill_in_training(runner, "tiny/bridge/0", path.parent / "runs" / "tiny" / "bridge" / "seed_0")
    runner.communicate()
    assert runner.returncode == 1
    results = path.parent / "results" / "tiny"
    done = {str(file.relative_to(results)): file.stat().st_mtime_ns for file in sorted(results.glob("*/*.json"))}
    assert list(done) == ["base/seed_0.json", "rlvr/seed_0.json"]

    again = run_study(path, *options)
    theirs = undisturbed(write_study(tmp_path / "undisturbed", seeds=[0]), "tiny/bridge/0")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert said.count("begins:") == 1  # what was done is not done again
    assert {name: (results / name).stat().st_mtime_ns for name in done} == done
    assert "going on from" in (path.parent / "runs" / "tiny" / "bridge" / "seed_0" / "log.txt").read_text()
    assert "3 of 4 cells are done" in (path.parent / "report" / "table.md").read_text()

    ours = read_cell(results / "bridge" / "seed_0.json")
    assert (ours.summaries, ours.counts, ours.history) == (theirs.summaries, theirs.counts, theirs.history)
    assert len(ours.trained) == 2
    assert len(theirs.trained) == 1
    for width in (1, 4):
        right = np.array(ours.right(width))  # [groups, problems]
        assert right.mean() / width == pytest.approx(ours.find("pass@1", width).value)
