"""Groups in lockstep: sampling, and the full-sequence oracle it agrees with."""

from bridge_rl.rollout.engine import Rollout, generate_groups
from bridge_rl.rollout.reference import group_logprobs
from bridge_rl.rollout.request import Group, RolloutOptions
from bridge_rl.rollout.sampling import SamplingParams

__all__ = ["Group", "Rollout", "RolloutOptions", "SamplingParams", "generate_groups", "group_logprobs"]
