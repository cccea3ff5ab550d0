"""The rollout on a GPU: sampled log-probs against the full forward, and CUDA graphs against plain steps."""

import pytest
import torch
from conftest import ALL_FAMILIES, make_bridged

import bridge_rl as br
from bridge_rl.errors import UserError
from bridge_rl.rollout.graphs import why_not_recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]] * 3
PARAMS = br.SamplingParams(max_new_tokens=40, seed=3, eos_token_id=[2, 4, 5])


@pytest.fixture(autouse=True)
def exact_products():
    """Without TF32, so that the tolerance of the CPU tests holds."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_sampled_logprobs_match_the_full_forward(family, cuda_graphs):
    model = make_bridged(family).cuda()
    options = br.RolloutOptions(max_rows=17, cuda_graphs=cuda_graphs)
    if cuda_graphs and why_not_recorded(model, torch.cuda.get_device_capability()):
        with pytest.raises(UserError, match="cannot record a step of this model"):
            br.generate_groups(model, PROMPTS, 4, PARAMS, options=options)
        return
    groups = br.generate_groups(model, PROMPTS, 4, PARAMS, options=options)
    oracle = br.group_logprobs(model, PROMPTS, [group.tokens for group in groups])
    for group, expected in zip(groups, oracle, strict=True):
        for row, expected_row in zip(group.logprobs, expected, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_same_seed_gives_the_same_tokens_again(cuda_graphs):
    model = make_bridged("llama").to("cuda", torch.bfloat16)
    options = br.RolloutOptions(max_rows=17, cuda_graphs=cuda_graphs)
    first, second = (br.generate_groups(model, PROMPTS, 4, PARAMS, options=options) for _ in range(2))
    assert [group.tokens for group in first] == [group.tokens for group in second]


def test_graphs_draw_what_plain_steps_draw():
    model = make_bridged("llama").cuda()
    plain, graphs = (
        br.generate_groups(model, PROMPTS, 4, PARAMS, options=br.RolloutOptions(cuda_graphs=on)) for on in (False, True)
    )
    assert [group.tokens for group in plain] == [group.tokens for group in graphs]


def test_a_cache_beyond_the_devices_memory_is_cut_to_what_is_free():
    model = make_bridged("llama").cuda()
    params = br.SamplingParams(max_new_tokens=8, eos_token_id=[])
    taken = torch.empty(int(0.9 * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
    groups = br.generate_groups(model, PROMPTS, 4, params)
    assert all(len(row) == 8 for group in groups for row in group.tokens)
    del taken
