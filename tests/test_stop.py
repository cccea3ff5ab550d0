"""When a run leaves: signals, the clock, and the agreement of ranks."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import make_bridged
from datasets import Dataset
from trainers import PROMPTS, quiet_config, reward_of_tokens
from transformers import TrainerCallback, TrainerControl

from bridge_rl import stop as stop_module
from bridge_rl.cli import main
from bridge_rl.config import ModelSection, load_recipe
from bridge_rl.errors import Stopped, UserError
from bridge_rl.models import load_tokenizer
from bridge_rl.report.tracking import run_id
from bridge_rl.stop import GivenUp, Stop, parse_duration
from bridge_rl.trainer import BridgeGRPOTrainer


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("45m", 2700), ("1d", 86400), ("1d2h3m4s", 93784), ("90s", 90)]
)
def test_durations(text, seconds):
    assert parse_duration("save_before", text) == seconds


@pytest.mark.parametrize("text", ["", "3", "3:50", "50m3h", "1h1h", "-1h", "1.5h", "0s", "3 h", "soon", 230])
def test_other_durations_are_refused_in_one_sentence(text):
    with pytest.raises(UserError, match=r"save_before is .*: write a time with units, largest first, such as 3h50m"):
        load_recipe("recipes/tiny_arith.yaml", [f"save_before={text!r}"])


def test_a_signal_while_nothing_is_to_be_saved_asks_for_the_same_command_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bridge_rl.run.train", lambda recipe: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["train", "recipes/tiny_arith.yaml", f"output_dir={tmp_path}"])
    assert ended.value.code == 85
    assert "stopped by SIGTERM while nothing was to be saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def at(monkeypatch, stop: Stop, seconds: float) -> None:
    monkeypatch.setattr(stop_module.time, "time", lambda: stop.started + seconds)


def test_the_limit_leaves_room_for_an_update_and_twice_a_save(monkeypatch):
    stop = Stop(limit=1000)
    stop.saves, stop.longest_update = [30.0, 50.0], 100.0
    for seconds, asked in ((0, False), (799, False), (800, True)):  # 1000 - 100 - 2 x 50
        at(monkeypatch, stop, seconds)
        assert stop.asked() == asked
    at(monkeypatch, stop, 600)
    assert stop.asked(ahead=300)  # of a whole step
    assert not stop.asked(ahead=299)


def test_until_a_save_was_timed_a_slow_disk_is_assumed(monkeypatch):
    stop = Stop(limit=1000)
    stop.save_bytes = int(10e9)  # 50 s at 200 MB/s
    at(monkeypatch, stop, 899)
    assert not stop.asked()
    at(monkeypatch, stop, 900)
    assert stop.asked()


def make_trainer(stop, directory, evaluator=None, **options):
    return BridgeGRPOTrainer(
        make_bridged("llama"),
        [reward_of_tokens],
        quiet_config(directory, **{"max_steps": 2, **options}),
        width=4,
        stop=stop,
        evaluator=evaluator,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=load_tokenizer(ModelSection("package://bridge_rl/tiny/model")),
    )


class SignalInUpdate(TrainerCallback):
    def __init__(self, stop):
        self.stop = stop

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.stop.signal = "SIGTERM"


def test_a_stop_at_a_step_that_is_evaluated_saves_though_the_best_is_kept(tmp_path):
    stop = Stop()
    best = {"metric_for_best_model": "pass@1/w4", "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(stop, tmp_path, evaluator=lambda trainer: {"eval_pass@1/w4": 0.5}, **best)
    trainer.add_callback(SignalInUpdate(stop))
    with pytest.raises(Stopped, match="checkpoint-1 is whole"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "manifest.json").is_file()
    resumed = make_trainer(Stop(), tmp_path, evaluator=lambda trainer: {"eval_pass@1/w4": 0.5}, **best)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["step"] for entry in resumed.state.log_history if "eval_pass@1/w4" in entry] == [1, 2]


def test_an_evaluation_that_was_given_up_moves_the_schedule_when_it_is_made(tmp_path):
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5},
        "metric_for_best_model": "pass@1/w4",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    whole = make_trainer(Stop(), tmp_path / "whole", evaluator=lambda trainer: {"eval_pass@1/w4": 0.5}, **options)
    whole.train()

    def give_up(trainer):
        if trainer.state.global_step == 2:
            stop.stopping = "SIGTERM"
            raise GivenUp
        return {"eval_pass@1/w4": 0.5}

    stop = Stop()
    with pytest.raises(Stopped):
        make_trainer(stop, tmp_path, evaluator=give_up, **options).train()
    resumed = make_trainer(Stop(), tmp_path, evaluator=lambda trainer: {"eval_pass@1/w4": 0.5}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [trainer.optimizer.param_groups[0]["lr"] for trainer in (resumed, whole)]
    assert rates[0] == rates[1] == 0.5e-2
    assert resumed.state.best_metric == whole.state.best_metric == 0.5


@pytest.mark.parametrize(("rollout", "step"), [(1, 0), (2, 2), (4, 6)])
def test_a_rollout_that_was_given_up_changes_nothing_also_at_the_beginning_of_an_epoch(tmp_path, rollout, step):
    """Three generation batches an epoch serve two updates each; how they are shared out comes from the global RNG."""
    options = {"steps_per_generation": 2, "max_steps": 8}
    whole = make_trainer(Stop(), tmp_path / "whole", **options)
    whole.train()

    class SignalInRollout(Stop):
        rollouts = 0

        def give_up_if_asked(self):
            self.rollouts += 1
            self.signal = "SIGTERM" if self.rollouts == rollout else None
            super().give_up_if_asked()

    with pytest.raises(Stopped, match=f"checkpoint-{step} is whole"):
        make_trainer(SignalInRollout(), tmp_path / "stopped", **options).train()
    checkpoint = tmp_path / "stopped" / f"checkpoint-{step}"
    rollout = 1  # of the run that goes on, in another directory
    with pytest.raises(Stopped, match=f"checkpoint-{step} is whole"):
        make_trainer(SignalInRollout(), tmp_path / "again", **options).train(resume_from_checkpoint=str(checkpoint))
    resumed = make_trainer(Stop(), tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "again" / f"checkpoint-{step}"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_step_that_is_taken_back_takes_the_controller_of_the_entropy_back(tmp_path):
    trainer = make_trainer(Stop(), tmp_path, max_steps=1, use_adaptive_entropy=True, entropy_target=100.0)
    before = trainer.entropy_coef, trainer._last_world_entropy
    trainer.train()
    assert trainer.entropy_coef > before[0]
    trainer._resume.rewind()
    assert (trainer.entropy_coef, trainer._last_world_entropy) == before


def test_completions_without_a_reference_do_not_meet_a_beta(tmp_path):
    options = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(Stop(), tmp_path, **options).train()
    with pytest.raises(UserError, match=r"training.beta is 0.1, and the completions that wait"):
        make_trainer(Stop(), tmp_path, beta=0.1, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_save_is_reckoned_with_before_the_first(tmp_path):
    stop = Stop()
    trainer = make_trainer(stop, tmp_path)
    trainer.train()
    assert stop.saves == []
    blocks = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    assert stop.save_bytes >= 3 * blocks  # with Adam's two moments


def test_without_limit_and_signal_nothing_is_asked(monkeypatch):
    stop = Stop()
    at(monkeypatch, stop, 1e9)
    assert not stop.asked()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_the_handlers_go_back(sent):
    before = signal.getsignal(sent)
    stop = Stop()
    with stop.listening():
        os.kill(os.getpid(), sent)
        os.kill(os.getpid(), sent)  # a launcher's copy
        assert stop.asked()
        assert stop.signal == sent.name
    assert signal.getsignal(sent) == before


SECOND = """
import os, signal, time; from bridge_rl.stop import Stop
with Stop().listening():
    os.kill(os.getpid(), signal.SIGINT); print("first", flush=True); time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM); print("a SIGTERM", flush=True)
    os.kill(os.getpid(), signal.SIGINT); print("second", flush=True)
"""


def test_a_second_interrupt_leaves_at_once():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout.split("\n") == ["first", "a SIGTERM", ""]


def test_any_rank_stops_all(monkeypatch):
    """The sum over ranks decides: here another one was asked, and this one not."""
    stop = Stop()

    def reduce(flag, reduction):
        assert reduction == "sum"
        return flag + others

    monkeypatch.setattr(stop_module, "reduce", reduce)
    control = TrainerControl()
    others = 0
    stop.on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop) == (False, False)
    others = 1
    stop.on_step_end(None, None, control)
    assert (control.should_save, control.should_training_stop) == (True, True)


def test_a_run_that_goes_on_stays_the_same_wandb_run(tmp_path):
    first = run_id(tmp_path, resumed=False)
    assert run_id(tmp_path, resumed=True) == first
    assert run_id(tmp_path, resumed=False) != first
