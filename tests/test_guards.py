"""A run that goes wrong is stopped before the update that would spoil it, and its batch can be looked at."""

import pytest
import torch
from conftest import make_bridged
from datasets import Dataset
from trainers import PROMPTS, quiet_config, reward_of_tokens
from transformers import Trainer

from bridge_rl.config import GuardsSection, ModelSection, UpdateSection, load_recipe
from bridge_rl.errors import UserError
from bridge_rl.guards import KL, NORM, poison
from bridge_rl.models import load_tokenizer
from bridge_rl.report import names
from bridge_rl.trainer import BridgeGRPOTrainer

WIDTH = 4
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))


class Broken(BridgeGRPOTrainer):
    """Breaks the `n`-th part whose loss is computed (from 0) as `breaks[n]` says."""

    def __init__(self, *args, breaks=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.breaks, self.parts = breaks or {}, 0
        self.states = []  # after each step

    def _loss_of_part(self, model, part, whole):
        how = self.breaks.get(self.parts)
        self.parts += 1
        if how == "logps":
            part = {**part, "sampling_per_token_logps": part["sampling_per_token_logps"] - 1.0}
        if isinstance(how, float):
            part = {**part, "advantages": part["advantages"] + how}
        return super()._loss_of_part(model, part, whole)

    def log(self, logs, *args):
        if "loss" in logs:
            moments = self.optimizer.state_dict()["state"]
            self.states.append(
                (
                    {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad},
                    [value.clone() for entry in moments.values() for value in entry.values()],
                    self.lr_scheduler.get_last_lr(),
                )
            )
        super().log(logs, *args)


def make_trainer(tokenizer, tmp_path, guards=None, cls=Broken, breaks=None, update=None, **options):
    more = {"breaks": breaks} if cls is Broken else {}
    return cls(
        make_bridged("llama"),
        [reward_of_tokens],
        quiet_config(tmp_path, **{"max_steps": 3, **options}),
        width=WIDTH,
        guards=guards,
        update=update,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        **more,
    )


def saved(tmp_path, step):
    return torch.load(tmp_path / "guards" / f"step_{step:06d}_rank_0.pt", weights_only=True)


def assert_same_state(ours, theirs):
    assert all(torch.equal(p, theirs[0][name]) for name, p in ours[0].items())
    assert len(ours[1]) == len(theirs[1]) > 0
    assert all(map(torch.equal, ours[1], theirs[1]))
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("how", [NAN, INF])
@pytest.mark.parametrize("part", [4, 5, 6, 7])
def test_a_loss_that_is_not_finite_voids_its_whole_update(tokenizer, tmp_path, part, how):
    """In any of two micro-batches, of two parts each: weights, moments and schedule stay."""
    trainer = make_trainer(
        tokenizer,
        tmp_path,
        breaks={part: how},
        update=UpdateSection(token_budget=45),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=8,
    )
    trainer.train()
    assert trainer.parts == 12
    assert trainer.state.global_step == 3
    assert_same_state(trainer.states[1], trainer.states[0])
    assert not torch.equal(trainer.states[2][1][1], trainer.states[1][1][1])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    logged = [entry[names.SKIPPED] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 1, 1]
    assert [len(list((tmp_path / "guards").iterdir())), saved(tmp_path, 2)["step"]] == [1, 2]


def test_without_the_guard_the_weights_are_lost(tokenizer, tmp_path):
    """Negative control."""
    trainer = make_trainer(tokenizer, tmp_path, GuardsSection(max_skipped=None), breaks={1: NAN}, max_steps=2)
    trainer.train()
    assert not all(p.isfinite().all() for p in trainer.model.parameters())
    assert not (tmp_path / "guards").exists()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_named_and_skipped(tokenizer, tmp_path, max_grad_norm):
    """The loss is finite, and so are all gradients but one parameter's. Clipped or not."""
    trainer = make_trainer(tokenizer, tmp_path, max_steps=2, max_grad_norm=max_grad_norm)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    seen = []

    def break_it(gradient):
        seen.append(gradient)
        return gradient * (NAN if len(seen) == 2 else 1.0)

    parameter.register_hook(break_it)
    trainer.train()
    assert_same_state(trainer.states[1], trainer.states[0])
    content = saved(tmp_path, 2)
    assert content["check"] == NORM
    assert content["parameters"] == [name]
    assert all(loss.isfinite() for loss in content["losses"])


def test_a_loss_whose_gradient_is_finite_is_skipped_too():
    for value, finite in ((2.0, True), (0.0, True), (INF, False), (NAN, False)):
        x = torch.tensor(3.0, requires_grad=True)
        loss = poison(x * 5.0 + (value - 15.0))
        loss.backward()
        assert bool(x.grad.isfinite()) is finite
        if finite:
            assert (loss.item(), x.grad.item()) == (value, 5.0)


def test_after_the_limit_the_run_stops_with_the_batch_and_the_last_good_state(tokenizer, tmp_path):
    trainer = make_trainer(
        tokenizer, tmp_path, GuardsSection(max_skipped=3), breaks=dict.fromkeys(range(1, 9), NAN), max_steps=9
    )
    with pytest.raises(UserError, match=r"not finite in 3 update\(s\) in a row .* is whole") as error:
        trainer.train()
    assert str(tmp_path / "guards" / "step_000004_rank_0.pt") in str(error.value)
    assert str(tmp_path / "checkpoint-3") in str(error.value)
    content = saved(tmp_path, 4)
    assert (content["check"], content["step"], content["rank"]) == (NORM, 4, 0)
    [batch] = content["batches"]
    for key in ("prompt_ids", "completion_ids", "completion_mask", "advantages", "rewards", "sampling_per_token_logps"):
        assert len(batch[key]) == 16
    assert len(content["parameters"]) == sum(p.requires_grad for p in trainer.model.parameters())
    assert content["losses"][0].isnan()

    whole = make_trainer(tokenizer, tmp_path / "whole", breaks={}, max_steps=9)
    whole.train()
    resumed = make_trainer(tokenizer, tmp_path, GuardsSection(max_skipped=3), breaks={0: NAN}, max_steps=9)
    with pytest.raises(UserError, match="in a row"):  # it had skipped two before
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    mended = make_trainer(tokenizer, tmp_path, max_steps=9)
    mended.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert mended.state.global_step == 9
    assert mended.state.log_history[-2][names.SKIPPED] == 2
    assert trainer.states[0][0].keys() == whole.states[0][0].keys()
    assert_same_state(trainer.states[-1], whole.states[0])  # as after the one step that was taken


def test_a_batch_that_the_full_disk_refuses_is_said_and_the_guard_goes_on(tokenizer, tmp_path, monkeypatch):
    save = torch.save

    def full(content, path, *args):
        if "guards" not in str(path):
            return save(content, path, *args)
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    trainer = make_trainer(tokenizer, tmp_path, GuardsSection(max_skipped=2), breaks={1: NAN, 2: NAN})
    with pytest.raises(UserError, match=r"step 3, could not be kept \(disk full\) \(\S+/checkpoint-2 is whole"):
        trainer.train()
    assert list((tmp_path / "guards").iterdir()) == []


def test_only_updates_in_a_row_count_and_old_batches_go(tokenizer, tmp_path):
    breaks = dict.fromkeys((0, 1, 3, 4, 6), NAN)
    trainer = make_trainer(tokenizer, tmp_path, GuardsSection(max_skipped=3), breaks=breaks, max_steps=8)
    trainer.train()
    assert trainer.state.log_history[-2][names.SKIPPED] == 5
    assert sorted(p.name for p in (tmp_path / "guards").iterdir()) == [
        f"step_00000{step}_rank_0.pt" for step in (4, 5, 7)
    ]


class AsInTheHost(BridgeGRPOTrainer):
    """Without a guard: every method that one has replaced is the host's."""

    _clip_grad_norm = Trainer._clip_grad_norm
    _get_grad_norm = Trainer._get_grad_norm


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 1e9])
def test_a_healthy_run_is_the_same_to_the_bit_with_and_without(tokenizer, tmp_path, max_grad_norm):
    runs = []
    for cls, guards in (
        (BridgeGRPOTrainer, GuardsSection()),
        (AsInTheHost, GuardsSection(max_skipped=None, max_rollout_kl=None)),
    ):
        runs.append(
            make_trainer(tokenizer, tmp_path, guards, cls, max_grad_norm=max_grad_norm, gradient_accumulation_steps=2)
        )
        runs[-1].train()
    expected = dict(runs[1].model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in runs[0].model.named_parameters())
    ours, theirs = ([entry["grad_norm"] for entry in run.state.log_history if "loss" in entry] for run in runs)
    assert ours == theirs


def test_a_rollout_that_is_not_what_is_trained_stops_before_the_update(tokenizer, tmp_path):
    """Log-probs off by one nat, in the second micro-batch of the second update."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "max_steps": 3}
    trainer = make_trainer(tokenizer, tmp_path, breaks={3: "logps"}, **options)
    with pytest.raises(UserError, match=r"a KL of 0.718 nats a token \(guards.max_rollout_kl is 0.01\)") as error:
        trainer.train()
    assert f"step 2 was not taken, its batch is in {tmp_path / 'guards' / 'step_000002_rank_0.pt'}" in str(error.value)
    content = saved(tmp_path, 2)
    assert content["check"] == KL
    assert content["value"] == pytest.approx(0.718, abs=1e-3)
    assert len(content["batches"]) == 2
    assert len(trainer.states) == 1

    resumed = make_trainer(tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    whole = make_trainer(tokenizer, tmp_path / "whole", **options)
    whole.train()
    assert_same_state(resumed.states[-1], whole.states[-1])


def test_an_update_in_the_middle_of_a_generation_batch_is_no_difference(tokenizer, tmp_path, monkeypatch):
    """Three micro-batches are sampled at once and two make an update: the second batch begins inside one."""
    monkeypatch.setattr(
        "test_guards.reward_of_tokens", lambda completion_ids, **_: [sum(x) % 2 for x in completion_ids]
    )
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 3}
    trainer = make_trainer(tokenizer, tmp_path, max_steps=5, **batch)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if names.RECOMPUTE_KL in entry]
    assert len(logged) >= 3
    assert max(entry[names.RECOMPUTE_KL] for entry in logged) < 1e-6
    assert max(entry["grad_norm"] for entry in logged) > 0


def test_without_a_threshold_any_rollout_is_trained(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path, GuardsSection(max_rollout_kl=None), breaks={0: "logps"}, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0][names.RECOMPUTE_KL] == pytest.approx(0.718, abs=1e-3)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("guards.max_skipped=0", "guards.max_skipped is 0: it must be at least 1"),
        ("guards.max_rollout_kl=0", "guards.max_rollout_kl is 0.0: it must be above 0, or null"),
        ("guards.max_skips=3", "did you mean 'max_skipped'"),
    ],
)
def test_bad_limits_are_refused_with_a_sentence(override, reason):
    with pytest.raises(UserError, match=reason):
        load_recipe("recipes/tiny_arith.yaml", [override])
