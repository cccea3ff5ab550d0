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
from bridge_rl.rollout.budget import bytes_per_token, free_memory, prompt_page_for, row_page_for
from bridge_rl.rollout.cache import PagedCache
from bridge_rl.rollout.layout import Layout
from bridge_rl.rollout.packing import packed_weights
from bridge_rl.rollout.pages import Pages
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


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float32, None), (torch.float32, 6), (torch.bfloat16, None), (torch.float16, 6)]
)
def test_attention_over_pages_is_attention_over_the_prompt_and_the_own_columns(dtype, window):
    torch.manual_seed(0)
    like = [x.to(dtype) for x in LIKE]
    prompts, rows = Pages(30, 4, like), Pages(30, 2, like)
    of_prompt = {5: layers(9), 2: layers(4)}
    running = [
        (7, 5, 5),
        (3, 5, 5),
        (9, 5, 5),
        (4, 2, 1),
    ]  # number, prompt, own columns: of the second group one is left
    own = {number: layers(columns) for number, _, columns in running}
    for owner, written in of_prompt.items():
        prompts.write(owner, written)
    for number, written in own.items():
        rows.write(number, written)
    cache = PagedCache(rows, prompts)
    lengths = {place: written[0][0].shape[1] for place, written in of_prompt.items()}
    running_rows = [SimpleNamespace(number=number, group=place, circle=place) for number, place, _ in running]
    layout = Layout.of(running_rows, lengths, rows, prompts, torch.device("cpu"))
    last = torch.tensor([columns - 1 for *_, columns in running])
    cache.begin_step(layout, last, torch.tensor([rows.of[number][-1] for number, *_ in running]))
    q = torch.randn(4, 2, 5, 4)
    attended = cache.attend(q, layer=1, scaling=0.5, window=window)
    for slot, (number, place, _) in enumerate(running):
        keys, values = (torch.cat(pair, dim=1) for pair in zip(of_prompt[place][1], own[number][1], strict=True))
        seen = slice(0 if window is None else max(0, keys.shape[1] - window), None)
        weights = torch.softmax(0.5 * q[slot] @ keys[:, seen].transpose(-1, -2), dim=-1)
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
        torch.testing.assert_close(attended[slot], weights @ values[:, seen], **tolerance)


def test_what_a_step_writes_is_where_its_rows_columns_are():
    torch.manual_seed(0)
    rows = Pages(9, 4, LIKE)
    kept = {number: layers(6) for number in (3, 8)}
    for number, written in kept.items():
        rows.write(number, written)
        rows.grow(number, 9)
    cache = PagedCache(rows, rows)
    columns = torch.tensor([6, 8])
    cache.begin_step(None, columns, torch.tensor([rows.of[3][1], rows.of[8][2]]))
    keys, values = torch.randn(2, 2, 1, 4), torch.randn(2, 1, 2, 4).transpose(1, 2)
    cache.update(keys, values, 1)
    for slot, (number, column) in enumerate(zip(kept, columns, strict=True)):
        for part, new in enumerate((keys, values)):
            before = [torch.zeros(2, 9, 4) for _ in LIKE]
            for layer, written in enumerate(kept[number]):
                before[layer][:, :6] = written[part]
            before[1][:, column] = new[slot, :, 0]
            found = [layer[part] for layer in contents(rows, number, 9)]
            torch.testing.assert_close(found, before, rtol=0, atol=0)


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


@pytest.mark.parametrize(
    ("limit", "page"), [(0, 8), (16, 8), (256, 8), (511, 8), (512, 16), (1024, 32), (2048, 64), (32768, 64)]
)
def test_rows_that_may_be_long_have_larger_pages(limit, page):
    assert row_page_for(limit) == page


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
