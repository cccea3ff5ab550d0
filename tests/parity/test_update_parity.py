"""However an update is computed, its loss and every gradient are those of TRL's own padded forward pass."""

import pytest
import torch
from conftest import ALL_FAMILIES, make_bridged
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch.nn.functional import scaled_dot_product_attention
from trainers import PROMPTS, quiet_config, reward_of_tokens
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import bridge_rl as br
from bridge_rl import packed_forward
from bridge_rl.config import GuardsSection, ModelSection, UpdateSection
from bridge_rl.group import split_rows
from bridge_rl.models import load_tokenizer
from bridge_rl.trainer import BridgeGRPOTrainer

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ROWS, PROMPT, COMPLETION = 16, 10, 12
WINDOWS = {"gemma3_text": {"sliding_window": 5}, "phi3": {"sliding_window": 5}, "mistral": {"sliding_window": 5}}
COMPUTED = ("entropy", "kl", "clip_ratio", "cispo_clip_ratio", "vespo", "bridge", "rollout/recompute_kl")
PLAIN = UpdateSection(share_prompt=False, trim=False)
SHARED = UpdateSection()
PADDED_PARTS = UpdateSection(share_prompt=False, token_budget=8 * 18)
SHARED_PARTS = UpdateSection(token_budget=60)


def lengths_of(generator, count, longest):
    """Ragged, and long-tailed: most are short."""
    return [int(1 + (longest - 1) * torch.rand((), generator=generator) ** 2) for _ in range(count)]


def make_batch(width, rows=ROWS, seed=0, beta=0.0, on_policy=False):
    """What TRL hands to `_compute_loss`, in blocks: prompts of mixed lengths, two groups with the same one."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 50, (n,), generator=g) for n in lengths_of(g, rows // width, PROMPT)]
    prompts[-1] = prompts[0]
    prompt_ids, prompt_mask = torch.zeros(2, rows, PROMPT, dtype=torch.long)
    ids, mask = torch.zeros(2, rows, COMPLETION, dtype=torch.long)
    for row, length in enumerate(lengths_of(g, rows, COMPLETION)):
        prompt = prompts[row // width]
        prompt_ids[row, PROMPT - len(prompt) :], prompt_mask[row, PROMPT - len(prompt) :] = prompt, 1
        ids[row, :length], mask[row, :length] = torch.randint(3, 50, (length,), generator=g), 1
    tool_mask = mask.clone()
    tool_mask[1] = 0  # cut at the limit: seen by siblings, not counted
    logps = -3 + 0.3 * torch.randn(rows, COMPLETION, generator=g)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": torch.randn(rows, generator=g),
        "sampling_per_token_logps": logps * mask,
        "num_items_in_batch": tool_mask.sum(),
    }
    if not on_policy:
        batch["old_per_token_logps"] = (logps + 0.1 * torch.randn(logps.shape, generator=g)) * mask
    if beta:
        batch["ref_per_token_logps"] = (logps + 0.1 * torch.randn(logps.shape, generator=g)) * mask
    return {key: split_rows(x, width) if x.dim() else x for key, x in batch.items()}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection("package://bridge_rl/tiny/model"))


@pytest.fixture(scope="module")
def make_trainer(tokenizer, tmp_path_factory):
    def make(update=PLAIN, family="llama", width=4, train="bridge", lora=False, model_options=None, **options):
        model = make_bridged(family, **(model_options or {}))
        with torch.no_grad():  # of a size at which fp32 is as good as elsewhere
            for _, parameter in br.bridge_parameters(model):
                if parameter.dim() > 1:
                    parameter.mul_(0.3)
        defaults = {
            "per_device_train_batch_size": ROWS,
            "max_completion_length": COMPLETION,
            "max_steps": 2,
            "optim": "sgd",  # Adam would make steps of noise where a gradient is almost zero
            "temperature": 0.8,
        }
        torch.manual_seed(0)
        return BridgeGRPOTrainer(
            model,
            [reward_of_tokens],
            quiet_config(tmp_path_factory.mktemp("run"), **{**defaults, **options}),
            width=width,
            train=train,
            update=update,
            guards=GuardsSection(max_rollout_kl=None),  # the batches are made up
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", modules_to_save=["bridge"]) if lora else None,
        )

    return make


def loss_and_gradients(trainer, micro_batches):
    """Of one update with one or several micro-batches, by TRL's and transformers' own code."""
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    loss = 0.0
    for number, batch in enumerate(micro_batches):
        trainer._step, trainer._buffered_inputs = 1000 + number, [batch]  # long after the sampling
        loss += trainer.training_step(trainer.model, None, None).item()
    named = trainer.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    """Loss to 1e-6, and every gradient to 1e-5 of its own norm (or of the largest's, where it is nearly zero)."""
    loss, gradients = expected
    assert abs(found[0] - loss) <= 1e-6 * max(1.0, abs(loss))
    assert found[1].keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    assert largest > 1e-3
    for name, gradient in gradients.items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-2 * largest)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(autouse=True)
def buffered(monkeypatch):
    """Micro-batches are those of the test: nothing is sampled by the trainers that `loss_and_gradients` steps."""
    own = BridgeGRPOTrainer._prepare_inputs

    def prepare(trainer, generation_batch):
        return trainer._buffered_inputs[0] if generation_batch is None else own(trainer, generation_batch)

    monkeypatch.setattr(BridgeGRPOTrainer, "_prepare_inputs", prepare)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_has_the_loss_and_gradients_of_the_padded_pass(make_trainer, family, width):
    options = {"family": family, "width": width, "train": "full", "model_options": WINDOWS.get(family)}
    batch = make_batch(width, seed=width)
    updates = [SHARED] if family == "qwen3_moe" else [SHARED, SHARED_PARTS, PADDED_PARTS]
    expected = loss_and_gradients(make_trainer(PLAIN, **options), [batch])
    for update in updates:
        assert_same(loss_and_gradients(make_trainer(update, **options), [batch]), expected)


def test_a_window_is_attended_to_with_as_many_heads_of_keys_as_of_queries(make_trainer, monkeypatch):
    """Or CUDA would hold all scores at once: its fused kernels take no mask otherwise."""
    calls = []

    def attend(query, key, value, attn_mask, **kwargs):
        calls.append((type(attn_mask) is torch.Tensor, key.shape[1] == value.shape[1] == query.shape[1]))
        return scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)

    monkeypatch.setattr(packed_forward, "scaled_dot_product_attention", attend)
    trainer = make_trainer(SHARED, "gemma3_text", model_options=WINDOWS["gemma3_text"])
    loss_and_gradients(trainer, [make_batch(4)])
    assert set(calls) == {(True, True), (False, False)}  # with a window that is shorter, and without


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_of_trl_is_the_same(make_trainer, loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    batch = make_batch(4, beta=0.1)
    expected = loss_and_gradients(make_trainer(PLAIN, **options), [batch])
    for update in (SHARED, SHARED_PARTS, PADDED_PARTS):
        assert_same(loss_and_gradients(make_trainer(update, **options), [batch]), expected)


def metrics_of(trainer, batch):
    """What one micro-batch logs."""
    trainer._metrics["train"].clear()
    loss_and_gradients(trainer, [batch])
    return {name: values for name, values in trainer._metrics["train"].items() if name.startswith(COMPUTED)}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_metric_of_trl_is_that_of_the_whole(make_trainer, loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    batch = make_batch(4, beta=0.1)
    for update in (SHARED, SHARED_PARTS, PADDED_PARTS):
        expected = metrics_of(make_trainer(PLAIN, **options), batch)
        assert expected.keys() >= {"kl", "entropy"}
        found = metrics_of(make_trainer(update, **options), batch)
        assert found == {name: pytest.approx(values, rel=1e-4, nan_ok=True) for name, values in expected.items()}


def test_a_relative_bridge_has_the_loss_and_gradients_of_the_padded_pass(make_trainer, monkeypatch):
    """In which a prompt's rows attend to each other, and their gradients cancel to rounding: in fp64 to nothing."""
    options, batch = {"train": "full", "model_options": {"relative": True}}, make_batch(4)
    norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda own, x: norm(x, x.shape[-1:], own.weight, own.variance_epsilon))

    def of(update):
        trainer = make_trainer(update, **options)
        trainer.model.double()
        return loss_and_gradients(trainer, [batch])

    expected = of(PLAIN)
    for update in (SHARED, SHARED_PARTS, PADDED_PARTS):
        assert_same(of(update), expected, tolerance=1e-7)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("train", ["bridge", "lora", "full"])
def test_checkpointing_and_what_is_trained_make_no_difference(make_trainer, train, reentrant):
    checkpointing = {
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)},
    }
    batch = make_batch(4, on_policy=True)
    options = {"train": train, "lora": train == "lora"}
    expected = loss_and_gradients(make_trainer(PLAIN, **options), [batch])
    for update in (SHARED, SHARED_PARTS, PADDED_PARTS):
        assert_same(loss_and_gradients(make_trainer(update, **options, **checkpointing), [batch]), expected)


def test_the_load_balance_of_experts_counts_a_prompt_once_a_row(make_trainer):
    options = {"family": "qwen3_moe", "train": "full", "router_aux_loss_coef": 1.0}
    batch = make_batch(4)
    expected = loss_and_gradients(make_trainer(PLAIN, **options), [batch])
    assert_same(loss_and_gradients(make_trainer(SHARED, **options), [batch]), expected)
    with pytest.raises(ValueError, match="computed over a whole micro-batch"):
        make_trainer(SHARED_PARTS, **options)


@pytest.fixture(scope="module")
def trainers(make_trainer):
    """By loss and number of micro-batches, made once: plain, and with each way to compute an update."""
    kept = {}

    def get(loss_type, steps, update):
        key = (loss_type, steps)
        if key not in kept:
            kept[key] = make_trainer(
                PLAIN,
                loss_type=loss_type,
                gradient_accumulation_steps=steps,
                per_device_train_batch_size=ROWS // steps,
                num_generations=4,
            )
        kept[key].update = update
        return kept[key]

    return get


def split_batch(batch, order, steps):
    """Whole groups in another order, in `steps` micro-batches of equally many."""
    chunks = torch.tensor(order).chunk(steps)
    return [{key: x[chunk] if x.dim() else x for key, x in batch.items()} for chunk in chunks]


@settings(max_examples=40, deadline=None)
@given(
    loss_type=st.sampled_from(LOSSES),
    steps=st.sampled_from([1, 2, 4]),
    order=st.permutations(range(4)),
    share_prompt=st.booleans(),
    trim=st.booleans(),
    budget=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 1000),
)
def test_any_split_into_micro_batches_and_parts_adds_up(
    trainers, loss_type, steps, order, share_prompt, trim, budget, seed
):
    """The update of one whole padded micro-batch, in given order: dividing under accumulation is where others err."""
    batch = make_batch(4, seed=seed, on_policy=seed % 2 == 0)
    micro_batches = split_batch(batch, order, steps)
    # TRL's bnpo divides by the tokens of a micro-batch: another split is another loss, ours is to be the same.
    whole = (micro_batches, steps) if loss_type == "bnpo" else ([batch], 1)
    expected = loss_and_gradients(trainers(loss_type, whole[1], PLAIN), whole[0])
    update = UpdateSection(share_prompt, trim, budget)
    assert_same(loss_and_gradients(trainers(loss_type, steps, update), micro_batches), expected)


def test_parts_that_were_not_weighted_would_not_add_up(trainers, monkeypatch):
    """Negative control of the property test."""
    batch = make_batch(4)
    expected = loss_and_gradients(trainers("grpo", 1, PLAIN), [batch])
    monkeypatch.setattr("bridge_rl.trainer.share_of_loss", lambda *args: 1.0)
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(trainers("grpo", 1, SHARED_PARTS), [batch]), expected)


def test_a_prompt_that_attended_to_a_completion_would_be_found(trainers, monkeypatch):
    """Negative control of parity: one token of leak in the packed attention."""
    batch = make_batch(4)
    expected = loss_and_gradients(trainers("grpo", 1, PLAIN), [batch])
    from bridge_rl import packed_forward

    monkeypatch.setattr(packed_forward, "_causal", lambda packed, q, k, *args: torch.ones(q, k, dtype=torch.bool))
    with pytest.raises(AssertionError):
        assert_same(loss_and_gradients(trainers("grpo", 1, SHARED), [batch]), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "num_iterations": 2},
        {"beta": 0.1, "train": "lora", "lora": True, "gradient_checkpointing": True},
        {"steps_per_generation": 2, "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2},
        {"train": "full", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"width": 1, "train": "full", "loss_type": "grpo"},
    ],
    ids=str,
)
def test_a_run_takes_the_same_steps_and_logs_the_same(make_trainer, options):
    runs = []
    for update in (PLAIN, SHARED, SHARED_PARTS):
        trainer = make_trainer(update, **options)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((history, {name: p.detach() for name, p in trainer.model.named_parameters()}))
    for history, parameters in runs[1:]:
        for name, parameter in runs[0][1].items():
            torch.testing.assert_close(parameters[name], parameter, atol=1e-5, rtol=0, msg=name)
        for found, expected in zip(history, runs[0][0], strict=True):
            for key in expected:
                if key in ("loss", "grad_norm", "reward", "num_tokens") or key.startswith(COMPUTED):
                    assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


class Kept:
    """A tensor that a backward pass waits for, and how many bytes of them were alive at most."""

    alive = peak = 0

    def __init__(self, x):
        self.x, self.bytes = x, x.nbytes
        Kept.alive += self.bytes
        Kept.peak = max(Kept.peak, Kept.alive)

    def __del__(self):
        Kept.alive -= self.bytes


def peak_of_activations(trainer, batch):
    Kept.alive = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        loss_and_gradients(trainer, [batch])
    return Kept.peak


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_activations_of_one_part_are_held_at_once(make_trainer, share_prompt):
    batch = make_batch(4, rows=4)
    batch = {key: torch.cat([x] * 4) if x.dim() else x * 4 for key, x in batch.items()}  # four groups of equal size
    whole = peak_of_activations(make_trainer(UpdateSection(share_prompt)), batch)
    parts = peak_of_activations(make_trainer(UpdateSection(share_prompt, token_budget=1)), batch)
    assert parts < 0.4 * whole
