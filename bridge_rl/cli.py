"""`bridge-rl`: train | warmup | convert | eval | report | study | generate | serve | lm-eval | demo | doctor."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from bridge_rl.errors import STOPPED_CODE, Stopped, UserError, fault_of_disk


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:  # the rest is a command line of its own
        run_command(lambda: run_lm_eval(argv[1:]))
        return
    parser = argparse.ArgumentParser(prog="bridge-rl", description=__doc__)
    parser.add_argument("--version", action="version", version=f"bridge_rl {version('bridge_rl')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in (("train", "a whole run from a recipe"), ("warmup", "only its warm-up")):
        add_recipe_arguments(commands.add_parser(name, help=description))
    convert = commands.add_parser("convert", help="a checkpoint in shards as one that load_bridge reads")
    convert.add_argument("checkpoint", type=Path, help="checkpoint-N of a run under ZeRO")
    convert.add_argument("output", type=Path, help="a new directory")
    add_eval_arguments(commands.add_parser("eval", help="sample suites at several widths, with controls and reports"))
    model = "checkpoint with a Bridge, or any causal LM"
    generate = commands.add_parser("generate", help="one group of completions for a prompt")
    generate.add_argument("--model", required=True, help=model)
    generate.add_argument("--width", type=int, default=4, help="completions, which hear each other; default: 4")
    generate.add_argument("--max-new-tokens", type=int, help="of each completion; default: 256, or fewer")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: 1")
    generate.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    generate.add_argument("prompt", help="the user's turn of a chat, or plain text without a chat template")
    serve = commands.add_parser("serve", help="OpenAI-compatible server: n completions are one group")
    serve.add_argument("--model", required=True, help=model)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    serve.add_argument("--port", type=int, default=8000, help="0 is any that is free; default: 8000")
    serve.add_argument("--max-tokens", type=int, default=1024, help="limit of a request; default: 1024")
    serve.add_argument("--max-width", type=int, default=16, help="limit of a request's n; default: 16")
    demo = commands.add_parser("demo", help="warm-up, RLVR and evaluation of the embedded model")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    add_report_arguments(commands.add_parser("report", help="page, plots and tables of evaluations; W&B dashboards"))
    add_study_arguments(commands.add_parser("study", help="arms x seeds x tasks, each trained and evaluated; a report"))
    commands.add_parser("lm-eval", help="lm-evaluation-harness's own command line, with the model `bridge`")
    commands.add_parser("doctor", help="what is installed and what this machine can do")
    args, rest = parser.parse_known_args(argv)
    takes_overrides = "overrides" in args
    unknown = [extra for extra in rest if extra.startswith("-") or not takes_overrides]
    if unknown:
        cure = ": keys of the recipe are set by key=value, such as rollout.width=8" if takes_overrides else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{cure}")
    if rest:
        args.overrides += rest  # those after an option
    run_command(lambda: dispatch(args))


def dispatch(args: argparse.Namespace) -> None:
    if args.command in ("train", "warmup"):
        run_recipe(args)
    elif args.command == "convert":
        from bridge_rl.convert import convert

        convert(args.checkpoint, args.output)
    elif args.command == "eval":
        from bridge_rl.evaluation.command import evaluate

        evaluate(args)
    elif args.command == "generate":
        from bridge_rl.evaluation.command import generate

        generate(args)
    elif args.command == "report":
        from bridge_rl.report.command import report

        report(args)
    elif args.command == "study":
        from bridge_rl.study.command import study

        study(args)
    elif args.command == "serve":
        from bridge_rl.serve import serve

        serve(args)
    elif args.command == "demo":
        from bridge_rl.demo import demo

        demo(args.output)
    else:
        from bridge_rl.doctor import doctor

        doctor()


def run_lm_eval(arguments: Sequence[str]) -> None:
    from bridge_rl.harness import main as lm_eval

    lm_eval(list(arguments))


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML recipe")
    parser.add_argument("overrides", nargs="*", help="key=value, such as rollout.width=8")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop: no weights loaded")


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="checkpoint with a Bridge, or any causal LM")
    suites = "with commas between: math500, aime24, math (the paper's seven), rg:TASK, a file, ..."
    parser.add_argument("--suite", default="tiny", help=suites)
    parser.add_argument("--widths", default="1,2,4,8", help="default: 1,2,4,8")
    parser.add_argument("--samples", type=int, default=8, help="completions a problem at each width; default: 8")
    parser.add_argument("--controls", action="store_true", help="also width 1, Bridge disabled, shuffled siblings")
    parser.add_argument("--probes", action="store_true", help="also watch what the blocks do")
    parser.add_argument(
        "--probe-rows", type=int, default=64, help="wrong rows --probes gives other siblings; default: 64"
    )
    parser.add_argument("--aggregate", default=None, help="FILE:FUNCTION that makes one answer of a group")
    parser.add_argument("--problems", type=int, default=None, help="at most so many problems")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="default: the run's recipe, else the suite's")
    parser.add_argument("--lengths", default=None, help="limits judged besides, such as 512,1024; default: four")
    parser.add_argument("--temperature", type=float, default=None, help="default: the run's recipe, else 1")
    parser.add_argument("--top-p", type=float, default=None, help="default: the run's recipe, else 1")
    parser.add_argument("--reward", default=None, help="FILE:FUNCTION; default: the suite's; of a file the run's first")
    parser.add_argument("--max-rows", type=int, default=None, help="rows sampled at once; default: 64, or a group")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: 0")
    parser.add_argument(
        "--output", type=Path, default=None, help="default: MODEL/eval/SUITE; of a hub model runs/NAME/eval/SUITE"
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="what bridge-rl eval wrote; the first is compared with others",
    )
    parser.add_argument(
        "--run", type=Path, default=None, help="training run for the first one's curves; default: its model's"
    )
    parser.add_argument("--wandb", default=None, metavar="PROJECT", help="save a dashboard for this W&B project")
    parser.add_argument("--entity", default=None, help="whose W&B project; default: the key's")
    parser.add_argument("--dry-run", action="store_true", help="write the W&B dashboard to a file, send nothing")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="YAML study; results and report are written beside it")
    only = "of a study, one or several of TASK, TASK/ARM, TASK/ARM/SEED"
    parser.add_argument("--only", action="append", default=[], metavar="CELLS", help=only)
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side; default: 1")
    parser.add_argument("--runs", type=Path, default=None, help="where cells work; default: runs/NAME of its directory")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and the time left")
    parser.add_argument("--search-only", action="store_true", help="only choose the learning rates")
    parser.add_argument("--report", action="store_true", help="only write the report again")


def parse_numbers(flag: str, text: str, example: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4], sorted, each once. Raises UserError for anything else."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"{flag} is '{text}': write numbers with commas between, such as {example}.") from error
    if numbers[0] < 1:
        raise UserError(f"{flag} is '{text}': each must be at least 1, such as {example}.")
    return numbers


def run_recipe(args: argparse.Namespace) -> None:
    """Plan the recipe; then, unless `--dry-run`, its warm-up or the whole run."""
    from bridge_rl.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from bridge_rl.plan import check, describe, make_plan, print_resolved

    if args.dry_run:
        plan = make_plan(recipe, read_data=True)
        print_resolved(recipe, plan)
        if plan.conflicts:
            raise UserError(f"{args.recipe}: {len(plan.conflicts)} conflict(s), the first: {plan.conflicts[0]}")
        return
    plan = check(recipe)
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        print(describe(recipe, plan), flush=True)
    from bridge_rl.files import alone_in
    from bridge_rl.run import train, warm_up
    from bridge_rl.stop import raising_stopped

    if args.command == "warmup" and recipe.warmup is None:
        print("nothing to warm up: this recipe has no Bridge, or warmup is null", flush=True)
        return
    # Where no `Stop` listens, a model is being loaded, or a report written.
    leaving = raising_stopped([signal.SIGTERM], " while nothing was to be saved: the same command goes on")
    with leaving, alone_in(Path(recipe.output_dir)) if is_main else nullcontext():
        if args.command == "warmup":
            warm_up(recipe)
        else:
            train(recipe)


def run_command(command: Callable[[], None]) -> None:
    """Run `command`; turn a user's mistake into a sentence on stderr and exit code 2, an early end into its code."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func`, on which the trainer is built
    # At every start it asks for a kernel from the hub, which trains nothing (`models.keep_gradients`).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        command()
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        sys.exit(STOPPED_CODE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = fault_of_disk(error)
        if sentence is None:  # ours: with its traceback
            raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
