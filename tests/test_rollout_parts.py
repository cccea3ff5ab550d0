"""The parts of a rollout, each against something slower and obvious."""

import random
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_bridged

from bridge_rl.group import sibling_bias
from bridge_rl.rollout import budget
from bridge_rl.rollout.budget import bytes_per_token, free_memory, prompt_page_for
from bridge_rl.rollout.cache import MASKED, Part, attend_pages, join
from bridge_rl.rollout.packing import packed_weights
from bridge_rl.rollout.pages import Pages, PageTable
from bridge_rl.rollout.sampling import SamplingParams, draw_tokens, invert_cdf, stream_seed

LIKE = [torch.zeros(1, 2, 1, 4)] * 3  # three layers, two heads of size 4


def layers(columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2, columns, 4), torch.randn(2, columns, 4)) for _ in LIKE]


def contents(pages: Pages, owner: int, columns: int) -> list[tuple[torch.Tensor, ...]]:
    data = pages.data[:, :, pages.of[owner]]  # [layers, 2, pages, H, C, K]
    flat = data.transpose(2, 3).flatten(3, 4)[:, :, :, :columns]
    return [tuple(layer) for layer in flat]


def test_pages_keep_what_their_owners_wrote_while_others_come_and_go():
    torch.manual_seed(0)
    rng, pages, kept = random.Random(0), Pages(40, 4, LIKE), {}
    for owner in range(60):
        columns = rng.randrange(1, 14)
        while pages.missing(owner, columns) > pages.free:
            gone = rng.sample(sorted(kept), k=min(2, len(kept)))
            pages.release(gone)
            for number in gone:
                del kept[number]
        kept[owner] = layers(columns)
        pages.write(owner, kept[owner])
        assert pages.used == sum(-(-tensors[0][0].shape[1] // 4) for tensors in kept.values())
        for number, tensors in kept.items():
            for found, expected in zip(contents(pages, number, tensors[0][0].shape[1]), tensors, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(kept) < 20, "nobody has left: the test says little"


def test_attention_over_pages_is_attention_over_each_owners_columns():
    torch.manual_seed(0)
    pages, lengths = Pages(30, 4, LIKE), {7: 9, 3: 4, 12: 1}
    written = {owner: layers(length) for owner, length in lengths.items()}
    for owner, tensors in written.items():
        pages.write(owner, tensors)
    table = PageTable.of(pages, list(lengths), torch.device("cpu"))
    q = torch.randn(3, 2, 5, 4)
    limits = torch.tensor(list(lengths.values()))[table.owner][:, None]
    bias = torch.where(table.column < limits, 0.0, MASKED)[:, None, None, :]
    part = attend_pages(q, pages.data[1, :, : pages.used], bias, table)
    for slot, owner in enumerate(lengths):
        keys, values = written[owner][1]
        expected = torch.softmax(q[slot] @ keys.transpose(-1, -2), dim=-1) @ values
        torch.testing.assert_close(part.mixed[slot] / part.total[slot][..., None], expected, atol=1e-6, rtol=1e-5)


def test_two_parts_join_to_one_softmax():
    torch.manual_seed(0)
    scores, values = 5 * torch.randn(3, 2, 5, 8), torch.randn(3, 2, 8, 4)

    def part(columns: slice) -> Part:
        some = scores[..., columns]
        largest = some.amax(-1)
        weights = (some - largest[..., None]).exp()
        return Part(weights @ values[:, :, columns], largest, weights.sum(-1))

    expected = scores.softmax(-1) @ values
    torch.testing.assert_close(join(part(slice(0, 3)), part(slice(3, 8))), expected, atol=1e-6, rtol=1e-5)


def test_siblings_are_the_living_rows_of_a_group():
    bias = sibling_bias(torch.tensor([0, 1, 0, 0]), torch.tensor([True, True, True, False]))
    no = float("-inf")
    assert bias.tolist() == [[0, no, 0, no], [no, 0, no, no], [0, no, 0, no], [0, no, 0, 0]]


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_a_draw_is_where_the_running_sum_passes_its_share(size):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(64, size, generator=generator, dtype=torch.float64)
    weights[torch.rand(64, size, generator=generator) < 0.5] = 0
    weights[:, 0] += 1e-3
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    sums = weights.cumsum(-1)
    expected = [int((row > u * row[-1]).nonzero()[0]) for row, u in zip(sums, uniforms, strict=True)]
    assert invert_cdf(weights, uniforms).tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    logits = torch.full((300,), float("-inf"))
    logits[[3, 140, 255]] = torch.tensor([0.0, -30.0, -3.0])
    tokens, logprobs = draw_tokens(logits[None], torch.tensor([uniform]), SamplingParams(1))
    assert tokens.item() in (3, 140, 255)
    assert logprobs.item() == pytest.approx(logits.log_softmax(-1)[tokens].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.45}, {0}),
        ({"top_p": 0.55}, {0, 2}),
        ({"top_p": 0.85}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.6}, {0}),  # of the two that are left it has 0.625
    ],
)
def test_tokens_are_of_the_smallest_set_and_log_probs_of_the_full_distribution(options, drawn):
    probs = torch.tensor([0.5, 0.125, 0.3, 0.075])
    uniforms = (torch.arange(200) + 0.5) / 200
    tokens, logprobs = draw_tokens(probs.log().expand(200, 4), uniforms, SamplingParams(1, **options))
    assert set(tokens.tolist()) == drawn
    torch.testing.assert_close(logprobs, probs.log()[tokens], atol=1e-6, rtol=0)
    kept = probs[sorted(drawn)] / probs[sorted(drawn)].sum()
    shares = torch.bincount(tokens, minlength=4)[sorted(drawn)] / 200
    torch.testing.assert_close(shares, kept, atol=1 / 200, rtol=0)


def test_every_use_of_a_seed_has_a_stream_of_its_own():
    purposes = ("training", "warmup", "evaluation", "refill")
    seeds = {stream_seed(seed, purpose, n) for seed in range(3) for purpose in purposes for n in (0, 1, 2, 10**6)}
    assert len(seeds) == 3 * 4 * 4


@pytest.mark.parametrize(("lengths", "page"), [([128, 256], 128), ([60, 64], 64), ([96, 96, 64], 32), ([130], 8)])
def test_prompts_have_the_largest_pages_that_pad_them_little(lengths, page):
    assert prompt_page_for(lengths) == page


def test_the_default_cache_is_what_fits_into_this_ranks_share_of_the_free_memory(monkeypatch):
    model = make_bridged("llama")  # three layers, two key-value heads of size 8, keys and values of 4 bytes
    assert bytes_per_token(model) == 2 * 3 * 2 * 8 * 4
    assert bytes_per_token(model.to(torch.bfloat16)) == 2 * 3 * 2 * 8 * 2
    monkeypatch.setattr(budget.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_memory(torch.device("cpu")) == 500_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 125_000


def test_packed_weights_multiply_alike_and_are_gone_afterwards(monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8, bias=False)).requires_grad_(False)
    x = torch.randn(5, 1, 24)
    expected = model(x)
    with packed_weights(model):
        assert len([layer for layer in model if "forward" in vars(layer)]) == 2
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
    model[1].weight.mul_(2)
    torch.testing.assert_close(model(x), 2 * expected, atol=1e-6, rtol=1e-5)
    with packed_weights(model):  # of what the weights are now
        torch.testing.assert_close(model(x), 2 * expected, atol=1e-6, rtol=1e-5)


def test_weights_that_the_layout_would_pad_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 16), torch.nn.Linear(16, 128), torch.nn.Linear(128, 64))
    with packed_weights(model):
        assert ["forward" in vars(layer) for layer in model] == [False, False, True]


@pytest.mark.parametrize(("width", "packed"), [(1024, 0), (1025, 4)])
def test_weights_are_packed_all_or_none_by_what_they_take_together(width, packed, monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 4 * 8 * 1024)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, width) for _ in range(4)))
    with packed_weights(model):
        assert sum("forward" in vars(layer) for layer in model) == packed


def test_weights_that_do_not_fit_twice_stay_as_they_are(monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    monkeypatch.setattr("bridge_rl.rollout.packing.MEMORY_SHARE", 0.0)
    layer = torch.nn.Linear(24, 40)
    with packed_weights(layer):
        assert "forward" not in vars(layer)


def test_weights_stay_as_they_are_where_accelerate_casts_them(monkeypatch):
    """Its autocast begins within the model's forward: packed fp32 weights would meet bf16 there."""
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # one state a process, which other tests have set

    class BehindAProduct(torch.nn.Module):  # as an attention's output projection is
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(24, 40)

        def forward(self, x):
            return self.linear(x @ x.T @ x)

    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(BehindAProduct())
    with packed_weights(model):
        assert model(torch.randn(5, 24)).shape == (5, 40)


def test_a_failure_while_weights_are_packed_leaves_none_of_them_packed(monkeypatch):
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("bridge_rl.rollout.packing.LEAST_SIDE", 1)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
    number = count()

    def fail_at_the_second(*args):
        if next(number) == 1:
            raise MemoryError
        return partial(*args)

    monkeypatch.setattr("bridge_rl.rollout.packing.partial", fail_at_the_second)
    with pytest.raises(MemoryError), packed_weights(model):
        raise AssertionError("packed without the second layer")
    assert not any("forward" in vars(layer) for layer in model)
