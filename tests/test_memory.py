"""The memory of a plan is that which is used, as far as a CPU shows, and each of its terms follows what it should."""

from dataclasses import replace
from pathlib import Path

import pytest

from bridge_rl import memory as memory_plan
from bridge_rl.config import load_recipe
from bridge_rl.plan import make_plan

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks"
RECIPE_7B = ROOT / "recipes" / "r1_distill_7b.yaml"
# Small tiles of logits, so that the head does not hide the rest of an update.
SMALL = {
    "new_tokens": 24,
    "hidden": 128,
    "inner": 384,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 2000,
    "tile": 256,
}
SHAPES = {
    "bridge": {"prompt": 300, "width": 4, "rows": 8},
    "lora": {"train": "lora", "family": "qwen2", "checkpointing": True, "prompt": 150},
    "warm-up": {"warmup": True, "prompt": 120, "width": 8, "rows": 32},
    "full": {"train": "full", "tied": True, "vocabulary": 9000, "checkpointing": True, "accumulation": 2},
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import memory

    # All that a measurement sets for its own process.
    monkeypatch.setattr(memory.pages, "_zeros", memory.pages._zeros)
    monkeypatch.setattr(memory.trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", memory.TRL_TILE)
    monkeypatch.setattr(memory_plan, "VOCABULARY_CHUNK", memory.TRL_TILE)
    return memory


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_planned_is_within_15_percent_of_what_is_used(benchmark, name):
    shape = benchmark.Shape(name, **{**SMALL, **SHAPES[name]})
    measured = benchmark.measure(shape)
    result = benchmark.compare(shape, measured)
    assert {phase: result[phase]["ratio"] for phase in shape.phases} == {
        phase: pytest.approx(1, abs=0.15) for phase in shape.phases
    }
    if name == "bridge":  # negative control: a plan that did not know that prompts are shared
        unshared = replace(shape, update={"share_prompt": False})
        assert benchmark.compare(unshared, measured)["update"]["ratio"] > 1.5


def planned(*overrides):
    return make_plan(load_recipe(RECIPE_7B, overrides)).memory


def test_the_7b_recipe_fits_8_gpus_of_80_gb():
    gb = 1e9  # of the maker of the GPU; a tenth is left to the CUDA context and to what does not fit into gaps
    assert planned().peak < 0.9 * 80 * gb


def test_a_token_budget_bounds_the_activations_and_accumulates_gradients():
    wide = ["training.per_device_train_batch_size=16", "training.gradient_accumulation_steps=1", "data.eval=null"]
    whole, parts = planned(*wide).update, planned(*wide, "update.token_budget=40000").update
    assert whole.terms["activations"] == pytest.approx(4 * parts.terms["activations"], rel=0.01)


@pytest.mark.parametrize(
    ("override", "phase", "term"),
    [
        ("update.share_prompt=false", "update", "activations"),
        ("training.gradient_checkpointing=false", "update", "activations"),
        ("launch.zero_stage=2", "update", "weights"),
        ("launch.zero_stage=0", "update", "optimizer"),
        ("rollout.max_rows=48", "rollout", "cache"),
        ("evaluation.max_rows=48", "evaluation", "cache"),
    ],
)
def test_a_term_grows_with_what_it_depends_on(override, phase, term):
    before, after = (getattr(memory, phase).terms[term] for memory in (planned(), planned(override)))
    assert after > before


def warmup_planned(*overrides):
    memory = make_plan(load_recipe(RECIPE_7B, overrides)).warmup
    assert memory is not None
    return memory


def test_a_warmup_of_the_7b_recipe_fits_one_gpu_of_80_gb_and_is_planned_without_zero():
    memory = warmup_planned()
    assert memory.peak < 0.9 * 80 * 1e9
    assert memory.rollout.terms["weights"] > 7 * 2e9
    assert "gathered" not in memory.rollout.terms
    assert "optimizer" not in memory.rollout.terms
    assert memory.update.terms["optimizer"] < 0.1 * memory.update.terms["weights"] * 4  # of the blocks alone


@pytest.mark.parametrize("override", ["warmup.groups_per_step=2", "warmup.samples=16", "warmup.max_new_tokens=4096"])
def test_what_a_warmup_computes_at_once_is_in_its_plan(override):
    assert warmup_planned(override).update.terms["activations"] > 1.5 * warmup_planned().update.terms["activations"]


def test_a_token_budget_bounds_a_warmup_too():
    whole, parts = (warmup_planned("warmup.groups_per_step=8", *more) for more in ([], ["update.token_budget=1"]))
    assert whole.update.terms["activations"] == pytest.approx(8 * parts.update.terms["activations"], rel=0.2)


def test_a_frozen_base_has_no_gradients_no_optimizer_state_and_keeps_less():
    full, bridge = planned("launch.zero_stage=0").update, planned("launch.zero_stage=0", "train=bridge").update
    for term in ("weights", "gradients", "optimizer", "activations"):
        assert bridge.terms.get(term, 0) < full.terms[term], term


def test_what_is_offloaded_is_not_on_the_gpu():
    everything, no_state, nothing = (planned(f"launch.offload={x}").update.terms for x in ("none", "optimizer", "all"))
    assert everything["optimizer"] > no_state["optimizer"] == nothing["optimizer"] == 0
    assert no_state["weights"] > nothing["weights"] == 0


def test_full_training_with_a_penalty_holds_a_second_model():
    assert planned("training.beta=0.1").update.terms["reference"] == 2 * 7_615_616_512 / 8
    assert "reference" not in planned("training.beta=0.1", "train=lora").update.terms
