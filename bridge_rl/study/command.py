"""`bridge-rl study`: every cell that is not done yet, in a process of its own, then the report."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bridge_rl.config import Recipe
from bridge_rl.data import load_problems
from bridge_rl.errors import STOPPED_CODE, UserError
from bridge_rl.stop import raising_stopped
from bridge_rl.study.cells import (
    Cell,
    check_named,
    find_result,
    is_ready,
    is_trained,
    named_cells,
    rate_name,
    recipe_of,
    result_path,
    search_cells,
    seed_cells,
    source_of,
)
from bridge_rl.study.config import Study, load_study
from bridge_rl.study.report import write_study_report
from bridge_rl.study.results import read_cell

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Plan:
    """path: of the study. results: what is committed. runs: where cells work."""

    path: Path
    study: Study
    results: Path
    runs: Path
    only: Sequence[str]

    def search(self) -> list[Cell]:
        return named_cells(search_cells(self.study), self.only)

    def test(self) -> list[Cell]:
        return named_cells(seed_cells(self.study, self.results), self.only)

    def done(self, cell: Cell) -> bool:
        return is_ready(self.study, cell) and find_result(self.study, cell, self.results) is not None


def study(args: argparse.Namespace) -> None:
    """Search the learning rates, run the cells, write the report. Exits with 1 where cells failed."""
    runs = args.runs or Path("runs") / args.study.resolve().parent.name
    loaded = load_study(args.study)
    plan = Plan(args.study, loaded, args.study.parent / loaded.results, runs, args.only)
    if args.jobs < 1:
        raise UserError(f"--jobs is {args.jobs}: it must be at least 1.")
    check_names(plan)
    if args.dry_run:
        show(plan, args.jobs)
        return
    failed: list[Cell] = []
    if not args.report:
        check_problems(plan)
        failed += run_cells(plan, plan.search(), args.jobs)
        if not args.search_only:
            test = plan.test()  # now that learning rates are chosen
            failed += run_cells(plan, [cell for cell in test if is_ready(plan.study, cell)], args.jobs)
            for cell in test:
                if not is_ready(plan.study, cell):
                    print(f"left out, for want of a learning rate: {cell.place}", flush=True)
    for path in write_study_report(plan.study, plan.results, plan.path.parent / "report"):
        print(path)
    if failed:
        print(f"{len(failed)} cell(s) failed: {', '.join(cell.place for cell in failed)}", file=sys.stderr, flush=True)
        sys.exit(1)


def check_names(plan: Plan) -> None:
    """Raise UserError for a cell that there is not, a role that is not the recipe's, or widths without training's."""
    check_named(plan.study, plan.only)
    for cell in seed_cells(plan.study, plan.results):
        recipe = recipe_of(plan.study, cell, plan.runs)
        check_role(plan, cell, recipe)
        width = recipe.rollout.width
        if width not in plan.study.widths:
            raise UserError(f"{plan.path}: widths is {plan.study.widths}: {cell.task} is trained at {width}, add it.")


def check_role(plan: Plan, cell: Cell, recipe: Recipe) -> None:
    """Raise UserError where an arm of the role bridge has no Bridge, or a control has one."""
    role, listens = plan.study.arms[cell.arm].role, recipe.bridge is not None and recipe.bridge.kind == "bridge"
    place = f"{plan.path}: arms.{cell.arm}.role is {role}"
    if role == "bridge" and not listens:
        has = "bridge=null" if recipe.bridge is None else f"bridge.kind={recipe.bridge.kind}"
        raise UserError(f"{place}, and its recipe for {cell.task} has {has}: take that away, or make the role control.")
    if role == "control" and listens:
        raise UserError(
            f"{place}, and its recipe for {cell.task} has a Bridge: add bridge=null or bridge.kind=pmatch to its "
            "overrides, or make the role bridge."
        )


def check_problems(plan: Plan) -> None:
    """Raise UserError for problems that cannot be read, or are too few, before anything is trained for them."""
    left = [cell for cell in [*plan.search(), *plan.test()] if not plan.done(cell)]
    for cell in {(cell.task, cell.search): cell for cell in left}.values():
        source, width = source_of(plan.study, cell), max(plan.study.widths)
        key = f"{plan.path}: tasks.{cell.task}.{'validation' if cell.search else 'test'}"
        problems = load_problems(source, key, cell.seed)
        if len(problems) < width:
            raise UserError(f"{key} has {len(problems)} problems: it needs {width}, as many as the largest of widths.")


def run_cells(plan: Plan, cells: Sequence[Cell], jobs: int) -> list[Cell]:
    """Those that are not done, `jobs` at a time; returns those that failed. On a signal, ends what is running."""
    waiting = [cell for cell in cells if not plan.done(cell)]
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failed: list[Cell] = []
    with leaving():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[cell] = start(plan, cell)
                for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                    if not say_end(plan, cell, running.pop(cell).returncode, len(waiting) + len(running)):
                        failed.append(cell)
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGTERM)  # a training saves a checkpoint and leaves
            for process in running.values():
                process.wait()
    return failed


def leaving() -> AbstractContextManager[None]:
    """Inside, SIGTERM, SIGINT and SIGHUP (of a terminal that is closed) raise `Stopped`, unless they are ignored."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    return raising_stopped(numbers, ": the same command goes on where the cells were")


def start(plan: Plan, cell: Cell) -> "subprocess.Popen[bytes]":
    """In a session of its own, so that Ctrl-C reaches it once, through us."""
    log = log_path(plan, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bridge_rl.study.cell", str(plan.path), str(plan.runs)]
    command += [f"{cell.task}/{cell.arm}/{cell.seed}"]
    if cell.search:
        assert cell.learning_rate is not None
        command += ["--search", rate_name(cell.learning_rate)]
    print(f"begins: {cell.place} (log: {log})", flush=True)
    threads = str(plan.study.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with log.open("ab") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)


def say_end(plan: Plan, cell: Cell, code: int, left: int) -> bool:
    """Print how a cell ended; returns whether well."""
    if code != 0 or not result_path(plan.results, cell).is_file():
        why = "was stopped" if code == STOPPED_CODE else f"failed (exit code {code})"
        print(f"{cell.place} {why}; the log is {log_path(plan, cell)}", file=sys.stderr, flush=True)
        return False
    result = read_cell(result_path(plan.results, cell))
    value, minutes = result.metric("pass@1").value, result.seconds.total / 60
    print(f"done: {cell.place}, pass@1 {value:.3f} at width {result.trained_width}, {minutes:.1f} minutes; {left} left")
    return True


def log_path(plan: Plan, cell: Cell) -> Path:
    return plan.runs / cell.place / "log.txt"


# -- what is left -----------------------------------------------------------------------------------------------------


def show(plan: Plan, jobs: int) -> None:
    """Every cell, whether it is done, and how long the others will take if they take as long as those like them."""
    cells = [*plan.search(), *plan.test()]
    done = {cell: plan.done(cell) for cell in cells}
    seconds = {cell: read_cell(result_path(plan.results, cell)).seconds.total for cell in cells if done[cell]}
    left, unknown = 0.0, 0
    for cell in cells:
        expected = None if done[cell] else expected_seconds(cell, seconds)
        left += expected or 0.0
        unknown += not done[cell] and expected is None
        print(f"{state_of(plan, cell, done[cell]):8} {cell.place}" + rate_of(plan, cell))
    sentences = [f"{sum(done.values())} of {len(cells)} cells are done"]
    if left:
        sentences.append(f"about {left / jobs / 3600:.1f} hours are left with {jobs} at a time")
    if unknown:
        sentences.append(f"{unknown} open cells are of a kind that has not been timed")
    print("; ".join(sentences))


def state_of(plan: Plan, cell: Cell, done: bool) -> str:
    if done:
        return "done"
    return "trained" if is_trained(plan.runs / cell.place) else "open"


def rate_of(plan: Plan, cell: Cell) -> str:
    if cell.search or plan.study.arms[cell.arm].role == "base":
        return ""
    rate = cell.learning_rate
    return " (learning rate not chosen yet)" if rate is None else f" (learning rate {rate_name(rate)})"


def expected_seconds(cell: Cell, seconds: dict[Cell, float]) -> float | None:
    """The mean of the finished cells that are most like it: of the same arm, if possible of the same task, and of the
    search or not, as it is. None without one."""
    of_arm = {other: time for other, time in seconds.items() if other.arm == cell.arm}
    alike = {other: time for other, time in of_arm.items() if other.task == cell.task} or of_arm
    times = [time for other, time in alike.items() if other.search == cell.search] or list(alike.values())
    return sum(times) / len(times) if times else None
